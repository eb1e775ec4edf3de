"""Critical learning rates against PyTorch's own optimisers, guarantees against wild losses, estimators and limits."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch.func import functional_call, hessian, jacrev

from ldyn.hessians import stability as sb
from ldyn.models import flat_parameters, mlp

F64 = torch.float64
RULES = ["gd", "momentum", "nesterov", "adam"]


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symmetric(curvatures, seed=0):
    modes, _ = torch.linalg.qr(normal(len(curvatures), len(curvatures), seed=seed))
    return modes @ torch.diag(torch.as_tensor(curvatures, dtype=F64)) @ modes.mT


def optimizer_for(w, rule, lr, beta, dampening):
    if rule == "adam":
        # a second moment that is full and does not move: frozen, and the bias corrections are over
        optimizer = torch.optim.Adam([w], lr=lr, betas=(beta, 1 - 1e-16), eps=0.0)
        optimizer.state[w] = {"step": torch.tensor(1e18), "exp_avg_sq": torch.ones_like(w)}
        return optimizer, "exp_avg"
    if rule == "gd":
        return torch.optim.SGD([w], lr=lr), "momentum_buffer"
    return (
        torch.optim.SGD([w], lr=lr, momentum=beta, dampening=dampening, nesterov=rule == "nesterov"),
        "momentum_buffer",
    )


def step_matrix(rule, curvature, lr, beta, dampening=0.0):
    """One step of PyTorch's optimiser on ½ λ w², as a linear map of parameter and buffer: two runs side by side."""
    w = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    optimizer, buffer = optimizer_for(w, rule, lr, beta, dampening)
    optimizer.state[w][buffer] = torch.tensor([0.0, 1.0], dtype=F64)
    w.grad = curvature * w.detach()
    optimizer.step()
    return torch.stack([w.detach(), optimizer.state[w][buffer]]).numpy()


def radius(rule, curvature, lr, beta, dampening=0.0):
    if rule == "gd":
        return abs(1 - lr * curvature)
    return np.abs(np.linalg.eigvals(step_matrix(rule, curvature, lr, beta, dampening))).max()


arguments = st.tuples(
    st.sampled_from(RULES), st.floats(0.01, 100.0), st.floats(0.02, 0.97), st.sampled_from([0.0, 0.3, 0.9])
)


def options(rule, beta, dampening):
    return dict(
        optimizer=rule,
        beta=None if rule == "gd" else beta,
        dampening=dampening if rule == "momentum" else 0.0,
    )


# --- thresholds -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(arguments)
def test_critical_rate_is_where_the_optimisers_own_step_stops_contracting(argument):
    rule, curvature, beta, dampening = argument
    chosen = options(rule, beta, dampening)
    critical = sb.critical_learning_rate(curvature, **chosen)
    measured = brentq(
        lambda lr: radius(rule, curvature, lr, beta, chosen["dampening"]) - 1,
        1e-2 / curvature,
        1e4 / curvature,
        xtol=1e-14 / curvature,
        rtol=1e-13,
    )
    assert critical == pytest.approx(measured, rel=1e-8)


@settings(max_examples=80)
@given(arguments, st.floats(0.001, 20.0), st.sampled_from([1.0, -1.0]))
def test_mode_factor_is_the_spectral_radius_of_the_step(argument, reduced, sign):
    rule, curvature, beta, dampening = argument
    chosen = options(rule, beta, dampening)
    factor = sb.mode_factor(sign * curvature, lr=reduced / curvature, **chosen)
    expected = radius(rule, sign * curvature, reduced / curvature, beta, chosen["dampening"])
    assert factor.item() == pytest.approx(expected, rel=1e-6)  # double roots lose half the digits in eigvals
    if sign < 0:
        assert factor.item() > 1
    else:
        assert (factor.item() < 1) == (reduced / curvature < sb.critical_learning_rate(curvature, **chosen))


