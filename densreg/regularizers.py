"""The density penalty and its rivals, behind one interface: each is what ``coeff`` is multiplied with in the loss.

A regularizer is called as ``regularizer(classify, logits, xs, target)`` and gives one value for each sample, [B],
differentiable in the parameters. ``logits`` [B, C] come from ``xs``, a tuple of inputs [B, ...] that require grad.
``target`` is [B] int64 classes, or -100 for a sample without one, whose label logit or cross-entropy then counts as 0.
``classify`` runs the model once more: a tuple of inputs to logits, with the buffers (running statistics) left as they
are.

With F a forward of the model, a plain training step costs 3F, and the step with

    name            what is penalized, for each sample                            cost
    density         ||grad log sum exp f||_p                                      6F
    input_gradient  ||grad f_y||_p                                                6F
    loss_gradient   ||grad ce||_p                                                 6F
    score_matching  h + ||grad f_y||_2^2 / 2 + mu h^2, h ~ trace(Hess f_y)        12F
    ig_sum          ce(x') - ce(x) + beta ||IG(x, x')||_1, x' the worst near x    66F
    hessian         ||Hess f_y v||_2^2, of mean ||Hess f_y||_F^2                  15F
    cure            ||grad ce(x + h z) - grad ce(x)||_2^2, z along sign(grad ce)  12F

Gradients and Hessians are in x, f_y is the label's logit, ce the cross-entropy, and the cost that of the default
options. Each class says where it departs from its paper, and what is assumed. Where samples depend on each other
(BatchNorm in training mode) a gradient is that of the batch's sum, and every call of ``classify`` uses the statistics
of its own batch. Dropout draws new masks in every call, so the regularizers that take a difference of two forwards
refuse models with active dropout modules (they cannot see a call of F.dropout).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from densreg import _torch, attacks, functional, ops, paths
from densreg.penalty import density_penalty, score_norm
from densreg.second_order import third_order

Classify = Callable[[tuple[Tensor, ...]], Tensor]

IGNORED = -100


class Regularizer(Protocol):
    """What :class:`densreg.RegularizedObjective` takes as its ``regularizer``.

    It may also have any of the attributes and methods of :class:`Traits`; what it lacks is as there.
    """

    name: ClassVar[str]
    precise: ClassVar[bool]
    """Whether its forwards run in float32 under autocast: half precision would drown a small difference."""

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Any) -> Tensor: ...


class Traits:
    """What the objective and ``densreg train`` ask of a regularizer, with the answers of one that does not say."""

    needs_target: ClassVar[bool] = True
    """Whether it takes the classes of the samples."""

    first_order: ClassVar[bool] = False
    """Whether it is the norm of the input score, whose value and finite difference take first-order kernels alone."""

    unrolled: ClassVar[bool] = False
    """Whether its compiled graph repeats the model so often that compiling takes long."""

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError where the model, in its present mode, cannot be regularized so."""

    def check_value(self, penalty: Tensor) -> None:
        """Raises RuntimeError if the first step's penalty, a scalar, shows that there is nothing to train."""


def trait(regularizer: Any, name: str) -> Any:
    """An attribute or a method of :class:`Traits` as the regularizer, or its class, has it, or else the default."""
    return getattr(regularizer, name, getattr(_DEFAULTS, name))


_DEFAULTS = Traits()

# --------------------------------------------------------------------------------------------------------------------
# what they are made of


def _label_logit(logits: Tensor, target: Tensor) -> Tensor:
    """f_y, [B], in the accumulation dtype; 0 without a target."""
    functional.check_target(logits, target, 0.0, IGNORED)
    ignored = target == IGNORED
    f = logits.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return f.to(ops.accumulation_dtype(logits.dtype)).masked_fill(ignored, 0)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """[B], in the accumulation dtype; 0 without a target."""
    return functional.density_cross_entropy(logits, target, ignore_index=IGNORED)[0]


