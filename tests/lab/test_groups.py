"""Group DRO: its weights and loss by hand, in the objective, and a resumed run bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reference import gradients
from torch import nn

from benchmarks.second_order import problem, relative_error
from densreg import RegularizedObjective
from densreg.lab import data, groups, models, training
from densreg.lab.groups import GroupDRO
from densreg.lab.training import Config, fit

pytestmark = pytest.mark.compile

TARGET = torch.tensor([[0, 0], [1, 2], [2, 2], [3, 0], [4, 2]])


def by_hand(logits, q, eta):
    """(loss, new q), over lists: group 1 has no sample."""
    ce = [f.exp().sum().log() - f[y] for f, y in zip(logits, TARGET[:, 0].tolist(), strict=True)]
    losses = [(ce[0] + ce[3]) / 2, 0 * ce[0], (ce[1] + ce[2] + ce[4]) / 3]
    up = [a * math.exp(eta * loss.item()) for a, loss in zip(q, losses, strict=True)]
    q = [a / sum(up) for a in up]
    return sum(a * loss for a, loss in zip(q, losses, strict=True)), q


def test_weights_and_loss_by_hand():
    torch.manual_seed(0)
    criterion = GroupDRO(3, 0.5).double()
    q = [1 / 3] * 3
    for _ in range(3):
        logits = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
        wanted, q = by_hand(logits, q, 0.5)
        loss = criterion(logits, TARGET)
        torch.testing.assert_close(loss, wanted)
        assert criterion.q.tolist() == pytest.approx(q)
        given, expected = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, wanted))
        torch.testing.assert_close(given, expected)
    assert criterion.state_dict().keys() == {"q"}
    criterion.eval()
    mean = torch.nn.functional.cross_entropy(logits, TARGET[:, 0])
    for target in (TARGET, TARGET[:, 0]):
        torch.testing.assert_close(criterion(logits, target), mean)
    assert criterion.q.tolist() == pytest.approx(q), "it is not trained in eval mode"


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_with_the_density_penalty_in_one_step(compiler, fresh_dynamo):
    """Two steps, as the second has other weights; and the classes reach a rival's penalty."""
    model, x = problem(torch.float64)
    criterion = GroupDRO(3, 0.5).double()
    options = {"compile": compiler is not None, "backend": compiler or "inductor", "labels": groups.classes}
    objective = RegularizedObjective(model, 0.7, criterion=criterion, **options)
    q = [1 / 3] * 3
    for _ in range(2):
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        (g,) = torch.autograd.grad(logits.logsumexp(1).sum(), leaf, create_graph=True)
        ce, q = by_hand(logits, q, 0.5)
        loss = ce + 0.7 * g.flatten(1).norm(dim=1).mean()
        wanted = torch.autograd.grad(loss, list(model.parameters()))
        model.zero_grad()
        out = objective(x, TARGET)
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach(), loss.detach())
        assert relative_error(gradients(model), list(wanted)) < 1e-9
        assert criterion.q.tolist() == pytest.approx(q)
    options |= {"compile": False, "regularizer": "input_gradient"}
    out = RegularizedObjective(model, 0.7, criterion=criterion, **options)(x, TARGET)
    assert out.penalty.isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0.1), "at least one group, got 0"), ((2, 0.0), "finite and above 0, got 0"), ((2, math.inf), "got inf")],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupDRO(*arguments)


# --------------------------------------------------------------------------------------------------------------------
# training


_digits = data.DATA_SETS["digits"]
"""Its entry in the registry."""


def _two_groups(request):
    """Digits in two groups, of which the second is a tenth."""
    digits = _digits.read(request)

    def grouped(split):
        return replace(split, groups=(torch.arange(len(split)) % 10 == 0).long())

    return replace(digits, train=grouped(digits.train), test=grouped(digits.test))


@pytest.fixture
def two_groups(monkeypatch):
    monkeypatch.setitem(data.DATA_SETS, "digits", replace(_digits, read=_two_groups, groups=("many", "few")))


