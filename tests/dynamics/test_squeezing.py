"""The functions of squeezing: against 80 digits, against PyTorch's softmax and autograd, and the bad inputs."""

import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, vmap

from ldyn.dynamics import squeezing as sq

F64 = torch.float64
POINTS = [
    [0.6, 0.2, 0.15, 0.05],
    [0.45, 0.44, 0.105, 0.005],
    [1e-30, 0.3, 0.7],
    [1 - 1e-10, 1e-10, 1e-20],
    [1e-30, 1e-30, 1.0],
    [0.25, 0.25, 0.25, 0.25],
    [1e-30, 1 - 1e-5, 1e-5],
    [0.0, 0.3, 0.7],
    [0.5, 0.5],
]
SIZES = [0.0, 1e-12, 1e-8, 1e-4, 1e-3, 0.01, 0.3, 1.0, 2.0, 3.0, 10.0, 30.0, 100.0, 1e3]


def exact(p, y, s):
    """Probabilities after the step, threshold, and the mean size of the push, in 80 digits."""
    with mpmath.workdps(80):
        whole = mpmath.fsum(mpmath.mpf(float(x)) for x in p)
        p, s = [mpmath.mpf(float(x)) / whole for x in p], mpmath.mpf(float(s))
        push = [x - int(j == y) for j, x in enumerate(p)]
        weights = [x * mpmath.exp(s * g) for x, g in zip(p, push, strict=True)]
        total = mpmath.fsum(weights)
        first = mpmath.fsum(x * g for x, g in zip(p, push, strict=True))
        scale = mpmath.fsum(x * abs(g) for x, g in zip(p, push, strict=True))
        return [w / total for w in weights], mpmath.log(total) / s if s else first, scale


def relative(value, truth):
    return float(abs((mpmath.mpf(float(value)) - truth) / truth))


def simplex(*shape, seed=0, scale=2.0, dtype=F64):
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=draw, dtype=F64)).softmax(-1).to(dtype)


problems = st.builds(
    lambda size, scale, seed, y, s: (simplex(size, seed=seed, scale=scale), y % size, s),
    st.integers(2, 8),
    st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    st.integers(0, 10_000),
    st.integers(0, 7),
    st.floats(1e-12, 1e3),
)


# --- against 80 digits ---


@pytest.mark.parametrize("point", POINTS)
def test_steps_and_thresholds_keep_their_relative_accuracy(point):
    p = torch.tensor(point, dtype=F64)
    for y in range(len(point)):
        for s in SIZES:
            after, tau, scale = exact(point, y, s)
            for value, truth in zip(sq.negative_step(p, y, s), after, strict=True):
                assert value == 0 if truth == 0 else truth < 1e-300 or relative(value, truth) < 1e-12
            got = sq.squeezing_threshold(p, y, s)
            assert abs(float(got - float(tau))) <= 1e-14 * float(scale)
            if abs(tau) > 1e-3 * scale or point in ([0.25] * 4, [0.5] * 2):
                assert got == 0 if tau == 0 else relative(got, tau) < 1e-12


@settings(max_examples=150)
@given(problems)
def test_thresholds_of_random_points(problem):
    p, y, s = problem
    after, tau, scale = exact(p, y, s)
    got = sq.squeezing_threshold(p, y, s)
    assert abs(float(got) - float(tau)) <= 1e-14 * float(scale)
    assert abs(tau) < 1e-3 * scale or relative(got, tau) <= 1e-10
    assert max(relative(a, b) for a, b in zip(sq.negative_step(p, y, s), after, strict=True) if b > 1e-300) < 1e-12


