"""Which layers of a model stand in the way of second order: :func:`check_model`, and what a model keeps of a graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densreg import _torch
from densreg._torch import tree_flatten, tree_leaves, tree_map, tree_unflatten
from densreg.paths import graph_nodes, may_leave_autograd
from densreg.second_order import fast_second_order, third_order


class Finding(NamedTuple):
    """A layer through which the penalty's gradient is missing or wrong.

    Attributes:
        module: its name in the model, "" for the model itself.
        type: its class.
        problem: what happens there.
        advice: what to do.
    """

    module: str
    type: str
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.type}): {self.problem}. {self.advice}"


_ADVICE = 'Replace the layer, or train with RegularizedObjective(..., path="directional")'
KEPT_ADVICE = "Empty it before each step, or train in the mode in which nothing is kept (often model.train())"
_FORMULA = "Write the layer as its formula, in torch's elementary operations"


def check_model(model: nn.Module, *example: Any, order: int = 2) -> list[Finding]:
    """The layers of a model that :class:`densreg.RegularizedObjective` cannot differentiate twice, or only to NaN.

    Runs the model once, and then each of its modules by itself, on the inputs that it had in that run: gradients, and
    gradients of gradients. Of nested modules the innermost is named. Nothing in the model changes.

    It finds a missing second derivative, one that is NaN at the example's values, a backward that loses its dependence
    on the incoming gradient, and a module that keeps a tensor of an earlier forward's graph. An ``autograd.Function``
    or a custom operator may be wrong in other ways, for example because it saves an intermediate result in its forward.
    Modules that call one have their second derivatives compared with finite differences, in float64; modules made of
    torch's own functions only with ``order=3``.

    Args:
        model: in the mode in which it is trained.
        example: its inputs, as few as two samples, of which the floating-point tensors are differentiated; or one
            mapping of names to inputs, for a model that is called by keyword.
        order: 2; or 3 for the regularizer "hessian", which differentiates once more. The model then runs in float64,
            under :class:`densreg.second_order.third_order`, and second and third derivatives are compared with finite
            differences.

    Returns:
        One :class:`Finding` for each such layer; an empty list if there is none.

    Raises:
        ValueError: another order.
        Exception: whatever the model itself raises on the example.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    model = _copy(_torch.uncompiled(model))
    if order == 3:
        model = model.double()
        example = tree_map(lambda t: t.double() if _is_floating(t) else t, example)
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in calls:
            calls[module] = tree_map(lambda v: v, (args, kwargs))  # DenseNet appends to the list that it passes on

    def run() -> Any:
        # Clones, as a model may change its inputs in place, and a leaf does not allow it.
        inputs = tree_map(lambda t: t.detach().requires_grad_().clone() if _is_floating(t) else t, example)
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return model(**inputs[0])
        return model(*inputs)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    devices = [t.device for t in tree_leaves(example) if isinstance(t, Tensor) and t.device.type == "cuda"][:1]
    findings: list[Finding] = []
    with (
        torch.random.fork_rng(devices),
        fast_second_order(),
        third_order() if order == 3 else contextlib.nullcontext(),
        torch.enable_grad(),
    ):
        run()
        for hook in hooks:
            hook.remove()
        kept = dict(kept_from_earlier(model, run))
        for name, module in reversed(list(model.named_modules())):  # children before their parents
            inside = f"{name}." if name else ""
            if name in kept:
                problem = f"it keeps a tensor of an earlier graph, {kept[name]}, which no second step can go through"
                findings.append(Finding(name, type(module).__name__, problem, KEPT_ADVICE))
            elif module in calls and not any(f.module.startswith(inside) for f in findings):
                # A Sequential has nothing of its own; and the weights are not what is differentiated twice and more.
                own = type(module) is not nn.Sequential and ".parametrizations." not in f".{name}."
                found = _problem(module, *calls[module], order if own else 2)
                if found is not None:
                    findings.append(Finding(name, type(module).__name__, *found))
    return findings[::-1]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _problem(module: nn.Module, args: tuple, kwargs: dict, order: int) -> tuple[str, str] | None:
    """(problem, advice) of a module on these inputs, or None."""
    if isinstance(module, nn.SyncBatchNorm):
        return "torch does not differentiate it twice across processes", "Use BatchNorm. " + _ADVICE
    _, inputs, run = _isolated(module, args, kwargs)
    outputs = run()
    if not outputs or not inputs:
        return None
    cotangents = [torch.randn_like(t).requires_grad_() for t in outputs]
    try:
        grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
        present = [_real(g) for g in grads if g is not None]
        if not present:
            return None
        if not all(g.requires_grad for g in present):
            return "its backward runs outside of autograd, so its gradient is a constant", _ADVICE
        sizes = [g.detach().double().abs().sum().clamp_min(1e-30) for g in present]
        largest = torch.stack(sizes).max()
        # A gradient that is smaller by far is nothing but rounding, as that of a bias before BatchNorm.
        weights = [(largest / size).clamp_max(1e3).to(g.dtype) for g, size in zip(present, sizes, strict=True)]
        seconds = []
        for _ in range(3):  # in one direction, what one gradient loses may cancel what another one loses
            shares = [w * (g * _along(g)).sum() for w, g in zip(weights, present, strict=True)]
            along = torch.stack(shares).sum()
            seconds.append((along, torch.autograd.grad(along, [*cotangents, *inputs], None, True, allow_unused=True)))
    except RuntimeError as error:
        if "compile" in str(error):
            return "it is compiled by itself, and torch differentiates that once only", "Leave compiling to densreg"
        return f"it cannot be differentiated twice: {str(error).splitlines()[0]}", _ADVICE
    finite = all(g.isfinite().all() for g in present)
    if finite and not all(t is None or t.isfinite().all() for _, of_all in seconds for t in of_all):
        return "its second derivative is not finite at these inputs, and its first is", _ADVICE
    # The gradient is linear in the cotangents: by Euler's theorem its derivative in them, times them, is the gradient.
    # Each input has an equal share in the sum, or the gradients of large weights would hide that of the module's input.
    for along, of_all in seconds:
        again = sum(
            (_real(s).double() * _real(u).double()).sum()
            for s, u in zip(of_all, cotangents, strict=False)
            if s is not None
        )
        if not (along.double() - again).abs() <= 1e-2 * len(present) ** 0.5 * largest:
            return "its second derivative is wrong: it loses the incoming gradient", _ADVICE
    if order == 3 or any(map(may_leave_autograd, graph_nodes(outputs))):  # of a Function nothing is known
        return _wrong_derivative(module, args, kwargs, order)
    return None


