"""What the functions on the Fisher matrix refuse, and the caller's model afterwards."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldyn.foundations import kl
from ldyn.models import mlp
from tests.callers_model import same, seeded, snapshot
from tests.foundations.test_kl_fisher import Wrapped, inputs

FISHER = {
    "matrix": lambda model, x: kl.fisher_matrix(model, x),
    "product": lambda model, x: kl.fisher_vector_product(model, x, torch.ones(_count(model)).double()),
    "quadratic": lambda model, x: kl.quadratic_kl(model, x, torch.ones(_count(model)).double()),
}


def _count(model):
    return sum(parameter.numel() for parameter in getattr(model, "parameters", list)())


class Noisy(nn.Module):
    """Dropout called as a function, which no inspection of modules can see."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return functional.dropout(self.layer(x), 0.5, training=True)


class Broken(nn.Module):
    """Draws a random number, then fails."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(1)
        raise RuntimeError("out of order")


BAD_MODELS = {
    "training-mode dropout": (
        lambda: seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))).train(),
        "evaluation mode",
    ),
    "training-mode batch norm": (
        lambda: seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).train(),
        "evaluation mode",
    ),
    "hidden dropout": (lambda: seeded(Noisy), "random numbers"),
    "no parameters": (nn.Identity, "parameters"),
    "not a module": (lambda: "model", "Module"),
    "mixed dtypes": (
        lambda: nn.Sequential(mlp((3, 3)), mlp((3, 3), dtype=torch.float32)),
        "dtype",
    ),
    "mixed devices": (lambda: nn.Sequential(mlp((3, 3)), mlp((3, 3)).to("meta")), "device"),
    "output cut off": (lambda: seeded(lambda: Wrapped(lambda z: z.detach())), "depends on the parameters"),
    "no tensor": (lambda: seeded(lambda: Wrapped(lambda z: {"a": z})), "logits"),
    "a scalar": (lambda: seeded(lambda: Wrapped(lambda z: z.sum())), "dimension"),
    "infinite logits": (lambda: seeded(lambda: Wrapped(lambda z: z / 0)), "finite"),
}


@pytest.mark.parametrize("function", FISHER)
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_and_left_alone(function, case):
    make, words = BAD_MODELS[case]
    model, x = make(), inputs(5, 3)
    state = torch.get_rng_state()
    before = snapshot(model, x) if isinstance(model, nn.Module) and "devices" not in case else None
    with pytest.raises(ValueError, match=r"^model.*expected") as caught:
        FISHER[function](model, x)
    assert words in str(caught.value)
    assert torch.equal(state, torch.get_rng_state())
    assert before is None or same(before, snapshot(model, x))


@pytest.mark.parametrize("function", FISHER)
def test_nothing_changes_when_the_model_itself_fails(function):
    model, x = seeded(Broken), inputs(5, 3)
    before = snapshot(model, x)
    with pytest.raises(RuntimeError, match="out of order"):
        FISHER[function](model, x)
    assert same(before, snapshot(model, x))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(5, 3), "dtype"),
        (torch.zeros(5, 3, dtype=torch.float64, device="meta"), "device"),
        (torch.zeros(0, 3, dtype=torch.float64), "at least one element"),
        (torch.full((5, 3), math.nan, dtype=torch.float64), "finite"),
        ([[0.0, 1.0, 2.0]], "torch.Tensor"),
    ],
)
def test_bad_inputs_are_refused(x, words):
    with pytest.raises(ValueError, match=r"^x: expected") as caught:
        kl.fisher_matrix(mlp((3, 4)), x)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (torch.ones(15).double(), "expected shape"),
        (torch.ones(16), "dtype"),
        (torch.ones(1, 16).double(), "dimension"),
        (torch.full((16,), math.inf).double(), "finite"),
        (torch.ones(16, dtype=torch.int64), "floating"),
    ],
)
@pytest.mark.parametrize(("function", "name"), [(kl.fisher_vector_product, "vector"), (kl.quadratic_kl, "delta")])
def test_bad_vectors_are_refused(function, name, vector, words):
    with pytest.raises(ValueError, match=rf"^{name}: expected") as caught:
        function(mlp((3, 4)), inputs(5, 3), vector)
    assert words in str(caught.value)
