"""A step's buffers, which are those of one forward, and the penalty of a part of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import Checkpointed, Layer, Net, by_autograd, gradients, next_part, nothing, objective_of, smooth_network
from torch import nn

import densreg
from benchmarks.second_order import problem, relative_error
from densreg import RegularizedObjective

pytestmark = pytest.mark.compile

Y = torch.tensor([0, 1, 2, 3, 4])


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_fraction_of_a_model_without_batch_statistics(compiler, fresh_dynamo):
    torch.manual_seed(0)
    model = smooth_network()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    objective = objective_of(model, compiler, fraction=0.4)
    plain, _ = by_autograd(model, x, Y, 0.0)
    seen = []
    for _ in range(40):
        out = objective(x, Y)
        torch.testing.assert_close(out.ce, plain)
        torch.testing.assert_close(out.logits, model(x).detach())
        seen.append(float(out.penalty))
    leaf = x.clone().requires_grad_()
    norms = densreg.density_penalty(model(leaf), leaf, reduction="none").detach()
    pairs = {round(float((norms[i] + norms[j]) / 2), 10) for i in range(5) for j in range(i)}
    assert {round(s, 10) for s in seen} <= pairs, "each is the mean of two samples' norms"
    assert len({round(s, 10) for s in seen}) > 5
    # The gradient is that of the cross-entropy of all and the penalty of these two.
    part = x[next_part()].requires_grad_()
    model.zero_grad()
    objective(x, Y).loss.backward()
    loss = F.cross_entropy(model(x), Y) + 0.5 * densreg.density_penalty(model(part), part)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert relative_error(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_fraction_with_batch_statistics(compiler, fresh_dynamo):
    model, x = problem(torch.float64)
    twin, x = copy.deepcopy(model), x.detach()
    part = x[next_part()].requires_grad_()
    out = objective_of(model, compiler, fraction=0.4)(x, Y)
    out.loss.backward()
    ce = F.cross_entropy(twin(x), Y)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):  # those of one plain step
        torch.testing.assert_close(a, b)
    expected = torch.autograd.grad(ce + 0.5 * densreg.density_penalty(twin(part), part), list(twin.parameters()))
    assert relative_error(gradients(model), expected) < 1e-10
    torch.testing.assert_close(out.ce, ce)


class _Aliased(Net):
    """One BatchNorm by two names."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(6))
        self.layers = nn.ModuleList([self.first, self.body, self.head])


@pytest.mark.parametrize(
    "options",
    [
        {"compile": False, "fraction": 0.4},
        {"backend": "aot_eager", "fraction": 0.4},
        {"path": "directional", "central": True},
    ],
)
def test_a_module_by_two_names_keeps_its_statistics(options, fresh_dynamo):
    model = _Aliased()
    mean = model.body.running_mean
    objective = RegularizedObjective(model, 0.1, **options)
    x = torch.randn(5, 4)
    objective.penalty(x)
    objective(x, Y)
    assert model.body.running_mean is mean
    assert int(model.body.num_batches_tracked) == 1


def test_statistics_of_instance_norm_see_the_whole_batch():
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(), nn.Linear(192, 7))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3, 8, 8)
    objective_of(model, fraction=0.4)(x, Y)
    twin(x)
    torch.testing.assert_close(model[0].running_mean, twin[0].running_mean)


class _OwnNorm(nn.Module):
    """Batch statistics that no module of torch's is there to tell of."""

    def forward(self, x):
        return F.batch_norm(x, None, None, training=self.training)