@pytest.mark.parametrize("s", [1e-12, 1e-6, 0.1, 1.0, 7.0, 50.0])
def test_single_precision(s):
    for seed in range(20):
        p = simplex(6, seed=seed, scale=4.0, dtype=torch.float32)
        after, tau, scale = exact(p, 2, s)
        got = sq.squeezing_threshold(p, 2, s)
        assert got.dtype == torch.float32 and abs(float(got) - float(tau)) < 1e-6 * float(scale)
        step = sq.negative_step(p, 2, s)
        assert max(relative(a, b) for a, b in zip(step, after, strict=True) if b > 1e-36) < 1e-4
    rare = torch.tensor([0.3, 0.7, 1e-30, 1e-30])
    assert sq.negative_step(rare, 3, 1.0)[2].item() == pytest.approx(float(exact(rare, 3, 1.0)[0][2]), rel=1e-5)


def test_a_large_vocabulary():
    """100 000 labels with ten different probabilities, so that the reference can sum them by groups."""
    values = torch.logspace(0, -9, 9, dtype=F64)
    p = torch.cat([torch.tensor([1e-30], dtype=F64), (values / values.sum() / 11_111).repeat_interleave(11_111)])
    groups = [(0, 1)] + [(1 + 11_111 * k, 11_111) for k in range(9)]
    assert len(p) == 100_000
    for y, s in ((0, 1e-12), (0, 1.0), (0, 1e3), (1, 1e-12), (1, 1e-3), (1, 1.0), (1, 1e3), (1, 1e5)):
        with mpmath.workdps(60):
            terms = [(mpmath.mpf(float(p[at])), times - int(at == y), 0) for at, times in groups]
            terms.append((mpmath.mpf(float(p[y])), 1, 1))
            whole = mpmath.fsum(times * x for x, times, _ in terms)
            each = [x / whole * mpmath.exp(s * (x / whole - own)) for x, _, own in terms]
            total = mpmath.fsum(times * weight for weight, (_, times, _) in zip(each, terms, strict=True))
            tau = mpmath.log(total) / mpmath.mpf(s)
        assert relative(sq.squeezing_threshold(p, y, s), tau) < 1e-10
        after = sq.negative_step(p, y, s)
        assert after.sum().item() == pytest.approx(1, rel=1e-12)
        assert relative(after[y], each[-1] / total) < 1e-11 or each[-1] / total < 1e-300
        assert all(
            relative(after[1 + at], w / total) < 1e-11 for (at, _), w in zip(groups[1:], each[1:-1], strict=True)
        )
    uniform = torch.full((100_000,), 1e-5)  # in single precision, where 1 and 1 + 1e-5 differ by 80 units
    assert sq.squeezing_threshold(uniform, 0, 1.0).item() == pytest.approx(1e-5 * math.exp(-1), rel=1e-3)


# --- against PyTorch ---


@settings(max_examples=100)
@given(problems)
def test_a_step_is_a_gradient_step_on_free_logits(problem):
    p, y, s = problem
    z = p.log()
    ascent = grad(lambda logits: -torch.log_softmax(logits, -1)[y])(z)
    torch.testing.assert_close(sq.negative_step(p, y, s), torch.softmax(z + s * ascent, -1), rtol=1e-9, atol=1e-290)


@settings(max_examples=60)
@given(problems)
def test_the_threshold_is_the_first_limit_plus_a_divergence(problem):
    p, y, s = problem
    s = min(max(s, 1e-3), 30.0)
    divergence = (p * (p / sq.negative_step(p, y, s)).log()).sum()
    limit = p.square().sum() - p[y]
    torch.testing.assert_close(sq.squeezing_threshold(p, y, s), limit + divergence / s, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sq.squeezing_threshold(p, y, 0.0), limit, rtol=1e-9, atol=1e-15)


