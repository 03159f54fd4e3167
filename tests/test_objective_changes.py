"""What changes between two steps of an objective counts in the next one, as in an objective that is made after it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import densreg


class Net(nn.Module):
    """With what may change in a model: modules, parameters, buffers, and attributes that are none of them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 4)
        self.scale = 1.0
        self.register_buffer("shift", None)
        self.register_parameter("gain", None)

    def forward(self, x):
        f = self.scale * self.head(self.body(x))
        f = f if self.shift is None else f + self.shift * x.mean(1, keepdim=True)
        return f if self.gain is None else f * self.gain


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class Tempered(nn.Module):
    """A criterion, or what is done to the output, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.5))

    def forward(self, f, target=None):
        return self.t * f if target is None else F.cross_entropy(self.t * f, target)


def _new(*shape):
    torch.manual_seed(7)
    return nn.Parameter(torch.randn(*shape))


def _linear():
    torch.manual_seed(8)
    return nn.Linear(5, 4)


def _other():
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _other_state(model):
    torch.manual_seed(9)
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()}


def _freeze(objective):
    objective.model.body[0].weight.requires_grad_(False)


def _doubling_hook(module, args, output):
    return output * 2


CHANGES = {
    "a parameter is frozen": (None, _freeze),
    "a parameter is unfrozen": (_freeze, lambda o: o.model.body[0].weight.requires_grad_()),
    "a module is frozen": (None, lambda o: o.model.head.requires_grad_(False)),
    "a module is unfrozen": (lambda o: o.model.head.requires_grad_(False), lambda o: o.model.head.requires_grad_()),
    "another is frozen": (_freeze, lambda o: (o.model.requires_grad_(), o.model.head.weight.requires_grad_(False))),
    "all is frozen but the criterion": (
        lambda o: setattr(o, "criterion", Tempered()),
        lambda o: o.model.requires_grad_(False),
    ),
    "a parameter is assigned": (None, lambda o: setattr(o.model.head, "weight", _new(4, 5))),
    "a parameter is assigned frozen": (
        None,
        lambda o: setattr(o.model.head, "weight", _new(4, 5).requires_grad_(False)),
    ),
    "a parameter is added": (None, lambda o: setattr(o.model, "gain", _new(4))),
    "a parameter is removed": (lambda o: setattr(o.model, "gain", _new(4)), lambda o: setattr(o.model, "gain", None)),
    "a parameter is shared": (None, lambda o: setattr(o.model.body[1], "bias", o.model.body[0].bias)),
    "a parameter gets other data": (None, lambda o: setattr(o.model.head.weight, "data", _new(4, 5).data)),
    "a parameter is parametrized": (
        None,
        lambda o: parametrize.register_parametrization(o.model.head, "weight", Doubled()),
    ),
    "a module is assigned": (None, lambda o: setattr(o.model, "head", _linear())),
    "a module of a sequence is assigned": (None, lambda o: o.model.body.__setitem__(2, nn.Softplus())),
    "a module is deleted": (None, lambda o: o.model.body.__delitem__(1)),
    "a module is appended": (None, lambda o: o.model.body.append(nn.PReLU())),
    "a module is hidden in place": (None, lambda o: o.model._modules.update(head=_linear())),
    "a forward hook": (None, lambda o: o.model.head.register_forward_hook(_doubling_hook)),
    "a forward hook of the model": (None, lambda o: o.model.register_forward_hook(_doubling_hook)),
    "a forward pre-hook": (None, lambda o: o.model.head.register_forward_pre_hook(lambda m, args: (args[0] * 2,))),
    "a hook of a parameter": (None, lambda o: o.model.head.weight.register_hook(lambda g: 2 * g)),
    "a buffer is added": (None, lambda o: o.model.register_buffer("shift", torch.full((4,), 0.3))),
    "a buffer is assigned": (
        lambda o: o.eval(),
        lambda o: setattr(o.model.body[1], "running_mean", torch.full((5,), 0.3)),
    ),
    "a buffer is removed": (
        lambda o: setattr(o.model, "shift", torch.arange(4.0)),
        lambda o: setattr(o.model, "shift", None),
    ),
    "eval": (None, lambda o: o.eval()),
    "eval of the model": (None, lambda o: o.model.eval()),
    "eval of a module": (None, lambda o: o.model.body[1].eval()),
    "train": (lambda o: o.eval(), lambda o: o.train()),
    "another dtype": (None, lambda o: o.double()),
    "another dtype of the model": (None, lambda o: o.model.to(torch.float64)),
    "another state": (None, lambda o: o.model.load_state_dict(_other_state(o.model))),
    "another state, assigned": (None, lambda o: o.model.load_state_dict(_other_state(o.model), assign=True)),
    "an attribute of the model": (None, lambda o: setattr(o.model, "scale", 1.7)),
    "an attribute of a layer": (None, lambda o: setattr(o.model.body[1], "momentum", 0.7)),
    "coeff": (None, lambda o: setattr(o, "coeff", 3.0)),
    "coeff in place": (None, lambda o: o.coeff.fill_(3.0)),
    "interval": (None, lambda o: setattr(o, "interval", 2)),
    "interval None": (None, lambda o: setattr(o, "interval", None)),
    "compiled": (None, lambda o: setattr(o, "compiled", False)),
    "model": (None, lambda o: setattr(o, "model", _other())),
    "a criterion": (None, lambda o: setattr(o, "criterion", Tempered())),
    "a criterion is removed": (
        lambda o: setattr(o, "criterion", Tempered()),
        lambda o: setattr(o, "criterion", None),
    ),
    "the criterion is frozen": (
        lambda o: setattr(o, "criterion", Tempered()),
        lambda o: o.criterion.requires_grad_(False),
    ),
    "an output": (None, lambda o: setattr(o, "output", Tempered())),
    "p": (None, lambda o: setattr(o, "p", 1)),
}
SECOND_ORDER = {
    "path": (None, lambda o: setattr(o, "path", "naive")),
    "a regularizer": (None, lambda o: setattr(o, "regularizer", "input_gradient")),
    "a regularizer with options": (
        lambda o: setattr(o, "regularizer", "input_gradient"),
        lambda o: setattr(o, "regularizer", densreg.regularizers.InputGradient(p=1)),
    ),
}


SAME_GRADIENTS = ("another dtype", "another dtype of the model", "an attribute of a layer", "compiled", "path")
DIRECTIONAL = (
    *("a parameter is unfrozen", "a parameter is added", "a module is assigned", "a module is deleted"),
    *("a forward hook", "a buffer is added", "a buffer is assigned", "eval of a module", "another dtype", "coeff"),
    *("an attribute of the model", "a criterion"),
)


def _gradients(objective, x, y):
    """Of a step, by the name of what they are the gradients of, and the buffers after it."""
    for w in objective.parameters():
        w.grad = None
    dtype = next(objective.model.parameters()).dtype
    out = objective(x.to(dtype), y)
    out.loss.backward()
    return [w.grad for w in objective.parameters()], [*objective.model.buffers()], out


def _same(change, options):
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    before, after = change
    objective = densreg.RegularizedObjective(Net(), 2.0, **options)
    if before is not None:
        before(objective)
    for _ in range(2):
        unchanged, *_ = _gradients(objective, x, y)
    fresh = densreg.RegularizedObjective(copy.deepcopy(objective.model), 2.0, **options)
    if before is not None:
        for name in ("criterion", "output", "regularizer", "training"):
            setattr(fresh, name, copy.deepcopy(getattr(objective, name)))
    fresh.calls = objective.calls
    for each in (objective, fresh):
        after(each)
    (found, buffers, out), (expected, of_fresh, out_of_fresh) = (_gradients(o, x, y) for o in (objective, fresh))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(buffers, of_fresh)
    torch.testing.assert_close(out, out_of_fresh, equal_nan=True)
    assert [w.requires_grad for w in objective.parameters()] == [g is not None for g in found]
    return unchanged, found


@pytest.mark.parametrize("options", [{"compile": False}, {"backend": "eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [*CHANGES, *SECOND_ORDER])
def test_a_change_counts_in_the_next_step(name, options, fresh_dynamo):
    unchanged, changed = _same({**CHANGES, **SECOND_ORDER}[name], options)
    if name not in SAME_GRADIENTS:
        differ = len(unchanged) != len(changed) or any(
            (a is None) != (b is None) or (a is not None and (a.shape != b.shape or (a - b).abs().max() > 1e-3))
            for a, b in zip(unchanged, changed, strict=True)
        )
        assert differ


@pytest.mark.parametrize("name", DIRECTIONAL)
def test_a_change_counts_in_the_next_directional_step(name):
    _same(CHANGES[name], {"path": "directional"})
