"""How far a block is from a multiple of the identity: exact moments by enumeration, bounds by their coverage."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from ldyn.kernels import pntk_bound as pb

F64 = torch.float64
KINDS = ("first", "sum", "trace")


def numbers(blocks):
    """The three numbers for blocks (..., V, V), written out again."""
    V = blocks.shape[-1]
    one = torch.ones(V, dtype=blocks.dtype) / math.sqrt(V)
    return {
        "first": blocks[..., 0, 0],
        "sum": torch.einsum("a,...ab,b->...", one, blocks, one),
        "trace": sum(blocks[..., a, a] for a in range(V)) / V,
    }


def errors(blocks, kind):
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return torch.linalg.matrix_norm(blocks - numbers(blocks)[kind][..., None, None] * eye)


def blocks_of(heads, A, c=0.0):
    eye = torch.eye(heads.shape[-2], dtype=heads.dtype)
    return heads @ A @ heads.mT + c * eye


def every_head(V, h, share):
    """All heads with entries 0 and ±1/√share, and their probabilities: variance 1, kurtosis 1/share.

    With share = 1 these are random signs. With share = 1/3 the entries have the moments of a normal variable up to the
    fifth, so that every mean of a quartic polynomial is that of a Gaussian head.
    """
    size = 1 / math.sqrt(share)
    law = (
        ((size, share / 2), (-size, share / 2))
        if share == 1
        else ((size, share / 2), (-size, share / 2), (0, 1 - share))
    )
    cells = list(itertools.product(law, repeat=V * h))
    values = torch.tensor([[value for value, _ in cell] for cell in cells], dtype=F64)
    weights = torch.tensor([math.prod(p for _, p in cell) for cell in cells], dtype=F64)
    return values.reshape(-1, V, h), weights


def matrix(seed, h, symmetric=False):
    A = torch.tensor(np.random.default_rng(seed).normal(size=(h, h)), dtype=F64)
    return (A + A.mT) / 2 if symmetric else A


SHAPES = ((2, 2), (3, 2), (2, 3), (4, 1), (1, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1.0, 1 / 3, 0.1, 0.7])
@pytest.mark.parametrize(("V", "h"), SHAPES)
def test_moments_are_those_of_all_heads(V, h, share, kind):
    heads, weights = every_head(V, h, share)
    sigma2, A = 0.7, matrix(V + 10 * h, h)
    blocks = blocks_of(math.sqrt(sigma2) * heads, A, c=1.3)
    kappa = numbers(blocks)[kind]
    mean = (weights * kappa).sum()
    assert torch.isclose(mean, sigma2 * A.trace() + 1.3, rtol=1e-12)
    variance = (weights * (kappa - mean).square()).sum()
    found = pb.pntk_variance(A, sigma2, V, kind=kind, kurtosis=1 / share)
    assert torch.isclose(found, variance, rtol=1e-11, atol=1e-13)
    second = (weights * errors(blocks, kind).square()).sum()
    found = pb.pntk_second_moment(A, sigma2, V, kind=kind, kurtosis=1 / share)
    assert torch.isclose(found, second, rtol=1e-11, atol=1e-13)


def test_moments_of_an_asymmetric_law_do_not_need_its_third_moment():
    """Entries 2 and −1/2 with probabilities 1/5 and 4/5: mean 0, variance 1, kurtosis 3.25, third moment 1.5."""
    cells = list(itertools.product(((2.0, 0.2), (-0.5, 0.8)), repeat=6))
    heads = torch.tensor([[v for v, _ in cell] for cell in cells], dtype=F64).reshape(-1, 3, 2)
    weights = torch.tensor([math.prod(p for _, p in cell) for cell in cells], dtype=F64)
    A = matrix(5, 2)
    for kind in KINDS:
        second = (weights * errors(blocks_of(heads, A), kind).square()).sum()
        found = pb.pntk_second_moment(A, 1.0, 3, kind=kind, kurtosis=3.25)
        assert torch.isclose(found, second, rtol=1e-12)


def test_default_is_a_gaussian_head_and_the_first_output():
    A = matrix(0, 3)
    named = pb.pntk_second_moment(A, 2.0, 4, kind="first", kurtosis=3.0)
    assert torch.equal(pb.pntk_second_moment(A, 2.0, 4), named)
    assert torch.equal(pb.pntk_variance(A, 2.0, 4), pb.pntk_variance(A, 2.0, 4, kind="first", kurtosis=3.0))


def test_a_uniform_head_is_less_variable_than_its_sum():
    """PyTorch's default head: kurtosis 9/5; h = 64 and V = 10 as in the pseudo-NTK chapter."""
    eye = torch.eye(64, dtype=F64)
    assert math.isclose(float(pb.pntk_variance(eye, 1.0, 10, kind="first", kurtosis=1.8)), 51.2)
    assert math.isclose(float(pb.pntk_variance(eye, 1.0, 10, kind="sum", kurtosis=1.8)), 120.32)
    assert float(pb.pntk_variance(eye, 1.0, 10, kurtosis=1.0)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_wide_gaussian_heads(kind):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, 20, generator=generator, dtype=F64)
    heads = torch.randn(20_000, 5, 20, generator=generator, dtype=F64)
    second = errors(blocks_of(heads, A), kind).square()
    predicted = pb.pntk_second_moment(A, 1.0, 5, kind=kind)
    assert abs(float(second.mean() / predicted) - 1) < 0.03


