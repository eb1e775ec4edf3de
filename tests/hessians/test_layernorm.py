"""LayerNorm and RMSNorm: every closed form against automatic differentiation, high precision and its near misses."""

import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional

from ldyn.hessians import layernorm as ln

F64 = torch.float64
NORMS = ("layernorm", "rmsnorm")
MATRICES = ("jacobian", "hessian")
PRODUCTS = ("hessian_contraction", "jvp", "vjp")
PAIRS = ("hessian_vector_product", "second_derivative")
OF_X = ("jacobian_spectrum", "jacobian_norm", "hessian_norm")


def call(norm, name, *arguments, **options):
    return getattr(ln, f"{norm}_{name}")(*arguments, **options)


def vectors_of(name):
    return 1 if name in PRODUCTS else 2 if name in PAIRS else 0


def forward(norm, weight=None, eps=1e-5):
    """PyTorch's own normalisation, which knows nothing of the closed forms."""
    function = functional.layer_norm if norm == "layernorm" else functional.rms_norm
    extra = (None,) if norm == "layernorm" else ()
    return lambda x: function(x, x.shape[-1:], weight, *extra, eps)


def normal(*shape, seed=0, scale=1.0, dtype=F64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def room(norm, x, eps, order, unit=1e-13):
    """The rounding to allow in a derivative of some order: its terms may cancel, and centring may lose digits."""
    moved = x - x.mean() if norm == "layernorm" else x
    sigma = float((moved.square().mean() + eps).sqrt())
    return unit * (1 + float(x.abs().max()) / sigma) / sigma**order


@st.composite
def rows(draw):
    norm = draw(st.sampled_from(NORMS))
    eps = draw(st.sampled_from([0.0, 1e-5, 0.3, 1.0]))
    least = 1 if norm == "rmsnorm" or eps else 2
    size, seed = draw(st.integers(least, 9)), draw(st.integers(0, 10_000))
    x = normal(size, seed=seed, scale=draw(st.sampled_from([0.3, 1.0, 4.0]))) + draw(st.sampled_from([0.0, 3.0]))
    weight = normal(size, seed=seed + 1) if draw(st.booleans()) else None
    return norm, eps, x, weight, normal(3, size, seed=seed + 2)


# --- against automatic differentiation --------------------------------------------------------------------------


@settings(max_examples=80)
@given(rows())
def test_derivatives_and_products_equal_automatic_differentiation(case):
    norm, eps, x, weight, (r, u, v) = case
    f = forward(norm, weight, eps)
    first, second = jacrev(f)(x), hessian(f)(x)
    size = 1 if weight is None else float(weight.abs().max()) + 1

    def close(got, expected, order):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=10 * size * room(norm, x, eps, order))

    close(call(norm, "jacobian", x, weight, eps=eps), first, 1)
    close(call(norm, "hessian", x, weight, eps=eps), second, 2)
    close(call(norm, "hessian_contraction", x, r, weight, eps=eps), torch.einsum("kij,k->ij", second, r), 2)
    close(call(norm, "hessian_vector_product", x, r, v, weight, eps=eps), torch.einsum("kij,k,j", second, r, v), 2)
    close(call(norm, "second_derivative", x, u, v, weight, eps=eps), torch.einsum("kij,i,j", second, u, v), 2)
    close(call(norm, "jvp", x, v, weight, eps=eps), first @ v, 1)
    close(call(norm, "vjp", x, r, weight, eps=eps), first.mT @ r, 1)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_twelve_digits_at_a_transformers_width(norm, eps):
    x, weight = normal(48, scale=0.7) + 0.5, normal(48, seed=1)
    f = forward(norm, weight, eps)
    assert relative(call(norm, "jacobian", x, weight, eps=eps), jacrev(f)(x)) < 1e-12
    assert relative(call(norm, "hessian", x, weight, eps=eps), hessian(f)(x)) < 1e-12


def test_a_wide_row_needs_no_matrix():
    x, r, v = normal(3, 200_000)
    other = jvp(grad(lambda point: forward("layernorm")(point) @ r), (x,), (v,))[1]
    torch.testing.assert_close(ln.layernorm_hessian_vector_product(x, r, v), other, rtol=1e-10, atol=1e-16)