def _gradient(of: Tensor, xs: tuple[Tensor, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    """The gradient of the sum of [B] in the inputs, which can be differentiated again."""
    return paths.check_score(paths.vjp(of, xs, torch.full_like(of, scale), scale))


def _square(g: Sequence[Tensor]) -> Tensor:
    """||g_b||_2^2 over all inputs, [B], at least in float32."""
    return torch.stack([t.to(ops.accumulation_dtype(t.dtype)).flatten(1).square().sum(1) for t in g]).sum(0)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()


def _moved(xs: tuple[Tensor, ...], by: Sequence[Tensor], factor: float = 1.0) -> tuple[Tensor, ...]:
    return tuple(x + factor * v for x, v in zip(xs, by, strict=True))


def _check(regularizer: Any, **least: float) -> None:
    """Raise ValueError unless each of these options is finite and at least (for 0.0: above) its bound."""
    for name, bound in least.items():
        value = getattr(regularizer, name)
        if isinstance(bound, int):
            if isinstance(value, bool) or value != int(value) or value < bound:
                raise ValueError(f"{regularizer.name}: {name} must be a whole number of at least {bound}, got {value}")
        elif not bound < value < math.inf:
            raise ValueError(f"{regularizer.name}: {name} must be finite and above {bound:g}, got {value}")


def _check_no_dropout(model: nn.Module, regularizer: str) -> None:
    for name, module in model.named_modules():
        inside = isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
        rate = module.dropout if inside else getattr(module, "p", 0)
        drops = inside or _torch.is_dropout(module)
        if (drops or type(module).__name__ == "StochasticDepth") and module.training and rate > 0:
            raise ValueError(
                f"regularizer {regularizer}: {name} ({type(module).__name__}) drops other units in each of the two "
                "forwards whose difference is penalized, which would be that of the masks: set its probability to 0, "
                "or put it in eval mode"
            )


# --------------------------------------------------------------------------------------------------------------------
# the regularizers


@dataclass(frozen=True)
class Density(Traits):
    """``|| grad_x log sum_i exp f_i(x) ||_p``: :func:`densreg.density_penalty` (Yang et al., ECCV 2024)."""

    name: ClassVar[str] = "density"
    precise: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    first_order: ClassVar[bool] = True
    p: float = 2
    path: str = "fused"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__call__" in vars(cls) and "first_order" not in vars(cls):
            cls.first_order = False  # another penalty, which is more than the norm

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Any) -> Tensor:
        return density_penalty(logits, xs, self.p, self.path, "none")


@dataclass(frozen=True)
class InputGradient(Traits):
    """``|| grad_x f_y(x) ||_p``, the gradient of the label's logit.

    As gradient-norm regularization in Srinivas and Fleuret, *Rethinking the Role of Gradient-based Attribution Methods
    for Model Interpretability* (ICLR 2021). Departs: they take half the squared 2-norm; here it is the norm itself, of
    order p, so that it differs from the density penalty in what is differentiated and in nothing else.
    """

    name: ClassVar[str] = "input_gradient"
    precise: ClassVar[bool] = False
    p: float = 2

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        f = _label_logit(logits, target)
        return score_norm(_gradient(f, xs, paths.cotangent_scale(logits)), self.p, "none")


@dataclass(frozen=True)
class LossGradient(Traits):
    """``|| grad_x cross_entropy(f(x), y) ||_p``, double backpropagation.

    Drucker and LeCun, *Improving generalization performance using double backpropagation* (IEEE TNN 1992); Ross and
    Doshi-Velez, *Improving the adversarial robustness and interpretability of deep neural networks by regularizing
    their input gradients* (AAAI 2018). Departs: they take the squared 2-norm; here it is the norm itself, of order p.
    """

    name: ClassVar[str] = "loss_gradient"
    precise: ClassVar[bool] = False
    p: float = 2

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        ce = _cross_entropy(logits, target)
        return score_norm(_gradient(ce, xs, paths.cotangent_scale(logits)), self.p, "none")


@dataclass(frozen=True)
class ScoreMatching(Traits):
    """``h + 1/2 ||grad_x f_y||_2^2 + mu h^2``, with h an estimate of the trace of f_y's Hessian in x.

    Srinivas and Fleuret, *Rethinking the Role of Gradient-based Attribution Methods for Model Interpretability* (ICLR
    2021): the score-matching objective of the density exp f_y(x) / Z. Its trace is taken by Hutchinson's estimator and
    a Taylor expansion, ``h = 2 / sigma^2 E[f_y(x + v) - f_y(x)]`` for v ~ N(0, sigma^2 I), and the square of h keeps it
    from running to minus infinity.

    Departs: each v is used with -v, ``h = E[f_y(x + v) + f_y(x - v) - 2 f_y(x)] / sigma^2``. The expectation is the
    same, and the noise of the expansion's first term, about 2 ||grad f_y|| / sigma, is gone; ``antithetic=False`` is as
    published. sigma is the default of the authors' code, here in pixels; mu and samples are ours (there: 0 and 10). The
    value may be negative.

    Costs 6F, and 6F more for each sample of v (3F if not antithetic).

    Args:
        sigma: standard deviation of v, in pixels.
        samples: how many v are drawn for each image.
        mu: weight of h^2.
        antithetic: whether each v is used with -v.
    """

    name: ClassVar[str] = "score_matching"
    precise: ClassVar[bool] = True
    sigma: float = 0.01
    samples: int = 1
    mu: float = 1e-4
    antithetic: bool = True

    def __post_init__(self) -> None:
        _check(self, sigma=0.0, samples=1)
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"score_matching: mu must be finite and at least 0, got {self.mu}")

    def check_model(self, model: nn.Module) -> None:
        _check_no_dropout(model, self.name)

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        f = _label_logit(logits, target)
        h = torch.zeros_like(f)
        for _ in range(int(self.samples)):
            v = [self.sigma * torch.randn_like(x) for x in xs]
            above = _label_logit(classify(_moved(xs, v)), target) - f
            below = _label_logit(classify(_moved(xs, v, -1)), target) - f if self.antithetic else above
            h = h + (above + below) / (self.sigma**2 * self.samples)
        return h + 0.5 * _square(_gradient(f, xs, paths.cotangent_scale(logits))) + self.mu * h.square()