def test_second_moments_of_a_data_set_add_up():
    heads, weights = every_head(2, 2, 1 / 3)
    bodies = torch.stack([matrix(n, 2) for n in range(6)]).reshape(2, 3, 2, 2)
    blocks = blocks_of(heads[:, None, None], bodies)
    for kind in KINDS:
        stacked = errors(blocks, kind).square().sum((1, 2))
        found = pb.pntk_second_moment(bodies, 1.0, 2, kind=kind)
        assert found.shape == (2, 3)
        assert torch.isclose(found.sum(), (weights * stacked).sum(), rtol=1e-12)


def written_out(A, c, sigma2, V, delta, pairs=1):
    """The three formulas in NumPy, singular values by a decomposition."""
    A = A.numpy()
    S = (A + A.T) / 2
    L = math.log(2 * V**2 * pairs / delta)
    fro, top = np.sqrt((A**2).sum()), np.linalg.svd(A)[1][0]
    fro_s, top_s = np.sqrt((S**2).sum()), np.abs(np.linalg.eigvalsh(S)).max()
    numerator = sigma2 * math.sqrt((V - 1) * (V + 4)) * (math.sqrt(2 * L) * fro + L * top)
    slack = 2 * fro_s * math.sqrt(L / V) + 2 * top_s * L / V
    denominator = math.sqrt(V) * (abs(sigma2 * np.trace(A) + c) - sigma2 * slack)
    quotient = math.sqrt((V - 1) * (V + 4) / V) * (math.sqrt(2 * L) * fro + L * top)
    bracket = abs(np.trace(A) + c / sigma2) - slack
    return numerator, denominator, quotient / bracket if bracket > 0 else math.inf


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    h=st.integers(1, 5),
    V=st.integers(1, 6),
    c=st.floats(-50, 50),
    sigma2=st.floats(1e-3, 1e2),
    delta=st.floats(1e-6, 0.99),
    pairs=st.integers(1, 1000),
)
def test_bounds_are_the_formulas(seed, h, V, c, sigma2, delta, pairs):
    A = matrix(seed, h) + 3 * torch.eye(h, dtype=F64)
    bound = pb.pntk_error_bound(A, c, sigma2, V, delta, pairs=pairs)
    expected = written_out(A, c, sigma2, V, delta, pairs)
    assert math.isclose(float(bound.numerator), expected[0], rel_tol=1e-10, abs_tol=1e-12)
    assert math.isclose(float(bound.denominator), expected[1], rel_tol=1e-9, abs_tol=1e-9 * expected[0] + 1e-9)
    if abs(expected[1]) > 1e-6:
        assert math.isclose(float(bound.ratio), expected[2], rel_tol=1e-6, abs_tol=1e-12)
    assert bound.cap == math.sqrt(V)