def test_known_thresholds():
    assert sb.critical_learning_rate(4.0) == 0.5
    assert sb.critical_learning_rate(1.0, optimizer="momentum", beta=0.9) == pytest.approx(3.8)
    assert sb.critical_learning_rate(1.0, optimizer="momentum", beta=0.9, dampening=0.9) == pytest.approx(38.0)
    assert sb.critical_learning_rate(1.0, optimizer="nesterov", beta=0.9) == pytest.approx(3.8 / 2.8)
    assert sb.critical_learning_rate(1.0, optimizer="adam") == pytest.approx(38.0)
    assert sb.critical_learning_rate(1.0, optimizer="adam", beta=0.0) == sb.critical_learning_rate(1.0)


def test_tensors_keep_dtype_shape_and_gradient():
    sharpness = torch.tensor([[1.0], [2.0]], requires_grad=True)
    rate = sb.critical_learning_rate(sharpness, optimizer="momentum", beta=0.5)
    assert rate.dtype == torch.float32 and rate.shape == (2, 1)
    rate.sum().backward()
    torch.testing.assert_close(sharpness.grad, -3 / sharpness.detach() ** 2)
    factor = sb.mode_factor(torch.ones(3, 2), lr=0.5, optimizer="nesterov", beta=0.5)
    assert factor.dtype == torch.float32 and factor.shape == (3, 2)
    mapped = torch.func.vmap(sb.critical_learning_rate)(torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(mapped, torch.tensor([2.0, 0.5]))


@settings(max_examples=30)
@given(st.floats(0.1, 10.0), st.floats(1.0, 50.0))
def test_best_learning_rate_beats_its_neighbours(smallest, kappa):
    lr, rate = sb.best_learning_rate(smallest, smallest * kappa)

    def worst(step):
        return max(abs(1 - step * smallest), abs(1 - step * smallest * kappa))

    assert worst(lr) == pytest.approx(rate, abs=1e-12)
    assert rate == pytest.approx((kappa - 1) / (kappa + 1), abs=1e-12)
    assert all(worst(lr * factor) > rate for factor in (0.9, 0.999, 1.001, 1.1))


# --- trajectories on a quadratic ----------------------------------------------------------------------------------


def walk(matrix, start, lr, steps, momentum=0.0):
    w = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    path = [w.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * torch.einsum("...i,ij,...j", w, matrix, w)).sum().backward()
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 1000), st.sampled_from([0.0, 0.4, 0.95]), st.floats(0.01, 1.5))
def test_quadratic_descent_is_the_optimisers_walk(size, seed, momentum, lr):
    matrix, start = symmetric(normal(size, seed=seed), seed=seed), normal(2, size, seed=seed + 1)
    path = walk(matrix, start, lr, 9, momentum)
    jumped = sb.quadratic_descent(matrix, start, lr=lr, steps=range(10), momentum=momentum)
    torch.testing.assert_close(jumped, path, rtol=1e-9, atol=1e-11)
    last = sb.quadratic_descent(matrix, start[0], lr=lr, steps=9, momentum=momentum)
    torch.testing.assert_close(last, path[-1, 0], rtol=1e-9, atol=1e-11)


def test_convergence_stops_exactly_at_the_critical_rate():
    matrix, start = symmetric([10.0, 1.0, 0.1]), symmetric([10.0, 1.0, 0.1]) @ torch.ones(3, dtype=F64)
    critical = sb.critical_learning_rate(10.0)
    below, at, above = (
        sb.quadratic_descent(matrix, start, lr=factor * critical, steps=2000).norm() for factor in (0.95, 1.0, 1.005)
    )
    top = torch.linalg.eigh(matrix).eigenvectors[:, -1] @ start
    assert below < 1e-12
    assert at.item() == pytest.approx(abs(top.item()), rel=1e-9)
    assert above > 1e3 * at
    with_momentum = sb.critical_learning_rate(10.0, optimizer="momentum", beta=0.9)
    slow, fast = (
        sb.quadratic_descent(matrix, start, lr=factor * with_momentum, steps=1000, momentum=0.9).norm()
        for factor in (0.99, 1.01)
    )
    assert slow < 1e-3 < 1e3 < fast


# --- the curvature that Adam sees -------------------------------------------------------------------------------------


