"""One penalized training step: forward, score, double backward, and the gradients of the trained parameters.

:func:`whole_step` becomes one compiled graph, :func:`directional_step` runs in eager. Both take a :class:`StepSpec`,
which describes what is trained and penalized, and a :class:`~densreg.batch.Batch`, and return a :class:`StepResult`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densreg import _torch, directional, functional, ops
from densreg.batch import Batch, rows, with_inputs
from densreg.check import KEPT_ADVICE, kept_from_earlier
from densreg.paths import graph_nodes, input_score
from densreg.penalty import density_loss, mean_cross_entropy
from densreg.regularizers import Regularizer, trait
from densreg.second_order import fast_second_order

AUXILIARY = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}
"""Weight of the auxiliary classifiers' loss, by torchvision's output type: what its models are trained with."""


class StepSpec(NamedTuple):
    """What a step needs to know of the objective; see :class:`densreg.RegularizedObjective`.

    Attributes:
        trained: the parameters whose gradients are computed.
        one_read: whether one read of the logits gives the cross-entropy and the penalty.
        checks: of the directional step.
        head: the last layer, where it is taken without logits: see :mod:`densreg.head`.
    """

    model: nn.Module
    output: Callable[[Any], Any] | None
    criterion: Callable[[Tensor, Any], Tensor] | None
    labels: Callable[[Any], Tensor]
    regularizer: Regularizer
    p: float
    one_read: bool
    central: bool
    trained: list[nn.Parameter]
    checks: directional.Checks
    head: nn.Linear | None = None


class StepResult(NamedTuple):
    """The step's values, without graph, and the gradients of the trained parameters.

    Attributes:
        loss, ce, penalty: scalars; the penalty is NaN where it was not computed.
        logits: [B, C].
        gradients: one for each of ``spec.trained``, None where the loss does not depend on it.
    """

    loss: Tensor
    logits: Tensor
    ce: Tensor
    penalty: Tensor
    gradients: Sequence[Tensor | None]


# --------------------------------------------------------------------------------------------------------------------
# buffers


Buffers = list[dict[str, Any]]
"""By name, of the model and, if that is a module, of ``output``; None for one that the first forward is to make."""


def _owners(spec: StepSpec) -> list[nn.Module]:
    return [owner for owner in (spec.model, spec.output) if isinstance(owner, nn.Module)]


def named_buffers(spec: StepSpec) -> Buffers:
    """Each module's buffers under one of its names: functional_call would lose a buffer that it is given under two."""
    return [
        {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in owner.named_modules()
            for name, buffer in _torch.buffers_of(module).items()
        }
        for owner in _owners(spec)
    ]


def copies_of(buffers: Buffers) -> Buffers:
    return [{name: None if b is None else b.clone() for name, b in each.items()} for each in buffers]


_SavedBuffers = list[tuple[nn.Module, str, Any, Tensor | None]]
"""(module, name, buffer, its value); no value where restoring only puts the buffer back in its place"""


def _value(buffer: Tensor | None) -> Tensor | None:
    """A copy; None for a buffer that a forward is yet to make, and for an expanded one, which copy_ cannot write to."""
    if buffer is None:
        return None
    strided = buffer.layout == torch.strided
    expanded = strided and any(n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))
    return None if expanded else buffer.detach().clone()


def save_buffers(spec: StepSpec) -> _SavedBuffers:
    """The buffers' values, for :func:`restore_buffers`."""
    return [
        (module, name, b, _value(b))
        for owner in _owners(spec)
        for module in owner.modules()
        for name, b in _torch.buffers_of(module).items()
    ]


def restore_buffers(saved: _SavedBuffers) -> None:
    """Undo what checkpoints did to the buffers as they ran their forward again, in each backward that there was."""
    for module, name, buffer, value in saved:
        if value is not None:
            if buffer.shape != value.shape:  # quantization's observers give theirs a shape in the first forward
                buffer.resize_(value.shape)
            buffer.data.copy_(value)  # the graph may hold the buffer: to it nothing has changed
        _torch.buffers_of(module)[name] = buffer


