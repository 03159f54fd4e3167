"""RegularizedObjective with its last layer taken without logits, against itself with them."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from reference import ORDERS, Checkpointed, by_autograd, gradients, nothing
from torch import nn

import densreg
from densreg import head
from densreg.batch import batch_of
from densreg.regularizers import Cure


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 9), nn.Tanh(), nn.Linear(9, 7)
    ).to(dtype)


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8, dtype=dtype), torch.tensor([0, 6, -100, 3, 3, 1])


def steps(model, count=1, amp=None, data=None, **options):
    """Losses, penalties and gradients of a few steps, and the buffers after them."""
    objective = densreg.RegularizedObjective(model, 0.5, **{"compile": False, **options})
    x, y = data or batch(next(model.parameters()).dtype)
    found = []
    for _ in range(count):
        model.zero_grad()
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            out = objective(x, y, loss_scale=1024.0 if amp == torch.float16 else None)
        out.loss.backward()
        found += [out.loss.detach(), out.ce.detach(), out.penalty.detach(), *(g.clone() for g in gradients(model))]
    assert type(out).__name__ == ("ObjectiveOutput" if options.get("head") is None else "HeadOutput")
    return found + [b.double() for b in model.buffers()]


def assert_same(ours, expected, tolerance=1e-12):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_as_with_logits(compiled, fresh_dynamo):
    assert_same(steps(network(), 2, compile=compiled, backend="aot_eager", head="6"), steps(network(), 2))


@pytest.mark.slow
def test_compiled_by_inductor(fresh_dynamo):
    assert_same(steps(network(), compile=True, head="6"), steps(network()), 1e-10)


def test_interval():
    ours, expected = (steps(network(), 4, interval=2, head=layer) for layer in ("6", None))
    assert_same(ours, expected)
    assert sum(math.isnan(t) for t in expected if t.ndim == 0) == 2, "two steps of four have no penalty"


@pytest.mark.parametrize("part", ["trunk", "head"])
def test_frozen(part):
    results = []
    for layer in ("6", None):
        model = network()
        (model[:-1] if part == "trunk" else model[-1]).requires_grad_(False)
        results.append(steps(model, head=layer))
    assert_same(*results)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("p", ORDERS)
def test_penalty_alone(p, compiled, fresh_dynamo):
    """By value, and as what is left of the step without that of coefficient 0, against torch alone by the logits."""
    x, y = batch()
    penalty, expected = by_autograd(network(), x, y, 1.0, p, nothing)
    each = []
    for coeff in (1.0, 0.0):
        model = network()
        options = {"compile": compiled, "backend": "aot_eager", "head": "6"}
        out = densreg.RegularizedObjective(model, coeff, p, **options)(x, y)
        torch.testing.assert_close(out.penalty.detach(), penalty)
        out.loss.backward()
        each.append(gradients(model))
    size = max(g.abs().max() for g in expected)
    for with_penalty, without, g in zip(*each, expected, strict=True):
        torch.testing.assert_close(with_penalty - without, g, rtol=1e-10, atol=1e-10 * float(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Both against float64, over all gradients: rounding in the trunk is most of it."""
    x, y = batch()
    expected = torch.cat([t.flatten() for t in steps(network())])
    errors = []
    for layer in ("6", None):
        ours = steps(network(torch.float32), amp=dtype, head=layer, data=(x.float(), y))
        errors.append((torch.cat([t.double().flatten() for t in ours]) - expected).norm() / expected.norm())
    assert errors[0] <= max(1.5 * errors[1], 1e-3)
    assert errors[0] < 0.05


def test_a_checkpoint_and_a_hook_around_the_head():
    assert_same(steps(Checkpointed(network()), head="body.6"), steps(Checkpointed(network())))


def test_output():
    model, (x, y) = network(), batch()
    objective = densreg.RegularizedObjective(model.eval(), 0.5, compile=False, head=model[-1])
    out = objective(x, y)
    assert out.logits is None
    logits = model(x)
    assert torch.equal(out.correct, logits.argmax(1) == y)
    given = objective(x, y, logits=True).logits
    torch.testing.assert_close(given.detach(), logits.detach())
    with pytest.raises(RuntimeError, match="would train nothing"):
        given.sum().backward()
    with torch.no_grad():
        quiet = objective(x, y)
        assert quiet.logits is None
        assert quiet.penalty.isnan()
        torch.testing.assert_close(quiet.ce, out.ce.detach().as_subclass(torch.Tensor))
        assert torch.equal(quiet.correct, out.correct)
        torch.testing.assert_close(objective(x, y, logits=True).logits, logits)
    assert list(objective.state_dict()) == list(
        densreg.RegularizedObjective(network(), 0.5, compile=False).state_dict()
    )