def test_the_threshold_is_differentiable_at_zero_too():
    p, y = simplex(5), 2
    push = p - torch.eye(5, dtype=F64)[y]
    variance = p @ push**2 - (p @ push) ** 2
    for s in (0.0, 1e-7, 1e-3, 0.3, 0.35, 5.0, 40.0):
        size = torch.tensor(s, dtype=F64)
        slope = grad(lambda x: sq.squeezing_threshold(p, y, x))(size)
        if s < 1e-3:
            torch.testing.assert_close(slope, variance / 2, rtol=1e-5, atol=0)
        else:
            after = sq.negative_step(p, y, size)
            torch.testing.assert_close(slope, (after * (after / p).log()).sum() / s**2, rtol=1e-7, atol=0)
        at_size = partial(lambda size, z: sq.squeezing_threshold(z.softmax(-1), y, size), size)
        assert torch.autograd.gradcheck(at_size, p.log().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z, x: sq.negative_step(z.softmax(-1), y, x),
        (p.log().requires_grad_(), torch.tensor(1.3, dtype=F64, requires_grad=True)),
    )


def test_the_flow_is_the_derivative_of_the_step():
    for seed in range(10):
        p, y = simplex(6, seed=seed), seed % 6
        flow = jacfwd(lambda s, p=p, y=y: sq.negative_step(p, y, s))(torch.zeros((), dtype=F64))
        torch.testing.assert_close(sq.negative_flow(p, y), flow)
        assert abs(flow.sum()) < 1e-15


def test_a_path_repeats_the_step():
    p, y, s = simplex(3, 5), torch.tensor([0, 4, 2]), torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    path = sq.negative_path(p, y, s, steps=4)
    assert path.shape == (5, 3, 5)
    torch.testing.assert_close(path[0], p)
    z = p.log()
    for row in path[1:]:
        z = z + s[:, None] * (z.softmax(-1) - torch.eye(5, dtype=F64)[y])
        torch.testing.assert_close(row, z.softmax(-1), rtol=1e-9, atol=1e-15)
    assert sq.negative_path(p[0], 1, s, steps=0).shape == (1, 3, 5)


# --- special values ---


def test_a_step_of_size_zero_changes_nothing():
    p = simplex(4, 6)
    torch.testing.assert_close(sq.negative_step(p, 3, 0.0), p, rtol=4e-16, atol=0)


def test_a_sum_that_is_off_by_rounding_is_divided_out():
    p = simplex(5)
    off = p * (1 + 1e-9)
    for function in (sq.negative_step, sq.squeezing_threshold):
        torch.testing.assert_close(function(off, 1, 2.0), function(p, 1, 2.0), rtol=1e-14, atol=0)
    torch.testing.assert_close(sq.negative_flow(off, 1), sq.negative_flow(p, 1), rtol=1e-14, atol=0)
    assert sq.negative_path(off, 1, 2.0, steps=0).sum().item() == pytest.approx(1, abs=1e-15)


def test_a_label_without_probability_and_a_certain_label():
    p = torch.tensor([0.0, 0.3, 0.7], dtype=F64)
    assert sq.negative_step(p, 0, 2.0)[0] == 0
    certain = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    assert torch.equal(sq.negative_step(certain, 0, 5.0), certain)
    assert sq.squeezing_threshold(certain, 0, 5.0) == 0
    assert sq.negative_step(certain, 1, 5.0).equal(certain)


def test_an_endless_step_leaves_the_peak_alone():
    p = torch.tensor([0.3, 0.29, 0.01, 0.4], dtype=F64)
    assert torch.equal(sq.negative_step(p, 3, 1e6), torch.eye(4, dtype=F64)[0])
    assert sq.squeezing_threshold(p, 3, 1e6).item() == pytest.approx(0.3, abs=1e-5)


def test_critical_peak_of_numbers_and_tensors():
    assert sq.critical_peak(0.0) == 0.5 and isinstance(sq.critical_peak(0), float)
    assert sq.critical_peak(0.1) == pytest.approx((0.8 + math.sqrt(2.08)) / 4)
    values = torch.tensor([[0.0, 0.1], [0.5, 0.9]])
    assert sq.critical_peak(values).dtype == torch.float32 and sq.critical_peak(values).shape == (2, 2)
    with mpmath.workdps(60):
        for low in (1e-30, 1e-9, 0.3, 0.5, 0.7, 1 - 1e-9, 1 - 1e-15):
            e = mpmath.mpf(low)
            truth = ((1 - 2 * e) + mpmath.sqrt(1 + 12 * e * (1 - e))) / 4
            assert relative(sq.critical_peak(low), truth) < 1e-14
    edges = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=F64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(sq.critical_peak(edges).sum(), edges)[0]).all()


