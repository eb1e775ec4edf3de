"""Wide networks: closed forms against quadrature and networks, scalings against exact laws, exponents against data."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldyn.kernels import width
from ldyn.kernels.entk import entk
from ldyn.models import flat_parameters, mlp

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both_positive(angle, power, *, nodes=80):
    """2 E[relu(a)^power relu(b)^power] by quadrature in polar coordinates, over the wedge where both are positive."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    low, high = angle - np.pi / 2, np.pi / 2
    turn = (high - low) / 2 * points + (high + low) / 2
    radial = 2.0**power * math.factorial(power)  # integral of r^(2 power + 1) exp(-r²/2)
    inner = (np.cos(turn) * np.cos(turn - angle)) ** power if power else np.ones_like(turn)
    return 2 * radial * (high - low) / 2 * float(weights @ inner) / (2 * np.pi)


# --- closed forms ----------------------------------------------------------------------------------------------


@given(st.floats(0, math.pi), st.sampled_from([0, 1, 2]))
def test_arc_cosine_functions_equal_quadrature(angle, degree):
    found = width.arc_cosine(torch.tensor([angle], dtype=F64), degree).item()
    assert found == pytest.approx(both_positive(angle, degree), rel=1e-12, abs=1e-14)


def test_arc_cosine_at_the_ends():
    ends = torch.tensor([0.0, math.pi], dtype=F64)
    for degree, start in ((0, 1.0), (1, 1.0), (2, 3.0)):
        torch.testing.assert_close(
            width.arc_cosine(ends, degree), torch.tensor([start, 0.0], dtype=F64), rtol=1e-14, atol=1e-15
        )


