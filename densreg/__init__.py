"""densreg: smoothing a classifier's input marginal density, right to second order."""

from densreg.functional import density_cross_entropy, log_density, log_softmax_difference, pnorm
from densreg.ops import backend
from densreg.paths import input_score
from densreg.penalty import DensityPenalty, density_loss, density_penalty
from densreg.version import __version__

__all__ = [
    "DensityPenalty",
    "__version__",
    "backend",
    "density_cross_entropy",
    "density_loss",
    "density_penalty",
    "input_score",
    "log_density",
    "log_softmax_difference",
    "pnorm",
]