def _spectral() -> nn.Module:
    """Far from where its power iteration ends, so that each step of it shows."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    for vector in layer.parametrizations.weight[0].buffers():
        vector.copy_(F.normalize(torch.randn(6), dim=0))
    return layer


class _Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x.tanh()


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize(
    "body",
    [_OwnNorm, lambda: Layer(lambda x: x - x.mean(0).detach()), _Counter, lambda: _spectral()],
    ids=["batch_norm", "detached", "buffer", "spectral_norm"],
)
def test_fraction_where_samples_meet_or_buffers_change(body, compiler, fresh_dynamo):
    model, x = Net(body()).double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    out = objective_of(model, compiler, fraction=0.4)(x, Y)
    logits = twin(x)
    torch.testing.assert_close(out.logits.detach(), logits.detach())
    torch.testing.assert_close(out.ce.detach(), F.cross_entropy(logits, Y).detach())
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class _Centered(nn.Module):
    """Where it is asked for, among the batch."""

    def __init__(self):
        super().__init__()
        self.centered = False

    def forward(self, x):
        return x - x.mean(0) if self.centered else x


LATER = {
    "module": lambda model: setattr(model, "body", nn.BatchNorm1d(6, affine=False).double()),
    "flag": lambda model: setattr(model.body, "centered", True),
    "hook": lambda model: model.body.register_forward_hook(lambda module, given, output: output - output.mean(0)),
    "pre-hook": lambda model: model.body.register_forward_pre_hook(lambda module, given: given[0] - given[0].mean(0)),
}


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
def test_fraction_where_samples_meet_only_later(change, compiler, fresh_dynamo):
    model, x = Net(_Centered()).double(), torch.randn(5, 4, dtype=torch.float64)
    objective = objective_of(model, compiler, fraction=0.4)
    alone = objective_of(model, compiler, fraction=0.4, criterion=nothing)
    for each in (objective, alone):
        each(x, Y)
    change(model)
    out = objective(x, Y)
    torch.testing.assert_close(out.ce.detach(), F.cross_entropy(model(x), Y).detach())
    found = []
    for each in (alone, objective_of(model, compiler, fraction=0.4, criterion=nothing)):  # a new one is right
        model.zero_grad()
        torch.manual_seed(0)
        each(x, Y).loss.backward()
        found.append(gradients(model))
    assert relative_error(*found) < 1e-10
    assert max(float(g.abs().max()) for g in found[1]) > 1e-5  # small where two samples are normalized


def test_fraction_costs_no_more_where_samples_do_not_meet():
    """Dropout and layer normalization couple nothing: each sample goes through the model once."""
    sizes = []
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, 7))
    model[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    objective = objective_of(model, fraction=0.4)
    objective(torch.randn(5, 4), Y)
    assert sizes == [5, 5, 2, 3], "to find out, and the step"
    objective(torch.randn(5, 4), Y)
    assert sizes[4:] == [2, 3]


def test_the_penalty_of_a_part_starts_from_the_same_buffers():
    """As the classification does: with spectral_norm it is the same weight."""
    model = Net(_spectral()).double()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    part = x[next_part()].requires_grad_()
    out = objective_of(model, fraction=0.4)(x, Y)
    torch.testing.assert_close(out.penalty.detach(), densreg.density_penalty(twin(part), part).detach())


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("options", [{"fraction": 0.4}, {"regularizer": "cure"}], ids=str)
def test_the_buffers_of_an_output_are_of_one_forward(options, compiler, fresh_dynamo):
    """Of a module that is the option ``output``, as of the model."""
    model, norm, x = Net(nn.Tanh()).double(), nn.BatchNorm1d(7).double(), torch.randn(5, 4, dtype=torch.float64)
    expected = copy.deepcopy(norm)
    expected(model(x))
    objective_of(model, compiler, output=norm, **options)(x, Y)
    for a, b in zip(norm.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_fraction_of_a_head_that_is_still_zero():
    """Its logits tell nothing of whether samples meet, in the first step; in the next ones they do."""
    model, x = Net(_OwnNorm()).double(), torch.randn(5, 4, dtype=torch.float64)
    objective, weight = objective_of(model, fraction=0.4), model.head.weight.detach().clone()
    for value in (0 * weight, weight):
        with torch.no_grad():
            model.head.weight.copy_(value)
        torch.testing.assert_close(objective(x, Y).logits.detach(), model(x).detach())


class _Gated(nn.Module):
    """A residual branch in which samples meet, behind a gate."""

    def __init__(self, gate):
        super().__init__()
        self.gate = nn.Linear(6, 6)
        self.gate.weight.data.mul_(gate)

    def forward(self, x):
        return x + self.gate(F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("gate", [0.0, 1e-6], ids=["ReZero", "LayerScale"])
def test_fraction_of_a_gate_that_is_still_closed(gate, half):
    """The trial opens it; of that autocast's cache keeps nothing."""
    model, x = Net(_Gated(gate)), torch.randn(5, 4)
    objective, before = objective_of(model, fraction=0.4), copy.deepcopy(model.state_dict())
    for value in (None, torch.eye(6)):
        if value is not None:
            model.body.gate.weight.data.copy_(value)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = objective(x, Y).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.testing.assert_close(found.detach(), model(x).detach())
        if value is None:
            assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


every_step = pytest.mark.parametrize(
    "options",
    [
        {},
        {"interval": None},
        {"regularizer": "cure"},
        {"fraction": 0.4},
        {"path": "directional"},
        {"backend": "aot_eager", "compile": True},
    ],
)


