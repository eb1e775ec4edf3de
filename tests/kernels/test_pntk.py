"""One number for a block of the tangent kernel: reductions and their errors against other routes."""

import ast
import inspect
import subprocess
import sys
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldyn import models
from ldyn.kernels import _pntk_blocks, pntk, pntk_bound, pntk_regression, tiles
from ldyn.kernels.entk import entk

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kronecker(numbers, outputs):
    """κ ⊗ I block by block, (..., V, V)."""
    return numbers[..., None, None] * torch.eye(outputs, dtype=numbers.dtype)


shapes = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 5), st.integers(0, 10**6))


# --- the three numbers ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(shapes)
def test_each_number_is_the_loop_that_defines_it(case):
    lead, outputs, seed = case
    blocks = normal(*lead, outputs, outputs, seed=seed)
    numbers = pntk.pseudo_ntks(blocks)
    for place in product(*(range(size) for size in lead)):
        block = blocks[place].tolist()
        entries = [Fraction(entry) for row in block for entry in row]
        diagonal = [Fraction(block[a][a]) for a in range(outputs)]
        exact = (diagonal[0], sum(entries) / outputs, sum(diagonal) / outputs)
        for got, want in zip(numbers, exact, strict=True):
            assert float(got[place]) == pytest.approx(float(want), rel=1e-13, abs=1e-14)
    assert all(part.shape == torch.Size(lead) and part.dtype == F64 for part in numbers)


@pytest.mark.parametrize("kind", pntk.KINDS)
def test_numbers_of_blocks_are_those_computed_without_blocks(kind):
    model = models.mlp((3, 5, 4))
    x1, x2 = normal(6, 3), normal(2, 3, seed=1)
    reduced = getattr(pntk.pseudo_ntks(entk(model, x1, x2, method="jacobian")), kind)
    torch.testing.assert_close(pntk.pntk(model, x1, x2, kind=kind), reduced, rtol=1e-12, atol=1e-12)


def test_numbers_do_not_share_memory_with_the_blocks_and_keep_dtype():
    blocks = normal(2, 3, 3, dtype=torch.float32)
    kept = blocks.clone()
    for part in pntk.pseudo_ntks(blocks):
        assert part.dtype == torch.float32
        part.zero_()
    assert torch.equal(blocks, kept)


def test_numbers_can_be_differentiated_and_mapped():
    blocks = normal(4, 3, 3).requires_grad_()
    for part, weight in zip(pntk.pseudo_ntks(blocks), ("first", "sum", "trace"), strict=True):
        (slope,) = torch.autograd.grad(part.sum(), blocks)
        unit = {"first": torch.diag(torch.tensor([1.0, 0, 0])), "sum": torch.ones(3, 3) / 3, "trace": torch.eye(3) / 3}
        torch.testing.assert_close(slope, unit[weight].to(F64).expand(4, 3, 3))
    mapped = torch.func.vmap(pntk.pseudo_ntks)(blocks.detach())
    for got, want in zip(mapped, pntk.pseudo_ntks(blocks.detach()), strict=True):
        torch.testing.assert_close(got, want)


# --- the error --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(shapes, st.sampled_from([1, 7, 40, 1 << 22]))
def test_error_is_that_of_the_stacked_matrix(case, chunk):
    lead, outputs, seed = case
    blocks, numbers = normal(*lead, outputs, outputs, seed=seed), normal(*lead, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pntk_blocks, "CHUNK", chunk)
        error = pntk.pntk_error(blocks, numbers)
    whole = (blocks - kronecker(numbers, outputs)).norm()
    assert error.absolute == pytest.approx(float(whole), rel=1e-13)
    assert error.norm == pytest.approx(float(blocks.norm()), rel=1e-13)
    assert error.relative == pytest.approx(error.absolute / error.norm, rel=1e-15)


