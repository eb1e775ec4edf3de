"""The shared validation: what it lets through unchanged, what it refuses, and what the message says."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev, jvp, vmap

from ldyn import _checks


def refused(pattern, check, *args, **kwargs):
    with pytest.raises(ValueError, match=pattern):
        check(*args, **kwargs)


def test_the_value_itself_is_returned():
    value = torch.ones(2, 3, requires_grad=True)
    assert _checks.require_tensor(value, "x", ndim=2) is value
    assert _checks.require_real(value, "x", min_ndim=1) is value
    assert _checks.require_shape(value, "x", ("...", 3)) is value
    assert _checks.require_same(value, "x", torch.zeros(7), "y") is value
    half = torch.full((2, 2), 0.5)
    assert _checks.require_probabilities(half, "p") is half


@pytest.mark.parametrize("value", [[1.0], np.ones(2), 3.0, None])
def test_what_is_no_tensor_is_refused(value):
    refused(r"^logits: expected a torch\.Tensor, got ", _checks.require_tensor, value, "logits")


def test_dimensions():
    refused(r"^x: expected a tensor with 2 dimension.*\(3,\)", _checks.require_tensor, torch.ones(3), "x", ndim=2)
    refused(r"^x: expected .* at least 1 .*\(\)", _checks.require_tensor, torch.tensor(1.0), "x", min_ndim=1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    pattern = rf"^x: expected a real floating-point dtype, got a {str(dtype)[6:]} tensor of shape \(2,\)$"
    refused(pattern, _checks.require_floating, torch.ones(2, dtype=dtype), "x")


def test_empty_is_refused():
    refused(r"^x: expected at least one element, .*\(0, 3\)", _checks.require_nonempty, torch.ones(0, 3), "x")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused_and_counted(bad):
    refused(
        r"^x: expected finite values, .* with 2 NaN",
        _checks.require_finite,
        torch.tensor([0.0, bad, bad]),
        "x",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_values_whose_sum_overflows_are_accepted(dtype):
    _checks.require_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype), "x")


def test_infinities_that_cancel_are_refused():
    refused("^x: expected finite values", _checks.require_finite, torch.tensor([float("inf"), -float("inf")]), "x")


@pytest.mark.parametrize(
    ("size", "shape"),
    [((2, 3), (2, 3)), ((2, 3), (None, 3)), ((4, 3, 3), ("...", "V", "V")), ((3,), ("...", "V")), ((), ())],
)
def test_shapes_that_fit(size, shape):
    _checks.require_shape(torch.ones(size), "x", shape)


@pytest.mark.parametrize(
    ("size", "shape", "text"),
    [
        ((2, 3), (3, 2), "(3, 2)"),
        ((2, 3), (2,), "(2)"),
        ((4, 2, 3), ("...", "V", "V"), "(..., V, V)"),
        ((3,), ("...", "V", "V"), "(..., V, V)"),
        ((2, 4), (None, 3), "(any, 3)"),
    ],
)
def test_shapes_that_do_not_fit(size, shape, text):
    pattern = rf"^x: expected shape {re.escape(text)}, got .*{re.escape(str(size))}$"
    refused(pattern, _checks.require_shape, torch.ones(size), "x", shape)


def test_dtype_and_device_must_agree():
    x, y = torch.ones(2), torch.ones(2, dtype=torch.float64)
    refused(
        r"^x: expected the dtype of y \(torch.float64\), got torch.float32",
        _checks.require_same,
        x,
        "x",
        y,
        "y",
    )
    there = torch.ones(2, device="meta")
    refused(r"^x: expected the device of y \(meta\), got cpu", _checks.require_same, x, "x", there, "y")


def test_probabilities():
    refused("^p: .*off by 0.1", _checks.require_probabilities, torch.tensor([0.5, 0.4]), "p")
    refused("^p: .*negative entry -0.5", _checks.require_probabilities, torch.tensor([1.5, -0.5]), "p")
    refused("^p: ", _checks.require_probabilities, torch.tensor([0.5, float("nan")]), "p")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        _checks.require_probabilities(torch.randn(5, 100, dtype=dtype).softmax(-1), "p")
    near = torch.tensor([0.5, 0.5 + 1e-6], dtype=torch.float64)
    refused("^p: .*off by 1e-06", _checks.require_probabilities, near, "p")
    _checks.require_probabilities(near, "p", atol=1e-5)


@pytest.mark.parametrize("value", [1, 1.5, np.float32(2.0), np.int64(3), torch.tensor(2.5)])
def test_numbers(value):
    number = _checks.require_positive(value, "lr")
    assert type(number) is float
    assert number == float(value)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 1j, torch.ones(1), torch.tensor(True)])
def test_what_is_no_number_is_refused(value):
    refused("^lr: expected a finite real number, got ", _checks.require_number, value, "lr")


def test_signs_of_numbers():
    refused("^lr: expected a number > 0, got 0.0$", _checks.require_positive, 0, "lr")
    refused("^lr: expected a number >= 0, got -0.5$", _checks.require_nonnegative, -0.5, "lr")
    assert _checks.require_nonnegative(0, "lr") == 0.0


def test_integers():
    assert _checks.require_integer(np.int64(3), "k") == 3
    for bad in (0, 1.0, True, "2"):
        refused("^k: expected an integer >= 1, got ", _checks.require_integer, bad, "k")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.1),
        nn.AlphaDropout(0.1),
        nn.BatchNorm1d(3),
        nn.RReLU(),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.GRU(3, 3, num_layers=2, dropout=0.1),
    ],
)
def test_what_depends_on_training_mode_needs_evaluation_mode(layer):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer))
    pattern = rf"^model: expected evaluation mode .*{type(layer).__name__} at '1\.0'"
    refused(pattern, _checks.require_eval_mode, model, "model")
    assert model.training and layer.training  # asked, not changed
    assert _checks.require_eval_mode(model.eval(), "model") is model


def test_models_without_a_training_mode_pass_in_any_mode():
    for layer in (
        nn.Linear(3, 3),
        nn.LayerNorm(3),
        nn.Dropout(0.0),
        nn.TransformerEncoderLayer(4, 2, 8, 0.0),
    ):
        _checks.require_eval_mode(layer, "model")


def test_batch_statistics_are_refused_even_in_evaluation_mode():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    refused("^model: .*'0' without running statistics", _checks.require_eval_mode, model, "model")


def test_a_function_is_no_module():
    refused(
        r"^model: expected a torch\.nn\.Module, got an object of type",
        _checks.require_eval_mode,
        abs,
        "model",
    )


def checked_softmax(z):
    p = _checks.require_real(z, "z", min_ndim=1).softmax(-1)
    return _checks.require_probabilities(p, "p")


def test_value_checks_do_not_stand_in_the_way_of_transforms():
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vmap(checked_softmax)(z), z.softmax(-1))
    assert vmap(hessian(checked_softmax))(z).shape == (4, 3, 3, 3)
    assert vmap(jacrev(vmap(checked_softmax)))(z.reshape(2, 2, 3)).shape == (2, 2, 3, 2, 3)
    assert jvp(checked_softmax, (z,), (z,))[1].shape == z.shape
    assert checked_softmax(torch.empty(3, device="meta")).is_meta


def test_shape_checks_stay_on_under_vmap():
    refused("^z: expected a real floating", vmap(checked_softmax), torch.ones(2, 3, dtype=torch.int64))
    refused("^z: expected .* at least 1", vmap(checked_softmax), torch.ones(3))


def test_value_checks_stay_on_under_derivatives():
    refused("^z: expected finite", jacrev(checked_softmax), torch.tensor([0.0, float("nan")]))


def test_unreadable_for_another_reason_is_not_passed_over():
    with pytest.raises(RuntimeError, match="ambiguous"):
        _checks.known_truth(torch.tensor([True, False]))
