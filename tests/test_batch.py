"""What the objective is called with: several inputs, inputs by name, subclasses of Tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import (
    Layer,
    Net,
    Product,
    Subclass,
    by_autograd,
    gradients,
    next_part,
    nothing,
    objective_of,
)
from torch import Tensor, nn

import densreg
from benchmarks.second_order import relative_error
from densreg import RegularizedObjective

pytestmark = pytest.mark.compile

Y = torch.tensor([0, 1, 2, 3, 4])


def test_several_inputs():
    model = Product().double()
    u, v = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    out = objective_of(model, criterion=nothing)((u, v), Y)
    leaves = (u.clone().requires_grad_(), v.clone().requires_grad_())
    penalty = densreg.density_penalty(model(*leaves), leaves)
    torch.testing.assert_close(out.penalty, penalty.detach())
    out.loss.backward()
    assert relative_error(gradients(model), torch.autograd.grad(0.5 * penalty, list(model.parameters()))) < 1e-10


@pytest.mark.parametrize("options", [{"interval": 2}, {"fraction": 0.4}, {"path": "directional", "interval": 2}])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_x_is_detached(compiler, options, fresh_dynamo):
    leaf = torch.randn(5, 4, requires_grad=True)
    plain = leaf.detach()
    with torch.inference_mode():
        inference = torch.randn(5, 4)
    objective = objective_of(Net(nn.Tanh()), compiler, **options)
    for x in (leaf, leaf.sin(), leaf.sin(), leaf, plain, plain, inference):  # where an interval is 2, every other plain
        objective(x, Y).loss.backward()
    assert leaf.grad is None
    assert not plain.requires_grad


class _Residual(nn.Module):
    """A part of its score does not go through the convolution, so that the other part would not be missed."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x):
        return self.head((x + self.conv(x).tanh()).flatten(1))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("kind", ["subclass", "tv_tensor"])
def test_a_subclass_as_input_and_target(kind, compiler, fresh_dynamo):
    model = _Residual().double()
    twin, x = copy.deepcopy(model), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    _, expected = by_autograd(twin, x, Y, 1.0, criterion=nothing)
    given = x.as_subclass(Subclass) if kind == "subclass" else pytest.importorskip("torchvision.tv_tensors").Image(x)
    out = objective_of(model, compiler, 1.0, criterion=nothing)(given, Y.as_subclass(Subclass))
    out.loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    assert type(out.logits) is Tensor