@pytest.mark.parametrize(
    "options",
    [{"group_dro": 0.5}, {"group_dro": 0.5, "coeff": 0.0, "balance_groups": True}, {"regularizer": "score_matching"}],
    ids=["dro and density", "dro balanced", "score matching"],
)
def test_resumed_run_is_the_same_run(tmp_path, two_groups, options):
    options = {"epochs": 2, "train_size": 640, "test_size": 60, "coeff": 1e-3, **options}
    rows = fit(Config(str(tmp_path / "whole"), **options), progress=False)
    for steps in (3, 10, 17, 20):
        torch.manual_seed(steps)  # whatever another process would start from
        fit(Config(str(tmp_path / "parts"), max_steps=steps, **options), progress=False, resume="auto")
    whole, parts = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "parts"))
    assert all(torch.equal(w, parts["model"][k]) for k, w in whole["model"].items())
    if "group_dro" in options:
        q = whole["criterion"]["q"]
        assert torch.equal(q, parts["criterion"]["q"])
        assert (q - 0.5).abs().max() > 1e-3
    assert 0 <= rows[-1]["test_worst_group"] <= rows[-1]["test_accuracy"]
    model, _ = models.load_checkpoint(tmp_path / "whole")
    split = data.load("digits").test.first(60)
    x, y = split.batch(torch.arange(60), torch.Generator())
    right = (model(x).argmax(1) == y).double()
    assert rows[-1]["test_worst_group"] == min(right[split.groups == g].mean().item() for g in (0, 1))


def test_balanced_batches():
    split = _two_groups(data.Request("digits", None, False, False, None, None)).train
    drawn = torch.cat([y for _, y in data.batches(replace(split, labels=split.groups), 64, 0, 1, balanced=True)])
    assert len(drawn) == len(split)
    assert drawn.double().mean().item() == pytest.approx(0.5, abs=0.05)
    again = torch.cat([y for _, y in data.batches(replace(split, labels=split.groups), 64, 0, 1, balanced=True)])
    assert torch.equal(drawn, again)


def test_what_is_impossible_is_one_line(tmp_path, two_groups, monkeypatch):
    many = data.Split(torch.zeros(40, 1, 8, 8), torch.zeros(40), groups=torch.zeros(40, dtype=torch.int64))
    with pytest.raises(data.DataError, match="group_dro: group 1 of 2 has no images among these 40"):
        many.check_groups(2, "group_dro")
    with pytest.raises(ValueError, match="eta of group DRO must be finite and above 0"):
        fit(Config(str(tmp_path), group_dro=-1.0))
    monkeypatch.setattr(training.problem, "processes", lambda: (0, 2))
    with pytest.raises(ValueError, match="group_dro trains in one process, whose batch the group weights see: got 2"):
        fit(Config(str(tmp_path), group_dro=0.1))
    monkeypatch.undo()
    for options in ({"group_dro": 0.1}, {"balance_groups": True}):
        with pytest.raises(data.DataError, match="needs a data set with groups: spurious-mnist, waterbirds"):
            fit(Config(str(tmp_path), **options))


def test_worst_group_gains():
    """A feature that is right for nine in ten and wrong for the rest, beside a faint one that is always right."""
    torch.manual_seed(0)
    y = torch.arange(400) % 2
    minority = torch.arange(400) % 10 < 2  # as many of each class
    sign = 2.0 * y - 1
    x = torch.stack([torch.where(minority, -sign, sign), 0.3 * sign], 1) + 0.05 * torch.randn(400, 2)
    target = torch.stack([y, minority.long()], 1)
    worst = {}
    for eta in (None, 0.1):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        criterion = None if eta is None else GroupDRO(2, eta)
        objective = RegularizedObjective(model, 0.0, compile=False, interval=None, criterion=criterion)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for _ in range(60):
            training.train_step(objective, optimizer, x, y if eta is None else target)
        right = (model(x).argmax(1) == y).double()
        worst[eta] = min(right[~minority].mean().item(), right[minority].mean().item())
    assert worst[None] < 0.1
    assert worst[0.1] > 0.9
