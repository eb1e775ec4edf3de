"""The tracker's prediction for models that take another way: no forward mode, mixed dtypes, half precision."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldyn._linearize import Linearization, pushforward
from ldyn.dynamics import tracking as tk
from ldyn.models import causal_transformer, flat_parameters

F64 = torch.float64
V = 9
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 2, 0, 1]])
PROBES = (
    tk.Probe("chosen", "a", [1, 2], [3, 4, 5]),
    tk.Probe("chosen", "b", [3, 3, 8, 1], [4]),
    tk.Probe("rejected", "a", [1, 2], [6, 0]),
)


def tiny(**options):
    return causal_transformer(V, width=8, seed=1, **options)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, tracker, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS)[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).sum().neg().backward()
        with tracker.step():
            optimizer.step()


def slope(model, probe):
    """Gradient of the log-probability of one response, unpadded and alone."""
    table = model(torch.tensor([[*probe.prompt, *probe.response]]))[0].log_softmax(-1)[len(probe.prompt) - 1 :]
    total = sum(table[place, token] for place, token in enumerate(probe.response))
    parts = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


class _Cube(torch.autograd.Function):
    """An operation without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny()

    def forward(self, tokens):
        return _Cube.apply(self.model(tokens))


def test_without_forward_mode_the_prediction_is_still_at_the_parameters_before_the_step():
    model = Cubed()
    start, tracker = copy.deepcopy(model), tk.Tracker(model, PROBES)
    train(model, sgd(model, 1e-3), tracker, 1)
    step = flat_parameters(model) - flat_parameters(start)
    expected = [float(slope(start, probe) @ step) for probe in PROBES]
    late = [float(slope(model, probe) @ step) for probe in PROBES]
    assert [row.predicted for row in tracker.table] == pytest.approx(expected, rel=1e-10)
    assert max(abs(a - b) for a, b in zip(expected, late, strict=True)) > 1e-5


class Mixed(nn.Module):
    """Has an adapter of another dtype than the model it adapts."""

    def __init__(self):
        super().__init__()
        self.model, self.scale = tiny(), nn.Parameter(torch.ones(V))

    def forward(self, tokens):
        return self.model(tokens) * self.scale.double()


def test_parameters_may_differ_in_dtype():
    model = Mixed()
    start, tracker = copy.deepcopy(model), tk.Tracker(model, PROBES)
    train(model, sgd(model, 0.01), tracker, 1)
    step = flat_parameters(model.double()) - flat_parameters(start.double())
    expected = [float(slope(start, probe) @ step) for probe in PROBES]
    assert [row.predicted for row in tracker.table] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_a_model_in_half_precision_are_computed_in_single(dtype):
    coarse = []
    for probe in PROBES:
        model = tiny(dtype=dtype)
        start, tracker = copy.deepcopy(model), tk.Tracker(model, [probe])
        train(model, sgd(model), tracker, 1)
        (row,) = tracker.table
        with sdpa_kernel(SDPBackend.MATH):
            logits = start(torch.tensor([[*probe.prompt, *probe.response]]))[0, len(probe.prompt) - 1 : -1].detach()
        places = torch.arange(row.tokens), torch.tensor(probe.response)
        assert row.log_prob_before == pytest.approx(float(logits.double().log_softmax(-1)[places].sum()), abs=1e-6)
        coarse.append(abs(row.log_prob_before - float(logits.log_softmax(-1)[places].sum())))
        step = flat_parameters(model.double()) - flat_parameters(start.double())
        assert row.predicted == pytest.approx(float(slope(start, probe) @ step), rel=0.03)
    assert max(coarse) > 1e-4


def test_both_modes_linearise_where_they_are_told_to():
    for model in (tiny(), Cubed()):
        names = [name for name, _ in model.named_parameters()]
        elsewhere = {name: value.detach() * 1.1 for name, value in model.named_parameters()}
        direction = {name: torch.ones_like(elsewhere[name]) for name in names}
        moved = copy.deepcopy(model)
        moved.load_state_dict(elsewhere)
        found = pushforward(model, TOKENS, direction, parameters=elsewhere)
        local = Linearization(moved, TOKENS)
        expected = local.jvp(torch.ones(local.size, dtype=F64)).view(local.shape)
        torch.testing.assert_close(found.change, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.logits, moved(TOKENS).detach(), rtol=1e-12, atol=1e-12)