def test_a_batch_is_a_loop():
    bodies = torch.stack([matrix(n, 4) for n in range(6)]).reshape(3, 2, 4, 4)
    shifts = torch.linspace(-30, 30, 6, dtype=F64).reshape(3, 2)
    whole = pb.pntk_error_bound(bodies, shifts, 0.5, 3, 0.1)
    for i, j in itertools.product(range(3), range(2)):
        one = pb.pntk_error_bound(bodies[i, j], shifts[i, j], 0.5, 3, 0.1)
        for field in ("numerator", "denominator", "ratio"):
            assert torch.allclose(getattr(whole, field)[i, j], getattr(one, field), rtol=1e-12)
    many = pb.pntk_error_bound(bodies[0, 0], shifts, 0.5, 3, 0.1)
    assert many.numerator.shape == many.ratio.shape == (3, 2)
    assert torch.isinf(whole.ratio).any()
    assert torch.isfinite(whole.ratio).any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), sigma2=st.floats(1e-3, 1e3))
def test_the_ratio_has_no_units(seed, scale, sigma2):
    """Rescaling the body's parameters multiplies A; the ratio may not notice if c moves along."""
    A = matrix(seed, 3) + 20 * torch.eye(3, dtype=F64)
    plain = pb.pntk_error_bound(A, 500.0, 1.0, 3, 0.1).ratio
    assert torch.isfinite(plain)
    moved = pb.pntk_error_bound(scale * A, 500.0 * scale * sigma2, sigma2, 3, 0.1).ratio
    assert torch.isclose(plain, moved, rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), V=st.integers(2, 6))
def test_everything_is_the_same_for_the_transposed_body(seed, V):
    A = matrix(seed, 4)
    forward = pb.pntk_error_bound(A, -40.0, 0.3, V, 0.2)
    back = pb.pntk_error_bound(A.mT, -40.0, 0.3, V, 0.2)
    assert all(torch.allclose(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(forward, back, strict=True))
    for kind in KINDS:
        assert torch.isclose(
            pb.pntk_second_moment(A, 0.3, V, kind=kind), pb.pntk_second_moment(A.mT, 0.3, V, kind=kind)
        )


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), V=st.integers(2, 6), kind=st.sampled_from(KINDS))
def test_no_block_exceeds_the_cap(seed, V, kind):
    K = matrix(seed, V)
    assert float(errors(K, kind) / torch.linalg.matrix_norm(K)) <= math.sqrt(V) * (1 + 1e-12)


@pytest.mark.parametrize("V", [2, 3, 10])
def test_the_cap_is_attained(V):
    """A block of trace zero whose first entry outweighs the others; turned, it serves the sum of logits."""
    K = torch.diag(torch.cat([torch.ones(1, dtype=F64), torch.full((V - 1,), -1 / (V - 1), dtype=F64)]))
    assert math.isclose(float(errors(K, "first") / torch.linalg.matrix_norm(K)), math.sqrt(V), rel_tol=1e-12)
    lead = torch.ones(V, 1, dtype=F64)
    turn = torch.linalg.qr(torch.cat([lead, torch.eye(V, dtype=F64)[:, 1:]], 1))[0]
    turned = turn @ K @ turn.mT
    assert math.isclose(float(errors(turned, "sum") / torch.linalg.matrix_norm(turned)), math.sqrt(V), rel_tol=1e-12)


def lower_limit(hits, trials):
    """One-sided 99.9 % Clopper–Pearson limit."""
    return float(beta.ppf(0.001, hits, trials - hits + 1)) if hits else 0.0


def some_bodies():
    """Bodies that are positive, of rank one, indefinite, not symmetric, and one whose trace c nearly cancels."""
    h, rng = 24, np.random.default_rng(0)
    u, v = (torch.tensor(rng.normal(size=h)) for _ in range(2))
    M = torch.tensor(rng.normal(size=(h, h)))
    eye = torch.eye(h, dtype=F64)
    return {
        "identity": (eye, 0.0),
        "rank one": (u.outer(u), 0.0),
        "rank one and c": (u.outer(u), 200.0),
        "not symmetric": (u.outer(v), -30.0),
        "indefinite": (torch.diag(torch.tensor(rng.choice([-1.0, 1.0], h))), 40.0),
        "general": (M + 4 * eye, 1.0),
        "nearly cancelled": (eye, -20.0),
    }


