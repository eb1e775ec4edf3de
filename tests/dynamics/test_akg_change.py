"""The exact change of log-probabilities, and the bounds on what a linear prediction leaves out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldyn.dynamics import akg as dyn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the exact identity ---------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    classes=st.integers(1, 9),
    scale=st.floats(1e-3, 30),
    seed=st.integers(0, 999),
)
def test_parts_add_up_to_the_change(shape, classes, scale, seed):
    old, new = scale * normal(*shape, classes, seed=seed), scale * normal(*shape, classes, seed=seed + 1)
    parts = dyn.exact_change(old, new)
    p, q = old.log_softmax(-1), new.log_softmax(-1)
    A = torch.eye(classes, dtype=torch.float64) - p.exp().unsqueeze(-2)
    close = {"rtol": 1e-10, "atol": 1e-13 * max(1.0, scale)}
    torch.testing.assert_close(parts.linear, (A @ (new - old).unsqueeze(-1)).squeeze(-1), **close)
    torch.testing.assert_close(parts.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-9, atol=1e-13 * max(1.0, scale))
    torch.testing.assert_close(parts.total, q - p, **close)
    assert parts.kl.shape == shape and (parts.kl >= 0).all()


def test_the_divergence_the_other_way_round_is_noticed():
    old, new = normal(5), normal(5, seed=1)
    parts, backward = dyn.exact_change(old, new), dyn.exact_change(new, old).kl
    true = new.log_softmax(-1) - old.log_softmax(-1)
    assert (parts.linear - parts.kl - true).abs().max() < 1e-14 < 0.01 < (parts.linear - backward - true).abs().max()


def test_small_changes_of_large_logits_keep_their_digits():
    """Logits of 10⁶ whose common part moves by 1: the differences are what counts."""
    old = normal(6)
    change = 1e-6 * normal(6, seed=1)
    plain = dyn.exact_change(old, old + change)
    lifted = dyn.exact_change(old + 2.0**20, old + 2.0**20 + change)
    torch.testing.assert_close(lifted.linear, plain.linear, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(plain.kl, (dyn.exact_change(old, old + 2 * change).kl) / 4, rtol=1e-5, atol=0)


def test_differentiable_and_float32():
    old, new = normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: dyn.exact_change(a, b).total, (old, new))
    assert dyn.exact_change(old.detach().float(), new.detach().float()).total.dtype == torch.float32


# --- the remainder --------------------------------------------------------------------------------------------


def segment(W2, W1, x, step):
    """Largest Jacobian norm on the segment and the constant curvature of z = W2 W1 x, from their closed forms."""
    ends = [(W2, W1), (W2 + step[0], W1 + step[1])]
    size = max(float((x @ x) * torch.linalg.matrix_norm(b, 2) ** 2 + (a @ x) @ (a @ x)) for b, a in ends)
    return math.sqrt(size), float(x.norm())


def two_layers(seed, scale):
    """Weights, input, a step of their shapes, and log-probabilities' remainder of that step."""
    V, h, n = 2 + seed % 4, 1 + seed % 3, 3
    W2, W1, x = normal(V, h, seed=seed), normal(h, n, seed=seed + 1), normal(n, seed=seed + 2)
    step = scale * normal(V, h, seed=seed + 3), scale * normal(h, n, seed=seed + 4)
    z, new = W2 @ W1 @ x, (W2 + step[0]) @ (W1 + step[1]) @ x
    linear = step[0] @ W1 @ x + W2 @ step[1] @ x
    p = z.softmax(-1)
    remainder = new.log_softmax(-1) - z.log_softmax(-1) - (linear - p @ linear)
    return W2, W1, x, step, z, linear, new, remainder


@given(seed=st.integers(0, 5000), scale=st.sampled_from([1e-3, 0.03, 0.3, 2.0]))
def test_bounds_hold_for_two_linear_layers(seed, scale):
    W2, W1, x, step, z, linear, new, remainder = two_layers(seed, scale)
    s = math.sqrt(sum(float((part**2).sum()) for part in step))
    L, M = segment(W2, W1, x, step)
    assert float(remainder.abs().max()) <= dyn.remainder_bound(s, L, M) * (1 + 1e-12) + 1e-14
    # the interval, once with what is known in advance and once with the deviation as it was
    for deviation in (M * s**2 / 2, float((new - z - linear).norm())):
        interval = dyn.remainder_interval(z, linear, deviation=deviation)
        slack = 1e-12 * (1 + remainder.abs().max())
        assert (interval.lower - slack <= remainder).all() and (remainder <= interval.upper + slack).all()
        assert -dyn.remainder_bound(s, L, M) <= float(interval.upper.max())


