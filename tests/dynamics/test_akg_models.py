"""Predictions for models of many kinds, and the caller's model left as it was."""

import copy
import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldyn import _linearize
from ldyn.dynamics import akg as dyn
from ldyn.models import mlp
from tests.callers_model import same, seeded, snapshot


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Doubling(torch.autograd.Function):
    """An operation without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Custom(nn.Sequential):
    def forward(self, x):
        return Doubling.apply(super().forward(x))


class Attention(nn.Module):
    """Causal attention over tokens through SDPA, with the embedding as head, called twice."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 12)

    def layer(self, h):
        q, k, v = self.mix(h).unsqueeze(1).chunk(3, -1)
        return h + functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)

    def forward(self, tokens):
        return self.layer(self.layer(self.table(tokens))) @ self.table.weight.T


class HalfFrozen(nn.Module):
    """Its first layer runs under no_grad, so that its weights have no derivative."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        with torch.no_grad():
            h = self.first(x).tanh()
        return self.second(h)


class Renormed(nn.Module):
    """An embedding that shortens its own rows in the forward pass, in place."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, max_norm=0.5), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(functional.silu(self.norm(self.conv(x))).flatten(1))


class Counting(nn.Module):
    """Writes to a buffer whenever it runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


class Wrapped(nn.Module):
    """Gives its logits in another form."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = nn.Linear(5, 4), form

    def forward(self, x):
        return self.form(self.inner(x))


def tokens(seed):
    return torch.randint(0, 7, (2, 3), generator=torch.Generator().manual_seed(seed))


MODELS = {
    "mlp": (lambda: mlp((5, 6, 4)), lambda s: normal(3, 5, seed=s)),
    "attention, tied, called twice": (Attention, tokens),
    "recurrent": (Recurrent, lambda s: normal(2, 3, 5, seed=s)),
    "convolution": (Convolution, lambda s: normal(2, 1, 4, 4, seed=s)),
    "half under no_grad": (HalfFrozen, lambda s: normal(3, 5, seed=s)),
    "an operation without forward mode": (lambda: Custom(nn.Linear(5, 4)), lambda s: normal(3, 5, seed=s)),
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3)),
        lambda s: normal(2, 3, 4, seed=s),
    ),
    "in-place renormalisation": (Renormed, tokens),
    "counting": (Counting, lambda s: normal(3, 5, seed=s)),
    "tuple": (lambda: Wrapped(lambda z: (z, None)), lambda s: normal(3, 5, seed=s)),
    "mapping": (lambda: Wrapped(lambda z: {"loss": None, "logits": z}), lambda s: normal(3, 5, seed=s)),
    "object with logits": (lambda: Wrapped(lambda z: types.SimpleNamespace(logits=z)), lambda s: normal(3, 5, seed=s)),
}


