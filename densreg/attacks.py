"""Perturbations within a ball that raise a classifier's loss: projected gradient ascent, and FGSM as one step of it.

Used in adversarial training, and to measure robustness (:mod:`densreg.lab.evaluation.attacks`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from densreg.ops import accumulation_dtype, per_row

NORMS = (2.0, math.inf)


def check_norm(norm: float) -> float:
    """The norm of a ball that is known here, as a float.

    Raises:
        ValueError: neither 2 nor inf.
    """
    if norm not in NORMS:
        raise ValueError(f"the norm of an attack must be 2 or inf, got {norm}")
    return float(norm)


def default_step_size(eps: float, steps: int) -> float:
    """``2.5 eps / steps`` (Madry et al., ICLR 2018): from any point of the ball its surface can be reached."""
    return 2.5 * eps / steps


def _direction(gradient: Tensor, norm: float) -> Tensor:
    """The direction in which a step of length 1 in ``norm`` raises the loss most; 0 where the gradient is.

    NaN where that is NaN, which would otherwise look like a classifier that no step can break.
    """
    if norm == math.inf:
        return torch.where(gradient.isnan(), gradient, gradient.sign())
    # A confident classifier's gradient is so small that its squares are 0: scaled by the largest entry first.
    largest = per_row(gradient.abs().flatten(1).amax(1), gradient)
    gradient = torch.where(largest == 0, 0.0, gradient / largest)
    length = per_row(gradient.flatten(1).norm(dim=1), gradient)
    return torch.where(length == 0, 0.0, gradient / length)


def project(delta: Tensor, norm: float, eps: float) -> Tensor:
    """The nearest point of the ball with radius eps around 0, for each sample of [B, ...]."""
    if norm == math.inf:
        return delta.clamp(-eps, eps)
    length = per_row(delta.flatten(1).norm(dim=1), delta)
    return torch.where(length > eps, delta * (eps / length), delta)


def uniform_in_ball(x: Tensor, norm: float, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """A point of the ball with radius eps around 0 for each sample of x [B, ...], all points alike."""
    if norm == math.inf:
        return eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 1)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    radius = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) ** (len(x) / max(x.numel(), 1))
    length = direction.flatten(1).norm(dim=1)
    return eps * direction * per_row(radius / length, x)


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """``log((1 - P_y) / P_y)`` [B] of the classes y; the cross-entropy is its softplus, in all digits and gradients.

    Computed from the softmax it would be lost: 1 - P_y is 0 in float32 once y leads by 17.

    Args:
        logits: [B, C], any floating dtype.
        y: [B] int64.

    Returns:
        [B], float32 (float64 for float64 logits); 0 where there is only one class.
    """
    if logits.shape[1] == 1:
        return logits[:, 0] * 0  # nothing is against the only class
    f, at = logits.to(accumulation_dtype(logits.dtype)), y.unsqueeze(1)
    return f.scatter(1, at, -math.inf).logsumexp(1) - f.gather(1, at).squeeze(1)


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float,
    eps: float,
    steps: int,
    step_size: float,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    unit: Tensor | float = 1.0,
    start: Tensor | None = None,
) -> Tensor:
    """Images near x on which the cross-entropy is higher (Madry et al., ICLR 2018); the last iterate.

    The ascent is on :func:`log_odds`. For each sample its gradient has the direction of the cross-entropy's gradient,
    which however is 0 in float32 where the classifier is very confident, and would make it look robust.

    Each step goes ``step_size`` along the sign (inf) or the direction (2) of the gradient, then back into the ball,
    then back into [0, 1]. FGSM (Goodfellow et al., ICLR 2015) is one step of size eps without a random start. The model
    stays in the mode it is in, and no gradient is left in its parameters.

    Args:
        model: takes pixels in [0, 1] and gives logits [B, C].
        x: [B, ...], pixels in [0, 1]; y: [B] int64.
        norm: 2 or inf.
        eps: radius of the ball, >= 0.
        steps: number of gradient steps, >= 1.
        step_size: in the unit of eps, >= 0; see :func:`default_step_size`.
        random_start: begin at a random point of the ball, instead of at x.
        generator: draws the random start, on x's device; None: torch's global one.
        unit: of eps and step_size in pixels, to be broadcast with x: for a ball in normalised space, the standard
            deviation of each channel, [channels, 1, 1].
        start: begin at x + unit * start, [B, ...], instead of at a random point.

    Returns:
        [B, ...] without graph, in the ball (up to rounding) and in [0, 1]; NaN in an image where the model's gradient
        was not finite, which there is no attack along.

    Raises:
        ValueError: an impossible norm, radius, step or number of steps.
    """
    check_norm(norm)
    for name, value, least in (("eps", eps, 0), ("step_size", step_size, 0), ("steps", steps, 1)):
        if not least <= value < math.inf:
            raise ValueError(f"{name} of an attack must be finite and at least {least}, got {value}")
    x = x.detach()

    def valid(delta: Tensor) -> Tensor:
        # x is in [0, 1] itself, so that going back into the range goes nearer to x: never out of the ball.
        return ((x + unit * project(delta, norm, eps)).clamp(0, 1) - x) / unit

    if start is None:
        start = uniform_in_ball(x, norm, eps, generator) if random_start else torch.zeros_like(x)
    delta = valid(start)
    for _ in range(steps):
        with torch.enable_grad():
            delta.requires_grad_()
            # The sum, so that a sample's gradient does not depend on how many there are.
            (gradient,) = torch.autograd.grad(log_odds(model(x + unit * delta), y).sum(), delta)
        delta = valid(delta.detach() + step_size * _direction(gradient, norm))
    return (x + unit * delta).clamp(0, 1)
