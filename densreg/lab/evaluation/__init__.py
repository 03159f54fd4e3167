"""What a trained classifier is worth: the paper's measurements, of one run or of several side by side.

A metric is a function ``name(model, split, *, device, batch_size, seed=0, ...options) -> dict[str, float]`` in a module
of this package. Its entry in :data:`METRICS` (registry.py) is all that the rest of the package and the paper's
experiments know of it. The model takes pixels in [0, 1] and is in eval mode. What is random in a metric follows from
the seed and the number of the image: the size of the batches changes nothing but rounding.
"""

from densreg.lab.evaluation.compare import evaluate, load_runs, names_of
from densreg.lab.evaluation.registry import (
    METRICS,
    Metric,
    describe,
    measure,
    metric,
    options_of,
    parse_options,
    require,
    with_data,
)
from densreg.lab.evaluation.results import RESULTS, TABLE, Results, markdown, rows_of

__all__ = [
    "METRICS",
    "RESULTS",
    "TABLE",
    "Metric",
    "Results",
    "describe",
    "evaluate",
    "load_runs",
    "markdown",
    "measure",
    "metric",
    "names_of",
    "options_of",
    "parse_options",
    "require",
    "rows_of",
    "with_data",
]
