"""The table of blocks that every Hessian of this part comes in, and the check of what the loss brings to it."""

import dataclasses

import pytest
import torch

from ldyn.hessians._blocks import Blocks, LossHessian
from ldyn.hessians._output import checked_output, dense, is_per_token

F64 = torch.float64
SIZES = {"W": (2, 3), "b": (2,), "x": (4,)}


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symmetric(size, seed):
    matrix = normal(size, size, seed=seed)
    return matrix + matrix.T


def example():
    """A Hessian of three variables, and the two full matrices that its blocks were cut from."""
    counts = {name: torch.Size(shape).numel() for name, shape in SIZES.items()}
    names, whole = list(counts), [symmetric(sum(counts.values()), seed) for seed in (1, 2)]
    starts = dict(zip(names, (0, 6, 8), strict=True))

    def cut(matrix, a, b):
        return matrix[starts[a] : starts[a] + counts[a], starts[b] : starts[b] + counts[b]].clone()

    parts = [
        Blocks(names, {(a, b): cut(matrix, a, b) for i, a in enumerate(names) for b in names[i:]}) for matrix in whole
    ]
    return LossHessian({name: torch.Size(shape) for name, shape in SIZES.items()}, *parts), whole


def test_blocks_are_addressed_by_both_names():
    H, (gauss_newton, functional) = example()
    assert H.names == ("W", "b", "x")
    assert torch.equal(H.gauss_newton["W", "x"], gauss_newton[:6, 8:])
    assert torch.equal(H.gauss_newton["x", "W"], gauss_newton[8:, :6])
    assert torch.equal(H.functional["b", "b"], functional[6:8, 6:8])
    assert torch.equal(H["b", "W"], (gauss_newton + functional)[6:8, :6])


def test_a_mirror_image_shares_memory():
    H, _ = example()
    block, mirror = H.functional["W", "x"], H.functional["x", "W"]
    assert block.data_ptr() == mirror.data_ptr()
    block[0, 1] = 7.0
    assert float(mirror[1, 0]) == 7.0


def test_a_table_is_a_mapping_over_all_pairs():
    H, _ = example()
    pairs = list(H.functional)
    assert len(pairs) == len(H.functional) == len(set(pairs)) == 9
    assert pairs[1] == ("W", "b")
    assert dict(H.functional)["x", "b"].shape == (4, 2)
    assert ("b", "x") in H.functional
    assert ("b", "c") not in H.functional
    assert repr(H.functional) == "Blocks(W, b, x)"


def test_matrix_puts_all_parts_together():
    H, (gauss_newton, functional) = example()
    assert torch.equal(H.matrix(part="gauss_newton"), gauss_newton)
    assert torch.equal(H.matrix(part="functional"), functional)
    total = H.matrix()
    assert torch.equal(total, gauss_newton + functional)
    assert torch.equal(total, total.T)


def test_matrix_takes_some_variables_in_any_order():
    H, (gauss_newton, functional) = example()
    order = [*range(8, 12), *range(6)]
    assert torch.equal(H.matrix(["x", "W"]), (gauss_newton + functional)[order][:, order])
    assert torch.equal(H.matrix(("b",), part="functional"), functional[6:8, 6:8])


def test_a_hessian_cannot_be_reassigned():
    H, _ = example()
    with pytest.raises(dataclasses.FrozenInstanceError):
        H.functional = H.gauss_newton
    with pytest.raises(TypeError):
        H.functional["b", "b"] = torch.zeros(2, 2)


@pytest.mark.parametrize("pair", [("W", "c"), ("c", "W"), "W", ("W",), ("W", "b", "x"), 3])
def test_an_unknown_pair_is_a_key_error_that_names_the_variables(pair):
    H, _ = example()
    with pytest.raises(KeyError, match="the variables are W, b, x"):
        H.gauss_newton[pair]
    with pytest.raises(KeyError, match="the variables are W, b, x"):
        H[pair]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(names=["W", "c"]), "names: expected distinct names among W, b, x"),
        (dict(names=["W", "W"]), "names: expected distinct names"),
        (dict(names=[]), "names: expected distinct names"),
        (dict(part="all"), "part: expected 'total', 'gauss_newton' or 'functional', got 'all'"),
        (dict(part=None), "part: expected"),
    ],
)
def test_matrix_refuses_unknown_names_and_parts(arguments, message):
    H, _ = example()
    with pytest.raises(ValueError, match=message):
        H.matrix(**arguments)


def test_a_table_needs_exactly_one_block_for_each_pair():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="stored: expected one block for each of 3 pairs, got 2"):
        Blocks("ab", {("a", "a"): one, ("a", "b"): one})
    with pytest.raises(ValueError, match="stored: expected one block for each of 3 pairs"):
        Blocks("ab", {("a", "a"): one, ("b", "a"): one, ("b", "b"): one})


# --- what the loss brings ----------------------------------------------------------------------------------------


def test_both_forms_of_the_losses_hessian_are_taken_as_they_come():
    like, r = normal(1), normal(3, 2)
    per_token, full = torch.eye(2, dtype=F64).repeat(3, 1, 1), symmetric(6, 3).reshape(3, 2, 3, 2)
    for S, expected in ((per_token, True), (full, False)):
        gradient, hessian = checked_output(r, S, (3, 2), like)
        assert gradient is r
        assert hessian is S
        assert is_per_token(S) is expected
    assert torch.equal(dense(per_token), torch.eye(6, dtype=F64))
    assert torch.equal(dense(full), full.reshape(6, 6))


def test_writing_out_keeps_tokens_apart():
    blocks = normal(3, 2, 2)
    assert torch.equal(dense(blocks), torch.block_diag(*blocks))


def test_a_hessian_of_zeros_and_one_with_rounding_errors_are_symmetric():
    like, r, S = normal(1), normal(3, 2), torch.zeros(3, 2, 2, dtype=F64)
    checked_output(r, S, (3, 2), like)
    S = normal(3, 2, 2)
    S = (S + S.mT) * (1 + 1e-16) + 1e-15 * torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    checked_output(r, S, (3, 2), like)


@pytest.mark.parametrize(
    ("r", "S", "message"),
    [
        (normal(2, 3), torch.zeros(3, 2, 2, dtype=F64), r"r: expected shape \(3, 2\)"),
        (normal(3, 2).float(), torch.zeros(3, 2, 2, dtype=F64), "r: expected the dtype of the input"),
        (normal(3, 2) / 0, torch.zeros(3, 2, 2, dtype=F64), "r: expected finite values"),
        (normal(3, 2), torch.zeros(2, 2, dtype=F64), r"S: expected shape \(3, 2, 2\) or \(3, 2, 3, 2\)"),
        (normal(3, 2), torch.zeros(3, 2, 2), "S: expected the dtype of the input"),
        (normal(3, 2), torch.zeros(3, 2, 2, dtype=torch.int64), "S: expected a real floating-point dtype"),
        (normal(3, 2), normal(3, 2, 2), "S: expected a symmetric Hessian"),
        (normal(3, 2), normal(3, 2, 3, 2), "S: expected a symmetric Hessian"),
        (normal(3, 2), [[1.0]], "S: expected a torch.Tensor"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(r, S, message):
    with pytest.raises(ValueError, match=message):
        checked_output(r, S, (3, 2), normal(1))
    with pytest.raises(ValueError, match=message.replace("r:", "R:").replace("S:", "T:")):
        checked_output(r, S, (3, 2), normal(1), names=("R", "T"))