@dataclass(frozen=True)
class IGSum(Traits):
    """``ce(x') - ce(x) + beta || IG(x, x') ||_1``, x' the point of a ball around x where it is largest.

    IG-SUM-NORM of Chen et al., *Robust Attribution Regularization* (NeurIPS 2019): IG are the integrated gradients of
    the cross-entropy from x to x', whose sum is ce(x') - ce(x), so that with coeff 1 the whole loss is ce(x') + beta
    ||IG||_1. x' is found by projected gradient ascent on this sum, in the infinity norm, from a random start, and then
    held fixed. beta and eps are those of the authors' configuration for MNIST.

    Departs, for its cost: the path has 5 segments, by the midpoint rule, and one in the attack (50, and 10 in the
    attack, in the authors' configuration). The attack has 5 steps of size 2.5 eps / steps (40 of 0.01 there). The
    points of the path go through the model as one batch, which matters where samples depend on each other.

    Costs 6F + 6F segments + (2F + 4F attack_segments) steps: 66F. A compiled graph holds all steps: it is long.

    Args:
        beta: weight of ||IG||_1.
        eps: radius of the ball in the infinity norm, in pixels; x' is in [0, 1], as x must be.
        segments: of the path from x to x', in the penalty.
        attack_segments: of that path, in the attack.
        steps: of the attack.
    """

    name: ClassVar[str] = "ig_sum"
    precise: ClassVar[bool] = False
    unrolled: ClassVar[bool] = True
    beta: float = 0.1
    eps: float = 0.3
    segments: int = 5
    steps: int = 5
    attack_segments: int = 1

    def __post_init__(self) -> None:
        _check(self, beta=0.0, eps=0.0, segments=1, steps=1, attack_segments=1)

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        worst = self._worst(classify, xs, target)
        return self._objective(classify, xs, worst, target, int(self.segments)) - _cross_entropy(logits, target)

    def _objective(
        self, classify: Classify, xs: tuple[Tensor, ...], ends: tuple[Tensor, ...], target: Tensor, segments: int
    ) -> Tensor:
        """ce(end) + beta ||IG(x, end)||_1, [B]."""
        steps = tuple(end - x for x, end in zip(xs, ends, strict=True))
        points = tuple(
            torch.cat([x + (k + 0.5) / segments * step for k in range(segments)])
            for x, step in zip(xs, steps, strict=True)
        )
        along = _gradient(_cross_entropy(classify(points), target.repeat(segments)), points)
        norm: Any = 0
        for g, step in zip(along, steps, strict=True):
            mean = g.view(segments, len(step), *g.shape[1:]).mean(0)
            norm = norm + (mean * step).flatten(1).abs().sum(1)
        return _cross_entropy(classify(ends), target) + self.beta * norm

    def _worst(self, classify: Classify, xs: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, ...]:
        size = attacks.default_step_size(self.eps, self.steps)
        fixed = tuple(x.detach() for x in xs)

        def valid(points: Sequence[Tensor]) -> tuple[Tensor, ...]:
            near = (x + attacks.project(point - x, math.inf, self.eps) for x, point in zip(fixed, points, strict=True))
            return tuple(point.clamp(0, 1) for point in near)

        ends = valid([x + attacks.uniform_in_ball(x, math.inf, self.eps) for x in fixed])
        for _ in range(int(self.steps)):
            # Of xs, so that they require grad: no leaf can be made inside of a compiled graph.
            moving = tuple(end + 0 * x for x, end in zip(xs, ends, strict=True))
            value = self._objective(classify, xs, moving, target, int(self.attack_segments))
            uphill = torch.autograd.grad(value.sum(), moving)
            ends = valid([end + size * g.sign() for end, g in zip(ends, uphill, strict=True)])
        return tuple(end.detach() for end in ends)