# --- the contract of the library ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes_and_dtypes(batch, dtype):
    p = torch.full((*batch, 4), 0.25, dtype=dtype)
    labels, sizes = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=dtype)
    for y, s in ((0, 1), (labels, 1.0), (labels.int(), sizes), (0, sizes)):
        assert sq.negative_step(p, y, s).shape == p.shape and sq.negative_step(p, y, s).dtype == dtype
        assert sq.squeezing_threshold(p, y, s).shape == batch and sq.squeezing_threshold(p, y, s).dtype == dtype
        assert sq.negative_path(p, y, s, steps=2).shape == (3, *p.shape)
        assert sq.negative_path(p, y, s, steps=2).dtype == dtype
    assert sq.negative_flow(p, labels).shape == p.shape and sq.negative_flow(p, labels).dtype == dtype


def test_arguments_broadcast():
    p, y, s = simplex(4), torch.tensor([[0], [3]]), torch.tensor([0.1, 1.0, 4.0], dtype=F64)
    after, tau = sq.negative_step(p, y, s), sq.squeezing_threshold(p, y, s)
    assert after.shape == (2, 3, 4) and tau.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            single = p, int(y[row, 0]), float(s[column])
            torch.testing.assert_close(after[row, column], sq.negative_step(*single))
            torch.testing.assert_close(tau[row, column], sq.squeezing_threshold(*single))
    assert sq.negative_step(simplex(2, 1, 4), y, s).shape == (2, 3, 4)


def test_results_stay_on_the_device_of_p():
    p = torch.empty(3, 4, device="meta")
    assert sq.negative_step(p, 0, 1.0).device.type == "meta"
    assert sq.squeezing_threshold(p, torch.zeros(3, dtype=torch.int64, device="meta"), 0.5).shape == (3,)
    assert sq.negative_path(p, 1, 1.0, steps=2).shape == (3, 3, 4)
    assert sq.critical_peak(p).device.type == "meta"


def test_functions_can_be_mapped_over_a_batch():
    p, y, s = simplex(3, 4), torch.tensor([1, 0, 3]), torch.tensor([0.0, 1.0, 9.0], dtype=F64)
    for function in (sq.negative_step, sq.squeezing_threshold):
        torch.testing.assert_close(vmap(function)(p, y, s), function(p, y, s))
    torch.testing.assert_close(vmap(sq.negative_flow)(p, y), sq.negative_flow(p, y))


OFF = [
    ([0.5, 0.5], r"^p: expected a torch\.Tensor, got an object of type list"),
    (torch.tensor(1.0), r"^p: expected a tensor with at least 1 dimension"),
    (torch.ones(3, 1), r"^p: expected at least 2 labels in the last dimension, got a float32 tensor of shape \(3, 1\)"),
    (torch.zeros(3, 0), "^p: expected at least one element"),
    (torch.tensor([1, 0]), "^p: expected a real floating-point dtype"),
    (torch.tensor([0.5, math.nan]), "^p: expected finite values"),
    (torch.tensor([1.5, -0.5]), "^p: expected probabilities, got the negative entry -0.5"),
    (torch.tensor([0.5, 0.6]), "^p: expected probabilities that sum to 1, got a sum that is off by 0.1"),
]


