"""The penalized loss of a model as one training step: forward, score, double backward and gradients in one graph."""

from __future__ import annotations

import contextlib
import numbers
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from densreg import directional, functional, ops, paths, regularizers
from densreg.merge import MergeProducts
from densreg.paths import Inputs
from densreg.penalty import density_loss, mean_over_targets
from densreg.regularizers import REGULARIZERS, WITH_ORDER, Density, Hessian, Regularizer
from densreg.second_order import (
    KEPT_ADVICE,
    fast_second_order,
    hardsigmoid_under_compile,
    kept_from_earlier,
    of_a_graph,
)

AUXILIARY = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}
"""Weight of the auxiliary classifiers' loss, by torchvision's output type: what its models are trained with."""


class ObjectiveOutput(NamedTuple):
    """What a step of :class:`RegularizedObjective` gives. Only ``loss`` can be differentiated.

    The others are there to be looked at. A term of a loss that is made of them would train nothing, and raises in the
    backward: such a term is part of a ``criterion``. ``.detach()`` makes constants of them; the logits need it before
    ``.numpy()``.

    Attributes:
        loss: scalar, ``ce + coeff * penalty``.
        logits: [B, C].
        ce: scalar, the criterion; with auxiliary classifiers, theirs included.
        penalty: scalar, NaN where it was not computed: without gradients, and on the steps that ``interval`` skips.
    """

    loss: Tensor
    logits: Tensor
    ce: Tensor
    penalty: Tensor


class _HandOut(Function):
    """A loss whose gradients are there already: its backward hands them out, times what comes in."""

    @staticmethod
    def forward(ctx, loss, factor, gradients, *parameters):
        ctx.factor = factor
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx, incoming):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss of RegularizedObjective cannot be differentiated twice (create_graph=True): its gradients "
                "were computed along with it. Use densreg.density_loss, whose graph goes on"
            )
        gradients = ctx.saved_tensors
        factor = incoming * ctx.factor
        # Looking is free on the CPU; loss.backward() takes them as they are, and autograd copies what it cannot own.
        if factor.device.type != "cpu" or factor != 1:
            present = [g for g in gradients if g is not None]
            scaled = iter(torch._foreach_mul(present, factor) if present else ())
            gradients = [None if g is None else next(scaled) for g in gradients]
        else:
            gradients = _apart(gradients)
        return None, None, None, *gradients


class _Shown(Function):
    """What is there to be looked at, in front of the parameters whose gradients a loss term made of it would miss."""

    @staticmethod
    def forward(ctx, shown, *parameters):
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in shown)

    @staticmethod
    def backward(ctx, *incoming):
        if any(g is not None for g in incoming):
            raise RuntimeError(
                "a loss term made of out.logits, out.ce or out.penalty of RegularizedObjective would train nothing, as "
                "only out.loss has gradients: put it into criterion=f, (logits, target) -> loss, or detach() what is "
                "meant as a constant"
            )
        return (None,) * len(ctx.needs_input_grad)


class _Scalar(Tensor):
    """A number that requires grad and is no less a number for that: float() gives no warning, numpy() no error."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what is computed from it is a plain tensor

    def __float__(self) -> float:
        return float(self.item())

    def numpy(self, *, force: bool = False) -> Any:
        return self.detach().numpy(force=force)

    def __format__(self, spec: str) -> str:
        return format(self.detach(), spec)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, none in another's memory: w.grad is added to and clipped in place."""
    seen, apart = set(), []
    for g in gradients:
        if g is not None and g.layout == torch.strided:
            memory = g.untyped_storage()._cdata
            g = g.clone() if memory in seen else g
            seen.add(memory)
        apart.append(g)
    return apart


class _Batch(NamedTuple):
    """What the model is called with.

    Attributes:
        xs: the inputs that are penalized, [B, ...].
        keys: where each of them stands, a position or a name.
        others: the rest by position or name. Of the tensors those of length B have a row for each sample.
    """

    xs: tuple[Tensor, ...]
    keys: tuple[int | str, ...]
    others: dict[int | str, Any]


def _at(batch: _Batch, xs: tuple[Tensor, ...]) -> _Batch:
    """The batch with these penalized inputs, which may be several batches one after the other."""
    size = len(batch.xs[0])
    others = batch.others
    if len(xs[0]) != size:
        times = len(xs[0]) // size
        others = {k: v.repeat(times, *[1] * (v.ndim - 1)) if _has_rows(v, size) else v for k, v in others.items()}
    return _Batch(xs, batch.keys, others)


def _rows(batch: _Batch, index: Tensor) -> _Batch:
    size = len(batch.xs[0])
    others = {k: v[index] if _has_rows(v, size) else v for k, v in batch.others.items()}
    return _Batch(tuple(x[index] for x in batch.xs), batch.keys, others)


def _has_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


_Outputs = list[tuple[float, Tensor]]
"""Logits with their weight in the loss: the classifier's own first, of weight 1, then those of auxiliary ones."""

_Results = tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor | None]]
"""(loss, logits, ce, penalty), without graph, and the gradients of the trained parameters."""


