"""Bounds against exact laws far out in their tails, and values that coverage alone cannot pin down."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr, logsumexp
from scipy.stats import chi2

from ldyn.kernels import pntk_bound as pb

F64 = torch.float64
KINDS = ("first", "sum", "trace")


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- far tails: where coverage has no failures to count ------------------------------------------------------------


def log_tail_of_products(n, x):
    """Logarithm of P(g·g' > x) in n dimensions: normal given |g|, whose square is chi-squared."""
    step = 1e-4
    q = (n + math.hypot(n, 2 * x)) / 2 * np.exp(np.arange(-3, 3, step))
    return math.log(step) + logsumexp(log_ndtr(-x / np.sqrt(q)) + chi2.logpdf(q, n) + np.log(q))


def test_the_tail_of_products_is_that_of_a_laplace_variable():
    for x in (3.0, 30.0, 300.0):
        assert log_tail_of_products(2, x) == pytest.approx(-x - math.log(2), rel=1e-9)


def log_failure(h, delta, part=(1.0, 1.0)):
    """Logarithm of P(|D_22| > bound) for A = I and two outputs, where D_22 is twice a product of normal vectors.

    The bound is put together from those for A = I of two sizes: it is linear in the root of the size and a constant.
    """
    small, large = (float(pb.pntk_error_bound(torch.eye(n, dtype=F64), 0.0, 1.0, 2, delta).numerator) for n in (4, 16))
    by_root = (large - small) / 2  # numerator(n) = by_root √n + constant
    constant = small - 2 * by_root
    return math.log(2) + log_tail_of_products(h, (part[0] * by_root * math.sqrt(h) + part[1] * constant) / 2)


@pytest.mark.parametrize("h", [1, 100, 10**6])
@pytest.mark.parametrize("log", [3.0, 30.0, 300.0])
def test_the_numerator_holds_far_out(h, log):
    assert log_failure(h, math.exp(-log)) <= -log


def test_smaller_constants_do_not():
    assert log_failure(10**6, math.exp(-300.0), part=(0.5**0.5, 1.0)) > -300
    assert log_failure(1, math.exp(-300.0), part=(1.0, 0.5)) > -300


def exact_one_weight(t):
    """Logarithm of P(w² > bound) for the chaos bound, A = 1 and two outputs: ‖D‖² = w⁴ + w'⁴."""
    bound = float(pb.pntk_chaos_bound(torch.ones(1, 1, dtype=F64), 1.0, 2, math.exp(-t)))
    return float(chi2.logsf(bound, 1))


@pytest.mark.parametrize("t", [0.5, 4.0, 20.0, 100.0])
def test_the_chaos_bound_holds_far_out(t):
    assert exact_one_weight(t) <= -t


# --- values ---------------------------------------------------------------------------------------------------------


def moments_written_out(A, sigma2, V, kind, kurtosis):
    """Variance of the number and mean square of the error, entry by entry of one matrix."""
    rows = A.tolist()
    size = range(len(rows))
    whole = sum(rows[a][b] ** 2 for a in size for b in size)
    form = sum(rows[a][b] ** 2 + rows[a][b] * rows[b][a] for a in size for b in size)
    peaks = (kurtosis - 3) * sum(rows[a][a] ** 2 for a in size)
    extra = {"first": form + peaks, "sum": form, "trace": 0.0}[kind]
    spread = {"first": form + peaks, "sum": form + peaks / V, "trace": (form + peaks) / V}[kind]
    return sigma2**2 * spread, sigma2**2 * (V - 1) * (V * whole + form + peaks + extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kurtosis", [1.0, 1.8, 3.0, 9.0])
def test_a_batch_of_moments_and_bounds_is_a_loop(kind, kurtosis):
    bodies, sigma2, V, delta = normal(2, 3, 4, 4), 0.6, 5, 0.003
    options = {"kind": kind, "kurtosis": kurtosis}
    variance = pb.pntk_variance(bodies, sigma2, V, **options)
    second = pb.pntk_second_moment(bodies, sigma2, V, **options)
    markov = pb.pntk_markov_bound(bodies, sigma2, V, delta, **options)
    chaos = pb.pntk_chaos_bound(bodies, sigma2, V, delta, kind=kind)
    order = np.linspace(2, 20, 200_001)
    factor = float(((order - 1) * delta ** (-1 / order)).min())
    for place in itertools.product(range(2), range(3)):
        exact = moments_written_out(bodies[place], sigma2, V, kind, kurtosis)
        gaussian = moments_written_out(bodies[place], sigma2, V, kind, 3.0)[1]
        assert float(variance[place]) == pytest.approx(exact[0], rel=1e-12)
        assert float(second[place]) == pytest.approx(exact[1], rel=1e-12)
        assert float(markov[place]) == pytest.approx(math.sqrt(exact[1] / delta), rel=1e-12)
        assert float(chaos[place]) == pytest.approx(factor * math.sqrt(gaussian), rel=1e-9)


def test_bounds_are_by_default_those_of_the_first_output_and_a_gaussian_head():
    A = normal(3, 3)
    markov = pb.pntk_markov_bound(A, 0.5, 4, 0.1, kind="first", kurtosis=3.0)
    assert torch.equal(pb.pntk_markov_bound(A, 0.5, 4, 0.1), markov)
    assert torch.equal(pb.pntk_chaos_bound(A, 0.5, 4, 0.1), pb.pntk_chaos_bound(A, 0.5, 4, 0.1, kind="first"))


def test_markov_is_attained_for_the_first_output_too():
    """Two outputs with one weight each, non-zero with probability p: one size of error, but for p² of the heads."""
    p, A = 0.01, torch.ones(1, 1, dtype=F64)
    level = 2 * p * (1 - p)
    bound = float(pb.pntk_markov_bound(A, 1.0, 2, level, kind="first", kurtosis=1 / p))
    assert 1 <= bound * p < 1 + 2 * p


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_signs_on_a_diagonal_body_never_give_a_negative_variance(dtype):
    """The number does not fluctuate at all then, and rounding must not make its root undefined."""
    bodies = normal(500, 7, dtype=dtype).diag_embed()
    found = pb.pntk_variance(bodies, 1.0, 3, kurtosis=1.0)
    scale = bodies.square().sum((-2, -1))
    assert (found >= 0).all()
    assert (found <= 10 * torch.finfo(dtype).eps * scale).all()


# --- shapes of c ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "shift"), [((1,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((3,), (2, 1)), ((2, 1), (3,)), ((2,), ())]
)
def test_every_c_that_broadcasts_is_taken(batch, shift):
    bodies, c = normal(*batch, 3, 3), 60 + normal(*shift, seed=1)
    bound = pb.pntk_error_bound(bodies, c, 0.5, 3, 0.1)
    together = torch.broadcast_shapes(batch, shift)
    assert all(part.shape == together for part in bound[:3])
    wide, shifts = bodies.expand(*together, 3, 3), c.expand(together)
    for place in itertools.product(*(range(size) for size in together)):
        one = pb.pntk_error_bound(wide[place], shifts[place], 0.5, 3, 0.1)
        for whole, single in zip(bound[:3], one[:3], strict=True):
            assert torch.isclose(whole[place], single, rtol=1e-12)


@pytest.mark.parametrize(("batch", "shift"), [((2, 3), (2,)), ((3,), (2,)), ((2, 3), (3, 3)), ((3, 2), (4, 3, 3))])
def test_every_other_c_is_refused_by_name(batch, shift):
    with pytest.raises(ValueError, match=r"^c: expected a shape that broadcasts against the batch"):
        pb.pntk_error_bound(normal(*batch, 3, 3), torch.ones(shift, dtype=F64), 0.5, 3, 0.1)


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (torch.tensor([1.0, math.nan], dtype=F64), "^c: expected finite values"),
        (torch.tensor(math.inf, dtype=F64), "^c: expected finite values"),
        (torch.tensor([1, 2]), "^c: expected a real floating-point dtype"),
        (torch.ones(0, dtype=F64), "^c: expected at least one element"),
    ],
)
def test_bad_values_of_c_are_refused_by_name(c, message):
    with pytest.raises(ValueError, match=message):
        pb.pntk_error_bound(normal(3, 3), c, 0.5, 3, 0.1)