def test_auto(monkeypatch):
    """The last linear layer, from a number of classes on; found without a trace in the model."""

    def run(model, **options):
        objective = densreg.RegularizedObjective(model, 0.5, compile=False, head="auto", **options)
        return type(objective(*batch())).__name__

    assert run(network()) == "ObjectiveOutput", "of few classes the logits are faster"
    monkeypatch.setattr("densreg.objective.AUTO_CLASSES", 7)
    assert run(network()) == "HeadOutput"
    assert_same(steps(network(), head="auto"), steps(network()))
    assert run(nn.Sequential(network(), nn.Tanh())) == "ObjectiveOutput"
    assert run(network(), fraction=0.5) == "ObjectiveOutput"
    assert run(network(), path="taylor") == "ObjectiveOutput"
    assert run(network(), criterion=lambda f, y: f.mean()) == "ObjectiveOutput"


def test_auto_compiled(fresh_dynamo, monkeypatch):
    monkeypatch.setattr("densreg.objective.AUTO_CLASSES", 7)
    assert_same(steps(network(), 2, compile=True, backend="aot_eager", head="auto"), steps(network(), 2))


def test_copies_and_assignment():
    model = network()
    objective = densreg.RegularizedObjective(model, 0.5, compile=False, head="6")
    other = copy.deepcopy(objective)
    file = io.BytesIO()
    torch.save(objective, file)
    file.seek(0)
    for each in (other, torch.load(file, weights_only=False)):
        assert each(*batch()).logits is None
    objective.head = None
    assert objective(*batch()).logits is not None
    objective.head = model[-1]
    assert objective.head == "6"
    with pytest.raises(ValueError, match=r"head: expected fraction=1.0 beside it, got 0.5"):
        objective.fraction = 0.5
    assert objective.fraction == 1
    assert objective(*batch()).logits is None


class Scaled(nn.Module):
    def __init__(self, twice=False, unused=False, in_place=False):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice, self.unused, self.in_place = twice, unused, in_place

    def forward(self, x):
        h = self.body(x)
        if self.twice:
            return self.head(self.head(h))
        if self.in_place:
            return self.head(h).mul_(2)
        return h if self.unused else 2 * self.head(h)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scaled(), "it returns a tensor of another function"),
        (Scaled(twice=True), "its weight was used 2 times"),
        (Scaled(unused=True), "its weight was used 0 times"),
        (Scaled(in_place=True), "it went through (mul_|__imul__)"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_does_not_return_its_head(model, message, compiled, fresh_dynamo):
    objective = densreg.RegularizedObjective(model, 0.5, compile=compiled, backend="aot_eager", head="head")
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=message) as raised:
        objective(x, y)
    assert "\n" not in str(raised.value)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        objective(x, y)


def test_errors():
    model = network()
    for options, kind, message in [
        ({"head": "fc"}, ValueError, "head: expected the name of an nn.Linear of the model, got 'fc'"),
        ({"head": "0"}, ValueError, "head: expected the name of an nn.Linear of the model, got '0', a Conv2d"),
        ({"head": nn.Linear(9, 7)}, ValueError, "which is not in it"),
        ({"head": 6}, TypeError, 'head: expected "auto", None, an nn.Linear or its name, got int'),
        ({"head": "6", "fraction": 0.5}, ValueError, "head: expected fraction=1.0 beside it, got 0.5"),
        ({"head": "6", "path": "taylor"}, ValueError, "head: expected path='fused' beside it, got 'taylor'"),
        ({"head": "6", "path": "directional"}, ValueError, "head: expected path='fused'"),
        ({"head": "6", "criterion": nn.CrossEntropyLoss()}, ValueError, "head: expected criterion=None beside it"),
        ({"head": "6", "regularizer": Cure()}, ValueError, "head: expected regularizer=Density"),
    ]:
        with pytest.raises(kind, match=message):
            densreg.RegularizedObjective(model, 0.5, compile=False, **options)
    objective = densreg.RegularizedObjective(model, 0.5, compile=False, head="6")
    model[6] = nn.Sequential(model[6])
    with pytest.raises(ValueError, match="got '6', a Sequential"):
        objective(*batch())