# --- structure ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(rows())
def test_without_a_scale_layernorm_is_a_gradient_map(case):
    norm, eps, x, _, _ = case

    def sigma(point):
        moved = point - point.mean() if norm == "layernorm" else point
        return (moved.square().mean() + eps).sqrt()

    size = x.numel()
    jacobian, tensor = call(norm, "jacobian", x, eps=eps), call(norm, "hessian", x, eps=eps)
    torch.testing.assert_close(forward(norm, None, eps)(x), grad(sigma)(x) * size, rtol=0, atol=room(norm, x, eps, 0))
    torch.testing.assert_close(jacobian, hessian(sigma)(x) * size, rtol=0, atol=room(norm, x, eps, 1))
    assert torch.linalg.eigvalsh(jacobian).min() >= -room(norm, x, eps, 1, unit=1e-15)
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        assert (tensor - tensor.permute(order)).abs().max() <= room(norm, x, eps, 2, unit=1e-15)


def test_a_scale_ends_the_symmetry_in_the_output_only():
    x, weight = normal(5), torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0], dtype=F64)
    tensor, jacobian = ln.layernorm_hessian(x, weight), ln.layernorm_jacobian(x, weight)
    torch.testing.assert_close(tensor, tensor.mT, rtol=1e-13, atol=1e-15)
    assert (tensor - tensor.transpose(0, 1)).abs().max() > 0.1
    assert (jacobian - jacobian.mT).abs().max() > 0.1
    assert torch.linalg.eigvalsh(jacobian + jacobian.mT).min() < -0.1


@settings(max_examples=60)
@given(rows())
def test_null_directions_and_homogeneity(case):
    norm, eps, x, _, (_, u, _) = case
    ones, first, second = torch.ones_like(x), room(norm, x, eps, 1), room(norm, x, eps, 2)
    if norm == "layernorm":
        assert call(norm, "jvp", x, ones, eps=eps).abs().max() <= first
        assert call(norm, "second_derivative", x, ones, u, eps=eps).abs().max() <= second * u.norm()
    if eps == 0:
        # a map of degree zero: its Jacobian sends x to zero, and is of degree −1 itself
        moved = call(norm, "jvp", x, u, eps=0)
        torch.testing.assert_close(call(norm, "jvp", x, x, eps=0), 0 * x, rtol=0, atol=first * float(x.norm()))
        twice = call(norm, "second_derivative", x, x, u, eps=0)
        torch.testing.assert_close(twice, -moved, rtol=0, atol=second * float(x.norm() * u.norm()))


# --- spectrum and norms ------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(rows())
def test_spectrum_and_norms_equal_linear_algebra(case):
    norm, eps, x, _, _ = case
    size = x.numel()
    jacobian, tensor = call(norm, "jacobian", x, eps=eps), call(norm, "hessian", x, eps=eps)
    spectrum = call(norm, "jacobian_spectrum", x, eps=eps)
    assert sum(spectrum.multiplicities) == size
    first, second = room(norm, x, eps, 1), room(norm, x, eps, 2)
    torch.testing.assert_close(spectrum.eigenvalues(), torch.linalg.eigvalsh(jacobian), rtol=1e-11, atol=first)
    largest = torch.linalg.matrix_norm(jacobian, 2)
    torch.testing.assert_close(call(norm, "jacobian_norm", x, eps=eps), largest, rtol=1e-11, atol=first)
    flat = torch.linalg.matrix_norm(tensor.reshape(size * size, size), 2)
    got = call(norm, "hessian_norm", x, eps=eps, kind="flattening")
    torch.testing.assert_close(got, flat, rtol=1e-11, atol=second)


def injective_norm(tensor, starts=40, rounds=400):
    """Climb T[u, u, u] on the sphere by shifted power iterations: a lower bound that finds the maximum."""
    u = functional.normalize(normal(starts, len(tensor), seed=7), dim=-1)
    shift = 2 * tensor.reshape(len(tensor), -1).norm()
    for _ in range(rounds):
        u = functional.normalize(torch.einsum("kij,si,sj->sk", tensor, u, u) + shift * u, dim=-1)
    return torch.einsum("kij,sk,si,sj->s", tensor, u, u, u).max()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("size", "eps"), [(1, 1.0), (2, 0.5), (3, 0.0), (3, 1e-5), (4, 0.5), (4, 4.0), (7, 1.0)])