@settings(max_examples=60)
@given(shapes, st.floats(-3, 3))
def test_pythagoras_about_the_trace(case, shift):
    lead, outputs, seed = case
    blocks = normal(*lead, outputs, outputs, seed=seed)
    best = pntk.pseudo_ntks(blocks).trace
    moved = shift * normal(*lead, seed=seed + 2)
    error = pntk.pntk_error(blocks, best + moved)
    expected = pntk.pntk_error(blocks, best).absolute ** 2 + outputs * float(moved.square().sum())
    assert error.absolute**2 == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_the_layout_of_a_tangent_kernel_is_no_obstacle():
    model, x1, x2 = models.mlp((3, 6, 4)), normal(7, 3), normal(5, 3, seed=1)
    kernel = entk(model, x1, x2)
    assert not kernel.is_contiguous()
    numbers = pntk.pntk(model, x1, x2, kind="sum")
    stacked = kernel.transpose(1, 2).reshape(28, 20)
    near = torch.kron(numbers, torch.eye(4, dtype=F64))
    assert pntk.pntk_error(kernel, numbers).absolute == pytest.approx(float((stacked - near).norm()), rel=1e-13)


def test_small_errors_keep_their_digits():
    small = 1e-12 * normal(20, 3, 3)
    blocks = kronecker(torch.ones(20, dtype=F64), 3) + small
    stored = blocks - kronecker(torch.ones(20, dtype=F64), 3)  # what rounding left of the small part
    error = pntk.pntk_error(blocks, torch.ones(20, dtype=F64))
    assert error.absolute == pytest.approx(float(stored.norm()), rel=1e-14)
    from_norms = error.norm**2 - 2 * float(pntk.pseudo_ntks(blocks).trace.sum()) * 3 + 20 * 3
    assert abs(from_norms) ** 0.5 != pytest.approx(error.absolute, rel=0.1)  # the expanded square has none left


def test_single_precision_is_summed_in_double():
    blocks = torch.full((1 << 13, 2, 2), 0.1, dtype=torch.float32)
    error = pntk.pntk_error(blocks, torch.zeros(1 << 13, dtype=torch.float32))
    exact = float(torch.tensor(0.1, dtype=torch.float32)) * (1 << 15) ** 0.5
    assert error.absolute == pytest.approx(exact, rel=1e-12)
    assert error.norm == pytest.approx(exact, rel=1e-12)
    blocks, numbers = normal(50, 3, 3, dtype=torch.float32), normal(50, seed=1, dtype=torch.float32)
    wide = pntk.pntk_error(blocks.double(), numbers.double())
    assert pntk.pntk_error(blocks, numbers) == pytest.approx(wide, rel=1e-13)


def test_measuring_keeps_nothing_for_a_derivative():
    """A kernel that requires gradients is measured as one that does not: no graph, which would hold copies of it."""
    blocks, numbers = normal(3, 2, 2).requires_grad_(), normal(3, seed=1).requires_grad_()
    plain = pntk.pntk_error(blocks.detach(), numbers.detach())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        assert pntk.pntk_error(blocks, numbers.detach()) == plain
        assert pntk.pntk_error(blocks.detach(), numbers) == plain
    assert not kept


def test_a_kernel_of_nothing_but_zeros():
    blocks = torch.zeros(2, 3, 3)
    assert pntk.pntk_error(blocks, torch.zeros(2)) == (0.0, 0.0, 0.0)
    absolute, norm, relative = pntk.pntk_error(blocks, torch.ones(2))
    assert (norm, relative) == (0.0, float("inf"))
    assert absolute == pytest.approx(6**0.5)


def test_nothing_of_the_callers_changes():
    blocks, numbers = normal(3, 2, 2).requires_grad_(), normal(3, seed=1)
    kept = blocks.detach().clone(), numbers.clone(), torch.random.get_rng_state()
    error = pntk.pntk_error(blocks, numbers)
    assert isinstance(error.absolute, float)
    assert torch.equal(blocks.detach(), kept[0])
    assert torch.equal(numbers, kept[1])
    assert torch.equal(torch.random.get_rng_state(), kept[2])
    assert blocks.grad is None


