"""Bad input to LayerNorm's closed forms is refused by name, and nothing of the caller's is changed."""

import math

import pytest
import torch

from ldyn.hessians import layernorm as ln
from tests.hessians.test_layernorm import F64, MATRICES, NORMS, OF_X, PAIRS, PRODUCTS, call, normal, vectors_of

BAD_ROWS = [
    ([0.0, 1.0], r"^x: expected a torch\.Tensor, got an object of type list"),
    (torch.tensor(0.0), r"^x: expected a tensor with at least 1 dimension\(s\)"),
    (torch.zeros(3, 0), r"^x: expected at least one element, .*\(3, 0\)"),
    (torch.tensor([1, 2]), "^x: expected a real floating-point dtype, got a int64"),
    (torch.tensor([0.0, math.nan]), "^x: expected finite values"),
    (torch.tensor([0.0, -math.inf]), "^x: expected finite values"),
    (torch.tensor([[0.0, 1.0], [math.inf, math.inf]]), "^x: expected finite values"),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [*MATRICES, *PRODUCTS, *PAIRS, *OF_X])
@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_bad_rows_are_refused_by_name(norm, name, bad, message):
    for eps in (0, 1e-5):
        with pytest.raises(ValueError, match=message):
            call(norm, name, bad, *[torch.ones(2)] * vectors_of(name), eps=eps)


BAD_VECTORS = [
    (1.0, r"expected a torch\.Tensor, got 1\.0"),
    (torch.zeros(3), r"expected shape \(\.\.\., 2\), got .*\(3,\)"),
    (torch.zeros(4, 2), r"expected a shape that broadcasts with that of x \(3, 2\), got \(4, 2\)"),
    (torch.zeros(0, 1, 2), "expected at least one element"),
    (torch.zeros(2, dtype=F64), r"expected the dtype of x \(torch\.float32\), got torch\.float64"),
    (torch.zeros(2, device="meta"), r"expected the device of x \(cpu\), got meta"),
    (torch.tensor([0.0, math.inf]), "expected finite values"),
    (torch.tensor([0.0, math.nan]), "expected finite values"),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("bad", "message"), BAD_VECTORS)
def test_bad_vectors_are_refused_by_name(norm, bad, message):
    x, good = normal(3, 2, dtype=torch.float32), torch.ones(2)
    names = {"hessian_contraction": "r", "jvp": "v", "vjp": "r"}
    names |= {"hessian_vector_product": "rv", "second_derivative": "uv"}
    for name, letters in names.items():
        for position, letter in enumerate(letters):
            arguments = [good] * len(letters)
            arguments[position] = bad
            with pytest.raises(ValueError, match=f"^{letter}: {message}"):
                call(norm, name, x, *arguments)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [*MATRICES, *PRODUCTS, *PAIRS])
def test_bad_scales_are_refused_by_name(norm, name):
    x = normal(3, 2, dtype=torch.float32)
    bad = {
        r"expected a torch\.Tensor, got 1": 1,
        r"expected shape \(2\), got .*\(3,\)": torch.ones(3),
        r"expected shape \(2\), got .*\(3, 2\)": torch.ones(3, 2),
        "expected the dtype of x": torch.ones(2, dtype=F64),
        "expected finite values": torch.tensor([1.0, math.nan]),
    }
    for message, weight in bad.items():
        with pytest.raises(ValueError, match=f"^weight: {message}"):
            call(norm, name, x, *[x] * vectors_of(name), weight)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf, "1", True, None])
def test_bad_eps_is_refused_by_name(norm, eps):
    for name in (*MATRICES, *PRODUCTS, *PAIRS, *OF_X):
        with pytest.raises(ValueError, match=r"^eps: expected "):
            call(norm, name, torch.tensor([0.0, 1.0]), *[torch.ones(2)] * vectors_of(name), eps=eps)


@pytest.mark.parametrize("row", [[0.1, 0.1, 0.1], [-1e30, -1e30, -1e30], [0.0, 0.0, 0.0]])
def test_rows_with_nothing_to_divide_by_are_refused(row):
    x = torch.tensor([[1.0, 2.0, 3.0], row], dtype=F64)
    for name in (*MATRICES, *PRODUCTS, *PAIRS, *OF_X):
        vectors = [torch.ones(3, dtype=F64)] * vectors_of(name)
        with pytest.raises(ValueError, match=r"^x: expected no constant row where eps is 0, got 1 such row"):
            call("layernorm", name, x, *vectors, eps=0)
        if any(row):
            call("rmsnorm", name, x, *vectors, eps=0)
        else:
            with pytest.raises(ValueError, match=r"^x: expected no zero row where eps is 0, got 1 such row"):
                call("rmsnorm", name, x, *vectors, eps=0)


@pytest.mark.parametrize("kind", ["spectral", None, 2])
def test_unknown_norms_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"^kind: expected 'injective' or 'flattening', got "):
        ln.layernorm_hessian_norm(torch.tensor([0.0, 1.0]), kind=kind)


def test_large_results_of_finite_rows_are_no_error():
    x = torch.tensor([1e-170, 0.0, -2e-170], dtype=F64)
    assert torch.isinf(ln.layernorm_hessian_norm(x, eps=0))
    assert torch.isfinite(ln.layernorm_jacobian_norm(x, eps=0))


def test_nothing_of_the_callers_is_changed():
    x, v, weight = normal(3, 4), normal(4, seed=1), normal(4, seed=2)
    before, state, default = x.clone(), torch.get_rng_state(), torch.get_default_dtype()
    for norm in NORMS:
        for name in (*MATRICES, *PRODUCTS, *PAIRS):
            call(norm, name, x, *[v] * vectors_of(name), weight)
        for name in OF_X:
            call(norm, name, x)
        with pytest.raises(ValueError, match=r"^x: "):
            call(norm, "hessian", x / 0)
    assert torch.equal(x, before) and torch.equal(v, normal(4, seed=1)) and torch.equal(weight, normal(4, seed=2))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is default