def test_injective_norm_is_what_a_search_finds(norm, size, eps):
    x = normal(size, seed=size)
    found = injective_norm(call(norm, "hessian", x, eps=eps))
    assert float(found) == pytest.approx(float(call(norm, "hessian_norm", x, eps=eps)), rel=1e-4, abs=1e-12)


@settings(max_examples=60)
@given(rows(), st.integers(-8, 8))
def test_bounds_over_all_rows(case, power):
    norm, eps, x, _, _ = case
    if eps:
        rows = x * 10.0**power
        assert call(norm, "jacobian_norm", rows, eps=eps) <= eps**-0.5 * (1 + 1e-14)
        bound = ln.HESSIAN_NORM_BOUND / (math.sqrt(len(x)) * eps)
        injective = call(norm, "hessian_norm", rows, eps=eps)
        assert injective <= bound * (1 + 1e-14)
        assert injective <= call(norm, "hessian_norm", rows, eps=eps, kind="flattening") * (1 + 1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_the_row_that_attains_the_bound(norm):
    x, eps = normal(6), 1e-3
    x = x - x.mean()
    x = x / x.square().mean().sqrt() * math.sqrt(eps / 4)
    bound = ln.HESSIAN_NORM_BOUND / (math.sqrt(6) * eps)
    assert float(call(norm, "hessian_norm", x, eps=eps)) == pytest.approx(bound, rel=1e-12)
    assert float(call(norm, "hessian_norm", 1.1 * x, eps=eps)) < 0.999 * bound


# --- rows that are hard for floating point ----------------------------------------------------------------------


def exact(values, eps):
    """x̂ and σ of LayerNorm in 60 digits."""
    numbers = [mpmath.mpf(float(value)) for value in values]
    mean = mpmath.fsum(numbers) / len(numbers)
    moved = [number - mean for number in numbers]
    sigma = mpmath.sqrt(mpmath.fsum(m * m for m in moved) / len(moved) + mpmath.mpf(eps))
    return [m / sigma for m in moved], sigma


@pytest.mark.parametrize(
    ("values", "eps"),
    [
        ([1e8 + 1, 1e8 - 2, 1e8 + 4, 1e8], 0.0),
        ([1e8 + 1, 1e8 - 2, 1e8 + 4, 1e8], 1e-5),
        ([1.0, 1.0 + 2**-50, 1.0 - 2**-51, 1.0], 0.0),
        ([1e-140, -3e-140, 2e-140], 0.0),
        ([1e-140, -3e-140, 2e-140], 1e-5),
        ([1e140, -3e140, 2e140], 1e-5),
        ([1e-9, 2e-9, 4e-9], 1e-5),
        ([5.0, 5.0, 5.0, 5.0 + 1e-7], 1e-12),
    ],
)
def test_offsets_and_extreme_scales_keep_their_accuracy(values, eps):
    x, size = torch.tensor(values, dtype=F64), len(values)
    with mpmath.workdps(60):
        hat, sigma = exact(x, eps)
        centred = [[mpmath.mpf(i == k) - mpmath.mpf(1) / size for i in range(size)] for k in range(size)]
        first = [[(centred[k][i] - hat[k] * hat[i] / size) / sigma for i in range(size)] for k in range(size)]
        matrix = torch.tensor([[float(entry) for entry in row] for row in first], dtype=F64)
        norm = float(1 / sigma)
        vector = [mpmath.mpf(k + 1) for k in range(size)]
        along = mpmath.fsum(h * v for h, v in zip(hat, vector, strict=True))
        mean = mpmath.fsum(vector) / size
        middle = mpmath.fsum((v - mean) ** 2 for v in vector)
        third = [
            -(2 * along * (v - mean) + middle * h - 3 * along**2 * h / size) / (size * sigma) * norm
            for v, h in zip(vector, hat, strict=True)
        ]
        bent = torch.tensor([float(entry) for entry in third], dtype=F64)
    v = torch.arange(1.0, size + 1, dtype=F64)
    assert relative(ln.layernorm_jacobian(x, eps=eps), matrix) < 1e-14
    assert float(ln.layernorm_jacobian_norm(x, eps=eps)) == pytest.approx(norm, rel=1e-14)
    second = ln.layernorm_second_derivative(x, v, v, eps=eps)
    assert relative(second, bent) < 1e-13


@pytest.mark.parametrize("norm", NORMS)
def test_small_eigenvalue_does_not_cancel(norm):
    x = torch.tensor([3.0, -1.0, -2.0], dtype=F64)
    eps = 1e-14
    sigma = math.sqrt(14 / 3 + eps)
    values = call(norm, "jacobian_spectrum", x, eps=eps).values
    assert float(values[1]) == pytest.approx(eps / sigma**3, rel=1e-13)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_single_precision(norm, offset):
    x, weight, r, v = normal(4, 32)
    x = x + offset
    single = [tensor.float() for tensor in (x, weight, r, v)]
    x, weight, r, v = (tensor.double() for tensor in single)
    for name in (*MATRICES, *PRODUCTS, *PAIRS, *OF_X[1:]):
        extra = {0: (), 1: (2,), 2: (2, 3)}[vectors_of(name)]
        order = (0, *extra, *(() if name in OF_X else (1,)))
        got = call(norm, name, *(single[position] for position in order))
        assert got.dtype == torch.float32
        assert relative(got.double(), call(norm, name, *((x, weight, r, v)[position] for position in order))) < 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_constant_rows_with_eps(norm):
    x, eps = torch.full((4,), 0.1 if norm == "layernorm" else 0.0, dtype=F64), 1e-5
    # x̂ = 0: the map is P / sqrt(eps), a point of inflection
    expected = jacrev(forward(norm, None, eps))(x)
    torch.testing.assert_close(call(norm, "jacobian", x, eps=eps), expected, rtol=1e-12, atol=1e-12)
    assert call(norm, "hessian", x, eps=eps).abs().max() < 1e-8
    assert float(call(norm, "jacobian_norm", x, eps=eps)) == pytest.approx(eps**-0.5)
    assert call(norm, "jacobian_spectrum", x, eps=eps).values[1] == pytest.approx(eps**-0.5)


def test_few_features():
    one, two = torch.tensor([3.0], dtype=F64), torch.tensor([1.0, 4.0], dtype=F64)
    assert torch.count_nonzero(ln.layernorm_jacobian(one)) == torch.count_nonzero(ln.layernorm_hessian(one)) == 0
    assert ln.layernorm_jacobian_norm(one) == ln.layernorm_hessian_norm(one) == 0
    assert ln.layernorm_jacobian_spectrum(one).eigenvalues().tolist() == [0.0]
    # two features without eps are sent to ±1 whatever they are
    assert ln.layernorm_jacobian(two, eps=0).abs().max() < 1e-15
    assert ln.layernorm_hessian_norm(two, eps=0) == ln.layernorm_jacobian_norm(two, eps=0) == 0
    assert ln.layernorm_jacobian_spectrum(two).multiplicities == (1, 1, 0)
    assert ln.rmsnorm_jacobian_spectrum(two).multiplicities == (0, 1, 1)
    assert ln.rmsnorm_jacobian_norm(one, eps=0) == 0


# --- near misses -------------------------------------------------------------------------------------------------


def test_near_misses_are_not_what_the_library_computes():
    x, eps = normal(16), 1e-5
    moved = x - x.mean()
    sigma = (moved.square().mean() + eps).sqrt()
    hat, centring = moved / sigma, torch.eye(16, dtype=F64) - 1 / 16
    jacobian, tensor = ln.layernorm_jacobian(x, eps=eps), ln.layernorm_hessian(x, eps=eps)
    cube = torch.einsum("k,i,j->kij", hat, hat, hat)
    wrong = {
        "rank-one term left out": (jacobian, centring / sigma),
        "unit-variance vector where x̂ belongs": (
            ln.layernorm_jacobian(x, eps=0.5),
            (centring - torch.outer(moved, moved) / moved.square().sum()) / (moved.square().mean() + 0.5).sqrt(),
        ),
        "2/d for 3/d": (tensor, tensor - cube / (256 * sigma**2)),
        "(2d + 1)/d for 3/d": (tensor, tensor + 30 * cube / (256 * sigma**2)),
        "unbiased variance": (jacobian, jacobian * math.sqrt(15 / 16)),
        "RMSNorm's": (jacobian, ln.rmsnorm_jacobian(x, eps=eps)),
    }
    for what, (right, near) in wrong.items():
        assert relative(near, right) > 1e-2, what


# --- the contract of the library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_shapes_and_dtypes(norm, batch, dtype):
    x, weight = normal(*batch, 4).to(dtype), torch.ones(4, dtype=dtype)
    shapes = {"jacobian": (4, 4), "hessian": (4, 4, 4), "hessian_contraction": (4, 4)}
    for name in (*MATRICES, *PRODUCTS, *PAIRS):
        result = call(norm, name, x, *[weight] * vectors_of(name), weight)
        assert result.shape == (*batch, *shapes.get(name, (4,))) and result.dtype == dtype
        assert result.device == x.device
    assert call(norm, "jacobian_norm", x).shape == call(norm, "hessian_norm", x).shape == batch
    spectrum = call(norm, "jacobian_spectrum", x)
    assert spectrum.values.shape == (*batch, 3) and spectrum.eigenvalues().shape == x.shape


@pytest.mark.parametrize("norm", NORMS)
def test_batches_equal_one_at_a_time_and_vmap(norm):
    x, u, v, weight = normal(6, 5), normal(6, 5, seed=1), normal(6, 5, seed=2), normal(5, seed=3)
    for name in (*MATRICES, *PRODUCTS, *PAIRS):
        arguments = (x, u, v)[: 1 + vectors_of(name)]
        function = partial(call, norm, name)
        single = torch.stack([function(*row, weight) for row in zip(*arguments, strict=True)])
        torch.testing.assert_close(function(*arguments, weight), single)
        torch.testing.assert_close(vmap(lambda *row, f=function: f(*row, weight))(*arguments), single)
    for name in OF_X[1:]:
        single = torch.stack([call(norm, name, row) for row in x])
        torch.testing.assert_close(vmap(partial(call, norm, name))(x), single)


@pytest.mark.parametrize("norm", NORMS)
def test_each_argument_can_be_mapped_over_alone(norm):
    x, u, v, weight = normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2), normal(3, 5, seed=3)
    for name in (*MATRICES, *PRODUCTS, *PAIRS):
        stacks = (*(x, u, v)[: 1 + vectors_of(name)], weight)
        for mapped in range(len(stacks)):
            arguments = [stack if place == mapped else stack[0] for place, stack in enumerate(stacks)]
            dims = tuple(0 if place == mapped else None for place in range(len(stacks)))
            got = vmap(partial(call, norm, name), in_dims=dims)(*arguments)
            single = [stack[1] if place == mapped else stack[0] for place, stack in enumerate(stacks)]
            torch.testing.assert_close(got[1], call(norm, name, *single))