def test_a_large_kernel_is_not_copied():
    code = """
import resource, sys, torch
from ldyn.kernels.pntk import pntk_error
unit = 1 if sys.platform == "darwin" else 1024
kernel = torch.ones(64, 512, 32, 32)  # 134 MB
numbers = torch.ones(64, 512)
pntk_error(kernel[:8], numbers[:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pntk_error(kernel, numbers)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / kernel.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


# --- heads, exactly ---------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_the_sum_is_the_first_number_of_a_rotated_head(outputs, seed):
    model, x = models.mlp((3, 4, outputs), seed=seed), normal(3, 3, seed=seed)
    across = torch.full((outputs,), outputs**-0.5, dtype=F64)
    normal_to_mirror = across - torch.eye(outputs, dtype=F64)[0]
    mirror = torch.eye(outputs, dtype=F64)
    mirror -= 2 * torch.outer(normal_to_mirror, normal_to_mirror) / normal_to_mirror.square().sum()
    rotated = models.mlp((3, 4, outputs), seed=seed)
    with torch.no_grad():
        rotated[-1].weight.copy_(mirror @ model[-1].weight)
        rotated[-1].bias.copy_(mirror @ model[-1].bias)
    torch.testing.assert_close(pntk.pntk(rotated, x, kind="first"), pntk.pntk(model, x, kind="sum"))
    before, after = entk(model, x), entk(rotated, x)
    error = pntk.pntk_error(before, pntk.pseudo_ntks(before).sum)
    assert pntk.pntk_error(after, pntk.pseudo_ntks(after).first).relative == pytest.approx(error.relative, rel=1e-12)


@pytest.mark.parametrize(
    "loss", [torch.nn.functional.cross_entropy, lambda z, y: z.logsumexp(-1).mean() - z[:, 0].mean()]
)
def test_losses_of_softmax_leave_the_row_sum_of_the_head(loss):
    model, x, y = models.mlp((3, 6, 4)), normal(8, 3), torch.arange(8) % 4
    before = model[-1].weight.detach().sum(0), model[-1].weight.detach().clone(), model[-1].bias.detach().sum()
    list(models.sgd(model, x, y, lr=0.5, steps=60, batch_size=4, loss=loss))
    after = model[-1].weight.detach()
    assert (after - before[1]).norm() > 0.3 * before[1].norm()
    torch.testing.assert_close(after.sum(0), before[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(model[-1].bias.detach().sum(), before[2], rtol=0, atol=1e-13)


def test_the_square_loss_does_not_leave_it():
    model, x, y = models.mlp((3, 6, 4)), normal(8, 3), normal(8, 4, seed=1)
    before = model[-1].weight.detach().sum(0)
    list(models.sgd(model, x, y, lr=0.1, steps=60, loss=torch.nn.functional.mse_loss))
    assert (model[-1].weight.detach().sum(0) - before).norm() > 0.05


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[1.0]], r"^blocks: expected a torch\.Tensor"),
        (torch.ones(3), r"^blocks: expected a tensor with at least 2 dimension"),
        (torch.ones(4, 2, 3), r"^blocks: expected shape \(\.\.\., V, V\), got .*\(4, 2, 3\)"),
        (torch.ones(0, 2, 2), "^blocks: expected at least one element"),
        (torch.ones(2, 2).long(), "^blocks: expected a real floating-point dtype"),
        (torch.full((2, 2), float("nan")), "^blocks: expected finite values"),
    ],
)
def test_bad_blocks_are_refused_by_name(blocks, message):
    with pytest.raises(ValueError, match=message):
        pntk.pseudo_ntks(blocks)
    with pytest.raises(ValueError, match=message):
        pntk.pntk_error(blocks, torch.ones(()))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (1.0, r"^numbers: expected a torch\.Tensor"),
        (torch.ones(2), r"^numbers: expected shape \(3\)"),
        (torch.ones(3, 1), r"^numbers: expected shape \(3\)"),
        (torch.ones(3, dtype=F64), r"^numbers: expected the dtype of blocks \(torch\.float32\)"),
        (torch.ones(3, device="meta"), r"^numbers: expected the device of blocks"),
        (torch.full((3,), float("inf")), "^numbers: expected finite values"),
    ],
)
def test_bad_numbers_are_refused_by_name(numbers, message):
    with pytest.raises(ValueError, match=message):
        pntk.pntk_error(torch.ones(3, 2, 2), numbers)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"^kind: expected one of .*, got 'mean'"):
        pntk.pntk(models.mlp((2, 3)), torch.ones(1, 2, dtype=F64), kind="mean")


# --- the module -------------------------------------------------------------------------------------------------


def test_the_facade_gathers_all_that_is_public_behind_it():
    tree = ast.parse(inspect.getsource(pntk))
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(pntk.__all__) == imported - {"annotations"}
    for module in (pntk_bound, pntk_regression, tiles):
        assert set(module.__all__) <= set(pntk.__all__)
        assert all(getattr(pntk, name) is getattr(module, name) for name in module.__all__)


def test_importing_it_loads_nothing_optional():
    code = "import sys, ldyn.kernels.pntk; print({'zarr', 'dask', 'scipy', 'sympy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