@pytest.mark.parametrize(("bad", "message"), OFF)
def test_probabilities_off_the_simplex_are_refused(bad, message):
    for call in (
        lambda: sq.negative_step(bad, 0, 1.0),
        lambda: sq.squeezing_threshold(bad, 0, 1.0),
        lambda: sq.negative_flow(bad, 0),
        lambda: sq.negative_path(bad, 0, 1.0, steps=1),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (2, "expected a label from 0 to 1, got 2"),
        (-1, "expected an integer >= 0, got -1"),
        (0.0, "expected an integer >= 0, got 0.0"),
        (True, "expected an integer >= 0, got True"),
        (None, "expected an integer >= 0, got None"),
        (torch.tensor([0, 2, 1]), "expected labels from 0 to 1, got 0 to 2"),
        (torch.tensor(-1), "expected labels from 0 to 1, got -1 to -1"),
        (torch.tensor([0.0, 1.0, 0.0]), "expected integer labels, got a float32 tensor"),
        (torch.tensor([True, False, True]), "expected integer labels, got a bool tensor"),
        (torch.zeros(0, dtype=torch.int64), "expected at least one element"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), r"expected the device of p \(cpu\), got meta"),
        (
            torch.zeros(2, dtype=torch.int64),
            r"expected a shape that broadcasts with \(3,\), got a int64 tensor of shape",
        ),
    ],
)
def test_bad_labels_are_refused(bad, message):
    p = torch.full((3, 2), 0.5)
    for call in (
        lambda: sq.negative_step(p, bad, 1.0),
        lambda: sq.squeezing_threshold(p, bad, 1.0),
        lambda: sq.negative_flow(p, bad),
    ):
        with pytest.raises(ValueError, match="^y: " + message):
            call()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-1e-9, "expected a number >= 0, got -1e-09"),
        (math.nan, "expected a finite real number, got nan"),
        (math.inf, "expected a finite real number, got inf"),
        ("1", "expected a finite real number, got '1'"),
        (True, "expected a finite real number, got True"),
        (torch.tensor([1.0, -2.0, 0.0]), "expected step sizes >= 0, got -2"),
        (torch.tensor([1.0, math.nan, 0.0]), "expected finite values"),
        (torch.tensor([1, 2, 3]), "expected a real floating-point dtype"),
        (torch.ones(3, dtype=F64), r"expected the dtype of p \(torch\.float32\), got torch\.float64"),
        (torch.ones(2), r"expected a shape that broadcasts with \(3,\), got a float32 tensor of shape \(2,\)"),
    ],
)
def test_bad_step_sizes_are_refused(bad, message):
    p = torch.full((3, 2), 0.5)
    for call in (
        lambda: sq.negative_step(p, 0, bad),
        lambda: sq.squeezing_threshold(p, 0, bad),
        lambda: sq.negative_path(p, 0, bad, steps=1),
    ):
        with pytest.raises(ValueError, match="^s: " + message):
            call()


@pytest.mark.parametrize("bad", [-1, 1.5, True, None])
def test_bad_numbers_of_steps_are_refused(bad):
    with pytest.raises(ValueError, match=r"^steps: expected an integer >= 0, got"):
        sq.negative_path(torch.full((2,), 0.5), 0, 1.0, steps=bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-0.1, "expected probabilities between 0 and 1, got -0.1 to -0.1"),
        (1.5, "expected probabilities between 0 and 1, got 1.5 to 1.5"),
        (math.nan, "expected a finite real number"),
        ("0.5", "expected a finite real number"),
        (torch.tensor([0.5, 2.0]), "expected probabilities between 0 and 1, got 0.5 to 2"),
        (torch.tensor([0.5, math.nan]), "expected finite values"),
        (torch.tensor([0, 1]), "expected a real floating-point dtype"),
    ],
)
def test_bad_arguments_of_the_critical_peak_are_refused(bad, message):
    with pytest.raises(ValueError, match="^p_y: " + message):
        sq.critical_peak(bad)


def test_nothing_of_the_callers_is_changed():
    p, y, s = simplex(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    copies = p.clone(), y.clone(), s.clone()
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    sq.negative_step(p, y, s)
    sq.squeezing_threshold(p, y, s)
    sq.negative_flow(p, y)
    sq.negative_path(p, y, s, steps=3)
    with pytest.raises(ValueError, match=r"^s: "):
        sq.negative_step(p, y, -s)
    assert all(map(torch.equal, (p, y, s), copies))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is default
