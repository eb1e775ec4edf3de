"""The curvature of a loss at the outputs: value, gradient and Hessian against automatic differentiation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian
from torch.nn import functional

from ldyn.hessians.losses import cross_entropy, squared_error

F64 = torch.float64
sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 30.0]))
reductions = st.sampled_from(["mean", "sum"])


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def check_against(loss, outputs, curvature):
    tokens, size = outputs.shape
    exact = hessian(loss)(outputs)
    torch.testing.assert_close(curvature.value, loss(outputs), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(curvature.gradient, grad(loss)(outputs), rtol=1e-10, atol=1e-15)
    assert curvature.hessian.shape == (tokens, size, size)
    for one in range(tokens):
        for other in range(tokens):
            expected = curvature.hessian[one] if one == other else torch.zeros(size, size, dtype=F64)
            torch.testing.assert_close(exact[one, :, other], expected, rtol=1e-10, atol=1e-15)


@settings(max_examples=30)
@given(sizes, reductions)
def test_squared_error_equals_automatic_differentiation(shape, reduction):
    tokens, size, seed, scale = shape
    outputs, targets = normal(tokens, size, seed=seed, scale=scale), normal(tokens, size, seed=seed + 1)
    curvature = squared_error(outputs, targets, reduction=reduction)
    check_against(lambda f: functional.mse_loss(f, targets, reduction=reduction), outputs, curvature)


@settings(max_examples=30)
@given(sizes, reductions)
def test_cross_entropy_equals_automatic_differentiation(shape, reduction):
    tokens, size, seed, scale = shape
    logits = normal(tokens, size, seed=seed, scale=scale)
    labels = torch.randint(size, (tokens,), generator=torch.Generator().manual_seed(seed))
    curvature = cross_entropy(logits, labels, reduction=reduction)
    check_against(lambda z: functional.cross_entropy(z, labels, reduction=reduction), logits, curvature)
    assert float(torch.linalg.eigvalsh(curvature.hessian).min()) >= -1e-15


def test_normalisation_is_what_the_names_say():
    outputs, targets, labels = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0, 3, 1])
    mean, plain = squared_error(outputs, targets), squared_error(outputs, targets, reduction="sum")
    assert float(plain.value / mean.value) == pytest.approx(12)
    torch.testing.assert_close(plain.hessian[0], 2 * torch.eye(4, dtype=F64))
    mean, plain = cross_entropy(outputs, labels), cross_entropy(outputs, labels, reduction="sum")
    assert float(plain.value / mean.value) == pytest.approx(3)
    torch.testing.assert_close(plain.hessian, 3 * mean.hessian)


def test_a_certain_model_keeps_the_small_curvature():
    """Where softmax is 1 up to rounding, p (1 − p) must not become zero."""
    curvature = cross_entropy(torch.tensor([[0.0, -50.0]], dtype=F64), torch.tensor([0]))
    small = float(torch.tensor(-50.0, dtype=F64).exp())
    assert float(curvature.hessian[0, 0, 0]) == pytest.approx(small, rel=1e-12)
    assert float(curvature.hessian[0, 0, 1]) == pytest.approx(-small, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_dtypes_are_kept(dtype, kind):
    outputs = normal(3, 4).to(dtype)
    for curvature in (squared_error(outputs, outputs + 1), cross_entropy(outputs, torch.tensor([0, 1, 2], dtype=kind))):
        assert {tensor.dtype for tensor in curvature} == {dtype}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squared_error(normal(3), normal(3)), "outputs: expected a tensor with 2 dimension"),
        (lambda: squared_error(normal(3, 2), normal(2, 2)), r"targets: expected shape \(3, 2\)"),
        (lambda: squared_error(normal(3, 2), normal(3, 2).float()), "targets: expected the dtype of outputs"),
        (lambda: squared_error(normal(3, 2) / 0, normal(3, 2)), "outputs: expected finite values"),
        (lambda: squared_error(normal(3, 2), normal(3, 2), reduction="none"), "reduction: expected 'mean' or 'sum'"),
        (lambda: squared_error(normal(0, 2), normal(0, 2)), "outputs: expected at least one element"),
        (lambda: cross_entropy(normal(3), torch.tensor([0, 1, 2])), "logits: expected a tensor with 2 dimension"),
        (lambda: cross_entropy(normal(3, 2), torch.tensor([0, 1])), r"labels: expected shape \(3\)"),
        (lambda: cross_entropy(normal(3, 2), torch.tensor([0.0, 1.0, 1.0])), "labels: expected integers"),
        (lambda: cross_entropy(normal(3, 2), torch.tensor([True, False, True])), "labels: expected integers"),
        (lambda: cross_entropy(normal(3, 2), torch.tensor([0, 2, 1])), "labels: expected 0 to 1, got 0 to 2"),
        (lambda: cross_entropy(normal(3, 2), torch.tensor([0, -1, 1])), "labels: expected 0 to 1, got -1 to 1"),
        (lambda: cross_entropy(normal(3, 2), [0, 1, 1]), "labels: expected a torch.Tensor"),
        (lambda: cross_entropy(normal(3, 2), torch.tensor([0, 1, 1]), reduction=None), "reduction: expected"),
    ],
)
def test_bad_input_is_refused_with_its_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
