"""The KL divergence of logits, its bounds and the length of a step, each against a route that shares no code."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from ldyn.foundations import kl

TINY = 2.0**-52


def logits_like(shape, seed, *, scale=1.0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def exact_kl(logits, new_logits):
    """The divergence in 700 digits, straight from its definition, for one pair of 1-D tensors."""
    with mpmath.workdps(700):
        z, w = ([mpmath.mpf(float(value)) for value in row] for row in (logits, new_logits))
        one, two = ([mpmath.exp(value) for value in row] for row in (z, w))
        first, second = mpmath.fsum(one), mpmath.fsum(two)
        total = mpmath.fsum(
            a / first * (s - t - mpmath.log(first) + mpmath.log(second)) for a, s, t in zip(one, z, w, strict=True)
        )
        return float(total)


# --- categorical_kl -----------------------------------------------------------------------------------------


@given(
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.sampled_from([1e-2, 1.0, 30.0, 1e3]),
    st.sampled_from([1e-12, 1e-8, 1e-4, 1e-1, 1.0, 10.0, 1e3]),
)
def test_kl_agrees_with_its_definition_in_many_digits(classes, seed, scale, step):
    logits = logits_like(classes, seed, scale=scale)
    new = logits + logits_like(classes, seed + 1, scale=step)
    want = exact_kl(logits, new)
    got = kl.categorical_kl(logits, new).item()
    assert got >= 0
    # relative to the divergence, plus what rounding of the inputs' exponents costs near a saturated softmax
    assert got == pytest.approx(want, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("step", [0.1, 0.2, 0.249999, 0.25, 0.3, 0.5, 0.9, 0.999999, 1.0, 1.000001, 1.1, 3.0])
def test_kl_is_smooth_across_its_branches(step):
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    new = logits + torch.tensor([step, 0.0, -step], dtype=torch.float64)
    assert kl.categorical_kl(logits, new).item() == pytest.approx(exact_kl(logits, new), rel=1e-14)


def test_kl_is_exactly_zero_for_equal_or_shifted_logits():
    logits = logits_like((50, 7), 0, scale=4.0).round()
    assert torch.equal(kl.categorical_kl(logits, logits), torch.zeros(50, dtype=torch.float64))
    assert torch.equal(kl.categorical_kl(logits, logits + 3), torch.zeros(50, dtype=torch.float64))


def test_kl_of_a_large_vocabulary_with_extreme_logits():
    classes = 100_000
    logits = torch.linspace(-1e3, 1e3, classes, dtype=torch.float64)
    new = logits.flip(0)
    # p sits at the last class and p' at the first, so that the divergence is the mean gap of their log-odds
    p = logits.softmax(-1)
    want = (p * (logits - new)).sum()
    assert kl.categorical_kl(logits, new).item() == pytest.approx(want.item(), rel=1e-12)


def test_kl_when_all_mass_moves_to_a_class_of_probability_zero():
    logits = torch.tensor([1e3, -1e3], dtype=torch.float64)
    assert kl.categorical_kl(logits, -logits).item() == pytest.approx(2000.0, rel=1e-15)
    logits = torch.tensor([0.0, -700.0, -900.0], dtype=torch.float64)
    new = torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64)
    assert kl.categorical_kl(logits, new).item() == pytest.approx(exact_kl(logits, new), rel=1e-14)


def test_kl_builds_nothing_quadratic_in_the_vocabulary():
    # 2 * 10^6 classes: a square matrix would need 32 terabytes and fail at once
    logits = torch.zeros(2_000_000, dtype=torch.float64)
    new = logits.clone()
    new[0] = 1.0
    want = math.log(1 + math.expm1(1.0) / 2e6) - 1 / 2e6
    assert kl.categorical_kl(logits, new).item() == pytest.approx(want, rel=1e-9)
    assert kl.kl_bounds(logits, new).upper.item() >= want


def test_kl_derivatives_at_zero_are_zero_and_the_covariance():
    logits = logits_like(5, 3)
    p = logits.softmax(-1)
    gradient = torch.func.grad(lambda new: kl.categorical_kl(logits, new))(logits)
    assert gradient.abs().max() < 1e-15
    hessian = torch.func.hessian(lambda new: kl.categorical_kl(logits, new))(logits)
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p), rtol=1e-12, atol=1e-14)
    third = logits + logits_like(5, 4, scale=3.0)
    gradient = torch.func.grad(lambda new: kl.categorical_kl(logits, new))(third)
    torch.testing.assert_close(gradient, third.softmax(-1) - p, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_kl_keeps_shape_and_dtype(dtype):
    logits, new = logits_like((2, 3, 5), 0, dtype=dtype), logits_like((2, 3, 5), 1, dtype=dtype)
    got = kl.categorical_kl(logits, new)
    assert got.shape == (2, 3) and got.dtype == dtype
    want = functional.kl_div(
        new.double().log_softmax(-1), logits.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)


BAD_PAIRS = {
    "shape": (torch.zeros(3), torch.zeros(4), "expected shape"),
    "dtype": (torch.zeros(3), torch.zeros(3, dtype=torch.float64), "dtype"),
    "device": (torch.zeros(3), torch.zeros(3, device="meta"), "device"),
    "integer": (torch.zeros(3, dtype=torch.int64), torch.zeros(3), "floating"),
    "empty": (torch.zeros(2, 0), torch.zeros(2, 0), "at least one element"),
    "nan": (torch.tensor([0.0, math.nan]), torch.zeros(2), "finite"),
    "infinite": (torch.zeros(2), torch.tensor([0.0, -math.inf]), "finite"),
    "scalar": (torch.tensor(1.0), torch.tensor(1.0), "dimension"),
    "list": ([0.0, 1.0], torch.zeros(2), "torch.Tensor"),
}


@pytest.mark.parametrize("function", [kl.categorical_kl, kl.kl_bounds])
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_logits_are_refused_by_name(function, case):
    first, second, words = BAD_PAIRS[case]
    with pytest.raises(ValueError, match=r"^(logits|new_logits|delta): expected") as caught:
        function(first, second)
    assert words in str(caught.value)


# --- kl_bounds ----------------------------------------------------------------------------------------------


@given(
    st.integers(2, 6),
    st.integers(0, 10**6),
    st.sampled_from([1e-2, 1.0, 20.0, 1e3]),
    st.sampled_from([1e-6, 1e-2, 1.0, 5.0, 100.0, 1e3]),
)
def test_bounds_enclose_the_divergence(classes, seed, scale, step):
    logits = logits_like(classes, seed, scale=scale)
    new = logits + logits_like(classes, seed + 1, scale=step)
    bounds = kl.kl_bounds(logits, new - logits)
    value = exact_kl(logits, new)
    # new - logits is itself rounded, which near large logits costs more than the bounds' own rounding
    slack = 1e-9 * value + 4 * (TINY * float(logits.abs().max())) ** 2 + 1e-300
    assert all(torch.isfinite(bound) for bound in bounds)
    assert bounds.lower.item() <= value + slack
    assert value <= bounds.upper.item() + slack
    assert bounds.upper <= bounds.range_bound
    assert abs(value - bounds.quadratic.item()) <= bounds.third_order.item() + slack


def test_bounds_against_their_formulas():
    logits, delta = logits_like((4, 5), 0), logits_like((4, 5), 1)
    p = logits.softmax(-1)
    variance = (p * delta**2).sum(-1) - (p * delta).sum(-1) ** 2
    reach = delta.amax(-1) - delta.amin(-1)
    got = kl.kl_bounds(logits, delta)
    torch.testing.assert_close(got.quadratic, variance / 2)
    torch.testing.assert_close(got.lower, variance * ((-reach).exp() - 1 + reach) / reach**2)
    relative = variance * (reach.exp() - 1 - reach) / reach**2
    torch.testing.assert_close(got.upper, torch.minimum(relative, reach**2 / 8))
    torch.testing.assert_close(got.range_bound, reach**2 / 8)
    torch.testing.assert_close(got.third_order, reach**3 / (36 * math.sqrt(3)))


def test_bounds_are_tight_where_theory_says():
    half = torch.zeros(2, dtype=torch.float64)
    small = torch.tensor([1e-4, 0.0], dtype=torch.float64)
    value = kl.categorical_kl(half, half + small)
    bounds = kl.kl_bounds(half, small)
    assert 1 - 1e-6 < (value / bounds.range_bound).item() <= 1
    # one unlikely class that rises by R: the relative upper bound is attained as its probability goes to 0
    rare = torch.tensor([0.0, -40.0], dtype=torch.float64)
    rise = torch.tensor([0.0, 3.0], dtype=torch.float64)
    ratio = kl.categorical_kl(rare, rare + rise) / kl.kl_bounds(rare, rise).upper
    assert 1 - 1e-12 < ratio.item() <= 1 + 1e-14
    fall = kl.categorical_kl(rare, rare - rise) / kl.kl_bounds(rare, -rise).lower
    assert 1 - 1e-14 <= fall.item() < 1 + 1e-12


def test_bounds_of_extreme_logits_are_finite_and_true():
    logits = torch.tensor([[1e3, -1e3, 0.0], [0.0, -1e3, -1e3]], dtype=torch.float64)
    delta = torch.tensor([[-1e3, 1e3, 0.0], [0.0, 1e3, 0.0]], dtype=torch.float64)
    value = kl.categorical_kl(logits, logits + delta)
    bounds = kl.kl_bounds(logits, delta)
    assert all(torch.isfinite(bound).all() for bound in bounds)
    # the second row: probability e^-1000 times e^1000; a variance that underflowed would give an upper bound of 0
    assert value[1].item() == pytest.approx(math.log(2), rel=1e-12)
    assert (bounds.lower <= value).all() and (value <= bounds.upper).all()
    assert bounds.upper[1].item() == pytest.approx(1.0, rel=1e-2)


def test_bounds_of_no_change_are_zero_and_one_class_is_allowed():
    logits = logits_like((3, 4), 0)
    for bound in kl.kl_bounds(logits, torch.zeros_like(logits)):
        assert torch.equal(bound, torch.zeros(3, dtype=torch.float64))
    assert kl.kl_bounds(torch.zeros(1), torch.ones(1)).upper.item() == 0


# --- the step -----------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0, 2), st.floats(0, 3), st.floats(0, 5))
def test_step_bound_holds_and_is_attained(seed, lr, decay, clip):
    parameters, gradient = logits_like(6, seed, scale=3.0), logits_like(6, seed + 1)
    gradient = gradient * (clip / gradient.norm())
    bound = kl.sgd_step_norm_bound(lr, decay, parameters.norm(), clip)
    assert isinstance(bound, float)
    assert (lr * (gradient + decay * parameters)).norm().item() <= bound * (1 + 1e-12)
    along = parameters * (clip / parameters.norm())
    assert (lr * (along + decay * parameters)).norm().item() == pytest.approx(bound, rel=1e-12)


def test_step_bound_clips_to_one_by_default():
    assert kl.sgd_step_norm_bound(0.5, 0.25, 2.0) == 0.75


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1", None, True])
def test_bad_numbers_are_refused(place, bad):
    arguments = [0.1, 0.2, 3.0, 1.0]
    arguments[place] = bad
    name = ("lr", "weight_decay", "param_norm", "clip")[place]
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        kl.sgd_step_norm_bound(*arguments)