def _sharing(spec: StepSpec) -> dict[str, str]:
    """Buffers that share memory with another buffer or with a parameter, by name, and the name of the other."""
    named: list[tuple[str, Any]] = [item for owner in _owners(spec) for item in owner.named_parameters()]
    named += [item for each in named_buffers(spec) for item in each.items()]
    spans = []
    for name, t in named:
        if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.numel() and t.device.type != "meta":
            last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
            spans.append((str(t.device), t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name))
    found: dict[str, str] = {}
    before = ("", 0, 0, "")
    for span in sorted(spans):
        if span[0] == before[0] and span[1] < before[2]:
            found |= {span[3]: before[3], before[3]: span[3]}
        before = max(before, span, key=lambda each: (each[0], each[2]))
    return found


def check_sharing(spec: StepSpec, batch: Batch) -> None:
    """Raises ValueError where the model gives other logits with copies of its buffers, as those share no memory."""
    sharing = _sharing(spec)
    if not sharing:
        return
    buffers = {name: b for each in named_buffers(spec) for name, b in each.items() if name in sharing}
    with torch.no_grad():
        with without_trace(spec, batch):
            before = copies_of([buffers])[0]
            logits = own_logits(spec, batch)
            changed = [name for name, b in buffers.items() if not torch.equal(b, before[name])]
        if not changed:
            return
        with without_trace(spec, batch):
            of_copies = own_logits(spec, batch, named_buffers(spec))
    if not torch.equal(logits, of_copies):
        raise ValueError(
            f"expected buffers that share no memory, got {changed[0]}, which shares it with {sharing[changed[0]]} and "
            "is changed in the forward: here the model runs again from copies of its buffers, which would not share "
            "it. Make them one buffer"
        )


# --------------------------------------------------------------------------------------------------------------------
# model and loss

Outputs = list[tuple[float, Tensor]]
"""Logits with their weight in the loss: the classifier's own first, of weight 1, then those of auxiliary ones."""


def classify(spec: StepSpec, batch: Batch, buffers: Buffers | None = None) -> Outputs:
    """The model's logits; with copies of these buffers in place of its own, which stay as they are."""
    # Copies, as a model may change its inputs in place, and a leaf does not allow it.
    given = {**dict(zip(batch.keys, batch.xs, strict=True)), **batch.others}
    given = {key: v.clone() if isinstance(v, Tensor) else v for key, v in given.items()}
    args = tuple(given[key] for key in range(len(given)) if key in given)
    named = {key: v for key, v in given.items() if isinstance(key, str)}
    if buffers is None:
        output = _torch.call_uncompiled(spec.model, *args, **named)
    else:
        own, *outputs = copies_of(buffers)
        output = torch.func.functional_call(spec.model, own, args, named, tie_weights=False)
    if isinstance(spec.output, nn.Module) and buffers is not None:
        output = torch.func.functional_call(spec.output, outputs[0], (output,), tie_weights=False)
    elif spec.output is not None:
        output = spec.output(output)
    weight = AUXILIARY.get(type(output).__name__)
    if weight is not None:
        logits, *auxiliary = output
        return [(1.0, logits), *((weight, f) for f in auxiliary if f is not None)]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"expected the model to return a tensor of logits [B, C], got {type(output).__name__}: pass output=..., "
            "a function that takes them out of it"
        )
    return [(1.0, output)]


def own_logits(spec: StepSpec, batch: Batch, buffers: Buffers | None = None) -> Tensor:
    """The logits [B, C] of :func:`classify` without those of auxiliary classifiers."""
    return classify(spec, batch, buffers)[0][1]