# --------------------------------------------------------------------------------------------------------------------
# other models


def penalty_gradients(model, x, y, **options):
    """The penalty's gradient alone, as the difference to a step of coefficient 0."""
    each = []
    for coeff in (0.0, 1.0):
        torch.manual_seed(2)
        objective = densreg.RegularizedObjective(copy.deepcopy(model), coeff, **{"compile": False, **options})
        objective(x, y).loss.backward()
        each.append(gradients(objective.model))
    return [a - b for a, b in zip(each[1], each[0], strict=True)]


def assert_penalty_as_with_logits(model, x, y, head, **options):
    ours, expected = penalty_gradients(model, x, y, head=head, **options), penalty_gradients(model, x, y)
    size = max(g.abs().max() for g in expected)
    assert size > 1e-8
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(size))


def classifier(name):
    """A model of torchvision's or timm's in float64, its head's name, and a batch."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        model = pytest.importorskip("timm").create_model(name.removeprefix("timm:"), num_classes=11)
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        model = pytest.importorskip("torchvision").models.get_model(name, num_classes=11, **options)
    return model.double(), torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([3, 10])


@pytest.mark.parametrize(
    ("name", "expected", "training"),
    [
        ("resnet18", "fc", True),
        ("mobilenet_v3_small", "classifier.3", True),
        ("timm:resnet10t", "fc", True),
        ("timm:convnext_atto", "head.fc", False),
        pytest.param("googlenet", "fc", True, marks=pytest.mark.slow),
    ],
)
def test_models_of_libraries(name, expected, training):
    """Also with auxiliary classifiers, whose logits are taken as they are."""
    model, x, y = classifier(name)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    objective = densreg.RegularizedObjective(model, 0.5, compile=False)
    assert head.find_head(objective._spec(), batch_of(x, None)) == expected
    assert_penalty_as_with_logits(model, x, y, expected)


def test_a_model_without_a_linear_head(monkeypatch):
    """SqueezeNet's last layer is a convolution."""
    monkeypatch.setattr("densreg.objective.AUTO_CLASSES", 1)
    model, x, y = classifier("squeezenet1_1")
    out = densreg.RegularizedObjective(model.eval(), 0.5, compile=False, head="auto")(x, y)
    assert type(out).__name__ == "ObjectiveOutput"
    with pytest.raises(ValueError, match=r"got 'classifier\.1', a Conv2d"):
        densreg.RegularizedObjective(model, 0.5, compile=False, head="classifier.1")


class Tied(nn.Module):
    """A weight that is an embedding's too, or with ``layer`` another linear layer's."""

    def __init__(self, layer=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.head = nn.Embedding(7, 7), nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.embedding.weight = self.head.weight
        if layer:
            self.mix.weight = self.head.weight

    def forward(self, x, token):
        return self.head(torch.tanh(self.mix(x * self.embedding(token))))


def test_a_tied_head(monkeypatch):
    torch.manual_seed(1)
    data = (torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1]))
    y = torch.tensor([2, 0, 6, 1, 1])
    assert_penalty_as_with_logits(Tied().double(), data, y, "head")
    with pytest.raises(ValueError, match="its weight was used 2 times"):
        densreg.RegularizedObjective(Tied(layer=True).double(), 0.5, compile=False, head="head")(data, y)
    monkeypatch.setattr("densreg.objective.AUTO_CLASSES", 1)
    for layer, expected in ((False, "HeadOutput"), (True, "ObjectiveOutput")):
        out = densreg.RegularizedObjective(Tied(layer).double(), 0.5, compile=False, head="auto")(data, y)
        assert type(out).__name__ == expected


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_computed_weight_is_refused(kind, monkeypatch):
    model = network()
    getattr(nn.utils.parametrizations, kind)(model[-1])
    with pytest.raises(ValueError, match=r"an nn\.Linear whose weight is a parameter, got '6'"):
        densreg.RegularizedObjective(model, 0.5, compile=False, head="6")
    monkeypatch.setattr("densreg.objective.AUTO_CLASSES", 1)
    assert densreg.RegularizedObjective(model, 0.5, compile=False, head="auto")(*batch()).logits is not None


def test_the_penalty_alone_without_logits():
    model, (x, _) = network(), batch()
    ours, expected = (densreg.RegularizedObjective(model, 0.5, compile=False, head=layer) for layer in ("6", None))
    torch.testing.assert_close(ours.penalty(x), expected.penalty(x), rtol=1e-12, atol=0)