@pytest.mark.parametrize("name", list(some_bodies()))
@pytest.mark.parametrize("V", [2, 10])
def test_coverage_of_all_three_bounds(name, V):
    A, c = some_bodies()[name]
    trials = 2000
    heads = torch.randn(trials, V, len(A), generator=torch.Generator().manual_seed(V), dtype=F64)
    blocks = blocks_of(heads, A, c)
    norms = torch.linalg.matrix_norm(blocks)
    for kind, delta in itertools.product(KINDS, (0.5, 0.1, 0.01)):
        bound, error = pb.pntk_error_bound(A, c, 1.0, V, delta), errors(blocks, kind)
        together = (error <= bound.numerator) & (norms >= bound.denominator) & (error <= bound.ratio * norms)
        assert lower_limit(int(together.sum()), trials) >= 1 - delta
        for limit in (pb.pntk_markov_bound, pb.pntk_chaos_bound):
            held = error <= limit(A, 1.0, V, delta, kind=kind)
            assert lower_limit(int(held.sum()), trials) >= 1 - delta


def test_two_fifths_of_the_bound_are_not_enough():
    """The coverage test can fail: where the bound is sharpest, a smaller one is refused."""
    A = torch.eye(64, dtype=F64)
    heads = torch.randn(4000, 2, 64, generator=torch.Generator().manual_seed(3), dtype=F64)
    error = errors(blocks_of(heads, A), "first")
    held = error <= 0.4 * pb.pntk_error_bound(A, 0.0, 1.0, 2, 0.05).numerator
    assert float(held.double().mean()) < 0.93


