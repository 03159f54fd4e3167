"""Is the penalty's gradient in the parameters right? Every route, eager and compiled, against float64.

    python -m benchmarks second-order [--backend inductor] [--json FILE]

Beside the paths, the log density differentiated by its caller: log_density, density_cross_entropy and
log_softmax_difference, with torch.autograd.grad for the score and densreg.pnorm for its norm.

The penalty stands alone: beside a cross-entropy nobody notices that its gradient is gone. The network has a
convolution, BatchNorm in training mode (the samples see each other), a smooth and a piecewise linear activation. The
reference is eager autograd through torch.logsumexp and torch.linalg.vector_norm in float64; the error is relative, in
the Euclidean norm over all parameters. In float32, torch's own error with that same expression stands beside ours.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import densreg
from densreg import _torch
from densreg.paths import PATHS

from .records import tables, write_json
from .timing import environment

ORDERS = (1, 1.5, 2, 4, math.inf)
CLASSES = 7

Penalty = Callable[[Tensor, Tensor], Tensor]
"""(logits, x) -> scalar."""


def problem(dtype: torch.dtype, seed: int = 0, classes: int = CLASSES) -> tuple[nn.Module, Tensor]:
    """The network, and a batch that requires grad: the same numbers in every dtype."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, classes),
    )
    x = torch.randn(5, 3, 8, 8)
    return model.to(dtype), x.to(dtype).requires_grad_()


def torch_penalty(p: float) -> Penalty:
    """Torch's own expression of the penalty."""

    def penalty(logits: Tensor, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), x, create_graph=True)
        return torch.linalg.vector_norm(g.flatten(1), p, dim=1).mean()

    return penalty


def _classes(logits: Tensor) -> Tensor:
    return torch.arange(len(logits), device=logits.device) % logits.shape[1]


LOG_DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_density": densreg.log_density,
    "density_cross_entropy": lambda logits: densreg.density_cross_entropy(logits, _classes(logits))[1],
    "log_softmax_difference": lambda logits: densreg.log_softmax_difference(logits, _classes(logits)),
}


def densreg_penalty(p: float, route: str) -> Penalty:
    """By a path, or from one of the LOG_DENSITIES."""
    if route not in LOG_DENSITIES:
        return lambda logits, x: densreg.density_penalty(logits, x, p, route)

    def penalty(logits: Tensor, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(LOG_DENSITIES[route](logits).sum(), x, create_graph=True)
        return densreg.pnorm(g, p).mean()

    return penalty


def parameter_gradient(model: nn.Module, x: Tensor, penalty: Penalty, backend: str | None = None) -> list[Tensor]:
    """Gradient of the penalty alone in every parameter.

    Args:
        backend: None for eager; else that of torch.compile, around the whole of it, as one graph.
    """
    parameters = list(model.parameters())

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        value = penalty(model(x), x)
        return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)

    if backend is None:
        return list(gradient(x))
    torch.compiler.reset()
    before = _torch.compiled_graphs()
    with _torch.tracing_autograd():
        grads = torch.compile(gradient, backend=backend, fullgraph=True, dynamic=False)(x)
    graphs = _torch.compiled_graphs() - before
    if graphs != 1:
        raise RuntimeError(f"expected one compiled graph, got {graphs}")
    return list(grads)


def relative_error(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """``||grads - reference|| / ||reference||`` over all tensors together; NaN where the reference is zero."""
    difference = sum((g.double() - r.double()).square().sum() for g, r in zip(grads, reference, strict=True))
    return math.sqrt(float(difference)) / math.sqrt(
        float(sum(r.double().square().sum() for r in reference)) or math.nan
    )


def reference(p: float, classes: int = CLASSES) -> list[Tensor]:
    return parameter_gradient(*problem(torch.float64, classes=classes), torch_penalty(p))


def measure(route: str, p: float, dtype: torch.dtype, backend: str | None, classes: int = CLASSES) -> float:
    """Relative error of one route's gradient."""
    grads = parameter_gradient(*problem(dtype, classes=classes), densreg_penalty(p, route), backend)
    return relative_error(grads, reference(p, classes))


SHARED = {"json": None}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--orders", type=float, nargs="+", default=ORDERS, metavar="P", help="of the norm")


def run(options: argparse.Namespace) -> int:
    rows = []
    for p in options.orders:
        wide = reference(p)
        for dtype in (torch.float64, torch.float32):
            for backend in (None, options.backend):
                columns = {route: {"error": measure(route, p, dtype, backend)} for route in (*PATHS, *LOG_DENSITIES)}
                if backend is None:
                    own = parameter_gradient(*problem(dtype), torch_penalty(p))
                    columns["torch"] = {"error": relative_error(own, wide)}
                case = {"p": p, "dtype": str(dtype).removeprefix("torch."), "mode": backend or "eager"}
                rows.append({"suite": "second-order", "case": case, "columns": columns})
    write_json(options.json, rows, environment())
    print("\n".join(tables(rows)))
    return 0
