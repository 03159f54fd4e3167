"""The penalized loss of a model as one training step: forward, score, double backward and gradients in one graph."""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from densreg import directional, functional, ops, paths, regularizers
from densreg.merge import MergeProducts
from densreg.paths import Inputs
from densreg.penalty import density_loss, mean_over_targets
from densreg.regularizers import Density, Hessian, Regularizer
from densreg.second_order import KEPT_ADVICE, fast_second_order, hardsigmoid_under_compile, kept_from_earlier

AUXILIARY = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}
"""Weight of the auxiliary classifiers' loss, by torchvision's output type: what its models are trained with."""


class ObjectiveOutput(NamedTuple):
    """What a step of :class:`RegularizedObjective` gives. Only ``loss`` carries a graph.

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


_Outputs = list[tuple[float, Tensor]]
"""Logits with their weight in the loss: the classifier's own first, of weight 1, then those of auxiliary ones."""

_Results = tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor | None]]
"""(loss, logits, ce, penalty), without graph, and the gradients of the trained parameters."""


def _whole_step(
    objective: RegularizedObjective,
    xs: tuple[Tensor, ...],
    target: Any,
    coeff: Tensor,
    scale: Tensor,
    penalized: bool = True,
    rest: tuple[Tensor, ...] | None = None,
    whole: tuple[Tensor, ...] | None = None,
    part: Any = None,
) -> _Results:
    """The step that becomes one graph.

    Args:
        xs: the inputs that are penalized; leaves that require grad.
        scale: of the loss, before anything is differentiated.
        rest: with ``fraction``, the inputs that are not penalized, which come before xs in the batch; or
        whole: the whole batch, where xs goes through the model once more.
        part: the target of xs, where it is not the whole target.
    """
    device = xs[0].device.type
    amp, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    regularizer = objective.regularizer

    def classify(inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(device, half, enabled=amp and not regularizer.precise):
            return objective._classify(inputs, _buffers(objective.model))[0][1]

    with fast_second_order():
        if whole is not None:
            outputs = objective._classify(whole)
            penalized_logits = classify(xs)
        else:
            outputs = objective._classify(xs)
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
    if penalty is None:
        penalty = torch.full_like(ce, float("nan"))
    return loss.detach(), logits.detach(), ce.detach(), penalty.detach(), gradients


def _directional_step(
    objective: RegularizedObjective,
    xs: tuple[Tensor, ...],
    target: Any,
    coeff: Tensor,
    scale: Tensor,
    penalized: bool = True,
    whole: tuple[Tensor, ...] | None = None,
) -> _Results:
    """The same by first-order kernels, in eager: see :mod:`densreg.directional`."""
    device = xs[0].device
    trained = objective._trained()
    leaves = [*trained, *xs, *(whole or ())]
    states = directional.random_states(device)
    buffers = {name: buffer.clone() for name, buffer in _buffers(objective.model).items()}  # as all forwards start from
    pieces = directional.Pieces()
    autocast = torch.is_autocast_enabled(device.type)
    apart = penalized and (autocast or whole is not None)  # the density is not that of the classifying forward

    with pieces.recorded() if penalized and not apart else contextlib.nullcontext():
        outputs = objective._classify(xs if whole is None else whole)
    with torch.autocast(device.type, enabled=False):  # half precision would drown a difference
        ce = loss = total = objective._loss_of(outputs, target)
        penalty = torch.full_like(ce, float("nan"))
        if penalized:

            def log_density(inputs: tuple[Tensor, ...], mode: TorchFunctionMode) -> Tensor:
                with directional.replayed(states, device), mode:
                    return functional.log_density(objective._classify(inputs, buffers)[0][1])

            at_x = log_density(xs, pieces.recorded()) if apart else functional.log_density(outputs[0][1])
            norm, direction = directional.dual_direction(_score(at_x, xs, leaves, retain_graph=True), objective.p)
            penalty = norm.mean()

            def difference(steps: int = 1) -> Tensor:
                return directional.difference(
                    lambda inputs: log_density(inputs, pieces.reused()), xs, direction, objective.central, at_x, steps
                )

            along = difference()
            objective._differences += 1
            if objective._differences & (objective._differences - 1) == 0:  # the first, second, fourth, eighth ...
                objective._check_followed(along, norm)
                if not objective._told:
                    pair = (directional.first_order_gradients(t, trained, leaves, True) for t in (along, difference(2)))
                    objective._check_smooth(*pair)
            weight = coeff.to(penalty.dtype)
            total = ce + weight * along / len(norm)
            loss = ce.detach() + weight * penalty
        gradients = directional.first_order_gradients(total * scale.to(total.dtype), trained, leaves)
    return loss.detach(), outputs[0][1].detach(), ce.detach(), penalty, gradients


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

    Only ``out.loss`` carries a graph: the logits, the cross-entropy and the penalty are there to be looked at. The
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

    Args:
        model: [B, ...] -> logits [B, C], with its parameters on one device; anything torch.nn. torchvision's GoogLeNet
            and Inception return auxiliary logits in training: these enter the cross-entropy at their usual weights. A
            compiled model is unwrapped. It stays what it is, as ``objective.model``.
        coeff: weight of the penalty, >= 0. ``objective.coeff`` is a tensor buffer: ``objective.coeff.fill_(0.2)``
            changes it without a recompilation. It is no part of the state_dict.
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

    Raises:
        TypeError, ValueError: what was given and what is wanted.
    """

    coeff: Tensor

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
    ) -> None:
        super().__init__()
        self.model = _bare(model)
        if isinstance(coeff, (bool, str)) or not isinstance(coeff, (int, float, Tensor)):
            raise TypeError(f"coeff must be a number, got {type(coeff).__name__}")
        value = float(coeff)
        if not 0 <= value < float("inf"):
            raise ValueError(f"coeff must be finite and at least 0, got {value}")
        if isinstance(interval, bool) or not isinstance(interval, int | None):
            raise TypeError(f"interval must be an int or None, got {type(interval).__name__}")
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
        for name, function in (("criterion", criterion), ("output", output), ("labels", labels)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable or None, got {type(function).__name__}")
        if path not in (*paths.PATHS, "directional"):
            raise ValueError(f"path must be one of {', '.join(paths.PATHS)}, directional; got {path!r}")
        first = next(self.model.parameters(), torch.empty(0))
        double = first.dtype == torch.float64
        self.register_buffer(
            "coeff",
            torch.tensor(value, dtype=torch.float64 if double else torch.float32, device=first.device),
            persistent=False,
        )
        self.p = functional.check_order(p)
        self.path = path
        if path == "directional":
            if regularizer != "density":
                raise ValueError(f'path "directional" is for the density penalty, got the regularizer {regularizer!r}')
            self.regularizer: Regularizer = Density(self.p)
        elif isinstance(regularizer, str):
            self.regularizer = regularizers.make(regularizer, self.p, path)
        elif callable(regularizer) and hasattr(regularizer, "name"):
            self.regularizer = regularizer
        else:
            raise TypeError(f"regularizer must be a name or a Regularizer, got {type(regularizer).__name__}")
        self.labels = labels or _as_it_is
        self.interval = interval
        self.fraction = float(fraction)
        self.criterion = criterion
        self.output = output
        self.central = central
        self.compiled = compile and path != "directional"
        self.calls = 0
        """Training steps so far: the penalty is part of those that ``interval`` divides. In the state_dict."""
        self.mode, self.backend = mode, backend
        self._compiled_step = _compile(self)
        self._told = self._nonzero = False
        self._differences = 0

    @property
    def at_once(self) -> bool:
        """Whether one read of the logits gives cross-entropy and penalty."""
        return self.regularizer == Density(self.p) and self.criterion is None

    def forward(self, x: Inputs, target: Any, loss_scale: float | Tensor | None = None) -> ObjectiveOutput:
        """The penalized loss of a batch.

        Args:
            x: [B, ...], floating point, or a sequence of such inputs, ``model(*x)``, whose joint norm is taken. It is
                detached: no gradient reaches what x came from.
            target: [B] int64 classes, or what the criterion takes.
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
        if torch.compiler.is_dynamo_compiling():  # not of another thread
            raise RuntimeError("RegularizedObjective compiles its own step: call it outside of torch.compile")
        for module in (self, self.model):  # fully_shard may have come after the constructor
            _check_unsharded(module)
        xs = _check_x(x)
        if not torch.is_grad_enabled():
            outputs = self._classify(xs)
            with torch.autocast(xs[0].device.type, enabled=False):
                ce = self._loss_of(outputs, target)
            return ObjectiveOutput(ce, outputs[0][1], ce, torch.full_like(ce, float("nan")))
        xs = tuple(t.clone() if t.is_inference() else t.detach() for t in xs)
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
        if self.compiled:
            target = tree_map_only(Tensor, _plain, target)
        try:
            *shown, gradients = self._run(xs, target, coeff, scale, penalized)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                self._raise_what_is_kept(xs, error)
            raise
        if penalized and isinstance(self.regularizer, Hessian) and not self._nonzero:
            if shown[3] == 0:
                raise RuntimeError(
                    "regularizer hessian: the Hessian of the model is 0, as it is piecewise linear: replace its "
                    "ReLU by SoftPlus (densreg train --softplus BETA)"
                )
            self._nonzero = True  # a look at the value waits for the device: once
        if self.compiled and self.mode in ("reduce-overhead", "max-autotune"):
            # CUDA graphs: the next replay would overwrite them.
            shown = [t.clone() for t in shown]
            gradients = [g if g is None else g.clone() for g in gradients]
        loss = _HandOut.apply(shown[0], factor, gradients, *trained)
        return ObjectiveOutput(loss, *shown[1:])

    @torch.enable_grad()
    def penalty(self, x: Inputs, target: Any = None) -> Tensor:
        """The penalty's value, a scalar without graph; the model's buffers (running statistics) stay as they are.

        Args:
            x: as in :meth:`forward`.
            target: as there; the density penalty needs none. What is random in others is drawn from a fixed seed.
        """
        xs = tuple(t.detach().requires_grad_() for t in _check_x(x))
        if not isinstance(self.regularizer, Density):
            return self._rival(xs, target)
        logits = self._classify(xs, _buffers(self.model))[0][1]
        with torch.autocast(logits.device.type, enabled=False):
            score = _score(functional.log_density(logits), xs, [*self._trained(), *xs])
            return directional.dual_direction(score, self.p)[0].mean()

    def _rival(self, xs: tuple[Tensor, ...], target: Any) -> Tensor:
        def classify(inputs: tuple[Tensor, ...]) -> Tensor:
            return self._classify(inputs, _buffers(self.model))[0][1]

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

    def _run(self, xs: tuple[Tensor, ...], target: Any, coeff: Tensor, scale: Tensor, penalized: bool) -> _Results:
        if not penalized:
            return self._call(self._step(), xs, target, coeff, scale, penalized=False)
        batch = len(xs[0])
        chosen = max(1, round(self.fraction * batch))
        if chosen == batch:
            return self._call(self._step(), _leaves(xs), target, coeff, scale)
        order = torch.randperm(batch, device=xs[0].device)
        part = _leaves(tuple(x[order[batch - chosen :]] for x in xs))
        apart = self.path == "directional" or _uses_batch_statistics(self.model)
        if apart and isinstance(self.regularizer, Density):
            return self._call(self._step(), part, target, coeff, scale, whole=xs)
        if not isinstance(target, Tensor):
            raise TypeError(f"fraction takes a part of the batch: target must be a tensor, got {type(target).__name__}")
        of_part = None if isinstance(self.regularizer, Density) else target[order[batch - chosen :]]
        if apart:
            return self._call(self._step(), part, target, coeff, scale, whole=xs, part=of_part)
        rest = tuple(x[order[: batch - chosen]] for x in xs)
        loss, logits, *others = self._call(self._step(), part, target[order], coeff, scale, rest=rest, part=of_part)
        return loss, torch.empty_like(logits).index_copy_(0, order, logits), *others  # type: ignore[return-value]

    def _call(self, step: Callable[..., _Results], *args, **kwargs) -> _Results:
        if self._compiled_step is None:
            with _without_hooks(self._trained()):
                return step(self, *args, **kwargs)
        with _COMPILED, torch._dynamo.config.patch(_DYNAMO), hardsigmoid_under_compile():
            try:
                return self._compiled_step(self, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                failure = error
        self._raise_what_eager_raises(step, *args, **kwargs)
        self._raise_what_is_kept(args[0], failure)
        for name, t in (*self.named_parameters(), *self.named_buffers()):
            if type(t) not in (Tensor, nn.Parameter, nn.Buffer):
                raise RuntimeError(
                    f"the training step could not be compiled: {name} is a {type(t).__name__}, a subclass of Tensor, "
                    "expected a plain one (above in full). compile=False runs it in eager, where there is no error"
                ) from failure
        lines = (str(failure).strip() or type(failure).__name__).splitlines()
        reason = next((line for line in lines if not line.endswith("raised:")), lines[0])
        raise RuntimeError(
            f"the training step could not be compiled as one graph: {reason} (above in full). compile=False runs it in "
            "eager, where there is no error"
        ) from failure

    def _raise_what_eager_raises(self, step: Callable[..., _Results], *args, **kwargs) -> None:
        """After a failed compilation: the error of the step itself, if it has one, says more than Dynamo's."""
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        device = args[0][0].device
        try:
            with directional.replayed(directional.random_states(device), device), _without_hooks(self._trained()):
                step(self, *args, **kwargs)
        finally:
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)

    def _raise_what_is_kept(self, xs: tuple[Tensor, ...], error: Exception) -> None:
        """Of a step whose graph is in part that of an earlier one: which tensor the model kept."""
        for name, attribute in kept_from_earlier(self.model, lambda: self._classify(xs, _buffers(self.model))):
            kind = type(self.model.get_submodule(name)).__name__
            raise RuntimeError(
                f"{name or 'the model'} ({kind}) keeps a tensor of an earlier step's graph, {attribute}, which cannot "
                f"be differentiated again. {KEPT_ADVICE}"
            ) from error

    def _classify(self, xs: tuple[Tensor, ...], buffers: dict[str, Tensor] | None = None) -> _Outputs:
        """The model's logits; with copies of these buffers in place of its own, which stay as they are."""
        if buffers is None:
            # Past what model.compile() has put there.
            compiled = self.model._compiled_call_impl is not None
            output = self.model._call_impl(*xs) if compiled else self.model(*xs)
        else:
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            output = torch.func.functional_call(self.model, copies, xs, tie_weights=False)
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

    def _check_followed(self, along: Tensor, norm: Tensor) -> None:
        """The difference must be the norm's sum, which is known. Reading it synchronises, so it is done seldom."""
        found, wanted = along.item(), norm.sum().item()
        if abs(found - wanted) > 0.1 * wanted:
            raise RuntimeError(
                f'path "directional": the difference of the log density is {found:.4g}, and {wanted:.4g} by the score. '
                "The perturbed forwards differ from the first by more than their input: random numbers that are not of "
                "torch's, Python's or NumPy's own generators, a detached part, or too curved a network (try central)"
            )

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

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def _apply(self, fn, recurse=True):
        value = self.coeff
        super()._apply(fn, recurse)
        self.coeff = value.to(self.coeff.device)  # .half() and .to(bfloat16) are for the model
        return self

    def extra_repr(self) -> str:
        options = ["regularizer", "interval", "fraction", "compiled"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)


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


class _Refusing:
    """A backend of torch.compile that raises where second order would be lost without a word: see functional.py."""

    def __init__(self, mode: str | None, backend: str | Callable) -> None:
        self.inner: Any
        if backend == "inductor":
            self.inner = torch._TorchCompileInductorWrapper(mode, None, False)
        else:
            self.inner = torch._TorchCompileWrapper(backend, mode, None, False)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        if any("autograd_function_apply" in str(node.target) for each in graphs for node in each.nodes):
            raise RuntimeError(
                "the model calls an autograd.Function, whose second order torch.compile loses without an error: mark "
                "its class with torch._dynamo.allow_in_graph"
            )
        if torch._inductor.config.post_grad_custom_pre_pass is not None:  # the user's own: there is room for one
            return self.inner(graph, inputs)
        with torch._inductor.config.patch(post_grad_custom_pre_pass=MergeProducts()):
            return self.inner(graph, inputs)

    def __getattr__(self, name: str) -> Any:  # name, configuration, reset
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def _compile(objective: RegularizedObjective) -> Callable[..., _Results] | None:
    """The step as one graph, or None where it runs in eager."""
    if not objective.compiled:
        return None
    # Dynamo keeps what it compiled by code object, with one limit for all: each objective gets its own.
    code = _whole_step.__code__.replace()
    step = types.FunctionType(code, _whole_step.__globals__, argdefs=_whole_step.__defaults__)
    mode, backend = objective.mode, objective.backend
    if objective.interval is not None:  # a plain step has no second order to lose
        mode, backend = None, _Refusing(mode, backend)
    return torch.compile(step, fullgraph=True, dynamic=False, mode=mode, backend=backend)


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


def _check_x(x: Inputs) -> tuple[Tensor, ...]:
    xs = (x,) if isinstance(x, Tensor) else tuple(x) if isinstance(x, Sequence) else ()
    if not xs or not all(isinstance(t, Tensor) for t in xs):
        raise TypeError(f"x must be a tensor or a non-empty sequence of tensors, got {type(x).__name__}")
    for t in xs:
        if not t.is_floating_point():
            raise TypeError(f"x must be floating point to have a score, got {t.dtype}")
        if t.ndim < 2 or len(t) != len(xs[0]):
            raise ValueError(f"x must have shape [B, ...], got {[list(t.shape) for t in xs]}")
    return tuple(_plain(t) for t in xs)


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


def _leaves(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in xs)


def _uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a layer's output, or what it keeps, depends on which samples are in the batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return True
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            return True
    return False


def _as_it_is(target: Any) -> Any:
    return target


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    ce, _ = functional.density_cross_entropy(logits, target)
    return mean_over_targets(ce, target)
