"""What the objective returns: a loss whose gradients have been computed already, and values that have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from densreg import _torch


class ObjectiveOutput(NamedTuple):
    """What a step of :class:`densreg.RegularizedObjective` returns. Only ``loss`` can be differentiated.

    The other fields are for inspection. A loss term made of them would train nothing, so its backward raises an error:
    put such a term into ``criterion``. ``.detach()`` turns them into constants; the logits need it before ``.numpy()``.
    Scalars are float32 (float64 for float64 logits); ``ce`` of a ``criterion`` has the dtype that it returns.

    Attributes:
        loss: scalar, ``ce + coeff * penalty``.
        logits: [B, C], of the model's dtype.
        ce: scalar, the criterion; with auxiliary classifiers, theirs included.
        penalty: scalar, NaN where it was not computed: without gradients, and on the steps that ``interval`` skips.
    """

    loss: Tensor
    logits: Tensor
    ce: Tensor
    penalty: Tensor


class HeadOutput(NamedTuple):
    """:class:`ObjectiveOutput` of an objective with ``head``, whose last layer is computed without logits.

    Attributes:
        loss: as there.
        logits: [B, C] where they were asked for, ``objective(x, y, logits=True)``, else None.
        ce: as there.
        penalty: as there.
        correct: [B] bool, whether the target's logit is larger than every other: the accuracy is its mean. An ignored
            target is not correct.
    """

    loss: Tensor
    logits: Tensor | None
    ce: Tensor
    penalty: Tensor
    correct: Tensor


class AttachGradients(Function):
    """Attaches precomputed gradients to a loss; its backward returns them, times the incoming gradient."""

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
        factor = incoming if ctx.factor is None else incoming * ctx.factor
        # Reading the factor costs nothing on a CPU. Gradients that are not scaled are returned without a copy, once.
        if factor.device.type != "cpu" or factor.item() != 1:
            gradients = _torch.scaled(list(gradients), factor)
        elif _torch.keeps_graph():  # another backward will hand them out again
            gradients = [g.clone() for g in gradients]
        else:
            gradients = _unalias(gradients)
        return None, None, None, *gradients


class NoGradient(Function):
    """Values for logging, whose backward raises: a loss term made of them would give the parameters no gradient."""

    @staticmethod
    def forward(ctx, values, *parameters):
        ctx.set_materialize_grads(False)
        logits, ce, penalty, *others = values
        return logits.detach(), ce.as_subclass(_Scalar), penalty.as_subclass(_Scalar), *others

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
    """A scalar that requires grad but can be read as a number: no warning from float(), no error from numpy()."""

    __torch_function__ = _torch.ordinary_results  # type: ignore[assignment]

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


def _unalias(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, no two of which share memory: w.grad is added to and clipped in place."""
    seen, result = set(), []
    for g in gradients:
        if g.layout == torch.strided:
            memory = g.untyped_storage().data_ptr()
            g = g.clone() if memory in seen else g
            seen.add(memory)
        result.append(g)
    return result