def test_subclasses_in_the_model(fresh_dynamo):
    model = _Residual().double()
    twin, x = copy.deepcopy(model), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    _, expected = by_autograd(twin, x, Y, 1.0, criterion=nothing)
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Subclass))
    objective_of(model, None, 1.0, criterion=nothing)(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    with pytest.raises(RuntimeError, match=r"conv\.weight is a Subclass, a subclass of Tensor.*compile=False"):
        objective_of(model, "aot_eager")(x, Y)


class _Negated(Product):
    """Of two inputs, and perhaps of a buffer."""

    def __init__(self, shift=None):
        super().__init__(3, 3)
        self.register_buffer("shift", shift)

    def forward(self, u, v):
        return super().forward(u if self.shift is None else u + self.shift, v)


def test_what_is_negated_lazily(fresh_dynamo):
    """inductor's kernels read the memory of the imaginary part of a conjugate, whose sign is another."""
    u, v, soft = torch.randn(3, 5, 3, dtype=torch.complex128).conj().imag
    assert u.is_neg()
    model = _Negated().double()
    found, expected = [], []
    for compiler, grads in (("inductor", found), (None, expected)):
        objective = objective_of(model, compiler, criterion=nothing, penalized=0)
        objective.zero_grad()
        objective((u, v), Y).loss.backward()
        grads += gradients(model)
    assert relative_error(found, expected) < 1e-10
    for target in (soft, [soft]):  # what is lazily negated in a graph is refused, with each compiler
        objective_of(model, "eager", criterion=lambda f, y: f.mean() * y[0].sum(), penalized=0)((u, v), target)
    with pytest.raises(RuntimeError, match=r"got one that is negated lazily, .*use .*resolve_neg"):
        objective_of(_Negated(u).double(), "eager")((u, v), Y)


class _Masked(nn.Module):
    """As Hugging Face's models are called, and with what they return."""

    def __init__(self):
        super().__init__()
        self.first, self.kinds, self.head = nn.Linear(4, 6), nn.Embedding(3, 6), nn.Linear(6, 7)

    def forward(self, pixel_values, kind=None, attention_mask=None, flag=False, scale=None):
        h = (self.first(pixel_values) + self.kinds(kind)).tanh()
        h = h * attention_mask * (2 if flag else 1)
        return {"logits": self.head(h if scale is None else h * scale)}


def _masked() -> tuple[nn.Module, dict[str, Any]]:
    x = {"pixel_values": torch.randn(5, 4).double(), "kind": torch.tensor([0, 1, 2, 1, 0]), "flag": True}
    return _Masked().double(), {**x, "attention_mask": torch.rand(5, 6) > 0.3}


def _expected_of_masked(model, x, penalized=("pixel_values",)) -> tuple[Tensor, list[Tensor]]:
    leaves = [x[name].clone().requires_grad_() for name in penalized]
    logits = model(**{**x, **dict(zip(penalized, leaves, strict=True))})["logits"]
    score = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), leaves, create_graph=True)
    penalty = torch.cat(score, 1).norm(dim=1).mean()
    return penalty.detach(), list(torch.autograd.grad(0.5 * penalty, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    ("compiler", "options"),
    [(None, {}), ("eager", {}), (None, {"path": "directional", "central": True})],
)
@pytest.mark.parametrize("form", ["mapping", "sequence"])
def test_other_inputs_beside_the_penalized_one(form, compiler, options, fresh_dynamo):
    model, x = _masked()
    penalty, expected = _expected_of_masked(model, x)
    objective = objective_of(model, compiler, criterion=nothing, output=lambda o: o["logits"], **options)
    given = x if form == "mapping" else [x[name] for name in ("pixel_values", "kind", "attention_mask", "flag")]
    before = x["pixel_values"].clone()
    torch.testing.assert_close(objective.penalty(given), penalty)
    out = objective(given, Y)
    torch.testing.assert_close(out.penalty.detach(), penalty)
    out.loss.backward()
    expected = [torch.zeros_like(w) if g is None else g for w, g in zip(model.parameters(), expected, strict=True)]
    assert relative_error(gradients(model), expected) < (1e-5 if options else 1e-10)
    assert torch.equal(before, x["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(objective(given, Y).logits, out.logits.detach())


def test_penalized_names_the_inputs():
    model, x = _masked()
    x["scale"] = torch.rand(5, 6).double()
    for penalized, names in ((None, ("pixel_values", "scale")), ("pixel_values",) * 2, (["scale"], ["scale"])):
        names = [names] if isinstance(names, str) else names
        objective = objective_of(model, output=lambda o: o["logits"], penalized=penalized)
        torch.testing.assert_close(objective(x, Y).penalty.detach(), _expected_of_masked(model, x, names)[0])
    with pytest.raises(ValueError, match=r"penalized names 'pixels', which is none of x's tensors: \['pixel_values'"):
        objective_of(model, penalized="pixels")(x, Y)
    with pytest.raises(TypeError, match=r"x\['kind'\] must be floating point to have a score, got torch\.int64"):
        objective_of(model, penalized="kind")(x, Y)
    with pytest.raises(TypeError, match=r"floating point to have a score, got torch\.int64, bool"):
        objective_of(model)({"kind": x["kind"], "flag": True}, Y)
    x["scale"] = x["scale"][:3]
    with pytest.raises(ValueError, match=r"x\['scale'\] must have shape \[5, \.\.\.\], .*got \[3, 6\]"):
        objective_of(model, output=lambda o: o["logits"])(x, Y)
    with pytest.raises(ValueError, match=r"x must have shape \[5, \.\.\.\], .*got \[5\]"):
        objective_of(model)(torch.rand(5), Y)
    with pytest.raises(TypeError, match=r"penalized must be positions or names of inputs, or None for all; got 1\.5"):
        objective_of(model, penalized=1.5)


def test_a_part_of_the_batch_takes_its_rows_of_the_other_inputs():
    model, x = _masked()
    for regularizer in ("density", "ig_sum"):
        part = next_part()
        objective = objective_of(model, output=lambda o: o["logits"], fraction=0.4, regularizer=regularizer)
        out = objective(x, Y)
        torch.testing.assert_close(out.logits, model(**x)["logits"])
        if regularizer == "density":
            rows = {name: v[part] if isinstance(v, Tensor) else v for name, v in x.items()}
            torch.testing.assert_close(out.penalty.detach(), _expected_of_masked(model, rows)[0])


@pytest.mark.parametrize(
    "options", [{"compile": False}, {"backend": "eager"}, {"path": "directional", "central": True}]
)
def test_a_model_that_begins_in_place(options, fresh_dynamo):
    net, x = Net(nn.Tanh()).double(), torch.randn(5, 4, dtype=torch.float64)
    before = x.clone()
    apart = nn.Sequential(Layer(lambda x: F.elu(x - 0.3)), net)
    value, expected = by_autograd(apart, x, Y, 1.0, criterion=nothing)
    model = nn.Sequential(Layer(lambda x: F.elu(x.sub_(0.3), inplace=True)), net)
    objective = RegularizedObjective(model, 1.0, criterion=nothing, **options)
    objective(x, Y).loss.backward()
    assert relative_error(gradients(net), expected) < (1e-5 if "path" in options else 1e-10)
    torch.testing.assert_close(objective.penalty(x), value)
    assert torch.equal(x, before)