def test_batch_dimensions_broadcast_both_ways():
    x, v = normal(3, 5), normal(2, 1, 5)
    result = ln.layernorm_jvp(x, v)
    assert result.shape == (2, 3, 5)
    torch.testing.assert_close(result[1, 2], ln.layernorm_jvp(x[2], v[1, 0]))
    assert ln.layernorm_second_derivative(x[0], v, normal(5, seed=1)).shape == (2, 1, 5)


@pytest.mark.parametrize("norm", NORMS)
def test_results_are_differentiable(norm):
    x, r, v, weight = normal(4, 4)
    jacobian, tensor = partial(call, norm, "jacobian"), partial(call, norm, "hessian")
    torch.testing.assert_close(jacrev(jacobian)(x, weight), tensor(x, weight))
    torch.testing.assert_close(jacfwd(jacobian)(x, weight), tensor(x, weight))
    along = jacrev(lambda point: call(norm, "vjp", point, r, weight))(x)
    torch.testing.assert_close(along, call(norm, "hessian_contraction", x, r, weight))
    third = jacrev(lambda point: call(norm, "hessian_vector_product", point, r, v, weight))(x)
    torch.testing.assert_close(third, third.mT)
    tracked = tuple(tensor_.clone().requires_grad_() for tensor_ in (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: tensor(a, b, eps=0.1), tracked)
    assert torch.autograd.gradcheck(lambda a: call(norm, "hessian_norm", a, eps=0.1), tracked[:1])
    # a constant row is no obstacle
    flat = torch.zeros(4, dtype=F64)
    assert torch.isfinite(jacrev(jacobian)(flat)).all()