def test_a_number_c_keeps_its_digits():
    A = 1e-9 * torch.eye(2, dtype=F64)
    third = pb.pntk_error_bound(A, 1 / 3, 1.0, 4, 0.1).denominator
    assert float(third) == pytest.approx(2 / 3, rel=1e-6)
    same = pb.pntk_error_bound(A, torch.tensor(1 / 3, dtype=F64), 1.0, 4, 0.1).denominator
    assert torch.equal(third, same)


# --- results --------------------------------------------------------------------------------------------------------


def test_results_are_tensors_of_their_own():
    """Where one body meets many c, no two entries of a result share memory, so that each can be written to."""
    bound = pb.pntk_error_bound(torch.eye(3, dtype=F64), torch.tensor([50.0, 60.0], dtype=F64), 1.0, 2, 0.1)
    for part in bound[:3]:
        part[0] = -1.0
        assert float(part[1]) > 0


def test_a_denominator_of_nothing_says_nothing():
    """One output and a body of zeros: 0 / 0 is no number, and what is documented is infinity."""
    bound = pb.pntk_error_bound(torch.zeros(2, 2, dtype=F64), 0.0, 1.0, 1, 0.1)
    assert (float(bound.numerator), float(bound.denominator), float(bound.ratio)) == (0.0, 0.0, math.inf)


def test_the_ratio_is_not_cut_at_the_cap():
    """The cap is reported beside the bound, so that a reader sees when the bound says nothing."""
    bound = pb.pntk_error_bound(torch.eye(4, dtype=F64), 5.0, 1.0, 10, 0.5)
    assert math.isfinite(float(bound.ratio))
    assert float(bound.ratio) > bound.cap