def adam_after(steps, **settings):
    model = mlp((3, 4, 2), seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        model(normal(5, 3, seed=step)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("settings", [dict(), dict(amsgrad=True), dict(eps=1e-3, betas=(0.0, 0.5))])
def test_adam_divides_its_step_by_the_preconditioner(settings):
    model, optimizer = adam_after(4, **settings)
    before, batch = flat_parameters(model), normal(5, 3, seed=9)
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    denominators = sb.adam_preconditioner(model, optimizer)
    averages = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
    correction = 1 - optimizer.param_groups[0]["betas"][0] ** 5
    step = -0.01 * averages / correction / denominators
    torch.testing.assert_close(flat_parameters(model) - before, step, rtol=1e-7, atol=1e-12)


def test_preconditioned_has_the_eigenvalues_of_the_product():
    matrix, diagonal = symmetric([-1.0, 0.5, 3.0, 7.0]), normal(4, seed=3).exp()
    operator = sb.preconditioned(matrix, diagonal)
    expected = np.sort(np.linalg.eigvals((matrix / diagonal[:, None]).numpy()).real)
    torch.testing.assert_close(torch.linalg.eigvalsh(operator.dense()), torch.from_numpy(expected))
    v = normal(4, seed=5)
    torch.testing.assert_close(operator @ v, (matrix @ (v / diagonal.sqrt())) / diagonal.sqrt())


def test_preconditioner_refuses_what_does_not_fit():
    model, optimizer = adam_after(1)
    untouched, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    for other in (untouched, sgd, torch.optim.Adam(mlp((3, 4, 2)).parameters())):
        with pytest.raises(ValueError, match=r"^optimizer: expected .*, got "):
            sb.adam_preconditioner(model, other)
    with pytest.raises(ValueError, match=r"^model: expected .*, got "):
        sb.adam_preconditioner(torch.nn.Tanh(), optimizer)
    for diagonal in (torch.ones(2, dtype=F64), torch.ones(3), torch.tensor([1.0, 0.0, 1.0], dtype=F64)):
        with pytest.raises(ValueError, match=r"^preconditioner: expected .*, got "):
            sb.preconditioned(torch.eye(3, dtype=F64), diagonal)


# --- descent --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 5000), st.floats(0.01, 8.0))
def test_descent_bound_holds_for_logistic_regression(size, count, seed, reduced):
    x, w = 3 * normal(count, size, seed=seed), 2 * normal(size, seed=seed + 1)

    def loss(v):
        return torch.nn.functional.softplus(x @ v).mean()

    smoothness = float(torch.linalg.matrix_norm(x, 2) ** 2) / (4 * count)
    gradient = jacrev(loss)(w)
    lr = reduced / smoothness
    bound = sb.descent_bound(loss(w), gradient.norm(), lr=lr, smoothness=smoothness)
    assert loss(w - lr * gradient) <= bound + 1e-12


def test_descent_bound_is_exact_on_a_round_quadratic_also_in_expectation():
    w, curvature, lr = normal(3), 2.5, 0.3
    noise = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 2.0, -0.5]], dtype=F64)  # two equally likely draws of mean zero
    loss = 0.5 * curvature * w.square().sum()
    gradient = curvature * w
    after = 0.5 * curvature * (w - lr * (gradient + noise)).square().sum(-1).mean()
    spread = float(noise.square().sum(-1).mean())
    bound = sb.descent_bound(loss, gradient.norm(), lr=lr, smoothness=curvature, noise=spread)
    torch.testing.assert_close(after, bound)
    assert sb.descent_bound(float(loss), float(gradient.norm()), lr=lr, smoothness=curvature) < float(bound)


# --- curvature from losses ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.floats(-3.0, 30.0).filter(lambda c: min(abs(c), abs(c - 20), abs(c - 10)) > 0.05), st.floats(-5.0, 5.0))
def test_curvature_of_one_mode_is_read_exactly(curvature, floor):
    lr = 0.1
    path = sb.quadratic_descent(torch.tensor([[curvature]], dtype=F64), torch.ones(1, dtype=F64), lr=lr, steps=range(5))
    losses = floor + 0.5 * curvature * path[:, 0].square()
    found = sb.curvature_from_losses(losses, lr=lr, overshoots=lr * curvature > 1)
    torch.testing.assert_close(found, torch.full_like(found, curvature), rtol=1e-6, atol=1e-6)
    twin = sb.curvature_from_losses(losses, lr=lr, overshoots=lr * curvature <= 1)
    torch.testing.assert_close(twin, 2 / lr - found)