def _whole_step(
    objective: RegularizedObjective,
    batch: _Batch,
    target: Any,
    coeff: Tensor,
    scale: Tensor,
    penalized: bool = True,
    rest: _Batch | None = None,
    whole: _Batch | None = None,
    part: Any = None,
) -> _Results:
    """The step that becomes one graph.

    Args:
        batch: whose xs are penalized; leaves that require grad.
        scale: of the loss, before anything is differentiated.
        rest: with ``fraction``, what is not penalized, which comes before the batch; or
        whole: the whole batch, where a part of it goes through the model once more.
        part: the target of the penalized batch, where it is not the whole target.
    """
    xs = batch.xs
    device = xs[0].device.type
    amp, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    regularizer = objective.regularizer
    again = whole is not None or not isinstance(regularizer, Density)
    buffers = {name: b.clone() for name, b in _buffers(objective.model).items()} if penalized and again else {}

    def classify(inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device, half, enabled=amp and not regularizer.precise):
            return objective._classify(_at(batch, inputs), buffers)[0][1]

    with fast_second_order():
        outputs = objective._classify(batch if whole is None else whole)
        kept = [] if torch.compiler.is_compiling() else _keep(objective)
        if whole is not None:
            penalized_logits = classify(xs)
        else:
            penalized_logits = outputs[0][1]
            if rest is not None:
                before = objective._classify(rest)
                outputs = [(w, torch.cat([a, b])) for (w, a), (_, b) in zip(before, outputs, strict=True)]
        logits = outputs[0][1]
        with torch.autocast(device, enabled=False):  # where torch wants every backward to be
            if penalized and logits is penalized_logits and objective.at_once:
                _, ce, penalty = density_loss(logits, target, xs, coeff, objective.p)
                ce = ce + objective._loss_of(outputs[1:], target)
            else:
                penalty = None
                if penalized:  # before the criterion, which may change the logits in place
                    if amp and regularizer.precise and whole is None:
                        penalized_logits = classify(xs)
                    of_xs = objective.labels(target if part is None else part)
                    penalty = regularizer(classify, penalized_logits, xs, of_xs).mean()
                ce = objective._loss_of(outputs, target)
            loss = ce if penalty is None else ce + coeff.to(penalty.dtype) * penalty
            # The backward for which checkpointed activations are computed again, of the two that are in the graph.
            with torch.fx.traceback.annotate({"phase": "backward"}):
                gradients = torch.autograd.grad(loss * scale.to(loss.dtype), objective._trained(), allow_unused=True)
    _put_back(kept)
    if penalty is None:
        penalty = torch.full_like(ce, float("nan"))
    return loss.detach(), logits.detach(), ce.detach(), penalty.detach(), gradients


def _directional_step(
    objective: RegularizedObjective,
    batch: _Batch,
    target: Any,
    coeff: Tensor,
    scale: Tensor,
    penalized: bool = True,
    whole: _Batch | None = None,
) -> _Results:
    """The same by first-order kernels, in eager: see :mod:`densreg.directional`."""
    xs = batch.xs
    device = xs[0].device
    trained = objective._trained()
    leaves = [*trained, *xs, *(whole.xs if whole else ())]
    states = directional.random_states(device)
    buffers = {name: buffer.clone() for name, buffer in _buffers(objective.model).items()}  # as all forwards start from
    pieces = directional.Pieces()
    autocast = torch.is_autocast_enabled(device.type)
    apart = penalized and (autocast or whole is not None)  # the density is not that of the classifying forward

    with pieces.recorded() if penalized and not apart else contextlib.nullcontext():
        outputs = objective._classify(batch if whole is None else whole)
    kept = _keep(objective)
    with torch.autocast(device.type, enabled=False):  # half precision would drown a difference
        ce = loss = total = objective._loss_of(outputs, target)
        penalty = torch.full_like(ce, float("nan"))
        if penalized:

            def log_density(inputs: tuple[Tensor, ...], mode: TorchFunctionMode) -> Tensor:
                with directional.replayed(states, device), mode:
                    return functional.log_density(objective._classify(_at(batch, inputs), buffers)[0][1])

            at_x = log_density(xs, pieces.recorded()) if apart else functional.log_density(outputs[0][1])
            norm, direction = directional.dual_direction(_score(at_x, xs, leaves, retain_graph=True), objective.p)
            penalty = norm.mean()

            def difference(steps: int = 1, central: bool = objective.central) -> Tensor:
                return directional.difference(
                    lambda inputs: log_density(inputs, pieces.reused()), xs, direction, central, at_x, steps
                )

            along = difference()
            objective._differences += 1
            if objective._differences & (objective._differences - 1) == 0:  # the first, second, fourth, eighth ...
                wanted = norm.sum()
                eps = torch.finfo(xs[0].dtype).eps
                rounding = 2 * (at_x.abs() + 1).norm()

                def step(central: bool) -> Tensor:
                    return directional.step_size(xs, direction, central)

                coarse = torch.finfo(at_x.dtype).eps  # a half model's log density is a float32
                _check_followed(along, wanted, 0.1 * wanted + coarse * rounding / step(objective.central))
                if not objective._told:
                    pair = (directional.first_order_gradients(t, trained, leaves, True) for t in (along, difference(2)))
                    objective._check_smooth(*pair)
                if not objective._told:  # of kinks
                    with torch.no_grad():
                        once, twice = difference(1, central=True), difference(2, central=True)
                    error = 0.2 * eps ** (1 / 3) * wanted + (twice - once).abs() / 2
                    _check_followed((4 * once - twice) / 3, wanted, error + eps * rounding / step(central=True))
            weight = coeff.to(penalty.dtype)
            total = ce + weight * along / len(norm)
            loss = ce.detach() + weight * penalty
        gradients = directional.first_order_gradients(total * scale.to(total.dtype), trained, leaves)
    _put_back(kept)
    return loss.detach(), outputs[0][1].detach(), ce.detach(), penalty, gradients


def _check_followed(found: Tensor, wanted: Tensor, within: Tensor) -> None:
    """A difference must be the norm's sum, which is known. Reading them synchronises, so it is done seldom."""
    difference, norm, tolerance = torch.stack([found, wanted, within]).tolist()
    if abs(difference - norm) > tolerance:
        raise RuntimeError(
            f'path "directional": the difference of the log density is {difference:.6g}, and {norm:.6g} by the score, '
            f"with a tolerance of {tolerance:.2g}. The perturbed forwards differ from the first by more than their "
            "input: a detached part that depends on x (detach(), no_grad(), a running mean used in the same forward), "
            "random numbers that are not of torch's, Python's or NumPy's own generators, or too curved a network (try "
            'central=True). Where the model can be differentiated twice, path="fused" has none of these limits'
        )


