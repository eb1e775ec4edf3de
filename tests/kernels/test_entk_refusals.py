"""What the tangent kernel refuses, by the name of the argument and before it could be silently wrong."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldyn.kernels.entk import entk, entk_vector_product, pntk
from tests.kernels.odd_models import Calls, build, vectors, weight

F64 = torch.float64
FUNCTIONS = [entk, pntk]


@pytest.fixture
def case():
    """A model and inputs that fit it."""
    model, (x,) = build("mlp", 3)
    return model, x


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fast"}, "method: expected one of ('auto', 'structured', 'jacobian'), got 'fast'"),
        ({"method": None}, "method: expected one of"),
        ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
        ({"chunk_size": -1}, "chunk_size: expected an integer >= 1, got -1"),
        ({"chunk_size": 2.0}, "chunk_size: expected an integer >= 1, got 2.0"),
        ({"chunk_size": True}, "chunk_size: expected an integer >= 1, got True"),
        ({"params": "3.*"}, "params: expected a pattern that matches a parameter, got '3.*'"),
        ({"params": ["0.*", "weight"]}, "params: expected a pattern that matches a parameter, got 'weight'"),
        ({"params": []}, "params: expected at least one name pattern, got none"),
        ({"params": [0]}, "params: expected name patterns, got 0"),
        ({"params": 0}, "params: expected name patterns, got 0"),
    ],
)
def test_options(case, function, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        function(*case, **options)


def test_kinds(case):
    with pytest.raises(ValueError, match=r"^kind: expected one of \('trace', 'sum', 'first'\), got 'mean'"):
        pntk(*case, kind="mean")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 6, dtype=F64), r": expected at least one element, got a float64 tensor of shape \(0, 6\)"),
        (torch.tensor(0.0, dtype=F64), r": expected a tensor with at least 1 dimension"),
        ([[0.0] * 6], ": expected a tensor or a mapping with one, got an object of type list"),
        (None, ": expected a tensor or a mapping with one, got None"),
        ({}, ": expected a tensor or a mapping with one, got an object of type dict"),
        (torch.zeros(2, 6), r": expected the dtype of the model's parameters \(torch.float64\), got torch.float32"),
        (torch.zeros(2, 6, dtype=F64, device="meta"), ": expected the model's device cpu, got meta"),
        (torch.full((2, 6), torch.nan, dtype=F64), ": expected finite values"),
        ({"x": torch.zeros(2, 6)}, r"\['x'\]: expected the dtype"),
        (
            {"x": torch.zeros(2, 6, dtype=F64), "y": torch.zeros(3, dtype=F64)},
            r": expected as many examples in each tensor, got \{'x': 2, 'y': 3\}",
        ),
    ],
)
def test_inputs(case, function, bad, message):
    model, x = case
    if bad is not None:
        with pytest.raises(ValueError, match="^x2" + message):
            function(model, x, bad)
    with pytest.raises(ValueError, match="^x1" + message):
        function(model, bad, x)
    with pytest.raises(ValueError, match="^x2" + message):
        entk_vector_product(model, x, bad, torch.zeros(2, 3, dtype=F64))


def test_vectors(case):
    model, x = case
    for bad, message in [
        (torch.zeros(3, 2, dtype=F64), r"expected shape \(3, 3\), got a float64 tensor of shape \(3, 2\)"),
        (torch.zeros(2, 3, dtype=F64), r"expected shape \(3, 3\)"),
        (torch.zeros(9, dtype=F64), r"expected a tensor with 2 dimension"),
        (torch.zeros(3, 3), "expected the dtype of the model's parameters"),
        ([1.0], "expected a torch.Tensor"),
    ]:
        with pytest.raises(ValueError, match="^v: " + message):
            entk_vector_product(model, x, x, bad)


class Mean(nn.Module):
    """Subtracts the batch's mean: no module in training mode, and yet the examples are coupled."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("method", ["auto", "structured", "jacobian"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), "expected evaluation mode"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), "expected evaluation mode"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)), "per-example outputs"),
        (lambda: Calls(lambda m, x: F.dropout(m.a(x)), a=nn.Linear(6, 4)), "the same output every time"),
        (lambda: nn.Sequential(nn.Linear(6, 4), Mean(), nn.Linear(4, 2)), "do not depend on the other examples"),
        (lambda: Calls(lambda m, x: F.batch_norm(x, None, None, m.w, training=True), w=weight(6)), "more than 1 value"),
        (lambda: nn.ReLU(), "expected a module with parameters"),
        (lambda: nn.Linear(6, 4).float(), r"parameter 'bias': expected the dtype of parameter 'weight'"),
        (lambda: Calls(lambda m, x: "logits", a=nn.Linear(6, 4)), "got 'logits'"),
        (lambda: Calls(lambda m, x: m.a(x).sum(), a=nn.Linear(6, 4)), "at least 1 dimension"),
        (lambda: Calls(lambda m, x: m.a(x).sum(0), a=nn.Linear(6, 4)), r"leading dimension counts the \d examples"),
        (lambda: Calls(lambda m, x: m.a(x).argmax(1), a=nn.Linear(6, 4)), "real floating-point dtype"),
        (lambda: Calls(lambda m, x: m.a(x) / 0, a=nn.Linear(6, 4)), "expected finite values"),
        (lambda: Calls(lambda m, x: m.a(x).detach(), a=nn.Linear(6, 4)), "depends on the parameters"),
    ],
)
def test_models(function, method, model, message):
    built = model().to(F64)
    if "dtype of parameter" in message:
        built.bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        function(built, vectors(3), method=method)


def test_something_that_is_no_model():
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"^model: expected a torch\.nn\.Module, got 3"):
            function(3, vectors(2))


def test_a_tensor_that_a_layer_has_read_and_somebody_then_changes():
    def call(m, x):
        hidden = torch.tanh(m.a(x))
        result = m.b(hidden)
        hidden.zero_()
        return result

    model = Calls(call, a=nn.Linear(6, 5), b=nn.Linear(5, 3)).to(F64)
    with pytest.raises((ValueError, RuntimeError), match=r"modified (in place|by an inplace operation)"):
        entk(model, vectors(3), method="structured")


def test_a_models_own_errors_come_through(case):
    model, _ = case
    for method in ("auto", "structured", "jacobian"):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            entk(model, vectors(3, width=5), method=method)