@dataclass(frozen=True)
class Hessian(Traits):
    """``|| Hess_x f_y(x) v ||_2^2`` for v ~ N(0, I), whose mean is ``|| Hess_x f_y(x) ||_F^2``.

    Dombrowski et al., *Towards robust explanations for deep neural networks* (Pattern Recognition 2022), where the
    Hessian of the network is minimized. Assumed: that it is the Hessian of the label's logit, and one sample of v.

    The product is exact, by differentiating twice, and so the parameters' gradient is of third order. It runs the model
    once more, with LayerNorm, BatchNorm and InstanceNorm as their formulas (:class:`densreg.second_order.third_order`);
    ``check_model(model, x, order=3)`` checks the other layers. In a piecewise linear network (ReLU) the Hessian is 0
    wherever it exists: it needs SoftPlus, as in the paper. RegularizedObjective refuses a penalty that is exactly 0 at
    the first step; a direct call of the regularizer does not check this.

    Args:
        samples: how many v are drawn for each image.
    """

    name: ClassVar[str] = "hessian"
    precise: ClassVar[bool] = True
    samples: int = 1

    def __post_init__(self) -> None:
        _check(self, samples=1)

    def check_value(self, penalty: Tensor) -> None:
        if penalty == 0:
            raise RuntimeError(
                "regularizer hessian: the Hessian of the model is 0, as it is piecewise linear: replace its "
                "ReLU by SoftPlus (densreg train --softplus BETA)"
            )

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        with third_order():
            logits = classify(xs)
        g = _gradient(_label_logit(logits, target), xs)
        total = torch.zeros_like(logits[:, 0], dtype=ops.accumulation_dtype(logits.dtype))
        for _ in range(int(self.samples)):
            v = [torch.randn_like(x) for x in xs]
            product = torch.autograd.grad(_dot(g, v), xs, create_graph=True, allow_unused=True)
            present = [t for t in product if t is not None]
            total = total + (_square(present) / self.samples if present else 0)
        return total


