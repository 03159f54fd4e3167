"""densreg: smoothing a classifier's input marginal density, right to second order."""

from densreg import distributed as distributed
from densreg.check import check_model
from densreg.functional import density_cross_entropy, log_density, log_softmax_difference, pnorm
from densreg.linear import linear_density_cross_entropy, linear_density_loss, linear_log_density
from densreg.objective import RegularizedObjective
from densreg.ops import backend
from densreg.paths import input_score
from densreg.penalty import DensityPenalty, density_loss, density_penalty
from densreg.results import HeadOutput, ObjectiveOutput
from densreg.second_order import fast_second_order
from densreg.version import __version__

__all__ = [
    "DensityPenalty",
    "HeadOutput",
    "ObjectiveOutput",
    "RegularizedObjective",
    "__version__",
    "backend",
    "check_model",
    "density_cross_entropy",
    "density_loss",
    "density_penalty",
    "fast_second_order",
    "input_score",
    "linear_density_cross_entropy",
    "linear_density_loss",
    "linear_log_density",
    "log_density",
    "log_softmax_difference",
    "pnorm",
]