def test_interval_is_a_point_for_logits_that_are_linear_in_the_parameters():
    z, change = normal(4, 5), normal(4, 5, seed=1)
    interval = dyn.remainder_interval(z, change, deviation=0.0)
    true = (z + change).log_softmax(-1) - z.log_softmax(-1) - dyn.exact_change(z, z + change).linear
    torch.testing.assert_close(interval.lower, true, rtol=1e-11, atol=1e-14)
    assert torch.equal(interval.lower, interval.upper)


def test_interval_is_attained():
    """The upper end for a deviation along e_k − q, up to its own second order."""
    z, change = normal(5), normal(5, seed=1)
    q = (z + change).softmax(-1)
    for k in range(5):
        direction = torch.eye(5, dtype=torch.float64)[k] - q
        r = 1e-4 * direction / direction.norm()
        true = (z + change + r).log_softmax(-1) - z.log_softmax(-1) - dyn.exact_change(z, z + change).linear
        interval = dyn.remainder_interval(z, change, deviation=torch.tensor(1e-4, dtype=torch.float64))
        assert 0 <= float(interval.upper[k] - true[k]) < 1e-8
        assert float(interval.upper[k] - interval.lower[k]) > 1e-5


def test_interval_batches_and_shapes():
    z, change = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    deviation = normal(2, 3, seed=2).abs()
    together = dyn.remainder_interval(z, change, deviation=deviation)
    assert together.lower.shape == together.upper.shape == z.shape
    for place in ((0, 1), (1, 2)):
        alone = dyn.remainder_interval(z[place], change[place], deviation=float(deviation[place]))
        torch.testing.assert_close(together.upper[place], alone.upper, rtol=1e-14, atol=0)
        torch.testing.assert_close(together.lower[place], alone.lower, rtol=1e-14, atol=0)


@pytest.mark.parametrize("arguments", [(1.0, 0.0, 0.0), (0.0, 3.0, 4.0)])
def test_bound_vanishes_with_the_step_and_with_both_constants(arguments):
    assert dyn.remainder_bound(*arguments) == 0


def test_bound_has_both_constants_and_the_square():
    assert dyn.remainder_bound(2.0, 3.0, 0.0) == pytest.approx(9.0)
    assert dyn.remainder_bound(2.0, 0.0, 3.0) == pytest.approx(6 * math.sqrt(2))
    assert dyn.remainder_bound(0.2, 3.0, 5.0) == pytest.approx(dyn.remainder_bound(2.0, 3.0, 5.0) / 100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: dyn.remainder_bound(-1.0, 1.0, 1.0), "step_norm: expected a number >= 0"),
        (lambda z: dyn.remainder_bound(1.0, math.nan, 1.0), "jacobian_norm: expected a finite"),
        (lambda z: dyn.remainder_bound(1.0, 1.0, "M"), "curvature: expected a finite"),
        (lambda z: dyn.remainder_interval(z, z, deviation=-1.0), "deviation: expected a number >= 0"),
        (lambda z: dyn.remainder_interval(z, z, deviation=-z[..., 0].abs()), "deviation: expected numbers >= 0"),
        (lambda z: dyn.remainder_interval(z, z, deviation=z.abs()), "deviation: expected shape"),
        (lambda z: dyn.remainder_interval(z, z, deviation=torch.tensor(1.0)), "deviation: expected the dtype"),
        (lambda z: dyn.remainder_interval(z, z[0], deviation=1.0), "change: expected shape"),
        (lambda z: dyn.exact_change(z, z.float()), "new_logits: expected the dtype"),
        (lambda z: dyn.exact_change(z * math.inf, z), "logits: expected finite"),
        (lambda z: dyn.exact_change(z, None), "new_logits: expected a torch.Tensor"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        call(normal(3, 4))