@dataclass(frozen=True)
class Cure(Traits):
    """``|| grad_x ce(x + h z) - grad_x ce(x) ||_2^2`` with ``z = sign(grad_x ce(x)) / || sign(grad_x ce(x)) ||_2``.

    Moosavi-Dezfooli et al., *Robustness via curvature regularization, and vice versa* (CVPR 2019): a finite difference
    of the loss's Hessian along z, without its factor 1 / h^2, which is left to the coefficient. z is held fixed; both
    gradients are differentiated in the parameters. Departs: the model stays in the mode it is in (the authors' code
    penalizes in eval mode, and the norm itself, not its square); h does not rise over the first epochs, and its default
    is ours.

    Args:
        h: length of the step, in pixels (2-norm over the image).
    """

    name: ClassVar[str] = "cure"
    precise: ClassVar[bool] = True
    h: float = 1.5

    def __post_init__(self) -> None:
        _check(self, h=0.0)

    def check_model(self, model: nn.Module) -> None:
        _check_no_dropout(model, self.name)

    def __call__(self, classify: Classify, logits: Tensor, xs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        scale = paths.cotangent_scale(logits)
        at_x = _gradient(_cross_entropy(logits, target), xs, scale)
        sign = [g.detach().sign() for g in at_x]
        length = _square(sign).sqrt().clamp_min(1)  # of a zero gradient 0; otherwise at least 1
        z = [(s / ops.per_row(length, s)).to(x.dtype) for s, x in zip(sign, xs, strict=True)]
        moved = _moved(xs, z, self.h)
        at_moved = _gradient(_cross_entropy(classify(moved), target), moved, scale)
        return _square([a - b for a, b in zip(at_moved, at_x, strict=True)])


REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    cls.name: cls for cls in (Density, InputGradient, LossGradient, ScoreMatching, IGSum, Hessian, Cure)
}


def option_names(regularizer: Any) -> set[str]:
    """The options of a regularizer's class: p where it is a norm of that order, path where there are several."""
    return {field.name for field in fields(regularizer)} if is_dataclass(regularizer) else set()


def make(name: str, p: float = 2, path: str = "fused", **options: float) -> Regularizer:
    """A regularizer by name.

    Args:
        name: in the table above.
        p: order of the norm, for regularizers that have one; the others accept only the default.
        path: how the density penalty computes the score, see :mod:`densreg.paths`.
        options: options of the regularizer's class.

    Raises:
        TypeError, ValueError: what was given and what was expected.
    """
    if name not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {', '.join(REGULARIZERS)}; got {name!r}")
    p = functional.check_order(p)
    cls: Any = REGULARIZERS[name]
    known = option_names(cls)
    for option in options:
        if option not in known - {"p", "path"}:
            others = [field.name for field in fields(cls) if field.name not in ("p", "path")]
            raise ValueError(f"regularizer {name} has no option {option!r}: expected {', '.join(others) or 'none'}")
    if "path" not in known and path != "fused":
        raise ValueError(f"path is how the density penalty is computed; regularizer {name} has none, got {path!r}")
    if "p" not in known and p != 2:
        ordered = ", ".join(each for each in REGULARIZERS if "p" in option_names(REGULARIZERS[each]))
        raise ValueError(f"p is for {ordered}; regularizer {name} has its own norm, got p={p:g}")
    common = {option: value for option, value in (("p", p), ("path", path)) if option in known}
    return cls(**common, **options)
