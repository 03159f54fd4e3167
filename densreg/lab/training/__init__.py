"""Training a classifier: the problem and its step (problem.py), the loop, the state that is saved, what is reported."""

from densreg.lab.config import Config, check_known
from densreg.lab.runs import RunError, TrainingError
from densreg.lab.training.distributed import threads
from densreg.lab.training.loop import fit
from densreg.lab.training.problem import Problem, StepOutput, coefficient, evaluate, learning_rate, train_step

__all__ = [
    "Config",
    "Problem",
    "RunError",
    "StepOutput",
    "TrainingError",
    "check_known",
    "coefficient",
    "evaluate",
    "fit",
    "learning_rate",
    "threads",
    "train_step",
]