@every_step
def test_buffers_are_of_one_forward_through_checkpoints_too(options, fresh_dynamo):
    model = Net(Checkpointed(nn.Sequential(nn.BatchNorm1d(6), nn.Tanh()))).double()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    objective = RegularizedObjective(model, 0.5, **{"compile": False, **options})
    objective.penalty(x, Y)
    objective(x, Y).loss.backward()
    twin(x)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class _OddBuffers(nn.Module):
    """One that is expanded, one that only looks so, one that the first forward makes, one to which it gives a shape."""

    def __init__(self, resizes):
        super().__init__()
        self.resizes = resizes
        self.register_buffer("expanded", torch.ones(1, dtype=torch.float64).expand(6))
        self.register_buffer("counted", torch.zeros((), dtype=torch.float64).expand(1))  # of stride 0 as well
        self.register_buffer("made", None)
        self.register_buffer("sized", torch.zeros(0, dtype=torch.float64))

    def forward(self, x):
        self.counted.add_(1)
        self.made = torch.ones(6) if self.made is None else self.made + 1
        if self.resizes:
            self.sized.resize_(6).zero_()
        return (x * self.expanded).tanh()


@every_step
def test_buffers_that_cannot_be_written_or_are_not_there_yet(options, fresh_dynamo):
    odd = _OddBuffers(resizes="compile" not in options)  # Dynamo does not trace that
    model = nn.Sequential(nn.Linear(4, 6).double(), odd, nn.Linear(6, 7).double())
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    objective = RegularizedObjective(model, 0.5, **{"compile": False, **options})
    for _ in range(2):
        objective.penalty(x, Y)
        objective(x, Y).loss.backward()
        twin(x)
        torch.testing.assert_close([*model.buffers()], [*twin.buffers()])


class _SharedMemory(nn.Module):
    """Two buffers in one memory, the first of which a forward changes; the other, or the first, is used."""

    def __init__(self, second, used: str) -> None:
        super().__init__()
        self.used = used
        memory = torch.ones(12, dtype=torch.float64)
        self.register_buffer("first", memory[:6])
        self.register_buffer("second", second(memory))

    def forward(self, x):
        self.first.data.mul_(0.5).add_(x.detach().abs().mean())
        return (x * getattr(self, self.used)).tanh()


def _of_shared_memory(second, used="second"):
    shared = _SharedMemory(second, used)
    return nn.Sequential(nn.Linear(4, 6).double(), shared, nn.Linear(6, 7).double()), torch.randn(5, 4).double()


@pytest.mark.parametrize(
    "options",
    [
        *({"regularizer": name} for name in ("cure", "hessian")),
        *({"fraction": 0.4}, {"path": "directional"}, {"fraction": 0.4, "compile": True, "backend": "aot_eager"}),
    ],
)
def test_buffers_that_share_memory_are_refused(options, fresh_dynamo):
    model, x = _of_shared_memory(lambda memory: memory[:6])
    objective = RegularizedObjective(model, 0.5, **{"compile": False, **options})
    for call in (objective, objective.penalty):
        with pytest.raises(ValueError, match=r"share no memory, got 1\.first, which shares it with 1\.second"):
            call(x, Y)
    torch.testing.assert_close([*model.buffers()], [torch.ones(6, dtype=torch.float64)] * 2)


@pytest.mark.parametrize(
    ("second", "used"),
    [(lambda memory: memory[6:], "second"), (lambda memory: memory[:6], "first"), (torch.clone, "first")],
)
def test_memory_that_is_not_shared_or_not_used_twice(second, used):
    """Halves of one memory; and another name for a buffer, of which the forward makes no use."""
    model, x = _of_shared_memory(second, used)
    objective = RegularizedObjective(model, 0.5, compile=False, fraction=0.4)
    objective.penalty(x)
    objective(x, Y).loss.backward()
    once = RegularizedObjective(_of_shared_memory(lambda memory: memory[:6])[0], 0.5, compile=False)
    once(x, Y).loss.backward()  # which runs the model once


class _Counting(nn.Module):
    """A model whose criterion keeps the frequencies of the classes in a buffer of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Checkpointed(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()))
        self.head = nn.Linear(6, 7)
        self.register_buffer("prior", torch.zeros(7))

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, logits, target):
        with torch.no_grad():
            self.prior.lerp_(F.one_hot(target, 7).to(self.prior).mean(0), 0.5)
        return F.cross_entropy(logits + self.prior, target)


@every_step
def test_a_criterion_may_update_the_models_buffers(options, fresh_dynamo):
    model, x = _Counting().double(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    objective = RegularizedObjective(model, 0.5, criterion=model.loss, **{"compile": False, **options})
    for _ in range(2):
        objective(x, Y).loss.backward()
        twin.loss(twin(x), Y)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
