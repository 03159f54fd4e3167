"""What a training step costs: plain, penalized by the paper's paths as the paper ran them, and by the objective.

    python -m benchmarks steps [--models resnet18 ...] [--threads 2] [--json FILE]

Each column is forward, loss and the parameters' gradients (no optimizer) on the same batch:

    plain           cross-entropy, the model's forward and loss compiled
    naive ... taylor  cross_entropy + coeff * penalty by that path, in eager, loss.backward()
    taylor compiled the same in one compiled graph with its gradients, the layers torch's own
    objective       densreg.RegularizedObjective; with the penalty of a quarter of the batch; and by a finite difference
    without ...     on request: the objective without one of densreg.graph_passes

Times are medians of interleaved rounds, ratios medians over the rounds. Before anything is timed every penalized
column's gradients are compared with torch's own in float64; one that is off is reported and not timed. Memory is what
a step allocates at its peak, the gradients included. With F for one forward a plain step is 3F and a penalized one 6F,
so the floor is 2.0 times the plain step; counted exactly, it is a little more (a plain step does not go back to the
images, a penalized one does), and 2.33 times for the MLP, which is mostly its first layer. The table's head has that
count, by operations and by the bytes of the products' operands.

test_epoch.py takes these steps, and more, through real images. Exit status 1: a column was wrong.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

import densreg
from densreg import _torch, attacks, graph_passes, paths, regularizers
from densreg.lab import models

from .records import Row, tables, write_json
from .second_order import relative_error
from .timing import WrongResult, environment, interleave, peak_bytes, summarize, synchronize

COEFF = 10.0
"""So large that the penalty's gradient is as large as the cross-entropy's, and a lost one shows in the comparison with
float64: at 0.1 it is less than what units close to a kink cost a ResNet in float32. Times do not depend on it."""

COLUMNS = (
    *("plain", "naive", "max_shift", "stable", "taylor", "taylor compiled"),
    *("objective", "fraction 0.25", "directional"),
)

PASSES = ("merge_products", "lay_out_images", "merge_convolutions", "split_sums", "mask_pools")
WITHOUT = tuple(f"without {name}" for name in PASSES)
"""The objective without one of the changes that densreg.graph_passes makes to inductor's graph."""

ADVERSARIAL = "PGD-5 training"
RIVALS = ("input_gradient", "score_matching", "ig_sum", ADVERSARIAL)
"""Of the paper's Fig. 8, in eager: densreg.regularizers at their defaults, and adversarial training (Madry et al.)."""

ERRORS = {"fraction 0.25": math.inf}
"""How far a column's gradients may be off, 0.02 for the others: units close to a kink are on its other side in float32,
which costs torch's own paths 0.005. A fraction's gradients are those of another loss."""


class Case(NamedTuple):
    """A model and its batch."""

    build: Callable[[], nn.Module]
    batch: int
    image_shape: tuple[int, int, int]
    classes: int
    memory_format: torch.memory_format = torch.channels_last


