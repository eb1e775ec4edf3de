"""Gradient descent on a constant kernel: closed forms against the steps themselves, autograd and exact arithmetic."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian, jacrev

from ldyn import models
from ldyn.kernels import regression as kr

F64 = torch.float64
LOSSES = ["half_mean", "half_sum", "mse"]


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(name):
    """The losses as anyone would write them."""
    return {
        "half_mean": lambda f, y: 0.5 * (f - y).square().sum(-1).mean(),
        "half_sum": lambda f, y: 0.5 * (f - y).square().sum(),
        "mse": nn.functional.mse_loss,
    }[name]


def blocks(first, second):
    """K[i, j, a, b] of features (N, V, P)."""
    return torch.einsum("iap,jbp->ijab", first, second)


def problem(n, v, m, p, seed=0):
    """Features and data of a model that is linear in P parameters; K has rank at most P."""
    train, other = normal(n, v, p, seed=seed), normal(m, v, p, seed=seed + 1)
    y, f, g = normal(n, v, seed=seed + 2), normal(n, v, seed=seed + 3), normal(m, v, seed=seed + 4)
    return train, other, y, f, g


def by_autograd(train, other, y, f, g, *, lr, steps, loss):
    """Moves the parameters of the linear model by autograd's gradient of the loss as PyTorch writes it."""
    w = torch.zeros(train.shape[-1], dtype=F64, requires_grad=True)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss_of(loss)(f + train @ w, y), w)
        w = (w - lr * slope).detach().requires_grad_()
    w = w.detach()
    return f + train @ w, g + other @ w


sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(0, 10**6))


# --- against the steps themselves -------------------------------------------------------------------------------