def _score(
    log_density: Tensor, xs: tuple[Tensor, ...], leaves: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    """The input score without a graph of its own, by first-order kernels."""
    score = directional.first_order_gradients(log_density.sum(), xs, leaves, retain_graph)
    present = [g for g in score if g is not None]
    if len(present) < len(score):
        raise ValueError("the logits do not depend on x")
    return present


class RegularizedObjective(nn.Module):
    """Cross-entropy and density penalty of a model: ``out = objective(x, y); out.loss.backward()``.

    Only ``out.loss`` has gradients: the logits, the cross-entropy and the penalty are there to be looked at. The
    forward, the input score, its double backward, the loss and the parameters' gradients are one step, by default one
    compiled graph; ``backward()`` hands the gradients out. So the loss cannot be differentiated a second time, and
    parameters must not change between the two calls. ``x.grad`` is not touched.

        objective = densreg.RegularizedObjective(model, coeff=0.1)
        for x, y in loader:
            out = objective(x, y)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    With F a forward of the model, a plain step costs 3F, and this one 6F. What makes it cheaper changes what is
    optimized: with ``interval=k`` the penalty is part of every k-th step only, times k: (3 + 3/k) F on average. With
    ``fraction=s`` it is taken of a random part of the batch, which goes through the model apart from the rest: (3 + 3s)
    F, an unbiased estimate. Where a layer uses batch statistics (BatchNorm in training mode) the part goes through the
    model once more, so that the cross-entropy and the running statistics stay those of the whole batch: (3 + 6s) F,
    which saves time for s < 1/2; and the penalty is biased, that of a smaller batch.

    Under no_grad the output is the cross-entropy alone, by the model as it is, in eager.

    Every option is an attribute too (``compile`` as ``compiled``): what is assigned to it is checked and counts from
    the next step on, which is compiled anew.

    A sample whose score is exactly 0 is not penalized, so a model whose head is zero when it is made (torchvision's
    ViT) has penalty 0 in the first step: :func:`densreg.density_penalty` says what the gradient is at 0 and beside it.

    Args:
        model: [B, ...] -> logits [B, C], with its parameters on one device; anything torch.nn. torchvision's GoogLeNet
            and Inception return auxiliary logits in training: these enter the cross-entropy at their usual weights. A
            compiled model is unwrapped. It stays what it is, as ``objective.model``.
        coeff: weight of the penalty, >= 0. ``objective.coeff`` is a tensor buffer: ``objective.coeff.fill_(0.2)``,
            or ``objective.coeff = 0.2``, changes it without a recompilation. It is no part of the state_dict.
        p: order of the norm, 1 <= p <= inf.
        path: a name in the table of :mod:`densreg.paths`; or "directional", a finite difference by first-order kernels
            alone for models that cannot be differentiated twice (:func:`densreg.check_model` tells): see ``central``.
            It runs in eager.
        compile: whether the step is compiled, as one graph; where that is impossible the first call raises.
        interval: k above; None leaves the penalty out of every step, which then is a plain one.
        fraction: s above, 0 < s <= 1, rounded to at least one sample.
        criterion: (logits, target) -> scalar loss; None is the mean cross-entropy of [B] int64 classes. If it is a
            module its parameters are trained too.
        output: model output -> logits [B, C], for models that return something else than a tensor. A module's
            parameters are trained too; those of one that a function merely calls are not the objective's.
        central: for path "directional": two perturbed forwards instead of one, 10F instead of 7F, with an error that
            is quadratic in the step instead of linear.
        mode, backend: of :func:`torch.compile`.
        regularizer: what the penalty is: a name in the table of :mod:`densreg.regularizers`, with p where it has an
            order, or one with options of its own, ``regularizers.Cure(h=3)``. All but the density's need a class for
            each sample, target [B] int64.
        labels: target -> [B] int64 classes, for targets that hold more than them, beside a criterion that takes them.
        penalized: of several inputs the ones that are penalized, by position or name; None are all floating point ones.

    Raises:
        TypeError, ValueError: what was given and what is wanted.
    """

    coeff: Tensor
    p: float
    path: str
    regularizer: Regularizer
    interval: int | None
    fraction: float
    criterion: Callable[[Tensor, Any], Tensor] | None
    output: Callable[[Any], Tensor] | None
    labels: Callable[[Any], Tensor]
    penalized: tuple[int | str, ...] | None
    central: bool
    compiled: bool
    mode: str | None
    backend: str | Callable

    def __init__(
        self,
        model: nn.Module,
        coeff: float,
        p: float = 2,
        path: str = "fused",
        compile: bool = True,
        interval: int | None = 1,
        fraction: float = 1.0,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        central: bool = False,
        mode: str | None = None,
        backend: str | Callable = "inductor",
        regularizer: str | Regularizer = "density",
        labels: Callable[[Any], Tensor] | None = None,
        penalized: int | str | Sequence[int | str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        value = _coefficient(coeff)
        first = next(self.model.parameters(), torch.empty(0))
        double = first.dtype == torch.float64
        self.register_buffer(
            "coeff",
            torch.tensor(value, dtype=torch.float64 if double else torch.float32, device=first.device),
            persistent=False,
        )
        options: dict[str, Any] = {"interval": interval, "fraction": fraction, "criterion": criterion, "output": output}
        options |= {"labels": labels, "penalized": penalized, "central": central}
        options |= {"compiled": compile, "mode": mode, "backend": backend}
        self._set({name: _checked(name, given) for name, given in options.items()})
        self._set(_penalty_options(p, path, regularizer))
        self.calls = 0
        """Training steps so far: the penalty is part of those that ``interval`` divides. In the state_dict."""
        self._compiled_step = _compile(self)
        self._told = self._nonzero = self._told_of_compiling = False
        self._differences = 0
        self._coupled: dict[tuple, bool] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """An option that is assigned is checked as in the constructor, and counts from the next step on."""
        if name == "coeff" and "coeff" in self._buffers:
            with torch.no_grad():
                self.coeff.fill_(value if isinstance(value, Tensor) else _coefficient(value))
        elif name == "compile":
            raise AttributeError("compile is a method of every nn.Module: assign to objective.compiled")
        elif name == "model":
            self._change({name: _bare(value)})
        elif name == "regularizer":
            p, kind = (self.p, self.path) if isinstance(value, str) else (2, "fused")
            path = "directional" if self.path == "directional" else kind
            self._change(_penalty_options(p, path, value))
        elif name in ("p", "path"):
            known = REGULARIZERS.get(self.regularizer.name) is type(self.regularizer)
            ordered = known and self.regularizer.name in WITH_ORDER  # which has no other option: made anew
            options = {"p": self.p, "path": self.path, name: value}
            options["regularizer"] = self.regularizer.name if ordered else self.regularizer
            self._change(_penalty_options(**options))
        elif name in _OPTIONS:
            self._change({name: _checked(name, value)})
        else:
            super().__setattr__(name, value)

    def _change(self, options: dict[str, Any]) -> None:
        before = {name: getattr(self, name) for name in options if hasattr(self, name)}
        self._set(options)
        if "_compiled_step" in self.__dict__:
            try:
                self._compiled_step = _compile(self)  # anew, so that nothing in it is of before
            except Exception:
                self._set(before)
                raise
            self._told = self._nonzero = self._told_of_compiling = False
            self._coupled = {}

    def _set(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            self.__dict__.pop(name, None)  # a function may follow a module, and a module a function
            self._modules.pop(name, None)
            super().__setattr__(name, value)

    @property
    def at_once(self) -> bool:
        """Whether one read of the logits gives cross-entropy and penalty."""
        return self.regularizer == Density(self.p) and self.criterion is None

    # Inside of a torch.compile'd function it is left to itself; with fullgraph=True that is an error with this reason.
    @torch.compiler.disable(reason="RegularizedObjective compiles its own step: call it outside of torch.compile")
    def forward(
        self, x: Inputs | Mapping[str, Any], target: Any, loss_scale: float | Tensor | None = None
    ) -> ObjectiveOutput:
        """The penalized loss of a batch.

        Args:
            x: [B, ...], floating point, or several inputs: a sequence, ``model(*x)``, or a mapping, ``model(**x)``. Of
                several the joint norm is taken of those that are floating point, or that ``penalized`` names; the rest
                (masks, token numbers, flags) is passed on, tensors of length B being taken to have a row for each
                sample. The model gets copies, which it may change in place; no gradient reaches what x came from.
            target: [B] int64 classes, or what the criterion takes. In a compiled step a float in it becomes a tensor of
                shape [], as each other value of a Python number would be compiled anew.
            loss_scale: needed in float16, where gradients underflow: the scale of
                :class:`torch.amp.GradScaler`, ``scaler.scale(torch.ones((), device=x.device))``, by which the loss is
                multiplied before it is differentiated. ``out.loss`` and its gradients are unscaled by it again, so
                that ``scaler.scale(out.loss).backward()`` follows as usual.

        Raises:
            TypeError, ValueError: what was given and what is wanted.
            RuntimeError: the step cannot be compiled as one graph, or loses second order there (the model calls an
                autograd.Function not marked ``torch._dynamo.allow_in_graph``), a layer cannot be differentiated twice,
                or the Hessian to be penalized is 0 because the model is piecewise linear.
        """
        for module in (self, self.model):  # fully_shard may have come after the constructor
            _check_unsharded(module)
        batch = _check_x(x, self.penalized)
        xs = batch.xs
        if not torch.is_grad_enabled():
            outputs = self._classify(batch)
            with torch.autocast(xs[0].device.type, enabled=False):
                ce = self._loss_of(outputs, target)
            return ObjectiveOutput(ce, outputs[0][1], ce, torch.full_like(ce, float("nan")))
        batch = _detached_batch(batch)
        xs = batch.xs
        if self._compiled_step is not None:
            target = tree_map(lambda v: _for_graph(v, xs[0].device), target)
        trained = self._trained()
        if not trained:
            raise ValueError("no parameter of the model requires grad: there is nothing to train")
        penalized, coeff = self.interval is not None, self.coeff
        if self.model.training:
            if self.interval is not None:
                penalized = self.calls % self.interval == 0
                coeff = coeff * self.interval
            self.calls += 1
        if penalized and getattr(self.regularizer, "differences", False):
            _check_no_dropout(self.model, self.regularizer.name)
        factor, scale = self._scales(xs, loss_scale, coeff)
        try:
            *shown, gradients = self._run(batch, target, coeff, scale, penalized)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                self._raise_what_is_kept(batch, error)
            raise
        if penalized and isinstance(self.regularizer, Hessian) and not self._nonzero:
            if shown[3] == 0:
                raise RuntimeError(
                    "regularizer hessian: the Hessian of the model is 0, as it is piecewise linear: replace its "
                    "ReLU by SoftPlus (densreg train --softplus BETA)"
                )
            self._nonzero = True  # a look at the value waits for the device: once
        if self._compiled_step is not None and self.mode in ("reduce-overhead", "max-autotune"):
            # CUDA graphs: the next replay would overwrite them.
            shown = [t.clone() for t in shown]
            gradients = [g if g is None else g.clone() for g in gradients]
        loss = _HandOut.apply(shown[0], factor, gradients, *trained)
        logits, ce, penalty = _Shown.apply(shown[1:], *trained)
        return ObjectiveOutput(loss, logits, ce.as_subclass(_Scalar), penalty.as_subclass(_Scalar))

    @torch.inference_mode(False)  # under which there are no gradients either
    @torch.enable_grad()
    def penalty(self, x: Inputs | Mapping[str, Any], target: Any = None) -> Tensor:
        """The penalty's value, a scalar without graph; the model's buffers (running statistics) stay as they are.

        Args:
            x: as in :meth:`forward`.
            target: as there; the density penalty needs none. What is random in others is drawn from a fixed seed.
        """
        batch = _leaves(_detached_batch(_check_x(x, self.penalized)))
        target = tree_map(_detached, target)
        kept = _keep(self)
        try:
            if not isinstance(self.regularizer, Density):
                return self._rival(batch, target)
            logits = self._classify(batch, _buffers(self.model))[0][1]
            with torch.autocast(logits.device.type, enabled=False):
                score = _score(functional.log_density(logits), batch.xs, [*self._trained(), *batch.xs])
                return directional.dual_direction(score, self.p)[0].mean()
        finally:
            _put_back(kept)

    def _rival(self, batch: _Batch, target: Any) -> Tensor:
        def classify(inputs: tuple[Tensor, ...]) -> Tensor:
            return self._classify(_at(batch, inputs), buffers)[0][1]

        buffers, xs = _buffers(self.model), batch.xs
        device = xs[0].device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            fast_second_order(),
        ):
            torch.manual_seed(0)
            return self.regularizer(classify, classify(xs), xs, self.labels(target)).mean().detach()

    def _scales(self, xs: tuple[Tensor, ...], loss_scale: float | Tensor | None, coeff: Tensor) -> tuple[Any, Tensor]:
        """What the gradients are multiplied by after the graph, and the loss before it is differentiated."""
        device = xs[0].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        if loss_scale is None:
            if autocast or xs[0].dtype == torch.float16:
                raise ValueError(
                    "float16 needs loss_scale, or small gradients underflow without a word: with a GradScaler, "
                    "objective(x, y, loss_scale=scaler.scale(torch.ones((), device=x.device)))"
                )
            return 1.0, torch.ones((), device=device)
        scale = torch.as_tensor(loss_scale, dtype=torch.float32, device=device).detach()
        if scale.ndim:
            raise ValueError(f"loss_scale must be a number or a tensor of shape [], got shape {list(scale.shape)}")
        # A large coefficient would overflow what the scale was made for, the cross-entropy's gradient.
        scale = scale / coeff.clamp_min(1)
        return 1 / scale, scale

    def _run(self, batch: _Batch, target: Any, coeff: Tensor, scale: Tensor, penalized: bool) -> _Results:
        if not penalized:
            return self._call(self._step(), batch, target, coeff, scale, penalized=False)
        size, device = len(batch.xs[0]), batch.xs[0].device
        chosen = max(1, round(self.fraction * size))
        if chosen >= size:  # an empty batch too
            return self._call(self._step(), _leaves(batch), target, coeff, scale)
        apart = self.path == "directional" or self._couples(batch)
        order = torch.randperm(size, device=device)
        part = _leaves(_rows(batch, order[size - chosen :]))
        if apart and isinstance(self.regularizer, Density):
            return self._call(self._step(), part, target, coeff, scale, whole=batch)
        if not isinstance(target, Tensor):
            raise TypeError(f"fraction takes a part of the batch: target must be a tensor, got {type(target).__name__}")
        of_part = None if isinstance(self.regularizer, Density) else target[order[size - chosen :]]
        if apart:
            return self._call(self._step(), part, target, coeff, scale, whole=batch, part=of_part)
        rest = _rows(batch, order[: size - chosen])
        loss, logits, *others = self._call(self._step(), part, target[order], coeff, scale, rest=rest, part=of_part)
        return loss, torch.empty_like(logits).index_copy_(0, order, logits), *others  # type: ignore[return-value]

    def _couples(self, batch: _Batch) -> bool:
        """Whether the logits of a sample, or what is kept in a buffer, depend on which samples are in the batch.

        Tried once for each mode of the modules: one sample among its neighbours, and among others.
        """
        mode = tuple(module.training for module in self.model.modules())
        if mode not in self._coupled:
            size, device = len(batch.xs[0]), batch.xs[0].device
            index = torch.full((size,), size // 2, device=device)
            self_ = torch.arange(size, device=device) == size // 2
            copies = _rows(batch, index)
            among = tuple(torch.where(ops.per_row(self_, x), x, 2 * x + 0.73) for x in copies.xs)
            states, kept = directional.random_states(device), _keep(self)
            logits = []
            with torch.no_grad():
                for each in (batch, copies._replace(xs=among)):
                    with directional.replayed(states, device):
                        logits.append(self._classify(each)[0][1][size // 2].float())
            changed = not all(m._buffers[name] is b and torch.equal(b, value) for m, name, b, value in kept)
            _put_back(kept)
            same = (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()
            self._coupled[mode] = changed or not same
        return self._coupled[mode]

    def _call(self, step: Callable[..., _Results], *args, **kwargs) -> _Results:
        if self._compiled_step is None:
            with _without_hooks(self._trained()):
                return step(self, *args, **kwargs)
        failure: Exception
        with _COMPILED, torch._dynamo.config.patch(_DYNAMO), hardsigmoid_under_compile():
            try:
                results = self._compiled_step(self, *args, **kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise RuntimeError(_often_compiled(self._compiled_step)) from error
            except torch._dynamo.exc.TorchDynamoException as error:
                failure = error
            else:
                if not self._told_of_compiling and len(_compiled_versions(self._compiled_step)) > OFTEN:
                    self._told_of_compiling = True
                    warnings.warn(_often_compiled(self._compiled_step), RuntimeWarning, stacklevel=2)
                return results
        self._raise_what_eager_raises(step, *args, **kwargs)
        self._raise_what_is_kept(args[0], failure)
        explained = _explanation(failure, self.model, args[0].xs)
        raise RuntimeError(
            f"the training step could not be compiled as one graph: {explained}; or "
            "compile=False, which runs it in eager, where there is no error (torch's own words are above in full)"
        ) from failure

    def _raise_what_eager_raises(self, step: Callable[..., _Results], *args, **kwargs) -> None:
        """After a failed compilation: the error of the step itself, if it has one, says more than Dynamo's."""
        kept, device = _keep(self), args[0].xs[0].device
        try:
            with directional.replayed(directional.random_states(device), device), _without_hooks(self._trained()):
                step(self, *args, **kwargs)
        finally:
            _put_back(kept)

    def _raise_what_is_kept(self, batch: _Batch, error: Exception) -> None:
        """Of a step whose graph is in part that of an earlier one: which tensor the model kept."""
        for name, attribute in kept_from_earlier(self.model, lambda: self._classify(batch, _buffers(self.model))):
            kind = type(self.model.get_submodule(name)).__name__
            raise RuntimeError(
                f"{name or 'the model'} ({kind}) keeps a tensor of an earlier step's graph, {attribute}, which cannot "
                f"be differentiated again. {KEPT_ADVICE}"
            ) from error

    def _classify(self, batch: _Batch, buffers: dict[str, Tensor] | None = None) -> _Outputs:
        """The model's logits; with copies of these buffers in place of its own, which stay as they are."""
        # Copies, as a model may change its inputs in place, and a leaf does not allow it.
        given = {**dict(zip(batch.keys, batch.xs, strict=True)), **batch.others}
        given = {key: v.clone() if isinstance(v, Tensor) else v for key, v in given.items()}
        args = tuple(given[key] for key in range(len(given)) if key in given)
        named = {key: v for key, v in given.items() if isinstance(key, str)}
        if buffers is None:
            # Past what model.compile() has put there.
            compiled = self.model._compiled_call_impl is not None
            output = self.model._call_impl(*args, **named) if compiled else self.model(*args, **named)
        else:
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            output = torch.func.functional_call(self.model, copies, args, named, tie_weights=False)
        if self.output is not None:
            output = self.output(output)
        weight = AUXILIARY.get(type(output).__name__)
        if weight is not None:
            logits, *auxiliary = output
            return [(1.0, logits), *((weight, f) for f in auxiliary if f is not None)]
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model returns {type(output).__name__}, wanted a tensor of logits [B, C]: pass output=..., "
                "a function that takes them out of it"
            )
        return [(1.0, output)]

    def _loss_of(self, outputs: _Outputs, target: Any) -> Tensor:
        total: Any = 0
        for weight, logits in outputs:
            wide = logits.to(ops.accumulation_dtype(logits.dtype)) if logits.is_floating_point() else logits
            loss = (self.criterion or _cross_entropy)(wide, target)
            if not isinstance(loss, Tensor) or loss.ndim:
                given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"the criterion must return a tensor of shape [], got {given}")
            total = total + weight * loss
        return total

    def _trained(self) -> list[nn.Parameter]:
        return [w for w in self.parameters() if w.requires_grad]

    def _check_smooth(self, once: list[Tensor | None], twice: list[Tensor | None]) -> None:
        """The gradient must not depend on the step, as it does where an unknown kink lies inside of it."""
        pairs = [(a, b) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]
        apart = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
        length = sum(a.square().sum().item() for a, _ in pairs) ** 0.5
        if apart > 0.2 * length:
            self._told = True
            warnings.warn(
                f'path "directional": with twice the step the gradient differs by {apart / max(length, 1e-30):.2g} of '
                "itself, so it is not to be relied on: there are kinks that are not of torch's own activations "
                "(torch.where, sort), too curved a network (try central), or too coarse a dtype",
                RuntimeWarning,
                stacklevel=2,
            )

    def _step(self) -> Callable[..., _Results]:
        return _directional_step if self.path == "directional" else _whole_step

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compiled_step = _compile(self)

    def get_extra_state(self) -> Tensor:
        self._check_no_loop()
        return torch.tensor(self.calls)  # safetensors knows nothing but tensors

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        self.calls = int(state["calls"] if isinstance(state, dict) else state)  # once it was a dict

    def _check_no_loop(self) -> None:
        """Where nn.Module would go from the objective into the model, and from the model into the objective."""
        if any(module is self for module in self.model.modules()):
            raise ValueError(
                "the model contains this very objective, as after self.objective = RegularizedObjective(self): give it "
                "the network inside, RegularizedObjective(self.net, ...)"
            )

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:  # train(), to() and apply() go through it
        self._check_no_loop()
        return super().named_children()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._check_no_loop()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        value = self.coeff
        super()._apply(fn, recurse)
        self._buffers["coeff"] = value.to(self.coeff.device)  # .half() and .to(bfloat16) are for the model
        return self

    def extra_repr(self) -> str:
        self._check_no_loop()
        options = {name: getattr(self, name) for name in ("regularizer", "interval", "fraction")}
        options["compiled"] = self._compiled_step is not None
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


_REMEDIES = (
    ("consumed returned tensor's grad_fn", "a tensor of the step's graph is kept", "keep it detached, or not at all"),
    (
        "FloatTrueDiv(1.0, ToFloat(",
        "momentum=None averages by a count, which is read from a tensor",
        "give it a momentum",
    ),
    ("data-dependent", "a tensor's value decides what is computed", "use torch.where or torch.cond"),
    (
        "RNG ops in recompute",
        "a checkpoint has dropout inside, which this torch does not compile",
        "leave one of them out",
    ),
    ("marked as skipped", "it calls a function that torch.compile does not trace", "call what that one calls"),
    (
        "trace builtin operator",
        "it calls a builtin of Python that torch.compile does not trace, as print",
        "leave it out",
    ),
    ("torch._dynamo.graph_break()", "it asks for a graph break", "leave that out"),
)
"""What torch says, what that means, and what to do."""

_HOOKS = {
    "WeightNorm": "use torch.nn.utils.parametrizations.weight_norm",
    "SpectralNorm": "use torch.nn.utils.parametrizations.spectral_norm",
    "BasePruningMethod": "make the pruning permanent, torch.nn.utils.prune.remove",
}
"""Hooks of torch that keep a weight they computed, and what to do."""


def _explanation(failure: BaseException, model: nn.Module, xs: tuple[Tensor, ...]) -> str:
    """Why a step could not be compiled, in one line: layer, reason, remedy."""
    if torch.is_anomaly_enabled():
        return "torch.autograd.detect_anomaly looks at every gradient's values: leave it out"
    for x in xs:
        if type(x) is not Tensor:
            return f"x is of {type(x).__name__}, a subclass of Tensor: give x.as_subclass(torch.Tensor)"
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if type(t) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"{name} is a {type(t).__name__}, a subclass of Tensor, expected a plain one"
    chain: list[BaseException] = []
    error: BaseException | None = failure
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    said = "\n".join(str(error) for error in chain).lower()
    lines = (str(failure).strip() or type(failure).__name__).splitlines()
    reason = next((line for line in lines if not line.endswith("raised:")), lines[0])
    words, meaning, remedy = next((row for row in _REMEDIES if row[0].lower() in said), ("", "", ""))
    layer = next((layer for error in chain if (layer := _layer_of(error, model))), "")
    if words.startswith("consumed"):
        layer, meaning, remedy = _keeping_a_graph(model) or (layer, meaning, remedy)
    meaning = f"{meaning} ({reason})" if meaning else reason
    return "".join((f"{layer}: " if layer else "", meaning, f"; {remedy}" if remedy else ""))


def _layer_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module in whose forward the error came up."""
    for frame in reversed(getattr(error, "real_stack", None) or traceback.StackSummary()):
        for name, module in model.named_modules():
            code = getattr(type(module).forward, "__code__", None)
            lines = {(code.co_filename, line) for *_, line in code.co_lines()} if code is not None else ()
            if (frame.filename, frame.lineno) in lines:
                return f"{name or 'the model itself'} ({type(module).__name__})"
    return ""


def _keeping_a_graph(model: nn.Module) -> tuple[str, str, str] | None:
    """(layer, reason, remedy) of the first module that keeps a tensor with a graph."""
    for name, attribute, _ in of_a_graph(model):
        module = model.get_submodule(name)
        kinds = {kind.__name__ for hook in module._forward_pre_hooks.values() for kind in type(hook).__mro__}
        remedy = next((_HOOKS[kind] for kind in _HOOKS if kind in kinds), "keep it detached, or not at all")
        layer = f"{name or 'the model itself'} ({type(module).__name__})"
        return layer, f"it keeps a tensor of the step's graph as its attribute {attribute!r}", remedy
    return None


# What Dynamo has to know for the call: to trace autograd.grad; that DDP(objective) is one graph too, which its
# splitting into buckets would cut; that new shapes, not an oversight, are what a step is compiled again for; and that
# a hook which comes after the first step counts.
_DYNAMO = {
    "trace_autograd_ops": True,
    "optimize_ddp": False,
    "recompile_limit": 64,
    "skip_nnmodule_hook_guards": False,
}


_COMPILED = threading.RLock()
"""Held during compiled calls: on some versions of torch that configuration is one for all threads."""


@contextlib.contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters without their hooks, which are for the gradients that backward() will hand out."""
    hooks = [w._backward_hooks for w in parameters]
    for w in parameters:
        w._backward_hooks = None
    try:
        yield
    finally:
        for w, kept in zip(parameters, hooks, strict=True):
            w._backward_hooks = kept


@contextlib.contextmanager
def _stores_apart() -> Iterator[None]:
    """inductor's C++ with each stored reduction in a scope of its own.

    Two half-precision results of one vectorized reduction, ``(x.sum(0), x.sum(0).view(4, 4))`` of a [64, 16] bfloat16
    x, are otherwise one name declared twice, which no C++ compiler takes. A penalized step under autocast has many.
    """
    from torch._inductor.codegen.common import IndentedBuffer
    from torch._inductor.codegen.cpp import CppVecKernel

    store_reduction = CppVecKernel.store_reduction

    def apart(kernel: Any, name: str, index: Any, value: Any) -> None:
        before, kernel.reduction_suffix = kernel.reduction_suffix, IndentedBuffer()
        store_reduction(kernel, name, index, value)
        before.writeline("{")
        before.splice(kernel.reduction_suffix)
        before.writeline("}")
        kernel.reduction_suffix = before

    with mock.patch.object(CppVecKernel, "store_reduction", apart):
        yield


class _Refusing:
    """A backend of torch.compile that raises where second order would be lost without a word: see functional.py."""

    def __init__(self, mode: str | None, backend: str | Callable, penalized: bool) -> None:
        self.inner: Any
        self.penalized = penalized
        self.stores = _stores_apart if backend == "inductor" else contextlib.nullcontext
        if backend == "inductor":
            self.inner = torch._TorchCompileInductorWrapper(mode, None, False)
        else:
            self.inner = torch._TorchCompileWrapper(backend, mode, None, False)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        # A plain step has no second order to lose.
        if self.penalized and any(
            "autograd_function_apply" in str(node.target) for each in graphs for node in each.nodes
        ):
            raise RuntimeError(
                "the model calls an autograd.Function, whose second order torch.compile loses without an error: mark "
                "its class with torch._dynamo.allow_in_graph"
            )
        if torch._inductor.config.post_grad_custom_pre_pass is not None:  # the user's own: there is room for one
            with self.stores():
                return self.inner(graph, inputs)
        with self.stores(), torch._inductor.config.patch(post_grad_custom_pre_pass=MergeProducts()):
            return self.inner(graph, inputs)

    def __getattr__(self, name: str) -> Any:  # name, configuration, reset
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def _compile(objective: RegularizedObjective) -> Callable[..., _Results] | None:
    """The step as one graph, or None where it runs in eager."""
    if not objective.compiled or objective.path == "directional":
        return None
    # Dynamo keeps what it compiled by code object, with one limit for all: each objective gets its own.
    code = _whole_step.__code__.replace()
    step = types.FunctionType(code, _whole_step.__globals__, argdefs=_whole_step.__defaults__)
    backend = _Refusing(objective.mode, objective.backend, penalized=objective.interval is not None)
    return torch.compile(step, fullgraph=True, dynamic=False, backend=backend)


_OPTIONS = (
    *("interval", "fraction", "criterion", "output", "labels", "penalized"),
    *("central", "compiled", "mode", "backend"),
)
"""What :func:`_checked` knows; p, path and regularizer belong together, see :func:`_penalty_options`."""


def _checked(name: str, value: Any) -> Any:
    """An option's value as the objective keeps it; raises TypeError or ValueError."""
    if name == "interval":
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise TypeError(f"interval must be an int or None, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"interval must be at least 1, got {value}")
    elif name == "fraction":
        if not 0 < value <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {value}")
        return float(value)
    elif name in ("central", "compiled"):
        if not isinstance(value, bool):
            raise TypeError(f"{name.removesuffix('d')} must be True or False, got {value!r}")
    elif name in ("criterion", "output", "labels"):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be callable or None, got {type(value).__name__}")
        return _as_it_is if value is None and name == "labels" else value
    elif name == "penalized" and value is not None:
        names = (value,) if isinstance(value, (int, str)) else tuple(value) if isinstance(value, Sequence) else ()
        if not names or not all(isinstance(each, (int, str)) for each in names):
            raise TypeError(f"penalized must be positions or names of inputs, or None for all; got {value!r}")
        return names
    return value


def _penalty_options(p: float, path: str, regularizer: Any) -> dict[str, Any]:
    """p, path and regularizer as they go together; raises TypeError or ValueError where they do not."""
    p = functional.check_order(p)
    if path not in (*paths.PATHS, "directional"):
        raise ValueError(f"path must be one of {', '.join(paths.PATHS)}, directional; got {path!r}")
    if path == "directional" and regularizer != "density" and not isinstance(regularizer, Density):
        raise ValueError(f'path "directional" is for the density penalty, got the regularizer {regularizer!r}')
    if isinstance(regularizer, str):
        made = Density(p) if path == "directional" else regularizers.make(regularizer, p, path)
        return {"p": p, "path": path, "regularizer": made}
    if not callable(regularizer) or not hasattr(regularizer, "name"):
        raise TypeError(f"regularizer must be a name or a Regularizer, got {type(regularizer).__name__}")
    own = {"p": float(getattr(regularizer, "p", 2)), "path": getattr(regularizer, "path", "fused")}
    for name, given, default in (("p", p, 2), ("path", path, "fused")):
        if given not in (default, own[name], "directional"):
            raise ValueError(f"{name} is {given!r} beside a regularizer with options of its own, {regularizer!r}")
    if path == "directional":
        own["path"] = path
    return {**own, "regularizer": regularizer}


def _coefficient(coeff: Any) -> float:
    if isinstance(coeff, (bool, str)) or not isinstance(coeff, (int, float, Tensor)):
        raise TypeError(f"coeff must be a number, got {type(coeff).__name__}")
    value = float(coeff)
    if not 0 <= value < float("inf"):
        raise ValueError(f"coeff must be finite and at least 0, got {value}")
    return value


def _bare(model: nn.Module) -> nn.Module:
    """The model itself; raises where it is wrapped in what cannot be differentiated twice."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        model = model._orig_mod
    for module in model.modules():
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise TypeError(
                f"the model is wrapped in {type(module).__name__}, through which torch cannot take the input's "
                "gradient: wrap the objective, DistributedDataParallel(RegularizedObjective(model, ...))"
            )
        _check_unsharded(module)
    return model


def _check_unsharded(module: nn.Module) -> None:
    if type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel")):
        raise TypeError(
            "the model is sharded (FSDP), and gradients of gradients do not go through its resharding: "
            "wrap the objective in DistributedDataParallel instead"
        )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Each module's buffers once, by a name for it: functional_call would lose one that it is given by two names."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def _keep(objective: RegularizedObjective) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """The buffers as they are, for :func:`_put_back`."""
    owners = [owner for owner in (objective.model, objective.output) if isinstance(owner, nn.Module)]
    modules = [module for owner in owners for module in owner.modules()]
    return [(m, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None]


def _put_back(kept: Sequence[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Undo what checkpoints did to the buffers as they ran their forward again, in each backward that there was."""
    for module, name, buffer, value in kept:
        buffer.data.copy_(value)  # the graph may hold the buffer: to it nothing has changed
        module._buffers[name] = buffer


OFTEN = 5
"""As many versions of the compiled step are taken for granted: a last batch of another size, skipped penalties."""


def _compiled_versions(compiled: Any) -> list[Any]:
    return torch._dynamo.eval_frame._debug_get_cache_entry_list(compiled._torchdynamo_orig_callable.__code__)


def _often_compiled(compiled: Any) -> str:
    """That a step is compiled again and again, and why."""
    code, versions = compiled._torchdynamo_orig_callable.__code__, len(_compiled_versions(compiled))
    reasons = torch._dynamo.utils.guard_failures.get(code) or ["?: unknown"]
    latest = str(reasons[-min(max(1, versions - 1), len(reasons))])  # one for each version there was, the latest first
    reason = latest.splitlines()[0].partition(": ")[2].partition("  #")[0].strip()
    return (
        f"the training step was compiled {versions} times, the last time because of: {reason}. Each new shape of a "
        "batch and each new Python number in the target, the criterion or the model is compiled anew: use batches of "
        "one size (drop_last=True) and tensors for numbers that change, or compile=False"
    )


def _for_graph(value: Any, device: torch.device) -> Any:
    """A part of the target as the compiled step takes it: no subclass of Tensor, and no number that is compiled in."""
    if isinstance(value, Tensor):
        return _plain(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
    return torch.full((), float(value), dtype=torch.float64, device=device) if real else value


def _check_x(x: Any, penalized: tuple[int | str, ...] | None) -> _Batch:
    given: dict[int | str, Any]
    if isinstance(x, Mapping):
        given = dict(x)
    elif isinstance(x, Tensor) or (isinstance(x, Sequence) and not isinstance(x, str)):
        given = dict(enumerate([x] if isinstance(x, Tensor) else x))
    else:
        raise TypeError(f"x must be a tensor, a sequence of inputs or a mapping to them, got {type(x).__name__}")
    given = {key: _plain(v) if isinstance(v, Tensor) else v for key, v in given.items()}
    tensors = {key: v for key, v in given.items() if isinstance(v, Tensor)}
    if penalized is None:  # nothing is left out silently that has a derivative
        penalized = tuple(key for key, v in tensors.items() if v.is_floating_point() or v.is_complex())
    if not penalized:
        kinds = ", ".join(str(v.dtype if isinstance(v, Tensor) else type(v).__name__) for v in given.values())
        raise TypeError(f"x must be floating point to have a score, got {kinds or 'nothing'}")
    for key in penalized:
        if key not in tensors:
            raise ValueError(f"penalized names {key!r}, which is none of x's tensors: {[*tensors]}")
        if not tensors[key].is_floating_point():
            raise TypeError(f"x must be floating point to have a score, got {tensors[key].dtype}")
    xs = tuple(tensors[key] for key in penalized)
    if any(t.ndim < 2 or len(t) != len(xs[0]) for t in xs):
        raise ValueError(f"x must have shape [B, ...], got {[list(t.shape) for t in xs]}")
    return _Batch(xs, tuple(penalized), {key: v for key, v in given.items() if key not in penalized})


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach()


def _plain(t: Tensor) -> Tensor:
    """The same memory as no subclass, which torch.compile may not take; one that is more than its memory stays."""
    if type(t) is Tensor or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return t
    with torch._C.DisableTorchFunctionSubclass():
        return t.as_subclass(Tensor)


def _check_no_dropout(model: nn.Module, regularizer: str) -> None:
    for name, module in model.named_modules():
        inside = isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
        rate = module.dropout if inside else getattr(module, "p", 0)
        drops = inside or isinstance(module, nn.modules.dropout._DropoutNd)
        if (drops or type(module).__name__ == "StochasticDepth") and module.training and rate > 0:
            raise ValueError(
                f"regularizer {regularizer}: {name} ({type(module).__name__}) drops other units in each of the two "
                "forwards whose difference is penalized, which would be that of the masks: set its probability to 0, "
                "or put it in eval mode"
            )


def _detached_batch(batch: _Batch) -> _Batch:
    others = {key: _detached(v) for key, v in batch.others.items()}
    return batch._replace(xs=tuple(_detached(x) for x in batch.xs), others=others)


def _leaves(batch: _Batch) -> _Batch:
    return batch._replace(xs=tuple(x.detach().requires_grad_() for x in batch.xs))


def _as_it_is(target: Any) -> Any:
    return target


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    ce, _ = functional.density_cross_entropy(logits, target)
    return mean_over_targets(ce, target)
