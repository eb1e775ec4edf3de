"""The next step of an optimiser, against the step it then takes, and its effect on predictions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldyn.dynamics import akg as dyn
from ldyn.models import mlp

CONFIGURATIONS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd, decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "momentum, damped, decay": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.3},
    ),
    "nesterov, decay": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}),
    "ascent with momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "maximize": True, "weight_decay": 0.2},
    ),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam, decay": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "adam, amsgrad, ascent": (
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.5, 0.5), "amsgrad": True, "maximize": True, "weight_decay": 0.1},
    ),
    "adam, decoupled": (torch.optim.Adam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.3}),
    "adam, plain loop": (torch.optim.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
    "adamw, rate in a tensor": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "weight_decay": 0.3}),
    "momentum, rate in a tensor": (torch.optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    "adam, fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    "adamw, amsgrad": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.5, 0.5), "amsgrad": True}),
    "adamw, ascent": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "maximize": True}),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(seed):
    return normal(6, 5, seed=seed), torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(seed))


def trained(name, steps, *, sizes=(5, 7, 4)):
    """A model and its optimiser after some steps."""
    model = mlp(sizes)
    make, options = CONFIGURATIONS[name]
    optimizer = make(model.parameters(), **options)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def gradients(model, x, y):
    names = [name for name, _ in model.named_parameters()]
    loss = functional.cross_entropy(model(x), y)
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def real_change(model, optimizer, x, y):
    """Take the step, on the model itself, and return what moved."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return {name: value.detach() - before[name] for name, value in model.named_parameters()}