def vgg11_bn() -> nn.Module:
    """torchvision's VGG11-BN for 32x32 images: its features, global pooling, one linear layer."""
    from torchvision.models.vgg import cfgs, make_layers

    return nn.Sequential(make_layers(cfgs["A"], True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


def mlp_784() -> nn.Module:
    """So small that Python is a part of the step that shows."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def vit_b_16() -> nn.Module:
    """torchvision's ViT-B/16, for 224x224 images, with a head that is not zero: there would be no score."""
    from torchvision.models import vit_b_16

    model = vit_b_16(num_classes=100)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return model


CASES = {
    "resnet18": Case(lambda: models.build("resnet18", 100, (3, 32, 32)), 32, (3, 32, 32), 100),
    "vgg11_bn": Case(vgg11_bn, 32, (3, 32, 32), 100),
    "mlp": Case(lambda: models.build("mlp", 10, (1, 56, 28)), 128, (1, 56, 28), 10),
    "mlp-784": Case(mlp_784, 32, (1, 28, 28), 10),
    "resnet20": Case(lambda: models.build("resnet20", 100, (3, 32, 32)), 128, (3, 32, 32), 100),
    "resnet20-nchw": Case(
        lambda: models.build("resnet20", 100, (3, 32, 32)), 128, (3, 32, 32), 100, torch.contiguous_format
    ),
    "wrn28-10": Case(lambda: models.build("wrn28-10", 100, (3, 32, 32)), 4, (3, 32, 32), 100),
    "vit_b_16": Case(vit_b_16, 4, (3, 224, 224), 100),
}


def problem(case: Case, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """Model, images and labels."""
    torch.manual_seed(0)
    model = case.build().to(device, memory_format=case.memory_format)  # type: ignore[call-overload]
    x = torch.rand(case.batch, *case.image_shape).to(device, memory_format=case.memory_format)
    return model, x, torch.randint(case.classes, (case.batch,)).to(device)


Step = Callable[[Tensor, Tensor], list[Tensor]]
"""(images, labels) -> the parameters' gradients."""


def interval_of(column: str) -> int:
    """k of the column "interval k"; 1 for the others."""
    return int(column.split()[1]) if column.startswith("interval ") else 1


def step_of(column: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
    """The step of a column on one batch."""
    return functools.partial(steps_of(column, model), x, y)


def steps_of(column: str, model: nn.Module) -> Step:
    """The step of a column, for any batch.

    Raises:
        ValueError: there is no such column.
    """
    parameters = list(model.parameters())

    def taken() -> list[Tensor]:
        grads = [w.grad for w in parameters]
        for w in parameters:
            w.grad = None
        return grads  # type: ignore[return-value]

    if column in ("plain", "plain eager"):

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x), y)

        loss_of = loss_of if column == "plain eager" else torch.compile(loss_of, fullgraph=True, dynamic=False)

        def plain(x: Tensor, y: Tensor) -> list[Tensor]:
            loss_of(x, y).backward()
            return taken()

        return plain
    if column in WITHOUT:
        step = steps_of("objective", model)

        def without(x: Tensor, y: Tensor) -> list[Tensor]:
            left_out = mock.patch.object(graph_passes, column.split()[1])
            with left_out, _torch.without_caches():  # which hold the whole graph
                return step(x, y)

        return without
    if column in ("objective", "objective eager", "fraction 0.25", "directional") or column.startswith("interval "):
        objective = densreg.RegularizedObjective(
            model,
            COEFF,
            path=column if column == "directional" else "fused",
            fraction=0.25 if column == "fraction 0.25" else 1.0,
            interval=interval_of(column),
            compile=column != "objective eager",
        )

        def ours(x: Tensor, y: Tensor) -> list[Tensor]:
            objective(x, y).loss.backward()
            return taken()

        return ours
    if column == "taylor compiled":

        def graph(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            logits = model(x)
            loss = F.cross_entropy(logits, y) + COEFF * densreg.density_penalty(logits, x, path="taylor")
            return torch.autograd.grad(loss, parameters)

        compiled = torch.compile(graph, fullgraph=True, dynamic=False)

        def one_graph(x: Tensor, y: Tensor) -> list[Tensor]:
            with _torch.tracing_autograd():
                return list(compiled(x.detach().requires_grad_(), y))

        return one_graph
    if column == ADVERSARIAL:

        def adversarial(x: Tensor, y: Tensor) -> list[Tensor]:
            moved = attacks.perturb(model, x, y, math.inf, eps=8 / 255, steps=5, step_size=2 / 255)
            F.cross_entropy(model(moved), y).backward()
            return taken()

        return adversarial
    if column in RIVALS:
        regularizer = regularizers.make(column)

        def classify(inputs: tuple[Tensor, ...]) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return torch.func.functional_call(model, buffers, inputs)

        def rival(x: Tensor, y: Tensor) -> list[Tensor]:
            leaf = x.detach().requires_grad_()
            logits = model(leaf)
            values = regularizer(classify, logits, (leaf,), y)
            (F.cross_entropy(logits, y) + COEFF * values.mean()).backward()
            return taken()

        return rival
    paths.check_path(column)

    def eager(x: Tensor, y: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        (F.cross_entropy(logits, y) + COEFF * densreg.density_penalty(logits, leaf, path=column)).backward()
        return taken()

    return eager


def references(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the cross-entropy and of the penalty, apart, by torch alone in float64."""
    double = copy.deepcopy(model).double()
    leaf = x.double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # of torch's attention the one with a double backward
        logits = double(leaf)
    (g,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), leaf, create_graph=True)
    parameters = list(double.parameters())
    ce = torch.autograd.grad(F.cross_entropy(logits, y), parameters, retain_graph=True)
    penalty = torch.autograd.grad(g.flatten(1).norm(dim=1).mean(), parameters, materialize_grads=True)
    return list(ce), list(penalty)


def _of(apart: tuple[list[Tensor], list[Tensor]], column: str) -> list[Tensor]:
    """What a column's first step has to give."""
    weight = 0 if column.startswith("plain") else COEFF * interval_of(column)
    return [a + weight * b for a, b in zip(*apart, strict=True)]


class _Products(_torch.TorchDispatchMode):
    """Counts the floating-point operations of matrix products, and the bytes of their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            tensors = [args, out]
            if func.overloadpacket is torch.ops.aten.convolution_backward:  # two products, if both are asked for
                (grad, x, weight), (of_x, of_weight, _) = args[:3], args[-1]
                tensors = [*([grad, weight, out[0]] if of_x else []), *([grad, x, out[1]] if of_weight else [])]
            self.bytes += sum(t.nbytes for t in _torch.tree_leaves(tensors) if isinstance(t, Tensor))
        return out


def floors(case: Case) -> dict[str, float]:
    """What matrix products alone make of a penalized step over a plain one: by operations, and by their bytes.

    By bytes each product reads its two operands and writes its result once, and everything between them is fused away:
    where memory is what limits the products this ratio is the floor.
    """
    counts = []
    model = case.build()  # where tensors have values, which initializers may look at
    parameters = list(model.parameters())
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):  # shapes only
        x, y = torch.rand(case.batch, *case.image_shape), torch.zeros(case.batch, dtype=torch.int64)
        for penalized in (False, True):
            with _Products() as products, densreg.fast_second_order():
                leaf = x.detach().requires_grad_(penalized)
                logits = model(leaf)
                loss = F.cross_entropy(logits, y)
                if penalized:
                    loss = loss + COEFF * densreg.density_penalty(logits, leaf)
                torch.autograd.grad(loss, parameters)
            counts.append(products)
    plain, ours = counts
    return {"operations": ours.flops / plain.flops, "bytes": ours.bytes / plain.bytes}


def require(column: str, grads: list[Tensor], apart: tuple[list[Tensor], list[Tensor]]) -> float | None:
    """The error of a column's first step; raises WrongResult where it is too large.

    The rivals are only seen to be finite and not the plain step's: None. Their own tests compare them with float64.
    """
    if column in RIVALS:
        if not all(bool(g.isfinite().all()) for g in grads) or relative_error(grads, apart[0]) < 1e-4:
            raise WrongResult(f"{column}: expected finite gradients unlike those of a plain step, got others")
        return None
    error = relative_error(grads, _of(apart, column))
    if not error <= ERRORS.get(column, 0.02):
        raise WrongResult(f"{column}: expected gradients within {ERRORS.get(column, 0.02)} of float64, got {error:.1e}")
    return error


def measure(
    name: str,
    columns: Sequence[str],
    seconds: float,
    memory: bool = True,
    base: str = "plain",
    batch: int | None = None,
    device: str = "cpu",
    amp: torch.dtype | None = None,
    more: Mapping[str, Callable[[nn.Module, Tensor, Tensor], Callable[[], list[Tensor]]]] | None = None,
) -> Row:
    """One model: time and memory of a step, the first call's time, and the gradients' error.

    A column that is wrong, or fails, is not timed and has a note instead.

    Args:
        base: the column that the ratios are to.
        batch: images, in place of the case's own.
        amp: dtype of autocast; gradients are then not compared with float64.
        more: further columns, each made from model, images and labels.
    """
    case = CASES[name] if batch is None else CASES[name]._replace(batch=batch)
    model, x, y = problem(case, device)
    apart = references(model, x, y) if amp is None else None
    found: dict[str, dict[str, Any]] = {column: {} for column in [*columns, *(more or {})]}
    steps: dict[str, Callable[[], list[Tensor]]] = {}

    def under_amp(step: Callable[[], list[Tensor]]) -> list[Tensor]:
        with torch.autocast(device, amp, enabled=amp is not None):
            return step()

    for column, of in found.items():
        mine = copy.deepcopy(model)
        step = functools.partial(
            under_amp, more[column](mine, x, y) if more and column in more else step_of(column, mine, x, y)
        )
        try:
            start = time.perf_counter()
            grads = step()
            synchronize()
            of["first_call"] = time.perf_counter() - start
            error = None if apart is None else require(column, grads, apart)
            del grads
            of |= {} if error is None else {"error": error}
        except Exception as error:
            synchronize()  # after an illegal access nothing works: that is raised
            of["note"] = f"not timed: {type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        steps[column] = step
    if base not in steps:
        raise WrongResult(f"{name}, {base}: {found[base]['note']}")
    for column, of in summarize(interleave(steps, seconds), base).items():
        found[column] |= of
        if memory:
            found[column]["peak_bytes"] = peak_bytes(steps[column])
    dtype = "float32" if amp is None else f"{amp} autocast".removeprefix("torch.")
    products = {f"products by {what}": f"{value:.3f}" for what, value in floors(case).items()}
    about = {"model": name, "batch": case.batch, "dtype": dtype, "device": device}
    return {"suite": "steps", "case": about | products, "columns": found}


SHARED = {"threads": None, "seconds": 60.0, "json": None}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=[*COLUMNS, *WITHOUT])
    parser.add_argument("--no-memory", dest="memory", action="store_false")


def run(options: argparse.Namespace) -> int:
    columns = list(dict.fromkeys(["plain", *options.columns, "objective"]))
    rows = [measure(name, columns, options.seconds, options.memory) for name in options.models]
    write_json(options.json, rows, environment())
    print("\n".join(tables(rows)))
    wrong = [column for row in rows for column, of in row["columns"].items() if "note" in of]
    return 1 if wrong else 0
