"""densreg.results: gradients that were computed already, and values that are there to be looked at."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import Net, by_autograd, gradients, nothing, objective_of
from torch import Tensor, nn

from benchmarks.second_order import problem, relative_error
from densreg import ObjectiveOutput

pytestmark = pytest.mark.compile

Y = torch.tensor([0, 1, 2, 3, 4])


def test_gradients_are_nobody_elses_memory():
    model, x = problem(torch.float64)
    loss = objective_of(model)(x, Y).loss
    loss.backward(retain_graph=True)
    first = [g.clone() for g in gradients(model)]
    for w in model.parameters():
        w.grad.zero_()  # as an optimizer may
    for _ in range(2):
        again = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert relative_error(again, first) < 1e-12
        for g in again:
            g.data.zero_()
    loss.backward()
    assert relative_error(gradients(model), first) < 1e-12


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_do_not_share_memory(compiler, fresh_dynamo):
    """torch.autograd.grad may hand out one tensor and a view of it; accumulating would then count both twice."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.d, self.head = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(36)), nn.Linear(6, 7)

        def forward(self, x):
            return self.head(torch.tanh(F.linear(x, self.w + self.d.view(6, 6))))

    model, x = Sum().double(), torch.randn(5, 6, dtype=torch.float64)
    _, expected = by_autograd(copy.deepcopy(model), x, Y, 0.5, criterion=nothing)
    objective = objective_of(model, compiler, criterion=nothing)
    objective(x, Y).loss.backward()
    assert relative_error(gradients(model), expected) < 1e-10
    once = [g.clone() for g in gradients(model)]
    assert len({g.untyped_storage().data_ptr() for g in gradients(model)}) == len(once)
    objective(x, Y).loss.backward()
    assert relative_error(gradients(model), [2 * g for g in once]) < 1e-12


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize(
    "term",
    [
        lambda out: F.kl_div(out.logits.log_softmax(1), torch.full((5, 7), 1 / 7), reduction="batchmean"),
        lambda out: out.ce,
        lambda out: 0.5 * out.penalty,
    ],
)
def test_a_loss_term_that_would_train_nothing(term, compiler, fresh_dynamo):
    objective = objective_of(Net(nn.Tanh()), compiler)
    parameters = list(objective.model.parameters())
    x = torch.randn(5, 4)
    for backward in (
        lambda loss: loss.backward(),
        lambda loss: loss.backward(inputs=parameters[-1:]),
        lambda loss: torch.autograd.grad(loss, parameters[:1]),
    ):
        out = objective(x, Y)
        with pytest.raises(RuntimeError, match=r"out\.logits, out\.ce or out\.penalty .* criterion=f"):
            backward(out.loss + term(out))
        with pytest.raises(RuntimeError, match="criterion=f"):
            backward(term(out))
    out = objective(x, Y)
    (out.loss + term(ObjectiveOutput(*(t.detach() for t in out)))).backward()  # a constant
    expected = gradients(objective.model)
    objective.model.zero_grad()
    objective(x, Y).loss.backward()
    assert relative_error(expected, gradients(objective.model)) < 1e-6


def test_what_is_looked_at_gives_no_warning(recwarn):
    out = objective_of(Net(nn.Tanh()))(torch.randn(5, 4), Y)
    total = torch.zeros(())
    for scalar in (out.ce, out.penalty):
        assert float(scalar) == scalar.item() == float(scalar.numpy()) == float(copy.deepcopy(scalar))
        assert f"{scalar:.3f}" == f"{scalar.item():.3f}"
        assert math.isfinite(scalar)
        assert float(pickle.loads(pickle.dumps(scalar))) == scalar.item()
        total += scalar.detach()
    assert type(out.ce + 1) is Tensor
    (out.logits.argmax(1) == Y).float().mean().item()
    out.logits.tolist(), out.logits.detach().numpy(), out.logits.max(1), out.penalty.isnan()
    with pytest.raises(RuntimeError, match=r"Use tensor\.detach\(\)\.numpy\(\)"):
        out.logits.numpy()
    out.loss.backward()
    assert len(recwarn) == 0
