"""Small networks are repeatable, and the training loop takes exactly the steps it hands out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldyn.models import ACTIVATIONS, evaluate, flat_parameters, mlp, moved, sgd


def data(count=12, width=3, classes=4):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (count,), generator=generator)


def test_mlp_has_the_layers_asked_for():
    model = mlp((3, 5, 6, 4), activation="relu")
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 3), (5,), (6, 5), (6,), (4, 6), (4,)]
    assert len(list(mlp((3, 4), bias=False).parameters())) == 1
    assert model(torch.zeros(2, 7, 3, dtype=torch.float64)).shape == (2, 7, 4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_repeatable_whatever_the_global_state(activation):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = flat_parameters(mlp((4, 3, 2), activation=activation, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one, flat_parameters(mlp((4, 3, 2), activation=activation, seed=3)))
    assert not torch.equal(one, flat_parameters(mlp((4, 3, 2), activation=activation, seed=4)))


def test_mlp_ignores_the_default_dtype():
    assert torch.get_default_dtype() == torch.float32
    assert next(mlp((3, 2)).parameters()).dtype == torch.float64
    assert next(mlp((3, 2), dtype=torch.float32).parameters()).dtype == torch.float32


@pytest.mark.parametrize(("activation", "gain"), [("tanh", 1.0), ("relu", 2.0**0.5)])
def test_mlp_weights_have_the_stated_variance_and_zero_biases(activation, gain):
    model = mlp((400, 300, 2), activation=activation)
    assert model[0].weight.std().item() == pytest.approx(gain / 20, rel=0.01)
    assert model[0].bias.abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        (((3,),), {}, "sizes"),
        (((3, 0),), {}, r"sizes\[1\]"),
        (((3, 2.5),), {}, r"sizes\[1\]"),
        (((3, 2),), {"activation": "step"}, "activation"),
        (((3, 2),), {"dtype": torch.int64}, "dtype"),
        (((3, 2),), {"seed": -1}, "seed"),
    ],
)
def test_mlp_refuses_what_makes_no_network(arguments, options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        mlp(*arguments, **options)


def test_flat_parameters_are_a_copy_in_order():
    model = mlp((2, 3, 2))
    flat = flat_parameters(model)
    assert torch.equal(flat[:6], model[0].weight.detach().reshape(-1)) and not flat.requires_grad
    flat.zero_()
    assert model[0].weight.abs().max() > 0
    tied = nn.Sequential(layer := nn.Linear(2, 2), layer)
    assert len(flat_parameters(tied)) == 6


def test_moved_moves_a_copy():
    model = mlp((2, 3, 2))
    before = flat_parameters(model)
    delta = torch.arange(len(before), dtype=torch.float64)
    assert torch.equal(flat_parameters(moved(model, delta)), before + delta)
    assert torch.equal(flat_parameters(model), before)
    with pytest.raises(ValueError, match=r"^delta: expected shape"):
        moved(model, delta[1:])
    with pytest.raises(ValueError, match=r"^model: expected"):
        moved(nn.Identity(), delta)


def test_evaluate_is_a_differentiable_function_of_the_parameters():
    inputs, targets = data()
    model = mlp((3, 5, 4))
    before = flat_parameters(model)
    delta = torch.linspace(-1, 1, len(before), dtype=torch.float64)
    there = evaluate(model, inputs, before + delta)
    torch.testing.assert_close(there, moved(model, delta)(inputs), rtol=1e-14, atol=0)
    gradient = torch.func.grad(lambda w: functional.cross_entropy(evaluate(model, inputs, w), targets))(before)
    parts = torch.autograd.grad(functional.cross_entropy(model(inputs), targets), model.parameters())
    torch.testing.assert_close(gradient, torch.cat([part.reshape(-1) for part in parts]))
    assert torch.equal(flat_parameters(model), before)


def test_evaluate_moves_tied_parameters_together_and_refuses_wrong_shapes():
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    tied, vector = nn.Sequential(layer, layer), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    matrix = vector.view(2, 2)
    torch.testing.assert_close(evaluate(tied, torch.eye(2).double(), vector), (matrix @ matrix).T)
    with pytest.raises(ValueError, match=r"^parameters: expected shape \(4\)"):
        evaluate(tied, torch.eye(2).double(), vector[1:])


def test_steps_agree_with_the_optimiser_of_pytorch():
    inputs, targets = data()
    model = mlp((3, 5, 4))
    other = copy.deepcopy(model)
    optimiser = torch.optim.SGD(other.parameters(), lr=0.7, weight_decay=0.02)
    for step in sgd(model, inputs, targets, lr=0.7, steps=25, weight_decay=0.02, clip=0.3):
        optimiser.zero_grad()
        loss = functional.cross_entropy(other(inputs), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.3)  # before the optimiser adds the decay
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert step.raw_norm == pytest.approx(norm.item(), rel=1e-5)
        optimiser.step()
    # PyTorch divides by norm + 1e-6 where it clips
    torch.testing.assert_close(flat_parameters(model), flat_parameters(other), rtol=1e-4, atol=1e-5)


def test_a_step_is_handed_out_before_it_is_taken():
    inputs, targets = data()
    model = mlp((3, 5, 4))
    seen = flat_parameters(model)
    for step in sgd(model, inputs, targets, lr=0.5, steps=4, weight_decay=0.1, clip=None):
        here = flat_parameters(model)
        torch.testing.assert_close(here, seen, rtol=0, atol=0)
        gradient = torch.autograd.grad(functional.cross_entropy(model(inputs), targets), model.parameters())
        flat = torch.cat([part.reshape(-1) for part in gradient])
        torch.testing.assert_close(step.gradient, flat)
        torch.testing.assert_close(step.delta, -0.5 * (flat + 0.1 * here))
        seen = here + step.delta
    assert torch.equal(flat_parameters(model), seen)


def test_leaving_early_leaves_the_last_step_untaken():
    inputs, targets = data()
    model = mlp((3, 4))
    before = flat_parameters(model)
    for _ in sgd(model, inputs, targets, lr=0.5, steps=4):
        break
    assert torch.equal(flat_parameters(model), before)


def test_clipping_comes_before_decay():
    inputs, targets = data()
    model = moved(mlp((3, 4)), torch.full((16,), 5.0, dtype=torch.float64))
    (step,) = sgd(model, 100 * inputs, targets, lr=1.0, steps=1, weight_decay=0.5, clip=1.0)
    assert step.raw_norm > 1
    assert step.gradient.norm().item() == pytest.approx(1.0)
    assert step.delta.norm() > 1


def test_batches_cover_the_data_once_a_pass_and_are_repeatable():
    inputs, targets = torch.eye(10, dtype=torch.float64), torch.zeros(10, dtype=torch.int64)

    def seen(seed):
        steps = sgd(mlp((10, 2)), inputs, targets, lr=1e-3, steps=6, batch_size=3, seed=seed)
        return [step.gradient[:10].nonzero().reshape(-1).tolist() for step in steps]

    first = seen(0)
    assert first == seen(0) != seen(1)
    for start in (0, 3):  # a pass is three batches of three, one example left out
        assert len({place for batch in first[start : start + 3] for place in batch}) == 9
    assert first[:3] != first[3:]


def test_only_the_parameters_change():
    inputs, targets = data()
    model = mlp((3, 5, 4)).eval()
    marker = torch.ones_like(model[0].weight)
    model[0].weight.grad = marker.clone()
    state, copies = torch.get_rng_state(), (inputs.clone(), targets.clone())
    with torch.no_grad():
        for _ in sgd(model, inputs, targets, lr=0.5, steps=3, batch_size=4):
            assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert torch.equal(inputs, copies[0]) and torch.equal(targets, copies[1])
    assert torch.equal(model[0].weight.grad, marker) and model[2].weight.grad is None


def test_a_failing_loss_leaves_the_model_where_it_was():
    inputs, targets = data()
    model = mlp((3, 4))
    before = flat_parameters(model)

    def broken(outputs, wanted):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        next(sgd(model, inputs, targets, lr=0.5, steps=3, loss=broken))
    assert torch.equal(flat_parameters(model), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("steps", -1),
        ("steps", 2.0),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("batch_size", 0),
        ("batch_size", 13),
        ("seed", -1),
    ],
)
def test_sgd_refuses_bad_options_at_the_call(name, value):
    inputs, targets = data()
    options = {"lr": 0.1, "steps": 2} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sgd(mlp((3, 4)), inputs, targets, **options)


def test_sgd_refuses_bad_data_and_frozen_models():
    inputs, targets = data()
    with pytest.raises(ValueError, match=r"^targets: expected 12"):
        sgd(mlp((3, 4)), inputs, targets[1:], lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"^inputs: expected at least one"):
        sgd(mlp((3, 4)), inputs[:0], targets[:0], lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"^model: expected every parameter to require gradients"):
        sgd(mlp((3, 4)).requires_grad_(False), inputs, targets, lr=0.1, steps=1)