def check_trained(spec: StepSpec, batch: Batch, outputs: Outputs) -> None:
    """Raises ValueError where the logits come from a leaf that would silently get no gradient."""
    own = [*spec.trained, *batch.xs]  # not leaves themselves, under torch.func.functional_call
    known = {id(t) for t in own}
    for node in graph_nodes([logits for _, logits in outputs], own):
        leaf = _torch.leaf_of(node)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                "expected logits that depend on no tensor that requires grad but x and the model's parameters, got one "
                f"of shape {list(leaf.shape)}, which would get no gradient: make it a parameter, or its module a part, "
                "of the model, or detach() it"
            )


@contextlib.contextmanager
def without_trace(spec: StepSpec, batch: Batch) -> Iterator[None]:
    """Context for a run of the model after which its buffers and the random states are as before."""
    device, saved = batch.xs[0].device, save_buffers(spec)
    try:
        with directional.replayed(directional.random_states(device), device):
            yield
    finally:
        restore_buffers(saved)


def try_trained(spec: StepSpec, batch: Batch) -> None:
    """:func:`check_trained` of a forward in eager mode."""
    with without_trace(spec, batch), fast_second_order():
        check_trained(spec, batch, classify(spec, batch))


def try_score(spec: StepSpec, batch: Batch) -> None:
    """Raises RuntimeError where the score cannot be differentiated again, as a forward in eager mode tells."""
    with without_trace(spec, batch), fast_second_order():
        input_score(own_logits(spec, batch), batch.xs)


def loss_of(spec: StepSpec, outputs: Outputs, target: Any) -> Tensor:
    """The criterion of all outputs, weighted; a scalar."""
    total: Any = 0
    for weight, logits in outputs:
        wide = logits.to(ops.accumulation_dtype(logits.dtype)) if logits.is_floating_point() else logits
        # torch 2.11 traces no "or" of a method.
        criterion = mean_cross_entropy if spec.criterion is None else spec.criterion
        loss = criterion(wide, target)
        if not isinstance(loss, Tensor) or loss.ndim:
            given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the criterion must return a tensor of shape [], got {given}")
        total = total + weight * loss
    return total


def labels_of(spec: StepSpec, target: Any) -> Any:
    """The classes for the regularizer, None if it takes none."""
    return spec.labels(target) if trait(spec.regularizer, "needs_target") else None


@contextlib.contextmanager
def _open_gates(spec: StepSpec) -> Iterator[None]:
    """Context in which no parameter is near 0 in all its entries: a closed gate (ReZero, LayerScale) hides a branch.

    Parameters are changed through ``.data``, unseen by a graph that holds them.
    """
    parameters = [w.data for owner in _owners(spec) for w in owner.parameters() if w.numel()]
    closed = [(w, w.clone()) for w in parameters if w.abs().amax() < 1e-2]
    try:
        for w, _ in closed:
            w.copy_(0.1 * torch.arange(1.0, w.numel() + 1, device=w.device).sin().view(w.shape))
        yield
    finally:
        for w, value in closed:
            w.copy_(value)


