"""Activations and their derivatives: against differentiation, in 400 digits, and at their extremes."""

import math

import mpmath
import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional

from ldyn.hessians.ffn import activation_derivatives

F64 = torch.float64
NAMES = ["relu", "gelu", "gelu_tanh", "silu"]
PYTORCH = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "silu": functional.silu,
}
POINTS = [-40.0, -37.0, -20.0, -8.0, -3.0, -1.2, -0.3, -1e-8, 0.0, 1e-8, 0.5, 1.5, 3.0, 8.0, 20.0, 37.0, 40.0]


def in_many_digits(name):
    slope, cubic = mpmath.sqrt(2 / mpmath.pi), mpmath.mpf(0.044715)
    return {
        "gelu": lambda h: h * mpmath.erfc(-h / mpmath.sqrt(2)) / 2,
        "gelu_tanh": lambda h: h / (1 + mpmath.exp(-2 * slope * (h + cubic * h**3))),
        "silu": lambda h: h / (1 + mpmath.exp(-h)),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_automatic_differentiation(name):
    h = torch.linspace(-6, 6, 400, dtype=F64)
    once, twice = grad(PYTORCH[name]), grad(grad(PYTORCH[name]))
    value, first, second = activation_derivatives(h, name)
    torch.testing.assert_close(value, PYTORCH[name](h), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(first, vmap(once)(h), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(second, vmap(twice)(h), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("dtype", "least", "rtol"), [(F64, 1e-300, 2e-13), (torch.float32, 1e-36, 1e-5)])
def test_values_far_out_keep_their_relative_accuracy(name, dtype, least, rtol):
    h = torch.tensor(POINTS, dtype=dtype)
    with mpmath.workdps(400):  # differences of numbers as small as 1e-300
        function = in_many_digits(name)
        for order, got in enumerate(activation_derivatives(h, name)):
            assert got.dtype == dtype
            exact = [mpmath.diff(function, mpmath.mpf(float(point)), order) for point in h]
            for point, value, truth in zip(POINTS, got.tolist(), exact, strict=True):
                if abs(truth) < least:  # below the range of the dtype only zero is near
                    assert abs(value) <= 2 * least
                else:
                    assert value == pytest.approx(float(truth), rel=rtol, abs=0.0), (point, order)


def test_relu_at_its_kink_is_what_pytorch_says():
    value, first, second = activation_derivatives(torch.tensor([-1.0, 0.0, 2.0], dtype=F64), "relu")
    assert value.tolist() == [0.0, 0.0, 2.0]
    assert first.tolist() == [0.0, 0.0, 1.0]
    assert second.tolist() == [0.0, 0.0, 0.0]
    assert float(grad(functional.relu)(torch.zeros(()))) == 0.0


def test_extremes_of_gelu_and_silu():
    h = torch.linspace(-12, 12, 200_001, dtype=F64)
    _, first, second = activation_derivatives(h, "gelu")
    root = math.sqrt(2.0)
    ends = activation_derivatives(torch.tensor([-root, root, 0.0], dtype=F64), "gelu")
    assert float(first.min()) == pytest.approx(float(ends.first[0]), abs=1e-8)
    assert float(first.max()) == pytest.approx(float(ends.first[1]), abs=1e-8)
    assert float(ends.first[0]) == pytest.approx(-0.1289, abs=5e-5)
    assert float(second.abs().max()) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)
    _, first, second = activation_derivatives(h, "silu")
    assert float(first.min()) == pytest.approx(-0.0998, abs=5e-5)
    assert float(second.max()) == pytest.approx(0.5, abs=1e-15)


def test_activations_keep_shape_and_can_be_mapped():
    h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    for name in NAMES:
        plain = activation_derivatives(h, name)
        mapped = vmap(lambda row, name=name: tuple(activation_derivatives(row, name)))(h)
        for one, other in zip(plain, mapped, strict=True):
            assert one.shape == h.shape
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("h", "name", "message"),
    [
        (torch.ones(2), "Relu", "activation: expected one of"),
        (torch.ones(2), None, "activation: expected one of"),
        (torch.ones(2, dtype=torch.int64), "gelu", "h: expected a real floating-point dtype"),
        (torch.ones(0), "gelu", "h: expected at least one element"),
        (torch.tensor([torch.inf]), "gelu", "h: expected finite values"),
        (3.0, "gelu", "h: expected a torch.Tensor"),
    ],
)
def test_bad_input_is_refused_with_its_name(h, name, message):
    with pytest.raises(ValueError, match=message):
        activation_derivatives(h, name)