def explicit(model, x_o, x_u, y, lr):
    """The prediction from Jacobians written out row by row in reverse mode, and from nothing else."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())

    def flat(scalar):
        parts = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    z = logits_in(model(x_u))
    gradient = flat(functional.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1)))
    z = logits_in(model(x_o))
    change = torch.stack([-lr * flat(entry) @ gradient for entry in z.reshape(-1)]).view_as(z)
    return change - (z.softmax(-1) * change).sum(-1, keepdim=True)


def targets(model, x):
    with torch.no_grad():
        shape = logits_in(copy.deepcopy(model)(x)).shape
    return torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(3))


def logits_in(output):
    if isinstance(output, tuple):
        return output[0]
    return output["logits"] if type(output) is dict else getattr(output, "logits", output)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODELS)
def test_prediction_for_models_of_many_kinds(name):
    make, inputs = MODELS[name]
    model, x_o, x_u = seeded(make), inputs(0), inputs(1)
    y = targets(model, x_u)
    before = snapshot(model)
    predicted = dyn.predicted_change(model, x_o, x_u, y, lr=0.3)
    assert same(before, snapshot(model))
    torch.testing.assert_close(predicted, explicit(model, x_o, x_u, y, 0.3), rtol=1e-10, atol=1e-13)
    assert predicted.abs().max() > 1e-4 and not predicted.requires_grad


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_and_reverse_mode_agree(name):
    make, inputs = MODELS[name]
    model, x = seeded(make), inputs(0)
    direction = normal(sum(value.numel() for value in model.parameters()))
    forward = _linearize.pushforward(model, x, direction)
    reverse = _linearize.Linearization(model, x)
    change = reverse.jvp(direction).reshape(reverse.shape)
    torch.testing.assert_close(forward.logits, reverse.logits.reshape(reverse.shape), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(forward.change, change, rtol=1e-11, atol=1e-13)


def test_a_direction_by_name_may_leave_parameters_out():
    for name in ("mlp", "an operation without forward mode"):  # each of the two modes
        make, inputs = MODELS[name]
        model, x = seeded(make), inputs(0)
        whole = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
        part = {"0.weight": normal(*model[0].weight.shape)}
        flat = torch.cat([value.reshape(-1) for value in (whole | part).values()])
        by_name, by_vector = (_linearize.pushforward(model, x, way) for way in (part, flat))
        torch.testing.assert_close(by_name.change, by_vector.change, rtol=1e-13, atol=1e-15)
        assert by_name.change.abs().max() > 0.1


def test_forward_mode_is_used_where_it_exists(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("reverse mode")

    monkeypatch.setattr(_linearize.Linearization, "__init__", forbidden)
    for name in ("mlp", "attention, tied, called twice", "recurrent", "convolution", "half under no_grad"):
        make, inputs = MODELS[name]
        model, x = seeded(make), inputs(0)
        dyn.predicted_change(model, x, x, targets(model, x), lr=0.1)
    model, x = seeded(MODELS["an operation without forward mode"][0]), normal(3, 5)
    with pytest.raises(AssertionError, match="reverse mode"):
        dyn.predicted_change(model, x, x, targets(model, x), lr=0.1)


def test_keyword_inputs_and_a_loss_that_selects_positions():
    class Keywords(Attention):
        def forward(self, ids, scale=1.0):
            return super().forward(ids) * scale

    model, x_o, x_u = seeded(Keywords), {"ids": tokens(0), "scale": 2.0}, {"ids": tokens(1)}
    y, chosen = tokens(2), torch.tensor([[True, False, True], [False, False, True]])

    def loss(logits, target):
        return functional.cross_entropy(logits[chosen], target[chosen], reduction="sum")

    change = dyn.predicted_logits(model, x_o, x_u, y, lr=0.2, loss=loss).change
    ends, h = [], 1e-5
    for rate in (h, -h):
        trial = copy.deepcopy(model)
        loss(trial(**x_u), y).backward()
        with torch.no_grad():
            for value in trial.parameters():
                value -= rate * value.grad
            ends.append(trial(**x_o))
    torch.testing.assert_close(change, 0.2 * (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-9)


def test_no_square_matrix_of_the_vocabulary_is_ever_held():
    """With 60,000 classes one V × V matrix of float32 would take 14 GB."""
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 60_000))
    x, y = torch.tensor([[0, 1]]), torch.tensor([[5, 59_999]])
    change = dyn.predicted_change(model, x, x, y, lr=0.1)
    assert change.shape == (1, 2, 60_000) and change[0, 0, 5] > 0 and change[0, 1, 59_999] > 0


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(guard):
    model, x, y = mlp((5, 6, 4)), normal(3, 5), torch.tensor([0, 1, 2])
    expected = dyn.predicted_change(model, x, x, y, lr=0.1)
    factors = dyn.akg(model, x, x, y)
    with guard():
        assert torch.equal(dyn.predicted_change(model, x, x, y, lr=0.1), expected)
        assert torch.equal(dyn.akg(model, x, x, y).predict(0.1), factors.predict(0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_models_whatever_the_default(dtype):
    model, x, y = mlp((5, 6, 4), dtype=dtype), normal(3, 5).to(dtype), torch.tensor([0, 1, 2])
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
        predicted, factors = dyn.predicted_change(model, x, x, y, lr=0.1), dyn.akg(model, x, x, y)
    finally:
        torch.set_default_dtype(default)
    assert predicted.dtype == factors.A.dtype == factors.K.dtype == factors.G.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (predicted - factors.predict(0.1)).abs().max() < tolerance


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        return functional.dropout(self.layer(x), 0.5, training=True)


class Broken(Noisy):
    def forward(self, x):
        torch.rand(1)
        raise RuntimeError("out of order")


ROUTES = {
    "factors": lambda model, a, b: dyn.akg(model, a, b, torch.zeros(len(b), dtype=torch.int64)),
    "products": lambda model, a, b: dyn.predicted_change(model, a, b, torch.zeros(len(b), dtype=torch.int64), lr=0.1),
}
BAD_MODELS = {
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5)), True, "evaluation mode"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), True, "evaluation mode"),
    "hidden dropout": (Noisy, False, "random numbers"),
    "cut off": (lambda: Wrapped(torch.detach), False, "depends on the parameters"),
    "no tensor": (lambda: Wrapped(lambda z: {"a": z}), False, "logits"),
    "infinite": (lambda: Wrapped(lambda z: z / 0), False, "finite"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_and_left_alone(route, case):
    make, training, words = BAD_MODELS[case]
    model = seeded(make).train(training)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^model") as caught:
        ROUTES[route](model, normal(2, 5), normal(3, 5))
    assert words in str(caught.value) and same(before, snapshot(model))


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_changes_when_the_model_itself_fails(route):
    model = seeded(Broken)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of order"):
        ROUTES[route](model, normal(2, 5), normal(3, 5))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["x_o", "x_u"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(3, 5), "dtype"),
        (torch.zeros(3, 5, dtype=torch.float64, device="meta"), "device"),
        (torch.zeros(0, 5, dtype=torch.float64), "at least one element"),
        (torch.full((3, 5), math.nan, dtype=torch.float64), "finite"),
        ([[0.0, 1.0, 2.0, 3.0, 4.0]], "torch.Tensor"),
    ],
)
def test_bad_inputs_are_refused_by_name(route, name, bad, words):
    good = normal(3, 5)
    model = mlp((5, 4))
    with pytest.raises(ValueError, match=f"^{name}: expected") as caught:
        ROUTES[route](model, *((bad, good) if name == "x_o" else (good, bad)))
    assert words in str(caught.value)
