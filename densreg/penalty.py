"""The density penalty: the mean p-norm of the input score, to be added to a classifier's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from densreg import functional, ops, paths
from densreg.paths import Inputs, Score

REDUCTIONS = ("mean", "sum", "none")


def score_norm(score: Score, p: float, reduction: str) -> Tensor:
    """The p-norm of each sample's score, of several inputs' that of the joint score: [B], or reduced to a scalar."""
    if not isinstance(score, Tensor):
        dtypes = [ops.accumulation_dtype(g.dtype) for g in score]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        score = score[0] if len(score) == 1 else torch.cat([g.flatten(1).to(wide) for g in score], 1)
    norm = functional.pnorm(score, p)
    return norm.mean() if reduction == "mean" else norm.sum() if reduction == "sum" else norm


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def check_coeff(coeff: float | Tensor) -> None:
    """Raises TypeError or ValueError unless the weight of the penalty is a number of at least 0, or a scalar tensor."""
    if isinstance(coeff, Tensor):
        if coeff.ndim:
            raise ValueError(f"coeff must be a number or a tensor of shape [], got shape {list(coeff.shape)}")
    elif not isinstance(coeff, (int, float)):
        raise TypeError(f"coeff must be a number or a tensor, got {type(coeff).__name__}")
    elif not coeff >= 0:
        raise ValueError(f"coeff must be at least 0, got {coeff}")


def mean_over_targets(cross_entropy: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Scalar mean of [B] over the targets [B] that count, as in torch: NaN where there are none."""
    return cross_entropy.sum() / (target != ignore_index).sum()


def mean_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Scalar mean cross-entropy of logits [B, C] over the targets [B] that count, in the accumulation dtype."""
    return mean_over_targets(functional.density_cross_entropy(logits, target)[0], target)


def density_penalty(logits: Tensor, x: Inputs, p: float = 2, path: str = "fused", reduction: str = "mean") -> Tensor:
    """``R = mean_b || grad_{x_b} logsumexp f(x_b) ||_p``, the density penalty (Yang et al., ECCV 2024).

    Differentiable in the parameters, by a double backward. Inside torch.compile, an ``autograd.Function`` of your own
    in the model must be marked ``torch.compiler.allow_in_graph``: torch silently loses its second derivative there.

        x.requires_grad_()
        logits = model(x)
        loss = F.cross_entropy(logits, y) + 0.1 * densreg.density_penalty(logits, x, p=2)
        loss.backward()  # x.grad is filled too: ignore it

    At a score g of exactly 0 the norm has no derivative. The gradient is then 0, as in torch: the sample is not
    penalized. So a network whose head is initialized to zero (torchvision's ViT) has penalty 0, with gradient 0, until
    the cross-entropy has moved the head. Near 0 the gradient does not become small with g: for p = 2 it is that of
    ``u . g`` with ``u = g / ||g||_2`` held fixed. Where the classes' gradients cancel in g, rounding errors remain: in
    float32 the penalty and its gradient have a relative error of about ``6e-8 max_i ||grad f_i|| / ||g||``.

    Args:
        logits: [B, C], computed from x; fp16, bf16, fp32 or fp64.
        x: the model's input [B, ...], with ``requires_grad``, or a sequence of inputs whose joint norm is taken.
        p: order of the norm (not squared), 1 <= p <= inf.
        path: a name in the table of :mod:`densreg.paths`.
        reduction: "mean" or "sum" over the batch, or "none".

    Returns:
        A scalar, or [B] for "none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: what was given and what was expected.
        RuntimeError: gradients are disabled, or something between x and the logits cannot be differentiated twice. A
            backward in Python that detaches a part of what it uses, as a saved tensor, is found by
            :func:`densreg.check_model` only.
    """
    _check_reduction(reduction)
    p = functional.check_order(p)
    return score_norm(paths.input_score(logits, x, path), p, reduction)


def density_loss(
    logits: Tensor,
    target: Tensor,
    x: Inputs,
    coeff: float | Tensor,
    p: float = 2,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """``cross_entropy(f, y) + coeff * R``: the penalized loss, from one read of the logits.

    Args:
        logits: [B, C], computed from x; fp16, bf16, fp32 or fp64.
        target: [B] int64 classes in [0, C), or ``ignore_index``: such a sample has a penalty and no cross-entropy.
        x: as in :func:`density_penalty`.
        coeff: weight of the penalty, >= 0; a tensor of shape [] can change without recompiling a compiled step.
        p: order of the norm, 1 <= p <= inf.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        ``(loss, cross_entropy, penalty)``, scalars; float32 (float64 for float64).

    Raises:
        ValueError: a negative or NaN ``coeff`` (a tensor's value is not read: that would synchronise with the device).
        TypeError, ValueError, RuntimeError: as :func:`density_penalty`.
    """
    check_coeff(coeff)
    p = functional.check_order(p)
    xs = paths.check_inputs(logits, x)
    functional.check_target(logits, target, label_smoothing, ignore_index)
    scale = paths.cotangent_scale(logits)
    _, ce, softmax = functional.softmax(logits, target, label_smoothing, ignore_index, scale=scale)
    cross_entropy = mean_over_targets(ce, target, ignore_index)
    penalty = score_norm(paths.check_score(paths.vjp(logits, xs, softmax, scale)), p, "mean")
    return cross_entropy + coeff * penalty, cross_entropy, penalty


class DensityPenalty(torch.nn.Module):
    """:func:`density_penalty` as a module: ``penalty(logits, x)``.

    Args:
        p: order of the norm, 1 <= p <= inf.
        path: a name in the table of :mod:`densreg.paths`.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: what was given and what was expected.
    """

    def __init__(self, p: float = 2, path: str = "fused", reduction: str = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        self.p = functional.check_order(p)
        self.path = paths.check_path(path)
        self.reduction = reduction

    def forward(self, logits: Tensor, x: Inputs) -> Tensor:
        return density_penalty(logits, x, self.p, self.path, self.reduction)

    def extra_repr(self) -> str:
        return f"p={self.p}, path={self.path!r}, reduction={self.reduction!r}"
