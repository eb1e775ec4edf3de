"""Softmax calculus: every formula against automatic differentiation, high-precision sums and its near misses."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from ldyn.foundations import softmax as sm

F64 = torch.float64
ALL_OF_LOGITS = [
    sm.softmax_jacobian,
    sm.softmax_hessian,
    sm.log_softmax_jacobian,
    sm.log_softmax_hessian,
    sm.softmax_jacobian_norm_bounds,
]
WITH_ONE_VECTOR = [sm.softmax_jacobian_vector_product, sm.softmax_hessian_contraction]


def normal(*shape, seed=0, scale=2.0, dtype=F64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(z):
    return torch.softmax(z, -1)


def logs(z):
    return torch.log_softmax(z, -1)


logit_vectors = st.builds(
    lambda size, scale, seed: normal(size, seed=seed, scale=scale),
    st.integers(1, 7),
    st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    st.integers(0, 10_000),
)


# --- against automatic differentiation -------------------------------------------------------------------------


@settings(max_examples=60)
@given(logit_vectors, st.sampled_from([1.0, 0.3, 4.0]))
def test_derivatives_equal_automatic_differentiation(z, tau):
    same = dict(rtol=1e-10, atol=1e-15 / tau**2)
    assert_close = torch.testing.assert_close
    assert_close(sm.softmax_jacobian(z, temperature=tau), jacrev(lambda x: plain(x / tau))(z), **same)
    assert_close(sm.softmax_hessian(z, temperature=tau), hessian(lambda x: plain(x / tau))(z), **same)
    assert_close(sm.log_softmax_jacobian(z, temperature=tau), jacfwd(lambda x: logs(x / tau))(z), **same)
    each = hessian(lambda x: logs(x / tau))(z)
    assert_close(sm.log_softmax_hessian(z, temperature=tau).expand_as(each), each, **same)


@settings(max_examples=40)
@given(logit_vectors, st.integers(0, 100), st.sampled_from([1.0, 0.5]))
def test_contractions_equal_the_full_tensors(z, seed, tau):
    size = z.numel()
    r, u, v = normal(3, size, seed=seed)
    jacobian = sm.softmax_jacobian(z, temperature=tau)
    tensor = sm.softmax_hessian(z, temperature=tau)
    same = dict(rtol=1e-9, atol=1e-14 / tau**3)
    product = sm.softmax_jacobian_vector_product(z, v, temperature=tau)
    torch.testing.assert_close(product, jacobian @ v, **same)
    contraction = sm.softmax_hessian_contraction(z, r, temperature=tau)
    torch.testing.assert_close(contraction, torch.einsum("kij,k->ij", tensor, r), **same)
    cumulant = sm.third_cumulant(z, r, u, v, temperature=tau)
    torch.testing.assert_close(cumulant, torch.einsum("kij,k,i,j", tensor, r, u, v) / tau, **same)


def test_third_cumulant_is_the_third_derivative_of_log_sum_exp():
    z, u = normal(5), normal(5, seed=1)

    def along(t):
        return torch.logsumexp(z + t * u, -1)

    third = grad(grad(grad(along)))(torch.zeros((), dtype=F64))
    torch.testing.assert_close(sm.third_cumulant(z, u, u, u), third)


# --- against sums in 60 digits: relative accuracy of every entry -----------------------------------------------


def to_tensor(nested):
    return torch.tensor([[float(x) for x in row] for row in nested], dtype=F64)


def exact_softmax(z):
    weights = [mpmath.exp(mpmath.mpf(float(x))) for x in z]
    whole = mpmath.fsum(weights)
    return [w / whole for w in weights]


EXTREME = [
    [0.0, -45.0, -50.0],
    [50.0, 10.0, 0.0, -300.0],
    [1000.0, 999.0, -1000.0],
    [-1000.0, -1000.0, -1000.5, -1030.0],
    [0.3, 0.1, -0.7, 0.2],
    [200.0, 0.0],
]


@pytest.mark.parametrize("values", EXTREME)
def test_every_entry_keeps_its_relative_accuracy(values):
    z, size = torch.tensor(values, dtype=F64), len(values)
    with mpmath.workdps(700):
        p = exact_softmax(z)
        rest = [mpmath.fsum(p[j] for j in range(size) if j != k) for k in range(size)]
        covariance = [[p[i] * rest[i] if i == j else -p[i] * p[j] for j in range(size)] for i in range(size)]
        centring = [[rest[i] if i == j else -p[j] for j in range(size)] for i in range(size)]
        third = [
            [[p[k] * (centring[k][i] * centring[k][j] - covariance[i][j]) for j in range(size)] for i in range(size)]
            for k in range(size)
        ]
        exact_covariance, exact_centring = to_tensor(covariance), to_tensor(centring)
        exact_third = torch.stack([to_tensor(matrix) for matrix in third])
    relative = dict(rtol=1e-13, atol=0.0)
    torch.testing.assert_close(sm.softmax_jacobian(z), exact_covariance, **relative)
    torch.testing.assert_close(sm.log_softmax_jacobian(z), exact_centring, **relative)
    torch.testing.assert_close(sm.log_softmax_hessian(z), -exact_covariance, **relative)
    torch.testing.assert_close(sm.softmax_hessian(z), exact_third, rtol=1e-12, atol=1e-300)


def test_products_keep_their_relative_accuracy_when_the_model_is_certain():
    z, v = torch.tensor([0.0, -60.0, -62.0], dtype=F64), torch.tensor([3.0, 1.0, -2.0], dtype=F64)
    with mpmath.workdps(60):
        p, w = exact_softmax(z), [3, 1, -2]
        mean = mpmath.fsum(a * b for a, b in zip(p, w, strict=True))
        product = [float(a * (b - mean)) for a, b in zip(p, w, strict=True)]
        third = float(mpmath.fsum(a * (b - mean) ** 3 for a, b in zip(p, w, strict=True)))
    expected = torch.tensor(product, dtype=F64)
    torch.testing.assert_close(sm.softmax_jacobian_vector_product(z, v), expected, rtol=1e-13, atol=0.0)
    assert sm.third_cumulant(z, v, v, v).item() == pytest.approx(third, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("function", ALL_OF_LOGITS)
def test_extreme_logits_stay_finite(function, dtype):
    z = torch.tensor([[1e3, -1e3, 0.0], [-1e3, -1e3, -1e3], [1e3, 1e3, -1e3]], dtype=dtype)
    result = function(z)
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.dtype == dtype
        assert torch.isfinite(tensor).all()


# --- identities ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(logit_vectors)
def test_null_direction_trace_symmetry_and_sign(z):
    p, jacobian, tensor = plain(z), sm.softmax_jacobian(z), sm.softmax_hessian(z)
    tight = dict(rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(jacobian.sum(-1), torch.zeros_like(p), **tight)
    torch.testing.assert_close(jacobian.trace(), 1 - p.square().sum(), rtol=1e-10, atol=1e-15)
    assert torch.linalg.eigvalsh(jacobian).min() >= -1e-15
    assert torch.equal(jacobian, jacobian.mT)
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
        torch.testing.assert_close(tensor, tensor.permute(order), **tight)
    torch.testing.assert_close(tensor.sum(0), torch.zeros_like(jacobian), **tight)


def test_uniform_probabilities_have_norm_one_over_v():
    for size in (2, 3, 10, 64):
        jacobian = sm.softmax_jacobian(torch.zeros(size, dtype=F64))
        assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(1 / size, rel=1e-12)
        lower, upper = sm.softmax_jacobian_norm_bounds(torch.zeros(size, dtype=F64))
        assert lower.item() == pytest.approx(1 / size) == upper.item()


@settings(max_examples=100)
@given(logit_vectors, st.sampled_from([1.0, 0.2, 3.0]))
def test_norm_bounds_enclose_the_norm(z, tau):
    norm = torch.linalg.eigvalsh(sm.softmax_jacobian(z, temperature=tau)).abs().amax()
    lower, upper = sm.softmax_jacobian_norm_bounds(z, temperature=tau)
    slack = 1e-12 * norm + 1e-16 / tau
    assert lower <= norm + slack
    assert norm <= upper + slack
    assert upper <= sm.JACOBIAN_NORM_BOUND / tau * (1 + 1e-15)
    assert upper <= 2 * lower * (1 + 1e-12) or z.numel() == 1


def test_norm_bounds_meet_for_two_classes_and_for_tied_leaders():
    for z in (normal(20, 2), torch.tensor([[1.0, 1.0, 0.3, -4.0]], dtype=F64)):
        lower, upper = sm.softmax_jacobian_norm_bounds(z)
        torch.testing.assert_close(lower, upper, rtol=1e-13, atol=0.0)


def test_the_case_that_attains_the_hessian_bound():
    share = (1 + 1 / math.sqrt(3)) / 2
    z = torch.tensor([math.log(share), math.log1p(-share)], dtype=F64)
    u = torch.tensor([1.0, -1.0], dtype=F64) / math.sqrt(2)
    assert sm.third_cumulant(z, u, u, u).abs().item() == pytest.approx(sm.HESSIAN_NORM_BOUND, rel=1e-14)
    assert math.sqrt(2 / 27) == sm.HESSIAN_NORM_BOUND


@settings(max_examples=60)
@given(logit_vectors, st.integers(0, 1000))
def test_hessian_stays_below_its_bound(z, seed):
    r, u, v = torch.nn.functional.normalize(normal(3, z.numel(), seed=seed), dim=-1)
    assert sm.third_cumulant(z, r, u, v).abs() <= sm.HESSIAN_NORM_BOUND
    assert torch.linalg.matrix_norm(sm.softmax_hessian_contraction(z, r), 2) <= sm.HESSIAN_NORM_BOUND + 1e-15


def test_one_class_has_no_derivative():
    z = torch.tensor([[3.0], [-1e3]])
    for function in ALL_OF_LOGITS[:4]:
        assert torch.count_nonzero(function(z)) == 0
    bounds = sm.softmax_jacobian_norm_bounds(z)
    assert bounds.lower.shape == (2,) and torch.count_nonzero(torch.stack(bounds)) == 0


# --- near misses -----------------------------------------------------------------------------------------------


def test_near_misses_are_not_what_the_library_computes():
    z = normal(4)
    p, jacobian, tensor = plain(z), sm.softmax_jacobian(z), sm.softmax_hessian(z)
    centred = torch.eye(4, dtype=F64) - p
    products = torch.einsum("k,ki,kj->kij", p, centred, centred)
    wrong = {
        "diagonal only": (jacobian, torch.diag(p)),
        "product added": (jacobian, torch.diag(p) + torch.outer(p, p)),
        "log-softmax's in its place": (jacobian, centred),
        "log-softmax transposed": (sm.log_softmax_jacobian(z), centred.mT),
        "sign of the log-softmax Hessian": (sm.log_softmax_hessian(z), jacobian),
        "covariance left out": (tensor, products),
        "covariance added": (tensor, products + torch.einsum("k,ij->kij", p, jacobian)),
        "covariance not weighted": (tensor, products - jacobian),
    }
    for what, (right, near) in wrong.items():
        assert (right - near).abs().max() > 1e-2, what


# --- the contract of the library -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_shapes_and_dtypes(batch, dtype):
    z = normal(*batch, 4).to(dtype)
    shapes = {
        sm.softmax_jacobian: (4, 4),
        sm.softmax_hessian: (4, 4, 4),
        sm.log_softmax_jacobian: (4, 4),
        sm.log_softmax_hessian: (4, 4),
    }
    if 0 in batch:
        with pytest.raises(ValueError, match="at least one element"):
            sm.softmax_jacobian(z)
        return
    for function, shape in shapes.items():
        assert function(z).shape == (*batch, *shape) and function(z).dtype == dtype
    vector = torch.ones(4, dtype=dtype)
    assert sm.softmax_jacobian_vector_product(z, vector).shape == z.shape
    assert sm.softmax_hessian_contraction(z, z).shape == (*batch, 4, 4)
    assert sm.third_cumulant(z, vector, z, z).shape == batch
    assert sm.third_cumulant(z, vector, z, z).dtype == dtype
    assert sm.softmax_jacobian_norm_bounds(z).upper.shape == batch


def test_batches_equal_one_at_a_time():
    z, v = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    for function in ALL_OF_LOGITS[:4]:
        single = torch.stack([function(row) for row in z.reshape(-1, 5)])
        torch.testing.assert_close(function(z).reshape(single.shape), single)
    for function in WITH_ONE_VECTOR:
        pairs = zip(z.reshape(-1, 5), v.reshape(-1, 5), strict=True)
        single = torch.stack([function(row, vector) for row, vector in pairs])
        torch.testing.assert_close(function(z, v).reshape(single.shape), single)


@pytest.mark.parametrize("function", ALL_OF_LOGITS)
def test_functions_can_be_mapped_over_a_batch(function):
    z = normal(3, 4)
    for mapped, direct in zip(vmap(function)(z), function(z), strict=True):
        torch.testing.assert_close(mapped, direct)


def test_vector_functions_can_be_mapped_over_either_argument():
    z, v = normal(3, 4), normal(3, 4, seed=1)
    for function in WITH_ONE_VECTOR:
        torch.testing.assert_close(vmap(function)(z, v), function(z, v))
        torch.testing.assert_close(vmap(function, in_dims=(None, 0))(z[0], v), function(z[0].expand(3, 4), v))


def test_results_are_differentiable():
    z, v = normal(3), normal(3, seed=1)
    torch.testing.assert_close(jacrev(sm.softmax_jacobian)(z), sm.softmax_hessian(z))
    torch.testing.assert_close(jacfwd(sm.softmax_jacobian)(z), sm.softmax_hessian(z))
    fourth = jacrev(jacrev(jacrev(plain)))(z)
    torch.testing.assert_close(jacrev(sm.softmax_hessian)(z), fourth)
    contraction = jacrev(lambda x: sm.softmax_jacobian_vector_product(x, v))(z)
    torch.testing.assert_close(contraction, sm.softmax_hessian_contraction(z, v))
    along = grad(lambda x: sm.third_cumulant(x, v, v, v))(z)
    torch.testing.assert_close(along, torch.einsum("kijl,k,i,j->l", fourth, v, v, v))
    assert torch.autograd.gradcheck(sm.softmax_hessian, z.clone().requires_grad_())


def test_a_large_vocabulary_forms_no_matrix():
    z, v = normal(100_000), normal(100_000, seed=1)
    bounds = sm.softmax_jacobian_norm_bounds(z)
    assert 0 < bounds.lower <= bounds.upper <= 0.5
    assert sm.softmax_jacobian_vector_product(z, v).sum().abs() < 1e-14
    assert torch.isfinite(sm.third_cumulant(z, v, v, v))


@pytest.mark.parametrize("function", ALL_OF_LOGITS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.0, 1.0], r"^logits: expected a torch\.Tensor, got an object of type list"),
        (torch.tensor(0.0), r"^logits: expected a tensor with at least 1 dimension\(s\)"),
        (torch.zeros(3, 0), r"^logits: expected at least one element, .*\(3, 0\)"),
        (torch.tensor([1, 2]), "^logits: expected a real floating-point dtype, got a int64"),
        (torch.tensor([0.0, float("nan")]), "^logits: expected finite values"),
        (torch.tensor([0.0, -float("inf")]), "^logits: expected finite values"),
    ],
)
def test_bad_logits_are_refused_by_name(function, bad, message):
    with pytest.raises(ValueError, match=message):
        function(bad)


@pytest.mark.parametrize("function", ALL_OF_LOGITS)
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "1", True, None])
def test_bad_temperatures_are_refused_by_name(function, temperature):
    with pytest.raises(ValueError, match=r"^temperature: expected "):
        function(torch.zeros(2), temperature=temperature)
    for with_vector in WITH_ONE_VECTOR:
        with pytest.raises(ValueError, match=r"^temperature: expected "):
            with_vector(torch.zeros(2), torch.zeros(2), temperature=temperature)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (1.0, "expected a torch.Tensor, got 1.0"),
        (torch.zeros(3), r"expected shape \(\.\.\., 2\), got .*\(3,\)"),
        (torch.zeros(4, 2), r"expected a shape that broadcasts to that of logits \(3, 2\), got \(4, 2\)"),
        (torch.zeros(1, 3, 2), r"expected a shape that broadcasts to that of logits \(3, 2\), got \(1, 3, 2\)"),
        (torch.zeros(2, dtype=F64), r"expected the dtype of logits \(torch\.float32\), got torch\.float64"),
        (torch.zeros(2, device="meta"), r"expected the device of logits \(cpu\), got meta"),
        (torch.tensor([0.0, float("inf")]), "expected finite values"),
    ],
)
def test_bad_vectors_are_refused_by_name(bad, message):
    z, good = torch.zeros(3, 2), torch.zeros(2)
    with pytest.raises(ValueError, match="^vector: " + message):
        sm.softmax_jacobian_vector_product(z, bad)
    with pytest.raises(ValueError, match="^weights: " + message):
        sm.softmax_hessian_contraction(z, bad)
    for position, name in enumerate("ruv"):
        directions = [good, good, good]
        directions[position] = bad
        with pytest.raises(ValueError, match=f"^{name}: " + message):
            sm.third_cumulant(z, *directions)


def test_nothing_of_the_callers_is_changed():
    z, v = normal(3, 4), normal(4, seed=1)
    before, state, default = z.clone(), torch.get_rng_state(), torch.get_default_dtype()
    for function in ALL_OF_LOGITS:
        function(z)
    for function in WITH_ONE_VECTOR:
        function(z, v)
    sm.third_cumulant(z, v, v, v)
    with pytest.raises(ValueError, match="logits"):
        sm.softmax_jacobian(z / 0)
    assert torch.equal(z, before) and torch.equal(v, normal(4, seed=1))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is default
