"""What the tests compare with, and the inputs they share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from densreg import RegularizedObjective
from densreg.paths import PATHS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ORDERS = (1, 1.5, 2, math.inf)  # each with code of its own; every other order takes that of 1.5

HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
"""Half the distance from 1 to the next number: what rounding a result may cost."""


def paths_and_orders(orders: tuple[float, ...] = ORDERS) -> list[tuple[str, float]]:
    """Every path with p = 2, and the fused path with every other order: of any score the norm is the same function."""
    return [(path, 2) for path in PATHS] + [("fused", p) for p in orders if p != 2]


def full_rows() -> list[tuple[int, torch.dtype, int]]:
    """(length, dtype, offset) of rows that fill what a group of threads holds; offset 1 begins beside its vectors.

    Every pair of length and dtype, length and offset, dtype and offset: tile configurations follow the length in bytes.
    """
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    return [(2**n, dtype, (n + i) % 2) for n in range(6, 15) for i, dtype in enumerate(dtypes)]


def double(tensor: Tensor) -> Tensor:
    """A float64 copy that requires grad."""
    return tensor.detach().double().requires_grad_()


def softmax_reference(
    logits: Tensor, target: Tensor | None, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log density, cross-entropy and softmax by torch's own functions, in the dtype of the logits."""
    ce = None
    if target is not None:
        ce = F.cross_entropy(
            logits, target, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
        )
    return torch.logsumexp(logits, 1), ce, torch.softmax(logits, 1)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest expected magnitude; raises where one is not finite and the other is."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    return float((actual[finite] - expected[finite]).abs().max() / expected[finite].abs().max().clamp(min=1e-300))


# --------------------------------------------------------------------------------------------------------------------
# batched and nested differentiation


def input_gradient(h, x: Tensor) -> Tensor:
    """The gradient of h, summed, in x: with a graph, and on the graph of x where it has one."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(h(x).sum(), x, create_graph=True)[0]


def each_unit(t: Tensor) -> Tensor:
    return torch.eye(t.numel(), dtype=t.dtype).view(-1, *t.shape)


def _rows(h, x, batch):
    """The Jacobian of h at x by the vector-Jacobian products of a batch of cotangents."""
    x = x.clone().requires_grad_()
    y = h(x)

    def vjp(v: Tensor, **options) -> Tensor:
        return torch.autograd.grad(y, x, v, create_graph=True, **options)[0]

    return batch(vjp)(each_unit(y))


def _is_grads_batched(vjp):
    return lambda v: vjp(v, is_grads_batched=True)


def direction(x: Tensor) -> Tensor:
    """What directional derivatives are taken along."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)


def along(h, x):
    """The directional derivative of h, a function of x."""
    return lambda t: torch.func.jvp(h, (t,), (direction(x),))[1]


vmap, grad, jacrev, jacfwd = torch.func.vmap, torch.func.grad, torch.func.jacrev, torch.func.jacfwd
TRANSFORMS = {  # of a function h of x
    # the vmap of torch.autograd
    "Jacobian": lambda h, x: _rows(h, x, _is_grads_batched),
    "Hessian": lambda h, x: _rows(lambda t: input_gradient(h, t), x, _is_grads_batched),
    "functional.jacobian": lambda h, x: jacobian(h, x.clone().requires_grad_(), create_graph=True, vectorize=True),
    "functional.hessian": lambda h, x: hessian(
        lambda t: h(t).sum(), x.clone().requires_grad_(), create_graph=True, vectorize=True
    ),
    "of a vmap": lambda h, x: _rows(lambda t: vmap(h)(torch.stack([t, 2 * t])), x, _is_grads_batched),
    # that of torch.func
    "vmap": lambda h, x: _rows(h, x, vmap),
    "vmap, Hessian": lambda h, x: _rows(lambda t: input_gradient(h, t), x, vmap),
    "chunked": lambda h, x: _rows(h, x, lambda vjp: vmap(vjp, chunk_size=2)),
    "nested": lambda h, x: _rows(h, x, lambda vjp: lambda v: vmap(vmap(vjp))(torch.stack([v, 2 * v]))),
    "grad": lambda h, x: grad(lambda t: h(t).sum())(x),
    "jacrev": lambda h, x: jacrev(h, chunk_size=2)(x),
    "jacrev(jacrev)": lambda h, x: jacrev(jacrev(lambda t: h(t).sum()))(x),
    "hessian": lambda h, x: torch.func.hessian(lambda t: h(t).sum())(x),
    "vmap(grad)": lambda h, x: vmap(grad(lambda t: h(t).sum()))(torch.stack([x, 2 * x])),
    "grad(vmap)": lambda h, x: grad(lambda t: vmap(h)(torch.stack([t, 2 * t])).square().sum())(x),
    # forward mode, and forward mode over forward mode
    "functional.jacobian, forward": lambda h, x: jacobian(h, x, vectorize=True, strategy="forward-mode"),
    "jvp": lambda h, x: along(h, x)(x),
    "jvp(jvp)": lambda h, x: along(along(h, x), x)(x),
    "jvp(jvp(jvp))": lambda h, x: along(along(along(h, x), x), x)(x),
    "forward Laplacian": lambda h, x: jacfwd(jacfwd(lambda t: h(t).sum()))(x).view(x.numel(), -1).trace(),
    "jacfwd(jacfwd(grad))": lambda h, x: jacfwd(jacfwd(grad(lambda t: h(t).sum())))(x),
}


# --------------------------------------------------------------------------------------------------------------------
# models


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Sine(torch.autograd.Function):
    """Right to every order in eager, and not marked for torch.compile."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Once(Sine):
    """That can be differentiated once."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Sine.backward))


class Checkpointed(nn.Module):
    """A module that is computed again in the backward."""

    def __init__(self, body: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)


class Product(nn.Module):
    """Of two inputs."""

    def __init__(self, first: int = 4, second: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(first, 6), nn.Linear(second, 6), nn.Linear(6, 7)

    def forward(self, u, v):
        return self.head((self.a(u) * self.b(v)).tanh())


class Net(nn.Module):
    """Whatever a test needs of a body, and a linear head."""

    def __init__(self, body, width=6) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(4, 6), body, nn.Linear(width, 7)

    def forward(self, x):
        return self.head(self.body(self.first(x)))


def smooth_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Tanh(), nn.Linear(10, 7)).double()


class Subclass(Tensor):
    """As loaders and frameworks hand out."""


# --------------------------------------------------------------------------------------------------------------------
# training steps


def objective_of(model: nn.Module, compiler: str | None = None, coeff: float = 0.5, **options) -> RegularizedObjective:
    return RegularizedObjective(model, coeff, compile=compiler is not None, backend=compiler or "inductor", **options)


def next_part() -> Tensor:
    """The samples that the next step takes of five, with a fraction of 0.4."""
    torch.manual_seed(3)
    order = torch.randperm(5)
    torch.manual_seed(3)
    return order[3:]


def nothing(logits: Tensor, target: Tensor) -> Tensor:
    """A criterion without gradient, beside which the penalty stands alone."""
    return (logits.double() * 0).sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in model.parameters()]


def by_autograd(model, x, y, coeff, p=2.0, criterion=F.cross_entropy) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by torch alone; of several outputs the first are the logits."""
    x = x.detach().requires_grad_()
    logits = model(x)
    logits = logits if isinstance(logits, Tensor) else logits[0]
    (g,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), x, create_graph=True)
    loss = criterion(logits, y) + coeff * torch.linalg.vector_norm(g.flatten(1), p, dim=1).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return loss.detach(), list(grads)