@settings(max_examples=80)
@given(sizes, st.sampled_from(LOSSES), st.sampled_from([0.01, 0.5, 0.97, 1.0, 1.03, 1.4]), st.integers(0, 25))
def test_closed_form_equals_steps_in_the_parameters(size, loss, share, steps):
    train, other, y, f, g = problem(*size)
    kernel = blocks(train, train)
    lr = share * kr.critical_learning_rate(kernel, loss=loss)
    result = kr.gradient_descent(
        kernel, y, steps=steps, lr=lr, initial=f, cross=blocks(other, train), initial_cross=g, loss=loss
    )
    expected = by_autograd(train, other, y, f, g, lr=lr, steps=steps, loss=loss)
    scale = max(float(part.abs().max()) for part in expected)
    for got, want in zip((result.train, result.cross), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * scale)
    if share != 1.0:
        assert result.converges == (share < 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_scalar_kernels_serve_every_output(loss):
    train, other = normal(6, 9), normal(4, 9, seed=1)
    y, f, g = normal(6, 3, seed=2), normal(6, 3, seed=3), normal(4, 3, seed=4)
    eye = torch.eye(3, dtype=F64)
    small, cross = train @ train.T, other @ train.T
    options = dict(steps=[0, 3, 50], lr=0.02, initial=f, initial_cross=g, loss=loss)
    scalar = kr.gradient_descent(small, y, cross=cross, **options)
    wide = kr.gradient_descent(
        torch.einsum("ij,ab->ijab", small, eye), y, cross=torch.einsum("ij,ab->ijab", cross, eye), **options
    )
    torch.testing.assert_close(scalar.train, wide.train)
    torch.testing.assert_close(scalar.cross, wide.cross)
    one = kr.gradient_descent(small, y[:, 0], steps=7, lr=0.02, initial=f[:, 0], cross=cross, initial_cross=g[:, 0])
    assert one.train.shape == (6,) and one.cross.shape == (4,)
    column = kr.gradient_descent(small, y[:, :1], steps=7, lr=0.02, initial=f[:, :1], cross=cross)
    torch.testing.assert_close(one.train, column.train[:, 0])


@pytest.mark.parametrize("loss", ["half_mean", "mse"])
def test_a_linear_layer_trained_by_sgd(loss):
    layer = nn.Linear(4, 3, dtype=F64)
    x, other, y = normal(7, 4), normal(5, 4, seed=1), normal(7, 3, seed=2)
    before, before_other = layer(x).detach(), layer(other).detach()
    kernel, cross = x @ x.T + 1, other @ x.T + 1
    lr = 0.9 * kr.critical_learning_rate(kernel, loss=loss, outputs=3)
    predicted = kr.gradient_descent(
        kernel, y, steps=40, lr=lr, initial=before, cross=cross, initial_cross=before_other, loss=loss
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(loss)(layer(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(predicted.train, layer(x).detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(predicted.cross, layer(other).detach(), rtol=1e-11, atol=1e-12)


# --- a million steps, and steps beyond the threshold ---------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 1000, 10**6, 10**9])
def test_every_mode_keeps_its_relative_accuracy(steps):
    values = [0.0, 1e-20, 1e-13, 1e-9, 1e-6, 0.4999, 0.7, 1.0, 1.999, 2.0]
    kernel, ones = torch.diag(torch.tensor(values, dtype=F64)), torch.ones(10, dtype=F64)
    cross = torch.eye(10, dtype=F64)
    result = kr.gradient_descent(kernel, ones, steps=steps, lr=1.0, cross=cross, loss="half_sum")
    with mpmath.workdps(60):
        kept = [mpmath.mpf(1 - mpmath.mpf(v)) ** steps for v in values]
        gain = [(1 - q) / mpmath.mpf(v) if v else mpmath.mpf(steps) for v, q in zip(values, kept, strict=True)]
        left, gained = ([float(q) for q in part] for part in (kept, gain))
    torch.testing.assert_close(ones - result.train, torch.tensor(left, dtype=F64), rtol=1e-10, atol=2e-16)
    expected = torch.tensor(gained, dtype=F64)
    torch.testing.assert_close(result.cross, expected, rtol=1e-10, atol=0.0)
    assert not result.converges  # an eigenvalue of exactly 2/lr oscillates for ever


def test_beyond_the_threshold_it_grows_with_alternating_sign():
    kernel, y = torch.diag(torch.tensor([1.0, 0.5], dtype=F64)), torch.ones(2, dtype=F64)
    result = kr.gradient_descent(kernel, y, steps=range(4), lr=2.5, loss="half_sum")
    torch.testing.assert_close(result.train[:, 0], 1 - torch.tensor([1, -1.5, 2.25, -3.375], dtype=F64))
    assert not result.converges


def test_what_diverges_out_of_range_is_refused_by_name():
    kernel, y = torch.diag(torch.tensor([1.0, 0.5], dtype=F64)), torch.ones(2, dtype=F64)
    with pytest.raises(ValueError, match=r"^lr: expected less than the critical learning rate 2 .* 1000000 steps"):
        kr.gradient_descent(kernel, y, steps=10**6, lr=2.5, loss="half_sum")
    with pytest.raises(ValueError, match=r"^lr: .* exceed the range of torch\.float32"):
        kr.gradient_descent(kernel.float(), y.float(), steps=300, lr=2.5, loss="half_sum")
    quiet = kr.gradient_descent(kernel, torch.tensor([0.0, 1.0], dtype=F64), steps=10**6, lr=2.5, loss="half_sum")
    torch.testing.assert_close(quiet.train, torch.tensor([0.0, 1.0], dtype=F64))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_threshold_is_two_over_the_largest_curvature(loss):
    train, _, y, f, _ = problem(5, 3, 1, 8)
    kernel = blocks(train, train)
    curvature = hessian(lambda w: loss_of(loss)(f + train @ w, y))(torch.zeros(8, dtype=F64))
    critical = kr.critical_learning_rate(kernel, loss=loss)
    assert critical == pytest.approx(2 / float(torch.linalg.eigvalsh(curvature)[-1]), rel=1e-12)
    largest = float(torch.linalg.eigvalsh(kernel.permute(0, 2, 1, 3).reshape(15, 15))[-1])
    assert critical == pytest.approx({"half_mean": 10, "half_sum": 2, "mse": 15}[loss] / largest, rel=1e-12)


def test_the_threshold_of_a_scalar_kernel_needs_the_number_of_outputs():
    kernel = torch.diag(torch.tensor([4.0, 1.0], dtype=F64))
    assert kr.critical_learning_rate(kernel, loss="mse") == pytest.approx(0.5)
    assert kr.critical_learning_rate(kernel, loss="mse", outputs=3) == pytest.approx(1.5)
    assert kr.critical_learning_rate(kernel, outputs=3) == pytest.approx(1.0)
    assert kr.critical_learning_rate(torch.zeros(2, 2)) == math.inf


# --- the limit ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes)
def test_the_limit_is_the_smallest_displacement_that_fits_best(size):
    train, other, y, f, g = problem(*size)
    rows = train.reshape(-1, train.shape[-1])
    w = torch.linalg.pinv(rows) @ (y - f).reshape(-1)
    result = kr.kernel_regression(blocks(train, train), y, initial=f, cross=blocks(other, train), initial_cross=g)
    condition = float(
        torch.linalg.svdvals(rows)[0] ** 2
        / torch.linalg.svdvals(rows)[: kr.spectrum(blocks(train, train)).rank][-1] ** 2
    )
    slack = dict(rtol=0.0, atol=1e-13 * condition * (1 + float(w.norm())))
    torch.testing.assert_close(result.train, f + train @ w, **slack)
    torch.testing.assert_close(result.cross, g + other @ w, **slack)


def test_long_descent_and_flow_reach_the_limit():
    train, other, y, f, g = problem(4, 2, 3, 12)
    parts = dict(initial=f, cross=blocks(other, train), initial_cross=g)
    modes = kr.spectrum(blocks(train, train))
    limit = kr.kernel_regression(modes, y, **parts)
    lr = 0.9 * kr.critical_learning_rate(modes)
    long = kr.gradient_descent(modes, y, steps=10**6, lr=lr, **parts)
    flow = kr.gradient_flow(modes, y, times=1e6 * lr, **parts)
    for other_route in (long, flow):
        torch.testing.assert_close(limit.train, other_route.train)
        torch.testing.assert_close(limit.cross, other_route.cross)
    torch.testing.assert_close(limit.train, y)


def test_conflicting_labels_of_equal_inputs_are_averaged():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, -1.0]], dtype=F64)
    y = torch.tensor([0.0, 1.0, 5.0], dtype=F64)
    limit = kr.kernel_regression(x @ x.T, y, cross=x[:1] @ x.T)
    torch.testing.assert_close(limit.train, torch.tensor([0.5, 0.5, 5.0], dtype=F64))
    torch.testing.assert_close(limit.cross, torch.tensor([0.5], dtype=F64))
    assert float((limit.train - y).norm()) == pytest.approx(math.sqrt(0.5))
    late = kr.gradient_descent(x @ x.T, y, steps=10**6, lr=0.1, cross=x[:1] @ x.T)
    torch.testing.assert_close(late.train, limit.train)
    torch.testing.assert_close(late.cross, limit.cross, rtol=1e-9, atol=0.0)


def test_the_tolerance_decides_the_rank():
    kernel = torch.diag(torch.tensor([1.0, 1e-3, 1e-17], dtype=F64))
    assert kr.spectrum(kernel).rank == 2
    assert kr.spectrum(kernel, tolerance=1e-2).rank == 1
    assert kr.spectrum(kernel, tolerance=0.0).rank == 3
    assert kr.spectrum(kernel.float()).rank == 2
    assert kr.spectrum(torch.zeros(2, 2)).rank == 0
    y = torch.ones(3, dtype=F64)
    cut = kr.kernel_regression(kr.spectrum(kernel, tolerance=1e-2), y)
    torch.testing.assert_close(cut.train, torch.tensor([1.0, 0.0, 0.0], dtype=F64))
    nothing = kr.kernel_regression(torch.zeros(3, 3, dtype=F64), y, cross=torch.zeros(1, 3, dtype=F64))
    assert torch.count_nonzero(nothing.train) == 0 and torch.count_nonzero(nothing.cross) == 0


# --- gradient flow ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_flow_equals_the_matrix_exponential(loss):
    train, other, y, f, g = problem(4, 3, 2, 20)
    rows, others = train.reshape(12, 20), other.reshape(6, 20)
    kernel, cross, residual = rows @ rows.T, others @ rows.T, (y - f).reshape(-1)
    c = {"half_mean": 1 / 4, "half_sum": 1.0, "mse": 2 / 12}[loss]
    times = [0.0, 0.3, 2.0]
    result = kr.gradient_flow(
        blocks(train, train), y, times=times, initial=f, cross=blocks(other, train), initial_cross=g, loss=loss
    )
    for place, t in enumerate(times):
        left = torch.linalg.matrix_exp(-c * t * kernel) @ residual
        torch.testing.assert_close(result.train[place].reshape(-1), y.reshape(-1) - left)
        gained = cross @ torch.linalg.solve(kernel, residual - left)
        torch.testing.assert_close(result.cross[place].reshape(-1), g.reshape(-1) + gained)


def test_small_steps_approach_the_flow_at_first_order():
    train, _, y, f, _ = problem(4, 2, 1, 12)
    modes = kr.spectrum(blocks(train, train))
    flow = kr.gradient_flow(modes, y, times=0.5, initial=f).train
    errors = []
    for steps in (1000, 2000):
        errors.append(kr.gradient_descent(modes, y, steps=steps, lr=0.5 / steps, initial=f).train.sub(flow).norm())
    assert float(errors[0] / errors[1]) == pytest.approx(2.0, rel=0.02)


# --- the linearised model -----------------------------------------------------------------------------------------


def jacobian(model, x):
    names = [name for name, _ in model.named_parameters()]
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parts = jacrev(lambda values: functional_call(model, values, (x,)))(own)
    return torch.cat([parts[name].flatten(2) for name in names], -1)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_linearised_model_walks_along_the_closed_form(loss):
    model = models.mlp((5, 11, 3), seed=3)
    x, other, y = normal(6, 5), normal(4, 5, seed=1), normal(6, 3, seed=2)
    train, rows = jacobian(model, x), jacobian(model, other)
    kernel, cross = blocks(train, train), blocks(rows, train)
    lr = 0.8 * kr.critical_learning_rate(kernel, loss=loss)
    steps = [5, 0, 60]
    walked = kr.linearized_descent(model, x, y, steps=steps, lr=lr, x_cross=other, loss=loss)
    start, start_other = model(x).detach(), model(other).detach()
    closed = kr.gradient_descent(
        kernel, y, steps=steps, lr=lr, initial=start, cross=cross, initial_cross=start_other, loss=loss
    )
    torch.testing.assert_close(walked.train, closed.train, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(walked.cross, closed.cross, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(start + train @ walked.displacement[2], walked.train[2])
    assert torch.count_nonzero(walked.displacement[1]) == 0
    single = kr.linearized_descent(model, x, y, steps=60, lr=lr, loss=loss)
    assert single.cross is None
    torch.testing.assert_close(single.displacement, walked.displacement[2])


def test_a_linearised_model_that_diverges_is_refused():
    model = models.mlp((2, 4, 1))
    with pytest.raises(ValueError, match=r"^lr: .* 1000\.0, which diverges"):
        kr.linearized_descent(model, normal(3, 2), normal(3, 1), steps=500, lr=1000.0)


# --- near misses -----------------------------------------------------------------------------------------------


def test_near_misses_are_not_what_the_library_computes():
    train, other, y, f, g = problem(4, 3, 3, 15)
    kernel, cross = blocks(train, train), blocks(other, train)
    parts = dict(initial=f, cross=cross, initial_cross=g)
    lr = 0.5 * kr.critical_learning_rate(kernel)
    right = kr.gradient_descent(kernel, y, steps=4, lr=lr, **parts)
    wrong = {
        "no ½": kr.gradient_descent(kernel, y, steps=4, lr=2 * lr, **parts),
        "no mean": kr.gradient_descent(kernel, y, steps=4, lr=lr, loss="half_sum", **parts),
        "mean over entries": kr.gradient_descent(kernel, y, steps=4, lr=lr, loss="mse", **parts),
        "exponential for the power": kr.gradient_flow(kernel, y, times=4 * lr, **parts),
        "initial predictions dropped": kr.gradient_descent(kernel, y, steps=4, lr=lr, cross=cross),
        "blocks transposed": kr.gradient_descent(kernel, y, steps=4, lr=lr, **{**parts, "cross": cross.mT}),
        "one step more": kr.gradient_descent(kernel, y, steps=5, lr=lr, **parts),
    }
    for what, near in wrong.items():
        assert (right.cross - near.cross).abs().max() > 1e-2, what


# --- the contract of the library -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shapes_and_dtypes(dtype):
    train, other, y, f, g = (part.to(dtype) for part in problem(4, 2, 3, 12))
    parts = dict(initial=f, cross=blocks(other, train), initial_cross=g)
    modes = kr.spectrum(blocks(train, train))
    for steps, lead in ((3, ()), ([1], (1,)), (torch.arange(5), (5,)), (torch.arange(5).numpy(), (5,))):
        result = kr.gradient_descent(modes, y, steps=steps, lr=0.01, **parts)
        assert result.train.shape == (*lead, 4, 2) and result.cross.shape == (*lead, 3, 2)
        assert result.train.dtype == result.cross.dtype == dtype
    assert kr.gradient_flow(modes, y, times=torch.tensor(0.5), **parts).train.shape == (4, 2)
    assert kr.kernel_regression(modes, y).cross is None
    torch.testing.assert_close(kr.kernel_regression(modes, y).train, y, rtol=1e-3, atol=1e-3)
    start = kr.gradient_descent(modes, y, steps=0, lr=0.01, **parts)
    torch.testing.assert_close(start.train, f)
    torch.testing.assert_close(start.cross, g)


def test_nothing_of_the_callers_is_changed():
    model = models.mlp((3, 4, 2)).train()
    x, y = normal(5, 3), normal(5, 2, seed=1)
    kernel = blocks(jacobian(model, x), jacobian(model, x)).requires_grad_()
    held = [value.detach().clone() for value in (kernel, y, x, models.flat_parameters(model))]
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    result = kr.gradient_descent(kernel, y, steps=3, lr=0.1)
    kr.linearized_descent(model, x, y, steps=3, lr=0.1)
    with pytest.raises(ValueError, match="lr"):
        kr.linearized_descent(model, x, y, steps=3, lr=-1.0)
    assert not result.train.requires_grad and kernel.grad is None
    for now, before in zip((kernel, y, x, models.flat_parameters(model)), held, strict=True):
        assert torch.equal(now, before)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is default
