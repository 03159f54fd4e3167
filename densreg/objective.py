"""The penalized loss of a model as one training step: forward, score, double backward and gradients in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densreg import _torch, directional, functional, paths, regularizers, wrapped
from densreg._torch import tree_leaves, tree_map
from densreg.batch import Batch, batch_of, detached, detached_batch, for_graph, leaves, rows, with_inputs
from densreg.compiling import CompiledStep
from densreg.head import (
    AUTO_CLASSES,
    check_name,
    find_head,
    head_step,
    log_density_without_logits,
    without_gradients,
)
from densreg.paths import Inputs
from densreg.regularizers import REGULARIZERS, Density, Regularizer, trait
from densreg.results import AttachGradients, HeadOutput, NoGradient, ObjectiveOutput
from densreg.second_order import fast_second_order
from densreg.step import (
    StepResult,
    StepSpec,
    check_sharing,
    classify,
    directional_step,
    labels_of,
    loss_of,
    named_buffers,
    own_logits,
    raise_kept_tensor,
    restore_buffers,
    samples_interact,
    save_buffers,
    whole_step,
)


@dataclass
class _Known:
    """What an objective's steps have found out: until an option changes, and in this process alone."""

    differences: directional.Checks = field(default_factory=directional.Checks)
    value: bool = False
    """Whether the penalty's value has been checked: a look at it waits for the device."""
    wrappers: int | None = None
    """How many wrappers had been made when the modules were last looked for in them."""
    interacting: dict[tuple, bool] = field(default_factory=dict)
    """Whether samples interact, by :func:`densreg._torch.traits_of` of each module."""