def test_a_scaled_loss_and_accumulation():
    """GradScaler's and two batches' gradients add up as they do with logits."""
    results = []
    for layer in ("6", None):
        model = network(torch.float32)
        objective = densreg.RegularizedObjective(model, 0.5, compile=False, head=layer)
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), 0.1)
        for part in (slice(0, 3), slice(3, 6)):
            x, y = (t[part] for t in batch(torch.float32))
            out = objective(x, y, scaler.scale(torch.ones(())))
            scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        results.append([w.grad.clone() for w in model.parameters()])
    assert_same(*results, 2e-5)


def _times(logits):
    logits *= 2


_CHANGES = {
    "imul": (_times, "(mul_|__imul__)"),
    "setitem": (lambda logits: logits.__setitem__(0, 1.0), "__setitem__"),
    "data": (lambda logits: logits.data.mul_(2), "a property, as .T or .data"),
    "T": (lambda logits: logits.T.mul_(2), "a property, as .T or .data"),
    "foreach": (lambda logits: torch._foreach_mul_([logits], 2.0), "_foreach_mul_"),
    "out": (lambda logits: torch.mul(logits.detach(), 2, out=logits.detach()), "detach"),
}


class _Changed(nn.Module):
    """Returns the very tensor that its last layer returned, after a change in place."""

    def __init__(self, change):
        super().__init__()
        self.head, self.change = nn.Linear(4, 4), change

    def forward(self, x):
        logits = self.head(x)
        self.change(logits)
        assert logits.shape[1] == logits.size(1) == 4
        return logits


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", _CHANGES)
def test_hidden_changes_of_the_logits_are_seen(change, compiled, fresh_dynamo):
    function, name = _CHANGES[change]
    options = {"compile": compiled, "backend": "aot_eager"}
    objective = densreg.RegularizedObjective(_Changed(function), 0.5, **options)
    x = torch.randn(3, 4)
    assert head.find_head(objective._spec(), batch_of(x, None)) is None
    objective.head = "head"
    with pytest.raises(ValueError if not compiled else (ValueError, RuntimeError), match=rf"it went through {name}"):
        objective(x, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("attribute", ["training", "calm"])
@pytest.mark.parametrize("checked", [True, False], ids=["checked in train", "checked in eval"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_change_in_the_other_mode_is_seen(compiled, checked, attribute, fresh_dynamo):
    """A change that Dynamo hides, in the mode in which the head was not checked: it raises, and is nowhere silent."""

    class Changed(_Changed):
        def forward(self, x):
            return self.head(x) if getattr(self, attribute) == checked else super().forward(x)

    torch.manual_seed(0)
    model, x, y = Changed(_CHANGES["data"][0]).double(), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    ours = densreg.RegularizedObjective(model, 0.5, compile=compiled, backend="aot_eager", head="head")
    expected = densreg.RegularizedObjective(model, 0.5, compile=False)
    for _ in range(2):
        setattr(model, attribute, checked)
        torch.testing.assert_close(ours(x, y).penalty.detach(), expected(x, y).penalty.detach(), rtol=1e-12, atol=0)
        setattr(model, attribute, not checked)
        with pytest.raises(ValueError, match=r"it went through a property, as \.T or \.data"):
            ours(x, y)


@pytest.mark.parametrize("gradients_", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_features_that_change_after_the_head(compiled, gradients_, fresh_dynamo):
    """A model may use its features further, in place: the logits are those of the call."""

    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 5), nn.Linear(5, 7)
            self.head.requires_grad_(False)  # or autograd raises

        def forward(self, x):
            h = self.trunk(x)
            logits = self.head(h)
            h.mul_(3)
            return logits

    torch.manual_seed(0)
    model, x, y = Reuses().double(), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 6])
    ours = {"head": "head", "compile": compiled, "backend": "aot_eager"}
    found = []
    for options in ({"compile": False}, ours):
        with torch.set_grad_enabled(gradients_):
            out = densreg.RegularizedObjective(model, 0.5, **options)(x, y)
        found.append([out.ce, *([out.penalty] if gradients_ else [])])
    assert_same([t.detach() for t in found[1]], [t.detach() for t in found[0]])
    if gradients_:
        assert_penalty_as_with_logits(model, x, y, **ours)