def test_several_modes_give_an_average_that_ends_at_the_slowest():
    curvatures, lr = torch.tensor([0.5, 2.0, 8.0], dtype=F64), 0.1
    path = sb.quadratic_descent(torch.diag(curvatures), torch.ones(3, dtype=F64), lr=lr, steps=range(120))
    found = sb.curvature_from_losses((0.5 * curvatures * path.square()).sum(-1), lr=lr)
    assert ((found > 0.5 - 1e-9) & (found < 8)).all()
    assert found[-1].item() == pytest.approx(0.5, abs=1e-4)


def test_what_no_mode_explains_is_nan():
    losses = torch.tensor([[3.0, 2.0, 2.5, 2.5, 2.5], [4.0, 2.0, 1.0, 0.5, 0.5]], dtype=F64)
    found = sb.curvature_from_losses(losses, lr=0.5)
    expected = torch.tensor([[math.nan, 2.0, math.nan], [2 - 2**0.5, 2 - 2**0.5, 2.0]], dtype=F64)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert sb.curvature_from_losses(losses.float(), lr=0.5).dtype == torch.float32


# --- one more sample ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 5000))
def test_increment_bound_holds_at_random_reference_points(count, size, seed):
    x, reference = 2 * normal(count + 1, size, seed=seed), 3 * normal(size, seed=seed + 1)
    point = reference + 2 * normal(size, seed=seed + 2)

    def each(w):
        return torch.nn.functional.softplus(x @ w)

    change = each(point).mean() - each(point)[:-1].mean()
    bound = sb.increment_bound(
        count,
        (point - reference).norm(),
        loss_bound=float(each(reference).max()),
        smoothness=float(x.square().sum(-1).max()) / 4,
    )
    assert change.abs() <= bound


def test_increment_bound_is_attained_by_a_parabola_among_zeros():
    curvature, centre, reference, point, count = 3.0, -0.7, 0.4, 1.9, 4
    new = 0.5 * curvature * (point - centre) ** 2
    bound = sb.increment_bound(
        count, point - reference, loss_bound=0.5 * curvature * (reference - centre) ** 2, smoothness=curvature
    )
    assert new / (count + 1) == pytest.approx(bound, rel=1e-12)


# --- Gauss–Newton bound ---------------------------------------------------------------------------------------------


def gauss_newton_norm(weights, x):
    def logits(parameters):
        state = x
        for place, weight in enumerate(parameters):
            state = weight @ (state.relu() if place else state)
        return state

    jacobian = torch.cat([part.flatten(1) for part in jacrev(logits)(tuple(weights))], 1)
    p = logits(weights).softmax(-1)
    return torch.linalg.matrix_norm(jacobian.mT @ (torch.diag(p) - torch.outer(p, p)) @ jacobian, 2)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 5000), st.floats(0.0, 3.0))
def test_gauss_newton_bound_holds(sizes, seed, scale):
    weights = [scale * normal(b, a, seed=seed + b) for a, b in pairwise(sizes)]
    x = normal(2, sizes[0], seed=seed)
    bound = sb.gauss_newton_bound(weights, x)
    assert bound.shape == (2,)
    for example, limit in zip(x, bound, strict=True):
        assert gauss_newton_norm(weights, example) <= limit * (1 + 1e-12)


def test_gauss_newton_bound_is_attained_and_bounds_the_hessian_of_softmax_regression():
    x, weights = normal(3), [torch.zeros(2, 3, dtype=F64)]
    layer = torch.nn.Linear(3, 2, bias=False, dtype=F64)

    def loss(flat):
        logits = functional_call(layer, {"weight": flat.view(2, 3)}, (x,))
        return torch.nn.functional.cross_entropy(logits, torch.tensor(1))

    norm = torch.linalg.matrix_norm(hessian(loss)(torch.zeros(6, dtype=F64)), 2)
    torch.testing.assert_close(norm, sb.gauss_newton_bound(weights, x))