def samples_interact(spec: StepSpec, batch: Batch) -> bool | None:
    """Whether the logits of a sample, or what is kept in a buffer, depend on which samples are in the batch.

    Tried with one sample among its neighbours, and among others. None where the logits do not even depend on the
    sample: they tell nothing yet.
    """
    size, device = len(batch.xs[0]), batch.xs[0].device
    index = torch.full((size,), size // 2, device=device)
    self_ = torch.arange(size, device=device) == size // 2
    copies = rows(batch, index)
    among = tuple(torch.where(ops.per_row(self_, x), x, 2 * x + 0.73) for x in copies.xs)
    states, saved = directional.random_states(device), save_buffers(spec)
    logits = []
    amp, half = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    # Without autocast's cache, which would keep the opened gates.
    uncached = torch.autocast(device.type, half, enabled=amp, cache_enabled=False)
    with torch.no_grad(), uncached, _open_gates(spec):
        for each in (batch, copies._replace(xs=among)):
            with directional.replayed(states, device):
                found = own_logits(spec, each).float()
                logits.append(found[size // 2])
    changed = not all(
        (value is None or torch.equal(b, value)) and _torch.buffers_of(module)[name] is b
        for module, name, b, value in saved
    )
    restore_buffers(saved)
    same = (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()
    if not changed and same and bool((found == logits[1]).all()):
        return None
    return bool(changed or not same)


def raise_kept_tensor(spec: StepSpec, batch: Batch, error: Exception) -> None:
    """Raises RuntimeError, which names it, where a module keeps a tensor of an earlier step's graph; else returns."""
    for name, attribute in kept_from_earlier(spec.model, lambda: classify(spec, batch, named_buffers(spec))):
        kind = type(spec.model.get_submodule(name)).__name__
        raise RuntimeError(
            f"{name or 'the model'} ({kind}) keeps a tensor of an earlier step's graph, {attribute}, which cannot "
            f"be differentiated again. {KEPT_ADVICE}"
        ) from error


# --------------------------------------------------------------------------------------------------------------------
# the steps


def gradients_of(spec: StepSpec, loss: Tensor) -> Sequence[Tensor | None]:
    """Those of the trained parameters, without their hooks, which the backward of the objective's loss calls."""
    # Of the two backwards in the graph, this is the one for which checkpointed activations are computed again.
    with torch.fx.traceback.annotate({"phase": "backward"}):
        if torch.compiler.is_compiling():
            return torch.autograd.grad(loss, spec.trained, allow_unused=True)
        # In eager mode, which is also where torch.compiler.set_stance leaves a compiled step.
        with _torch.without_gradient_hooks(spec.trained):
            return torch.autograd.grad(loss, spec.trained, allow_unused=True)


def whole_step(
    spec: StepSpec,
    batch: Batch,
    target: Any,
    coeff: Tensor,
    scale: Tensor,
    penalized: bool = True,
    rest: Batch | None = None,
    whole: Batch | None = None,
    part: Any = None,
) -> StepResult:
    """The step that becomes one graph.

    Args:
        batch: what is penalized; its xs are leaves that require grad.
        scale: of the loss, before it is differentiated.
        rest: with ``fraction``, the samples that are not penalized, which in the target come first; or
        whole: with ``fraction``, all samples, where the penalized ones go through the model once more.
        part: the target of the penalized samples, where that is not the whole target.
    """
    xs = batch.xs
    device = xs[0].device.type
    amp, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    regularizer = spec.regularizer
    again = penalized and (whole is not None or not spec.one_read)  # the model may run again, from these buffers
    buffers = copies_of(named_buffers(spec)) if again else []

    def logits_of(inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device, half, enabled=amp and not regularizer.precise):
            return own_logits(spec, with_inputs(batch, inputs), buffers)

    with fast_second_order():
        outputs = classify(spec, batch if whole is None else whole)
        saved = []
        if not torch.compiler.is_compiling():
            check_trained(spec, batch, outputs)
            saved = save_buffers(spec)
        if whole is not None:
            penalized_logits = logits_of(xs)
        else:
            penalized_logits = outputs[0][1]
            if rest is not None:
                before = classify(spec, rest)
                outputs = [(w, torch.cat([a, b])) for (w, a), (_, b) in zip(before, outputs, strict=True)]
        logits = outputs[0][1]
        with torch.autocast(device, enabled=False):  # where torch wants every backward to be
            if penalized and logits is penalized_logits and spec.one_read:
                _, ce, penalty = density_loss(logits, target, xs, coeff, spec.p)
                ce = ce + loss_of(spec, outputs[1:], target)
            else:
                penalty = None
                if penalized:  # before the criterion, which may change the logits in place
                    if amp and regularizer.precise and whole is None:
                        penalized_logits = logits_of(xs)
                    of_xs = labels_of(spec, target if part is None else part)
                    penalty = regularizer(logits_of, penalized_logits, xs, of_xs).mean()
                restore_buffers(saved)
                ce = loss_of(spec, outputs, target)
                saved = save_buffers(spec) if saved else []  # the criterion may be the model's, and update its buffers
            loss = ce if penalty is None else ce + coeff.to(penalty.dtype) * penalty
            gradients = gradients_of(spec, loss * scale.to(loss.dtype))
    restore_buffers(saved)
    if penalty is None:
        penalty = torch.full_like(ce, float("nan"))
    return StepResult(loss.detach(), logits.detach(), ce.detach(), penalty.detach(), gradients)


def directional_step(
    spec: StepSpec,
    batch: Batch,
    target: Any,
    coeff: Tensor,
    scale: Tensor,
    penalized: bool = True,
    whole: Batch | None = None,
) -> StepResult:
    """The same by first-order kernels, in eager: see :mod:`densreg.directional`."""
    xs = batch.xs
    device = xs[0].device
    trained, checks = spec.trained, spec.checks
    all_leaves = [*trained, *xs, *(whole.xs if whole else ())]
    states = directional.random_states(device)
    buffers = copies_of(named_buffers(spec))  # as all forwards start from
    pieces: list[tuple] = []
    autocast = torch.is_autocast_enabled(device.type)
    apart = penalized and (autocast or whole is not None)  # the density is not that of the classifying forward

    with directional.Record(pieces) if penalized and not apart else contextlib.nullcontext():
        outputs = classify(spec, batch if whole is None else whole)
    check_trained(spec, batch, outputs)
    with torch.autocast(device.type, enabled=False):  # half precision would drown a difference
        ce = loss = total = loss_of(spec, outputs, target)
        saved = save_buffers(spec)  # after the criterion, which may be the model's, and update its buffers
        penalty = torch.full_like(ce, float("nan"))
        if penalized:

            def log_density(inputs: tuple[Tensor, ...], mode: TorchFunctionMode) -> Tensor:
                with directional.replayed(states, device), mode:
                    return functional.log_density(own_logits(spec, with_inputs(batch, inputs), buffers))

            at_x = log_density(xs, directional.Record(pieces)) if apart else functional.log_density(outputs[0][1])
            score = directional.score_without_graph(at_x, xs, all_leaves, retain_graph=True)
            norm, direction = directional.dual_direction(score, spec.p)
            penalty = norm.mean()

            def difference(steps: int = 1, central: bool = spec.central) -> Tensor:
                return directional.difference(
                    lambda inputs: log_density(inputs, directional.Reuse(pieces)), xs, direction, central, at_x, steps
                )

            along = difference()
            checks.steps += 1
            if checks.steps & (checks.steps - 1) == 0:  # the first, second, fourth, eighth ...
                expected = norm.sum()
                eps = torch.finfo(xs[0].dtype).eps
                rounding = 2 * (at_x.abs() + 1).norm()

                def step(central: bool) -> Tensor:
                    return directional.step_size(xs, direction, central)

                coarse = torch.finfo(at_x.dtype).eps  # a half model's log density is a float32
                directional.check_difference(along, expected, 0.1 * expected + coarse * rounding / step(spec.central))
                if not checks.warned:
                    pair = (
                        directional.first_order_gradients(t, trained, all_leaves, True) for t in (along, difference(2))
                    )
                    directional.check_smooth(checks, *pair)
                if not checks.warned:  # of kinks
                    with torch.no_grad():
                        once, twice = difference(1, central=True), difference(2, central=True)
                    error = 0.2 * eps ** (1 / 3) * expected + (twice - once).abs() / 2
                    within = error + eps * rounding / step(central=True)
                    directional.check_difference((4 * once - twice) / 3, expected, within)
            weight = coeff.to(penalty.dtype)
            total = ce + weight * along / len(norm)
            loss = ce.detach() + weight * penalty
        gradients = directional.first_order_gradients(total * scale.to(total.dtype), trained, all_leaves)
    restore_buffers(saved)
    return StepResult(loss.detach(), outputs[0][1].detach(), ce.detach(), penalty, gradients)