def test_several_pairs_at_once():
    bodies = torch.stack([A for A, _ in some_bodies().values()])
    heads = torch.randn(2000, 1, 5, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    blocks = blocks_of(heads, bodies)
    bound = pb.pntk_error_bound(bodies, 0.0, 1.0, 5, 0.1, pairs=len(bodies))
    held = (errors(blocks, "first") <= bound.numerator).all(1)
    assert lower_limit(int(held.sum()), 2000) >= 0.9
    alone = pb.pntk_error_bound(bodies, 0.0, 1.0, 5, 0.1 / len(bodies))
    assert torch.allclose(alone.numerator, bound.numerator)


def test_markov_is_attained_by_heads_that_are_mostly_zero():
    """One weight for each of two outputs, non-zero with probability p: no distribution-free bound is lower."""
    p, A = 0.01, torch.ones(1, 1, dtype=F64)
    heads, weights = every_head(2, 1, p)
    for kind in ("trace", "sum"):
        size = errors(blocks_of(heads, A), kind)
        level = float(weights[size > 0].sum())  # the probability of any error at all
        smallest = size[size > 0].min()
        bound = pb.pntk_markov_bound(A, 1.0, 2, level, kind=kind, kurtosis=1 / p)
        assert 1 <= float(bound / smallest) < 1 + 2 * p


@settings(deadline=None, max_examples=60)
@given(log=st.floats(1e-3, 200))
def test_the_chaos_factor_is_the_best_order(log):
    delta = math.exp(-log)
    orders = np.concatenate([np.linspace(2, 20, 4000), np.geomspace(20, 400, 4000)])
    grid = (orders - 1) * np.exp(log / orders)
    factor = pb.pntk_chaos_factor(delta)
    assert factor <= grid.min() * (1 + 1e-12)
    assert factor >= grid.min() * (1 - 1e-3)
    assert factor <= delta**-0.5 * (1 + 1e-12)
    if log >= 2:
        assert factor <= math.e * (log - 1) * (1 + 1e-12)


def test_dtype_and_arguments_are_kept():
    A = matrix(3, 4).float()
    before = A.clone()
    c = torch.tensor([1.0, 2.0])
    bound = pb.pntk_error_bound(A, c, 0.5, 3, 0.1)
    assert all(part.dtype == torch.float32 for part in bound[:3])
    assert pb.pntk_markov_bound(A, 0.5, 3, 0.1).dtype == torch.float32
    assert pb.pntk_chaos_bound(A, 0.5, 3, 0.1).dtype == torch.float32
    assert torch.equal(A, before)
    assert torch.equal(c, torch.tensor([1.0, 2.0]))
    exact = pb.pntk_error_bound(A.double(), c.double(), 0.5, 3, 0.1)
    assert torch.allclose(bound.numerator.double(), exact.numerator, rtol=1e-5)


def test_under_vmap():
    bodies = torch.stack([matrix(n, 3) for n in range(4)])
    mapped = torch.func.vmap(lambda A: pb.pntk_error_bound(A, 1.0, 1.0, 3, 0.1).numerator)(bodies)
    assert torch.allclose(mapped, pb.pntk_error_bound(bodies, 1.0, 1.0, 3, 0.1).numerator)


def test_one_output_has_no_error():
    A = matrix(1, 3)
    assert float(pb.pntk_error_bound(A, 1.0, 1.0, 1, 0.1).numerator) == 0
    assert float(pb.pntk_second_moment(A, 1.0, 1)) == 0


A = torch.eye(3, dtype=F64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": [[1.0]]}, r"^A: expected a torch\.Tensor"),
        ({"A": torch.ones(3)}, r"^A: expected a tensor with at least 2"),
        ({"A": torch.ones(3, 2)}, r"^A: expected shape \(\.\.\., h, h\)"),
        ({"A": torch.eye(3).long()}, "^A: expected a real floating-point dtype"),
        ({"A": A / 0}, "^A: expected finite values"),
        ({"A": torch.zeros(0, 3, 3)}, "^A: expected at least one element"),
        ({"c": "1"}, "^c: expected a finite real number"),
        ({"c": math.nan}, "^c: expected a finite real number"),
        ({"c": torch.ones(3)}, r"^c: expected the dtype of A \(torch\.float64\)"),
        ({"c": torch.ones(2, dtype=F64), "A": A.expand(3, 3, 3)}, r"^c: expected a shape that broadcasts .*\(3,\)"),
        ({"sigma2": 0.0}, "^sigma2: expected a number > 0"),
        ({"sigma2": -1.0}, "^sigma2: expected a number > 0"),
        ({"k": 0}, "^k: expected an integer >= 1"),
        ({"k": 2.0}, "^k: expected an integer >= 1"),
        ({"delta": 0.0}, "^delta: expected a number > 0"),
        ({"delta": 1.0}, "^delta: expected a probability strictly between 0 and 1"),
        ({"delta": True}, "^delta: expected a finite real number"),
        ({"pairs": 0}, "^pairs: expected an integer >= 1"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    arguments = {"A": A, "c": 0.0, "sigma2": 1.0, "k": 3, "delta": 0.1, "pairs": 1} | changed
    with pytest.raises(ValueError, match=message):
        pb.pntk_error_bound(**arguments)


@pytest.mark.parametrize("function", [pb.pntk_second_moment, pb.pntk_variance])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": torch.ones(3, 2)}, r"^A: expected shape"),
        ({"sigma2": 0}, "^sigma2: expected"),
        ({"k": -1}, "^k: expected"),
        ({"kind": "mean"}, r"^kind: expected one of \('trace', 'sum', 'first'\), got 'mean'"),
        ({"kurtosis": 0.9}, "^kurtosis: expected .* got 0.9"),
        ({"kurtosis": math.inf}, "^kurtosis: expected a finite real number"),
    ],
)
def test_bad_moments_are_refused_by_name(function, changed, message):
    arguments = {"A": A, "sigma2": 1.0, "k": 3, "kind": "first", "kurtosis": 3.0} | changed
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("function", [pb.pntk_markov_bound, pb.pntk_chaos_bound])
def test_bad_levels_are_refused_by_name(function):
    for delta in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"^delta: expected"):
            function(A, 1.0, 3, delta)
    with pytest.raises(ValueError, match=r"^kind: expected"):
        function(A, 1.0, 3, 0.1, kind="mean")