def elementwise(x1, x2):
    """The kernel of one hidden layer, pair by pair, from scalars and quadrature."""
    table = torch.zeros(len(x1), len(x2), dtype=F64)
    for i, j in itertools.product(range(len(x1)), range(len(x2))):
        inner, size = float(x1[i] @ x2[j]), float(x1[i].norm() * x2[j].norm())
        angle = math.acos(max(-1.0, min(1.0, inner / size)))
        scale = 2 / x1.shape[1]
        table[i, j] = scale * (size * both_positive(angle, 1) + inner * both_positive(angle, 0))
    return table


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_relu_ntk_equals_quadrature(size, first, second, seed):
    x1, x2 = normal(first, size, seed=seed), normal(second, size, seed=seed + 1)
    torch.testing.assert_close(width.relu_ntk(x1, x2), elementwise(x1, x2), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(width.relu_ntk(x1, x2), width.relu_ntk(x2, x1).mT, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_networks_average_to_the_closed_form(layers):
    x = normal(4, 3, seed=5)
    networks, hidden = 150, 64 if layers == 1 else 256
    kernels = torch.stack(
        [entk(width.wide_mlp((3, *[hidden] * layers, 1), seed=seed), x)[..., 0, 0] for seed in range(networks)]
    )
    error = kernels.std(0) / math.sqrt(networks)
    score = (kernels.mean(0) - width.relu_ntk(x, layers=layers)) / error
    assert score.abs().max() < 4.0
    wrong = width.relu_ntk(x, layers=layers % 3 + 1)
    assert ((kernels.mean(0) - wrong) / error).abs().max() > 8


def test_outputs_share_no_kernel_on_average_and_one_number_on_the_diagonal():
    x = normal(3, 4, seed=1)
    kernels = torch.stack([entk(width.wide_mlp((4, 64, 3), seed=seed), x) for seed in range(200)])
    error = kernels.std(0) / math.sqrt(len(kernels))
    wanted = width.relu_ntk(x)[..., None, None] * torch.eye(3, dtype=F64)
    assert ((kernels.mean(0) - wanted) / error).abs().max() < 4.5


def test_variance_equals_the_scatter_of_units():
    x = normal(3, 5, seed=2)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(400_000, 5, generator=generator, dtype=F64)
    outer = torch.randn(400_000, 1, 1, generator=generator, dtype=F64)
    inner = math.sqrt(2 / 5) * weights @ x.T
    on = (inner > 0).double()
    gram = 2 / 5 * x @ x.T
    hidden = inner.clamp_min(0)
    units = 2 * (hidden[:, :, None] * hidden[:, None] + outer**2 * gram * on[:, :, None] * on[:, None])
    torch.testing.assert_close(units.mean(0), width.relu_ntk(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(units.var(0), width.relu_ntk_variance(x), rtol=0.05, atol=0.05)


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_variance_on_the_diagonal_is_three_times_the_square(size, seed):
    x = normal(3, size, seed=seed)
    own = width.relu_ntk(x).diagonal().square()
    torch.testing.assert_close(width.relu_ntk_variance(x).diagonal(), 3 * own, rtol=1e-12, atol=1e-14)


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.sampled_from([1, 2, 3]))
def test_homogeneous_in_each_input_and_blind_to_rotations(seed, factor, layers):
    x = normal(4, 3, seed=seed)
    turn = torch.linalg.qr(normal(3, 3, seed=seed + 1)).Q
    kernel = width.relu_ntk(x, layers=layers)
    torch.testing.assert_close(width.relu_ntk(factor * x, x, layers=layers), factor * kernel, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(width.relu_ntk(x @ turn, layers=layers), kernel, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(kernel.diagonal(), 2 * layers_factor(layers) * x.square().sum(1) / 3)


def layers_factor(layers):
    """Θ(x, x) / s(x, x): every hidden layer adds one."""
    return layers + 1


def test_semidefinite_and_negative_entries_allowed():
    x = normal(12, 3, seed=4)
    kernel = width.relu_ntk(x)
    assert torch.linalg.eigvalsh(kernel)[0] > -1e-12
    assert kernel.min() < 0


def test_nearly_parallel_inputs_keep_their_difference():
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=F64)
    kernel = width.relu_ntk(x)
    # 1 - κ_0 = α/π to first order, and s = 2 |x|²/d = 1
    assert (kernel[0, 0] - kernel[0, 1]).item() == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_a_zero_input_has_a_zero_kernel():
    x = torch.cat([torch.zeros(1, 3, dtype=F64), normal(2, 3)])
    kernel = width.relu_ntk(x, layers=2)
    assert torch.equal(kernel[0], torch.zeros(3, dtype=F64))
    assert torch.isfinite(kernel).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_inputs_have_a_kernel_of_zero(dtype):
    x = normal(20, 5, dtype=dtype)
    kernel = width.relu_ntk(x, -x, layers=1).diagonal()
    assert kernel.abs().max() <= 30 * torch.finfo(dtype).eps * width.relu_ntk(x).diagonal().max()


def test_batches_lead_and_dtype_stays():
    x = normal(2, 5, 4, 3, dtype=torch.float32)
    batched = width.relu_ntk(x)
    assert batched.shape == (2, 5, 4, 4) and batched.dtype == torch.float32
    torch.testing.assert_close(batched[1, 2], width.relu_ntk(x[1, 2]))
    assert width.relu_ntk_variance(x, x[..., :2, :]).shape == (2, 5, 4, 2)


# --- parameterisations -----------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.sampled_from(["relu", "tanh", "gelu"]),
    st.integers(0, 10_000),
)
def test_one_function_in_three_parameterisations(sizes, activation, seed):
    x = normal(3, sizes[0], seed=seed)
    build = {kind: width.wide_mlp(sizes, activation=activation, parameterisation=kind, seed=seed)
             for kind in width.PARAMETERISATIONS}  # fmt: skip
    plain = mlp(sizes, activation=activation, bias=False, seed=seed)(x)
    torch.testing.assert_close(build["standard"](x), plain)
    torch.testing.assert_close(build["ntk"](x), plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(build["mean-field"](x), plain * sizes[-2] ** -0.5, rtol=1e-12, atol=1e-14)


def test_ntk_weights_have_variance_one_and_layer_kernels_scale():
    x = normal(3, 5)
    ntk = width.wide_mlp((5, 40, 30, 2), seed=7)
    standard = width.wide_mlp((5, 40, 30, 2), parameterisation="standard", seed=7)
    assert flat_parameters(ntk).var().item() == pytest.approx(1.0, abs=0.1)
    for name, other, fan in (("0.*", "0.*", 5), ("2.*", "3.*", 40), ("4.*", "6.*", 30)):
        scaled = 2 / fan * entk(standard, x, params=name)
        torch.testing.assert_close(entk(ntk, x, params=other), scaled, rtol=1e-11, atol=1e-12)


def test_standard_kernel_grows_with_the_width_and_ntk_does_not():
    x = normal(3, 4, seed=8)
    sizes = (64, 4096)
    growth = {}
    for kind in ("standard", "ntk"):
        norms = [entk(width.wide_mlp((4, h, 1), parameterisation=kind, seed=1), x).norm() for h in sizes]
        growth[kind] = float(norms[1] / norms[0])
    assert growth["standard"] > 0.6 * sizes[1] / sizes[0]
    assert 0.5 < growth["ntk"] < 2


def test_dtype_generator_and_repr():
    before = torch.get_rng_state()
    net = width.wide_mlp((3, 4, 2), dtype=torch.float32, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert net(torch.ones(1, 3)).dtype == torch.float32
    assert "factor=" in repr(net)


# --- training --------------------------------------------------------------------------------------------------


def test_drift_agrees_with_a_loop_by_hand_and_leaves_the_model_alone():
    x, y = normal(5, 3, seed=1), normal(5, 2, seed=2)
    model = width.wide_mlp((3, 16, 2), activation="tanh", seed=4)
    start = flat_parameters(model)
    drift = width.training_drift(model, x, y, lr=0.2, steps=30)
    assert torch.equal(flat_parameters(model), start)
    assert all(p.grad is None for p in model.parameters())

    other = width.wide_mlp((3, 16, 2), activation="tanh", seed=4)
    for _ in range(30):
        loss = 0.5 * (other(x) - y).square().sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.2 * gradient
    first, last = entk(model, x), entk(other, x)
    assert drift.kernel == pytest.approx(float((last - first).norm() / first.norm()), rel=1e-10)
    assert drift.parameters == pytest.approx(float((flat_parameters(other) - start).norm() / start.norm()), rel=1e-10)
    assert drift.residual == pytest.approx(float(((other(x) - y).norm() / (model(x) - y).norm()).detach()), rel=1e-10)


def drifts(activation, kind, hidden, seeds):
    x = normal(6, 3, seed=11)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(3)
    y = torch.tensor([[1.0], [-1.0]] * 3, dtype=F64)
    found = []
    for seed in range(seeds):
        model = width.wide_mlp((3, hidden, 1), activation=activation, parameterisation=kind, seed=seed)
        rate = 0.5 * (hidden if kind == "mean-field" else 1)
        found.append(width.training_drift(model, x, y + model(x).detach(), lr=rate, steps=60))
    kernel = math.sqrt(sum(d.kernel**2 for d in found) / seeds)
    return kernel, math.sqrt(sum(d.parameters**2 for d in found) / seeds)


@pytest.mark.parametrize(
    ("activation", "kind", "kernel", "parameters"),
    [
        ("tanh", "ntk", (-1.15, -0.85), (-0.55, -0.45)),
        ("relu", "ntk", (-0.85, -0.45), (-0.55, -0.45)),
        ("tanh", "mean-field", (-0.1, 0.1), (-0.1, 0.1)),
        ("relu", "mean-field", (-0.1, 0.1), (-0.1, 0.1)),
    ],
)
def test_exponents_of_the_drift(activation, kind, kernel, parameters):
    widths = (128, 512, 2048, 8192)
    found = [drifts(activation, kind, hidden, 6) for hidden in widths]
    for column, (low, high) in enumerate((kernel, parameters)):
        assert low < width.loglog_slope(widths, [row[column] for row in found]).slope < high


# --- slopes ----------------------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_a_power_law_gives_its_exponent(power, factor):
    x = torch.tensor([1.0, 3.0, 7.0, 20.0], dtype=F64)
    found = width.loglog_slope(x, factor * x**power)
    assert found.slope == pytest.approx(power, abs=1e-12)
    assert found.error < 1e-7


def test_standard_error_of_a_slope_is_the_scatter_of_slopes():
    x = torch.logspace(0, 3, 8, dtype=F64)
    noise = normal(4000, 8, seed=6) * 0.1
    found = [width.loglog_slope(x, x**-0.5 * one.exp()) for one in noise]
    scatter = torch.tensor([f.slope for f in found]).std().item()
    typical = math.sqrt(sum(f.error**2 for f in found) / len(found))
    assert typical == pytest.approx(scatter, rel=0.05)


# --- bad input -------------------------------------------------------------------------------------------------

GOOD = normal(3, 2)
RANDOM = torch.nn.Sequential(mlp((2, 1)), torch.nn.Dropout(0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: width.relu_ntk(normal(3)), "x1"),
        (lambda: width.relu_ntk(GOOD, normal(3, 4)), "x2"),
        (lambda: width.relu_ntk(GOOD, GOOD.float()), "x2"),
        (lambda: width.relu_ntk(torch.tensor([[math.nan]])), "x1"),
        (lambda: width.relu_ntk(GOOD, layers=0), "layers"),
        (lambda: width.relu_ntk_variance(torch.ones(2, 2, dtype=torch.int64)), "x1"),
        (lambda: width.arc_cosine(torch.tensor([4.0]), 1), "angle"),
        (lambda: width.arc_cosine(torch.tensor([1.0]), 3), "degree"),
        (lambda: width.wide_mlp((2, 2), parameterisation="mup"), "parameterisation"),
        (lambda: width.wide_mlp((2,)), "sizes"),
        (lambda: width.training_drift(mlp((2, 1)), GOOD, normal(3, 2), lr=0.1, steps=1), "targets"),
        (lambda: width.training_drift(mlp((2, 1)), GOOD, mlp((2, 1))(GOOD), lr=0.1, steps=1), "targets"),
        (lambda: width.training_drift(mlp((2, 1)), GOOD, normal(3, 1), lr=0.1, steps=0), "steps"),
        (lambda: width.training_drift(mlp((2, 1)), GOOD, normal(3, 1), lr=1e3, steps=300), "lr"),
        (lambda: width.training_drift(RANDOM, GOOD, normal(3, 1), lr=0.1, steps=3), "model"),
        (lambda: width.training_drift(mlp((2, 1)).requires_grad_(False), GOOD, normal(3, 1), lr=0.1, steps=3), "model"),
        (lambda: width.loglog_slope([1.0, 2.0], [1.0, 2.0]), "x"),
        (lambda: width.loglog_slope([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), "x"),
        (lambda: width.loglog_slope([1.0, 2.0, 3.0], [1.0, 0.0, 3.0]), "y"),
        (lambda: width.loglog_slope([1.0, 2.0, 3.0], [1.0, 2.0]), "y"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        call()