def plain(state):
    """An optimiser's state dict with tensors copied, for comparison."""
    return copy.deepcopy(state)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_predicted_step_is_the_step_taken(name, steps):
    model, optimizer = trained(name, steps)
    x, y = batch(99)
    slopes = gradients(model, x, y)
    state, weights = plain(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    step = dyn.optimizer_step(model, optimizer, slopes)
    assert same(state, optimizer.state_dict()) and same(weights, model.state_dict())
    assert all(value.grad is None for value in model.parameters())
    for key, true in real_change(model, optimizer, x, y).items():
        torch.testing.assert_close(step.change[key], true, rtol=1e-11, atol=1e-12)
        split = step.carried[key] - step.scale[key] * slopes[key]
        torch.testing.assert_close(split, step.change[key], rtol=1e-12, atol=1e-14)


def test_leaving_the_memory_out_is_noticed():
    """The near miss for each kind of memory: momentum's buffer, Adam's moments, the count of steps."""
    for name, key in (("momentum", "momentum_buffer"), ("adam", "exp_avg"), ("adam", "exp_avg_sq"), ("adam", "step")):
        model, optimizer = trained(name, 3)
        x, y = batch(99)
        slopes = gradients(model, x, y)
        right = dyn.optimizer_step(model, optimizer, slopes).change["0.weight"]
        for state in optimizer.state.values():
            state[key] = torch.zeros_like(state[key])
        wrong = dyn.optimizer_step(model, optimizer, slopes).change["0.weight"]
        assert (wrong - right).abs().max() > 1e-2 * right.abs().max()


def test_scale_of_adam_depends_on_the_gradient_and_that_of_momentum_does_not():
    for name, fixed in (("momentum", True), ("adam", False)):
        model, optimizer = trained(name, 3)
        once = gradients(model, *batch(99))
        twice = {key: 2 * value for key, value in once.items()}
        first, second = (dyn.optimizer_step(model, optimizer, slopes).scale for slopes in (once, twice))
        assert torch.equal(first["0.weight"], second["0.weight"]) is fixed


def test_groups_frozen_and_unused_parameters():
    model = mlp((5, 7, 4))
    model.spare = nn.Linear(2, 2, dtype=torch.float64)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    model[0].bias.requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": list(model[2].parameters()) + list(model.spare.parameters()), "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    x, y = batch(0)
    change = dyn.optimizer_step(model, optimizer, gradients_or_none(model, x, y)).change
    assert set(change) == {"0.weight", "2.weight", "2.bias"}
    for key, true in real_change(model, optimizer, x, y).items():
        torch.testing.assert_close(change.get(key, torch.zeros_like(true)), true, rtol=1e-12, atol=1e-13)


class Tied(nn.Module):
    """Shares its embedding with its head: one parameter under two names."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 5), nn.Linear(5, 4, bias=False)
        self.table.weight = self.head.weight = nn.Parameter(normal(4, 5))

    def forward(self, x):
        return self.head(torch.tanh(self.table(x)))


def test_tied_parameters_move_once():
    model, x, y = Tied(), torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        step = dyn.optimizer_step(model, optimizer, gradients(model, x, y)).change
        assert list(step) == ["table.weight"]
        torch.testing.assert_close(step, real_change(model, optimizer, x, y), rtol=1e-11, atol=1e-12)


def gradients_or_none(model, x, y):
    names, values = zip(*model.named_parameters(), strict=True)
    own = [value.detach().clone().requires_grad_() for value in values]
    loss = functional.cross_entropy(torch.func.functional_call(model, dict(zip(names, own, strict=True)), (x,)), y)
    return dict(zip(names, torch.autograd.grad(loss, own, allow_unused=True), strict=True))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_effect_on_predictions_is_first_order_exact(name):
    """With the state held fixed, the error of the prediction falls with the square of the learning rate."""
    model, optimizer = trained(name, 3)
    x_o, _ = batch(50)
    x_u, y_u = batch(99)
    rates, errors = [0.02 / 2**k for k in range(5)], []
    for rate in rates:
        other = copy.deepcopy(model)
        theirs = type(optimizer)(other.parameters(), **CONFIGURATIONS[name][1])
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in theirs.param_groups:
            group["lr"] = torch.tensor(rate) if isinstance(group["lr"], torch.Tensor) else rate
        predicted = dyn.predicted_change(other, x_o, x_u, y_u, optimizer=theirs)
        with torch.no_grad():
            before = other(x_o).log_softmax(-1)
            real_change_grad(other, theirs, x_u, y_u)
            errors.append(float((other(x_o).log_softmax(-1) - before - predicted).abs().max()))
    slope = (math.log(errors[0]) - math.log(errors[-1])) / math.log(rates[0] / rates[-1])
    assert slope == pytest.approx(2, abs=0.15)


def real_change_grad(model, optimizer, x, y):
    with torch.enable_grad():
        real_change(model, optimizer, x, y)


def test_momentum_is_a_sum_over_two_times():
    """Δz_o = −η Σ_s μ^(t−s) J_o(θ_t) J_s(θ_s)ᵀ G_s: old gradients act through the kernel of two times."""
    model, (lr, mu) = mlp((5, 7, 4)), (0.1, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=mu)
    x_o, total = batch(50)[0][:1], 0.0
    for time in range(4):
        x, y = batch(time)
        flat = torch.cat([value.reshape(-1) for value in gradients(model, x, y).values()])
        total = mu * total + flat
        change = dyn.predicted_logits(model, x_o, x, y, optimizer=optimizer).change
        J = torch.stack(
            [
                torch.cat([part.reshape(-1) for part in torch.autograd.grad(z, model.parameters(), retain_graph=True)])
                for z in model(x_o)[0]
            ]
        )
        torch.testing.assert_close(change[0], -lr * J @ total, rtol=1e-11, atol=1e-13)
        real_change(model, optimizer, x, y)


def test_preconditioned_kernel_of_adam():
    """From a fresh state AdamW's effect is −J_o (P g + η λ θ) with P = diag(η / (|g| + ε))."""
    model, lr, decay, eps = mlp((5, 7, 4)), 0.01, 0.3, 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, eps=eps)
    x_o, (x_u, y_u) = batch(50)[0], batch(99)
    theta = torch.cat([value.detach().reshape(-1) for value in model.parameters()])
    g = torch.cat([value.reshape(-1) for value in gradients(model, x_u, y_u).values()])
    J = torch.stack(
        [
            torch.cat([part.reshape(-1) for part in torch.autograd.grad(z, model.parameters(), retain_graph=True)])
            for z in model(x_o).reshape(-1)
        ]
    )
    expected = -J @ (lr * g / (g.abs() + eps) + lr * decay * theta)
    change = dyn.predicted_logits(model, x_o, x_u, y_u, optimizer=optimizer).change
    torch.testing.assert_close(change.reshape(-1), expected, rtol=1e-10, atol=1e-13)