def _isolated(module: nn.Module, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor], Callable]:
    """A module by itself.

    Returns:
        (what it was given, as leaves; these and its weights; a function that runs it, to the outputs with a graph).
    """
    values, spec = tree_flatten((args, kwargs))
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    given = [v.requires_grad_() for v in values if _is_floating(v)]
    args, kwargs = tree_unflatten(values, spec)

    def run() -> list[Tensor]:
        # A clone, as the module may change it in place.
        mine, named = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
        return [t for t in tree_leaves(module(*mine, **named)) if isinstance(t, Tensor) and t.requires_grad]

    return given, [*given, *(w for w in module.parameters() if w.requires_grad)], run


def _real(t: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _along(g: Tensor) -> Tensor:
    """A random direction along or against a gradient, in which nothing of it cancels."""
    return g.detach().sign() * torch.rand_like(g) * (1 - 2 * torch.randint(2, (), device=g.device))


def _wrong_derivative(module: nn.Module, args: tuple, kwargs: dict, order: int) -> tuple[str, str] | None:
    """(problem, advice) where finite differences in float64 give another second or third derivative, or None.

    All derivatives but the last are taken in what the module is given; the last is taken in its weights too.
    """
    module = _copy(module).double()
    args, kwargs = tree_map(lambda v: v.double() if _is_floating(v) else v, (args, kwargs))
    given, inputs, run = _isolated(module, args, kwargs)
    try:
        run()
    except Exception:  # a Function that does not take float64
        return None
    if not given:
        return None
    buffers = [(b, b.clone()) for b in module.buffers()]
    drawn: list[list[Tensor]] = []

    def dot(tensors: Sequence[Tensor], number: int) -> Tensor:
        """With fixed random tensors."""
        if len(drawn) == number:
            drawn.append([torch.randn_like(t) for t in tensors])
        return torch.stack([(t * r).sum() for t, r in zip(tensors, drawn[number], strict=True)]).sum()

    def value(order: int) -> Tensor:
        """The derivative of order ``order - 1``, along fixed directions."""
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same dropout masks each time
        result = dot(run(), 0)
        torch.set_rng_state(state)
        for number in range(1, order):
            result = dot(_gradients(result, given, create_graph=True), number)
        return result

    if not _agrees(value, 1, inputs):
        return None  # it detaches a part, as a straight-through estimator: differences say nothing of its derivatives
    for each, ordinal, times in ((2, "second", "twice"), (3, "third", "three times"))[: order - 1]:
        try:
            right = _agrees(value, each, inputs)
        except RuntimeError as error:
            return f"it cannot be differentiated {times}: {str(error).splitlines()[0]}", _FORMULA
        if not right:
            return f"its {ordinal} derivative is wrong: finite differences give another", _FORMULA
    return None


def _gradients(of: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor]:
    if not of.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    return torch.autograd.grad(of, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _agrees(value: Callable[[int], Tensor], order: int, inputs: list[Tensor]) -> bool:
    """Whether the gradient of ``value(order)``, float64, in the inputs is its central difference.

    Tried with ever smaller steps, as a kink may lie inside of one.
    """
    at = value(order)
    gradients = _gradients(at, inputs)
    for step in (1e-6, 1e-7, 1e-8):
        direction = [torch.randn_like(t) for t in inputs]
        along = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        values = []
        for side in (step, -step):
            with torch.no_grad():
                for t, d in zip(inputs, direction, strict=True):
                    t.add_(d, alpha=side)
            values.append(value(order).item())
            with torch.no_grad():
                for t, d in zip(inputs, direction, strict=True):
                    t.sub_(d, alpha=side)
        difference = (values[0] - values[1]) / (2 * step)
        if abs(along - difference) <= 1e-3 * max(abs(along), abs(difference)) + 1e-6 * (1 + abs(at.item())):
            return True
    return False


# --------------------------------------------------------------------------------------------------------------------
# what a model keeps of an earlier graph


def of_a_graph(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """(module, attribute, tensor) of what modules hold that was computed from parameters or inputs."""
    return [
        (name, attribute, t)
        for name, module in model.named_modules()
        for attribute, value in _torch.attributes_of(module).items()
        for t in tree_leaves(value)
        if isinstance(t, Tensor) and t.grad_fn is not None
    ]


def kept_from_earlier(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str]]:
    """(module, attribute) of each tensor of an earlier forward's graph that is in the graph of a new one too.

    Args:
        run: a forward of the model, after at least one.
    """
    held = of_a_graph(model)
    if not held:
        return []
    outputs = [t for t in tree_leaves(run()) if isinstance(t, Tensor)]
    nodes = set(graph_nodes(outputs))
    return list({(module, attribute): None for module, attribute, t in held if t.grad_fn in nodes})


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a model that may hold tensors of a graph, as weight_norm's weight after a forward: detached."""
    return copy.deepcopy(model, {id(t): t.detach().clone() for _, _, t in of_a_graph(model)})