class RegularizedObjective(nn.Module):
    """Cross-entropy and density penalty of a model: ``out = objective(x, y); out.loss.backward()``.

    Only ``out.loss`` has gradients: the logits, the cross-entropy and the penalty are for inspection. The call itself
    computes the forward, the input score, its double backward, the loss and the parameters' gradients, by default as
    one compiled graph; ``backward()`` then attaches these gradients. So the loss cannot be differentiated a second
    time, and parameters must not change between the two calls. ``x.grad`` is not touched.

        objective = densreg.RegularizedObjective(model, coeff=0.1)
        for x, y in loader:
            out = objective(x, y)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    With F the cost of one forward pass, a plain step costs 3F, and a penalized one 6F. Two options are cheaper, but
    change what is optimized. With ``interval=k`` the penalty is part of every k-th step only, with k times the weight,
    (3 + 3/k) F on average. With ``fraction=s`` it is computed on a random part of the batch, which goes through the
    model apart from the rest: (3 + 3s) F, an unbiased estimate. Where a layer uses batch statistics (BatchNorm in
    training mode) the part goes through the model once more, so that the cross-entropy and the running statistics stay
    those of the whole batch: (3 + 6s) F, which saves time for s < 1/2. The penalty is then biased: it is that of a
    smaller batch.

    Under ``torch.no_grad()`` only the cross-entropy is computed, by the model as it is, in eager mode.

    Every option is an attribute too (``compile`` as ``compiled``): an assigned value is checked and takes effect in the
    next step, which compiles again.

    :func:`densreg.density_penalty` says what the gradient is where a score is 0, as in a model with a zero head.

    Args:
        model: [B, ...] -> logits [B, C], with its parameters on one device; any ``torch.nn.Module``. torchvision's
            GoogLeNet and Inception return auxiliary logits in training: these enter the cross-entropy at their usual
            weights. A compiled model is unwrapped. The model is not changed, and stays available as
            ``objective.model``.
        coeff: weight of the penalty, >= 0; for pixels in [0, 1] begin with 0.1 or less, and for x divided by a standard
            deviation s with 1 / s of that. ``objective.coeff`` is a tensor buffer: ``objective.coeff.fill_(0.2)``, or
            ``objective.coeff = 0.2``, changes it without a recompilation. It is not part of the state_dict.
        p: order of the norm, 1 <= p <= inf.
        path: a name in the table of :mod:`densreg.paths`; or "directional", a finite difference that needs first-order
            kernels only, for models that cannot be differentiated twice (which :func:`densreg.check_model` finds out):
            see ``central``. It runs in eager mode.
        compile: whether the step is compiled, as one graph; where that is impossible the first call raises an error.
        interval: k above; counts in training mode only (in eval mode every step has the penalty). None leaves the
            penalty out of every step.
        fraction: s above, 0 < s <= 1, rounded to at least one sample.
        criterion: (logits, target) -> scalar loss; None is the mean cross-entropy of [B] int64 classes. If it is a
            module its parameters are trained too.
        output: model output -> logits [B, C], for models that do not return a tensor. If it is a module its parameters
            are trained too; those of a module that a function merely calls are not.
        central: for path "directional": two perturbed forwards instead of one, 10F instead of 7F, with an error that
            is quadratic in the step instead of linear.
        mode, backend: as for :func:`torch.compile`.
        regularizer: the penalty: a name in the table of :mod:`densreg.regularizers`, with ``p`` as its order if it has
            one; or a regularizer with its own options, ``regularizers.Cure(h=3)``. All but the density penalty need a
            class for each sample, target [B] int64.
        labels: target -> [B] int64 classes, for targets that are not just classes, together with a criterion for them.
        penalized: which of several inputs are penalized, by position or name; None: all floating-point ones.
        head: the model's last layer, an nn.Linear or its name, to be computed without logits [B, C]: for very many
            classes (:mod:`densreg.linear`). The model must return its output untouched, and criterion, output,
            fraction, path and regularizer must be the defaults. The output is a :class:`HeadOutput`. "auto": the layer
            that comes last in the first batch, if all of that holds and it has at least 100,000 classes
            (``densreg.head.AUTO_CLASSES``); otherwise as without ``head``.

    Raises:
        TypeError, ValueError: what was given and what was expected.
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
    head: str | None
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
        head: str | nn.Linear | None = None,
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
        self._set({"head": check_name(self.model, head)})
        self._head = self._head_to_take()
        self.calls = 0
        """Training steps so far: the penalty is part of those that ``interval`` divides. In the state_dict."""
        self._compiled_step = self._compile()
        self._known = _Known()
        self._one: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """An option that is assigned is checked as in the constructor, and counts from the next step on."""
        if name == "coeff" and hasattr(self, name):
            _check_constant(value)
            with torch.no_grad():
                on_device = isinstance(value, Tensor) and value.device.type != "cpu"  # a look at it would wait
                self.coeff.fill_(value if on_device else _coefficient(value))
        elif name == "compile":
            raise AttributeError("compile is a method of every nn.Module: assign to objective.compiled")
        elif name == "model":
            self._change({name: wrapped.bare(value)})
        elif name == "regularizer":
            p, kind = (self.p, self.path) if isinstance(value, str) else (2, "fused")
            path = "directional" if self.path == "directional" else kind
            self._change(_penalty_options(p, path, value))
        elif name in ("p", "path"):
            regularizer: Any = self.regularizer
            own = regularizers.option_names(regularizer)
            if REGULARIZERS.get(regularizer.name) is type(regularizer) and {"p"} <= own <= {"p", "path"}:
                regularizer = regularizer.name  # it is made anew: no other option is lost
            self._change(_penalty_options(**{"p": self.p, "path": self.path, name: value}, regularizer=regularizer))
        elif name == "head":
            self._change({name: check_name(self.model, value)})
        elif name in _OPTIONS:
            self._change({name: _checked(name, value)})
        else:
            super().__setattr__(name, value)

    def _change(self, options: dict[str, Any]) -> None:
        before = {name: getattr(self, name) for name in options if hasattr(self, name)}
        self._set(options)
        if "_compiled_step" in self.__dict__:
            try:
                self._head = self._head_to_take()
                self._compiled_step = self._compile()  # anew, so that nothing in it is of before
            except Exception:
                self._set(before)
                self._head = self._head_to_take()
                raise
            self._known = _Known()

    def _set(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            if hasattr(self, name):  # a function may follow a module, and a module a function
                delattr(self, name)
            super().__setattr__(name, value)

    def _compile(self) -> CompiledStep | None:
        """The step as one graph, or None where it runs in eager."""
        if not self.compiled or self.path == "directional":
            return None
        step: Any = whole_step if self._head in (None, "auto") else head_step
        return CompiledStep(step, self.mode, self.backend, penalized=self.interval is not None)

    def _head_to_take(self) -> str | None:
        """The name of the layer that is taken without logits, "auto" where the first batch has to tell, or None."""
        if self.head is None:
            return None
        for name, expected in (
            *(("criterion", None), ("output", None), ("fraction", 1.0), ("path", "fused")),
            ("regularizer", Density(self.p)),
        ):
            given = getattr(self, name)
            if given != expected:
                if self.head == "auto":
                    return None
                raise ValueError(f"head: expected {name}={expected!r} beside it, got {given!r}")
        return check_name(self.model, self.head)

    def _with_head(self, spec: StepSpec, batch: Batch) -> StepSpec:
        """The spec with its head, if it has one."""
        if self._head == "auto":
            name = find_head(spec, batch)
            large = name is not None and cast(nn.Linear, spec.model.get_submodule(name)).out_features >= AUTO_CLASSES
            self._head = name if large else None
            self._compiled_step = self._compile()
        if self._head is None:
            return spec
        layer = spec.model.get_submodule(self._head)
        if not isinstance(layer, nn.Linear):  # it was one when it was named
            check_name(self.model, self._head)
        return spec._replace(head=cast(nn.Linear, layer))

    def _spec(self) -> StepSpec:
        return StepSpec(
            model=self.model,
            output=self.output,
            criterion=self.criterion,
            labels=self.labels,
            regularizer=self.regularizer,
            p=self.p,
            one_read=self.regularizer == Density(self.p) and self.criterion is None,
            central=self.central,
            trained=_torch.trained_parameters(self),
            checks=self._known.differences,
        )

    # In a torch.compile'd function Dynamo leaves this call out; with fullgraph=True that is an error with this reason.
    @torch.compiler.disable(reason="RegularizedObjective compiles its own step: call it outside of torch.compile")
    def forward(
        self,
        x: Inputs | Mapping[str, Any],
        target: Any,
        loss_scale: float | Tensor | None = None,
        logits: bool = False,
    ) -> ObjectiveOutput | HeadOutput:
        """The penalized loss of a batch.

        Args:
            x: [B, ...], floating point, or several inputs: a sequence, ``model(*x)``, or a mapping, ``model(**x)``. Of
                several inputs the floating-point ones, or those that ``penalized`` names, are penalized by their joint
                norm. The others (masks, token ids, flags) are passed on; tensors of length B among them are assumed to
                have a row for each sample. The model gets copies, which it may change in place. No gradient reaches
                what x was computed from.
            target: [B] int64 classes, or what the criterion takes. In a compiled step a float in it becomes a tensor of
                shape [], because each new value of a Python number would cause a new compilation.
            loss_scale: needed in float16, where gradients underflow: the scale of
                :class:`torch.amp.GradScaler`, ``scaler.scale(torch.ones((), device=x.device))``, by which the loss is
                multiplied before it is differentiated. ``out.loss`` and its gradients are returned unscaled, so that
                ``scaler.scale(out.loss).backward()`` follows as usual.
            logits: with ``head``, whether to compute the logits too, without a graph.

        Returns:
            An :class:`ObjectiveOutput`, or a :class:`HeadOutput` of an objective with ``head``.

        Raises:
            TypeError, ValueError: what was given and what was expected.
            RuntimeError: the step cannot be compiled as one graph, or would lose its second derivative there (the model
                calls an autograd.Function not marked ``torch.compiler.allow_in_graph``), a layer cannot be
                differentiated twice, or the Hessian to be penalized is 0 because the model is piecewise linear.
        """
        torch.clear_autocast_cache()  # of weights as they were, where autocast goes over several steps
        # fully_shard may have come after the constructor.
        for module in (self, self.model, self.criterion, self.output):
            wrapped.check_unsharded(module)
        batch = batch_of(x, self.penalized)
        spec = self._with_head(self._spec(), batch)
        if not torch.is_grad_enabled():
            if spec.head is not None:
                h, ce, correct = without_gradients(spec, batch, target)
                given = F.linear(h, spec.head.weight, spec.head.bias) if logits else None
                return HeadOutput(ce, given, ce, torch.full_like(ce, float("nan")), correct)
            outputs = classify(spec, batch)
            with torch.autocast(batch.xs[0].device.type, enabled=False):
                ce = loss_of(spec, outputs, target)
            return ObjectiveOutput(ce, outputs[0][1], ce, torch.full_like(ce, float("nan")))
        plain = type(target) is Tensor
        if any(isinstance(t, Tensor) and t.requires_grad for t in ([target] if plain else tree_leaves(target))):
            raise ValueError(
                "the target must not require grad: no gradient would reach it. detach() it, or let a module that is "
                "the criterion compute what is to be trained"
            )
        batch = detached_batch(batch)
        xs = batch.xs
        if self._compiled_step is not None:
            target = target.resolve_neg() if plain else tree_map(lambda v: for_graph(v, xs[0].device), target)
        if not spec.trained:
            raise ValueError("no parameter of the model requires grad: there is nothing to train")
        if self._known.wrappers != wrapped.wrappers_made():
            wrapped.check_parallel(self)
            self._known.wrappers = wrapped.wrappers_made()
        wrapped.check_averaged(self, spec.trained)
        penalized, coeff = self.interval is not None, self.coeff
        if self.model.training:
            if self.interval is not None:
                penalized = self.calls % self.interval == 0
                coeff = coeff * self.interval
            self.calls += 1
        if penalized:
            trait(self.regularizer, "check_model")(self.model)
            once = self.fraction == 1 and self.path != "directional" and trait(self.regularizer, "first_order")
            if not (once or self._known.value):
                check_sharing(spec, batch)
        factor, scale = self._scales(xs, spec.trained, loss_scale, coeff)
        try:
            *values, gradients = self._run(spec, batch, target, coeff, scale, penalized)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise_kept_tensor(spec, batch, error)
            raise
        if penalized and not self._known.value:
            trait(self.regularizer, "check_value")(values[3])
            self._known.value = True
        if self._compiled_step is not None and self.mode in ("reduce-overhead", "max-autotune"):
            # CUDA graphs: the next replay would overwrite them.
            values = [t.clone() for t in values]
            gradients = [g if g is None else g.clone() for g in gradients]
        # As in torch what the loss does not depend on is no part of its graph: DDP has to know.
        used = [w for w, g in zip(spec.trained, gradients, strict=True) if g is not None]
        loss = AttachGradients.apply(values[0], factor, [g for g in gradients if g is not None], *used)
        if spec.head is not None and logits:
            with torch.no_grad():
                values[1] = F.linear(values[1], spec.head.weight, spec.head.bias)
        of_batch, ce, penalty, *correct = NoGradient.apply(values[1:], *used)
        if spec.head is None:
            return ObjectiveOutput(loss, of_batch, ce, penalty)
        return HeadOutput(loss, of_batch if logits else None, ce, penalty, correct[0])

    @torch.inference_mode(False)  # under which there are no gradients either
    @torch.enable_grad()
    def penalty(self, x: Inputs | Mapping[str, Any], target: Any = None) -> Tensor:
        """The penalty's value; the model's buffers (running statistics) stay as they are.

        Args:
            x: as in :meth:`forward`.
            target: as in :meth:`forward`; the density penalty needs none. Penalties that draw random numbers use a
                fixed seed.

        Returns:
            A scalar without a graph, float32 (float64 for float64 logits).
        """
        torch.clear_autocast_cache()
        batch = leaves(detached_batch(batch_of(x, self.penalized)))
        spec = self._with_head(self._spec(), batch)
        target = tree_map(detached, target)
        check_sharing(spec, batch)
        saved = save_buffers(spec)
        try:
            if not trait(self.regularizer, "first_order"):
                return _penalty_of_rival(spec, batch, target)
            buffers = named_buffers(spec)
            if spec.head is not None:
                log_density = log_density_without_logits(spec, batch, buffers)
            else:
                log_density = functional.log_density(own_logits(spec, batch, buffers))
            with torch.autocast(log_density.device.type, enabled=False):
                score = directional.score_without_graph(log_density, batch.xs, [*spec.trained, *batch.xs])
                return directional.dual_direction(score, self.p)[0].mean()
        finally:
            restore_buffers(saved)

    def _scales(
        self, xs: tuple[Tensor, ...], trained: Sequence[Tensor], loss_scale: float | Tensor | None, coeff: Tensor
    ) -> tuple[Any, Tensor]:
        """(factor, scale): of the gradients in backward(), None for 1; and of the loss before it is differentiated."""
        device = xs[0].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        if loss_scale is None:
            if autocast or any(t.dtype == torch.float16 for t in (*xs, *trained)):
                raise ValueError(
                    "float16 needs loss_scale, or small gradients underflow without a word: with a GradScaler, "
                    "objective(x, y, loss_scale=scaler.scale(torch.ones((), device=x.device)))"
                )
            if self._one is None or self._one.device != device:
                self._one = torch.ones((), device=device)
            return None, self._one
        scale = torch.as_tensor(loss_scale, dtype=torch.float32, device=device).detach()
        if scale.ndim:
            raise ValueError(f"loss_scale must be a number or a tensor of shape [], got shape {list(scale.shape)}")
        # The scale was made for the cross-entropy's gradient; the penalty's, times a large coefficient, would overflow.
        scale = scale / coeff.clamp_min(1)
        return 1 / scale, scale

    def _run(
        self, spec: StepSpec, batch: Batch, target: Any, coeff: Tensor, scale: Tensor, penalized: bool
    ) -> StepResult:
        """The step, of the whole batch or with ``fraction`` of a part of it."""
        if not penalized:
            return self._call(spec, batch, target, coeff, scale, penalized=False)
        size, device = len(batch.xs[0]), batch.xs[0].device
        chosen = max(1, round(self.fraction * size))
        if chosen >= size:  # an empty batch too
            return self._call(spec, leaves(batch), target, coeff, scale)
        again = self.path == "directional" or self._samples_interact(spec, batch)
        order = torch.randperm(size, device=device)
        part = leaves(rows(batch, order[size - chosen :]))
        needs_target = trait(self.regularizer, "needs_target")
        if again and not needs_target:
            return self._call(spec, part, target, coeff, scale, whole=batch)
        if not isinstance(target, Tensor):
            raise TypeError(f"fraction takes a part of the batch: target must be a tensor, got {type(target).__name__}")
        of_part = target[order[size - chosen :]] if needs_target else None
        if again:
            return self._call(spec, part, target, coeff, scale, whole=batch, part=of_part)
        rest = rows(batch, order[: size - chosen])
        result = self._call(spec, part, target[order], coeff, scale, rest=rest, part=of_part)
        return result._replace(logits=torch.empty_like(result.logits).index_copy_(0, order, result.logits))

    def _samples_interact(self, spec: StepSpec, batch: Batch) -> bool:
        """:func:`densreg.step.samples_interact`, tried once for each mode and make of the modules."""
        mode = tuple(_torch.traits_of(module) for module in self.model.modules())
        interacting = self._known.interacting
        if mode not in interacting:
            found = samples_interact(spec, batch)
            if found is None:  # undecided: what is right either way, and another trial in the next step
                return True
            interacting[mode] = found
        return interacting[mode]

    def _call(self, spec: StepSpec, *args: Any, **kwargs: Any) -> Any:
        if self._compiled_step is not None:
            return self._compiled_step(spec, *args, **kwargs)
        if self.path == "directional":
            with _torch.without_gradient_hooks(spec.trained):
                return directional_step(spec, *args, **kwargs)
        step: Any = whole_step if spec.head is None else head_step
        return step(spec, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled_step": None, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        new = {"head": None, "_head": None, "_one": None}  # older ones have none of these
        super().__setstate__({**new, **state, "_known": _Known()})  # maybe in another process
        self._compiled_step = self._compile()

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
        super().__setattr__("coeff", value.to(self.coeff.device))  # .half() and .to(bfloat16) are for the model
        return self

    def extra_repr(self) -> str:
        self._check_no_loop()
        options = {name: getattr(self, name) for name in ("regularizer", "interval", "fraction")}
        options["compiled"] = self._compiled_step is not None
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


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
        if isinstance(value, nn.Module):
            wrapped.check_bare(name, filter(wrapped.is_trained, value.modules()))  # a teacher in it may be wrapped
        return _identity if value is None and name == "labels" else value
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
    if path == "directional" and regularizer != "density" and not getattr(regularizer, "first_order", False):
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
    _check_constant(coeff)
    value = float(coeff)
    if not 0 <= value < float("inf"):
        raise ValueError(f"coeff must be finite and at least 0, got {value}")
    return value


def _check_constant(coeff: Any) -> None:
    if isinstance(coeff, Tensor) and coeff.requires_grad:
        raise ValueError(
            "coeff must be a constant, got a tensor that requires grad, which no gradient would reach: detach() it, or "
            "train it with densreg.density_loss"
        )


def _identity(target: Any) -> Any:
    return target


def _penalty_of_rival(spec: StepSpec, batch: Batch, target: Any) -> Tensor:
    def logits_of(inputs: tuple[Tensor, ...]) -> Tensor:
        return own_logits(spec, with_inputs(batch, inputs), buffers)

    buffers, xs = named_buffers(spec), batch.xs
    device = xs[0].device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        fast_second_order(),
    ):
        torch.manual_seed(0)
        return spec.regularizer(logits_of, logits_of(xs), xs, labels_of(spec, target)).mean().detach()