def test_a_function_in_place_of_an_optimizer():
    """Clipping, for instance: the step is whatever the function makes of the gradients."""
    model, (x, y) = mlp((5, 7, 4)), batch(0)

    def clipped(slopes):
        norm = torch.cat([value.reshape(-1) for value in slopes.values()]).norm()
        return {key: -0.1 * value / norm for key, value in slopes.items() if key != "2.bias"}

    slopes = gradients(model, x, y)
    norm = torch.cat([value.reshape(-1) for value in slopes.values()]).norm()
    slopes["2.bias"] = torch.zeros_like(slopes["2.bias"])
    change = dyn.predicted_logits(model, x, x, y, optimizer=clipped).change
    moved = {key: -0.1 * value / norm for key, value in slopes.items()}
    h = 1e-5
    ends = [
        torch.func.functional_call(model, {k: v.detach() + sign * h * moved[k] for k, v in model.named_parameters()}, x)
        for sign in (1, -1)
    ]
    torch.testing.assert_close(change, (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-9)


BAD_OPTIMIZERS = [
    (lambda m: torch.optim.RMSprop(m.parameters()), "optimizer: expected torch.optim.SGD, Adam or AdamW, got RMSprop"),
    (lambda m: torch.optim.SGD(mlp((3, 3)).parameters()), "optimizer: expected one that holds parameters of the model"),
    (lambda m: "sgd", "optimizer: expected changes of parameters by name, got 'sgd'"),
    (lambda m: lambda slopes: None, "optimizer: expected changes of parameters by name, got None"),
    (lambda m: lambda slopes: {"nobody": torch.ones(1)}, "optimizer: expected names of the model's parameters"),
    (lambda m: lambda slopes: {"0.bias": torch.ones(3).double()}, r"optimizer, change of '0.bias': expected shape"),
    (lambda m: lambda slopes: {"0.bias": torch.ones(7)}, r"optimizer, change of '0.bias': expected the dtype"),
    (lambda m: lambda slopes: {"0.bias": slopes["0.bias"] * math.nan}, "optimizer, change of '0.bias': expected fin"),
]


@pytest.mark.parametrize(("make", "words"), BAD_OPTIMIZERS)
def test_bad_optimizers_are_refused(make, words):
    model, (x, y) = mlp((5, 7, 4)), batch(0)
    with pytest.raises(ValueError, match=words):
        dyn.predicted_change(model, x, x, y, optimizer=make(model))


def test_either_a_rate_or_an_optimizer():
    model, (x, y) = mlp((5, 7, 4)), batch(0)
    with pytest.raises(ValueError, match="lr: expected either lr or optimizer, got neither"):
        dyn.predicted_change(model, x, x, y)
    with pytest.raises(ValueError, match="lr: expected either lr or optimizer, got both"):
        dyn.predicted_change(model, x, x, y, lr=0.1, optimizer=torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("bad", [torch.ones(3).double(), torch.ones(7)])
def test_gradients_that_do_not_fit_are_refused(bad):
    model = mlp((5, 7, 4))
    with pytest.raises(ValueError, match=r"gradients\['0.bias'\]: expected shape \(7,\) and torch.float64"):
        dyn.optimizer_step(model, torch.optim.SGD(model.parameters()), {"0.bias": bad})
