"""Kernels in tiles at the edges: what rounding, scale, rank, names of folders and lost files must not change."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldyn.kernels import _tiles_engine, _tiles_solve, _tiles_store, tiles
from ldyn.models import mlp
from tests.kernels.tile_stores import MODEL, X, snapshot, unfinish

pytest.importorskip("dask")
pytest.importorskip("scipy")
zarr = pytest.importorskip("zarr")

F64 = torch.float64


def columns(size, count=3, seed=1):
    return torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spectral(values, seed=0):
    basis = torch.linalg.qr(columns(len(values), len(values), seed))[0]
    return (basis * torch.as_tensor(values, dtype=F64)) @ basis.T


# solving


@pytest.mark.parametrize("ridge", [0.0, 0.3, 40.0])
def test_the_preconditioner_is_the_scaled_inverse_on_what_it_has_seen(ridge):
    values = [0.5, 2.0, 9.0, 70.0]
    kernel = spectral([0.0] * 8 + values)
    found = _tiles_solve.nystrom(kernel.numpy().__matmul__, 12, 4, ridge)(np.eye(12))
    basis = torch.linalg.eigh(kernel)[1][:, 8:]
    seen = basis * ((0.5 + ridge) / (torch.tensor(values, dtype=F64) + ridge)) @ basis.T
    exact = seen + torch.eye(12, dtype=F64) - basis @ basis.T
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rank", [6, 20, 35])
@pytest.mark.parametrize("ridge", [0.0, 1e-14])
def test_a_rank_above_that_of_the_kernel_does_no_harm(rank, ridge):
    kernel = spectral([0.0] * 30 + [1.0, 2.0, 3.0, 50.0, 1000.0])
    solution = columns(35)
    rhs = kernel @ solution
    found = tiles.solve(kernel, rhs, ridge=ridge, rank=rank, progress=False)
    assert found.iterations <= 3 and found.residual <= 1e-8
    np.testing.assert_allclose(kernel @ found.solution, rhs, rtol=0, atol=1e-7 * float(rhs.norm()))


def test_a_kernel_of_zeros_is_solved_with_a_ridge_alone():
    kernel, rhs = torch.zeros(5, 5, dtype=F64), columns(5)
    for rank in (0, 3):
        torch.testing.assert_close(tiles.solve(kernel, rhs, ridge=2.0, rank=rank).solution, rhs / 2)
        with pytest.raises(tiles.NotConverged):
            tiles.solve(kernel, rhs, rank=rank, max_iter=5)


def test_it_goes_on_from_where_rounding_stopped_it_and_counts_all_steps():
    # the start is so far away that the carried residual is small while the true one is not
    kernel, rhs, start = spectral(np.linspace(1, 30, 20)), columns(20), 1e9 * columns(20, seed=2)
    found = tiles.solve(kernel, rhs, rtol=1e-13, initial=start)
    assert found.residual <= 1e-13
    torch.testing.assert_close(found.solution, torch.linalg.solve(kernel, rhs), rtol=1e-10, atol=1e-11)
    for most in range(1, found.iterations):
        with pytest.raises(tiles.NotConverged) as caught:
            tiles.solve(kernel, rhs, rtol=1e-13, initial=start, max_iter=most)
        assert caught.value.solution.iterations <= most


@pytest.mark.parametrize("scale", [1e-200, 2.0**-1060, 1e200, 1e308])
def test_the_scale_of_the_right_hand_side_does_not_matter(scale):
    kernel, rhs = spectral([1.0, 2.0, 5.0, 20.0]), columns(4).clamp(-1, 1)
    found, plain = tiles.solve(kernel, rhs * scale), tiles.solve(kernel, rhs)
    assert found.residual <= 1e-8 and found.iterations == plain.iterations
    tolerance = 1e-7 if scale > 1e-300 else 1e-3  # subnormal numbers have few digits
    np.testing.assert_allclose(found.solution / scale, plain.solution, rtol=tolerance, atol=tolerance)


def test_a_power_of_two_in_the_right_hand_side_changes_no_bit():
    kernel, rhs = spectral(np.geomspace(0.1, 9, 12)), columns(12)
    one, other = tiles.solve(kernel, rhs, rank=3), tiles.solve(kernel, rhs * 2.0**700, rank=3)
    assert torch.equal(one.solution * 2.0**700, other.solution) and one.residual == other.residual


def test_the_residual_is_that_of_the_rounded_solution():
    kernel, rhs = spectral(np.geomspace(1e-3, 1e3, 30)).float(), columns(30).float()
    wide = kernel.double() + 1e-3 * torch.eye(30, dtype=F64)
    found = tiles.solve(kernel, rhs, ridge=1e-3)
    assert found.solution.dtype == torch.float32 and found.residual > 1e-6
    true = (rhs.double() - wide @ found.solution.double()).norm() / rhs.double().norm()
    assert found.residual == pytest.approx(float(true), rel=1e-6)
    nothing = tiles.solve(kernel, torch.zeros_like(rhs), initial=rhs)
    assert nothing == (nothing.solution, 0, 0.0) and not nothing.solution.any()


def test_sums_of_a_float32_kernel_are_taken_in_float64(tmp_path):
    x = columns(40, seed=3).float()
    gram = tiles.tiled_gram(mlp((3, 8, 2)).float(), x, path=tmp_path / "k", tile=2)
    product = (gram.tensor().double() @ x.double()).float()
    torch.testing.assert_close(gram.matmul(x), product, rtol=2e-7, atol=0)


# the store


class Doubled(nn.Sequential):
    """Yet another function under the name of another class."""

    def forward(self, x):
        """Double what comes out."""
        return 2 * super().forward(x)


DISGUISED = type("Sequential", (Doubled,), {"__module__": nn.Sequential.__module__, "__qualname__": "Sequential"})


@pytest.mark.parametrize("damaged", ["0/0", "1/2"])
def test_a_repair_for_another_function_is_refused_before_anything_is_taken_away(store, damaged):
    (store / "c" / damaged).write_bytes(b"")
    before = snapshot(store)
    with pytest.raises(ValueError, match=r"expected a store of this kernel, got .* where the model now says"):
        tiles.tiled_gram(DISGUISED(*MODEL), X, path=store, tile=3, repair=True)
    assert snapshot(store) == before
    assert tiles.tiled_gram(MODEL, X, path=store, tile=3, repair=True).tensor().isfinite().all()


def test_a_repair_that_was_interrupted_is_taken_up_like_any_run(store, monkeypatch):
    before = snapshot(store)
    (store / "c" / "1" / "2").write_bytes(b"")
    with monkeypatch.context() as broken:
        broken.setattr("ldyn.kernels._tiles_engine.Job.fill", lambda *_: os.stat("/no/such/file"))
        with pytest.raises(FileNotFoundError):
            tiles.tiled_gram(MODEL, X, path=store, tile=3, repair=True)
    with pytest.raises(ValueError, match=r"^path: expected a finished store, got .* with 7 of 9 tiles"):
        tiles.open_gram(store)
    tiles.tiled_gram(MODEL, X, path=store, tile=3)
    assert snapshot(store) == before


def test_a_tile_with_infinite_numbers_is_refused_and_repaired(store):
    before = snapshot(store)
    zarr.open_array(store, mode="r+")[4, 4] = np.inf
    for call in (lambda: tiles.open_gram(store, verify=True), lambda: tiles.tiled_gram(MODEL, X, path=store, tile=3)):
        with pytest.raises(ValueError, match=r"^path: expected finite numbers, got others in .*c/1/1$"):
            call()
    tiles.tiled_gram(MODEL, X, path=store, tile=3, repair=True)
    assert snapshot(store) == before


def test_a_mirror_image_that_is_alone_is_written_again(store):
    before, lower = snapshot(store), store / "c" / "2" / "1"
    unfinish(store)
    (store / "c" / "1" / "2").unlink()
    lower.write_bytes((store / "c" / "2" / "0").read_bytes())
    tiles.tiled_gram(MODEL, X, path=store, tile=3)
    assert snapshot(store) == before


class Masked(nn.Module):
    """Takes whatever else than a tensor there is."""

    def __init__(self):
        super().__init__()
        self.inner = mlp((3, 4, 2))

    def forward(self, points, *, extra=None):
        return self.inner(points)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(5000.0), np.where(np.arange(5000) == 2500, 0.5, np.arange(5000.0))),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        ([torch.ones(2, dtype=F64)], [torch.ones(2, dtype=F64) + 1e-12]),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}),
        ((1, (2, 3)), ((1, 2), 3)),
        (1, 2),
    ],
)
def test_keywords_that_are_no_tensors_are_told_apart(tmp_path, one, other):
    options = {"path": tmp_path / "k", "tile": 2}
    tiles.tiled_gram(Masked(), {"points": X, "extra": one}, **options)
    tiles.tiled_gram(Masked(), {"extra": one, "points": X}, **options)
    with pytest.raises(ValueError, match=r"which differs in inputs x1, inputs x2$"):
        tiles.tiled_gram(Masked(), {"points": X, "extra": other}, **options)


@pytest.mark.parametrize("name", ["a::b", "k.zip", "a b#%20", "-"])
def test_any_name_of_a_folder_will_do(tmp_path, name):
    (tmp_path / "a").mkdir()
    path = tmp_path / name
    gram = tiles.tiled_gram(MODEL, X, path=str(path), tile=3)
    assert torch.equal(tiles.open_gram(path, verify=True).tensor(), gram.tensor())
    assert (path / "zarr.json").is_file() and not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("call", [tiles.open_gram, lambda path: tiles.tiled_gram(MODEL, X, path=path)])
def test_an_address_is_no_folder(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^path: expected a path to a folder, got 's3://bucket/k'"):
        call("s3://bucket/k")
    assert not list(tmp_path.iterdir())


def test_a_store_that_has_moved_is_the_same(store, tmp_path):
    kernel = tiles.open_gram(store).tensor()
    moved = store.rename(tmp_path / "elsewhere")
    assert torch.equal(tiles.open_gram(moved, verify=True).tensor(), kernel)
    before = snapshot(moved)
    assert tiles.tiled_gram(MODEL, X, path=moved, tile=3).path == moved
    assert snapshot(moved) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions")
def test_a_folder_that_can_only_be_read_is_enough_for_a_finished_store(finished):
    script = """
import os, sys
import dask, torch, zarr
from ldyn.kernels import tiles
from ldyn.kernels.entk import pntk
from ldyn.models import mlp
x, model = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), mlp((3, 4, 2))
pntk(model, x)  # which imports what it needs
if os.geteuid() == 0:  # who may do anything
    os.setuid(65534)
options = {"tile": 3, "progress": False}
assert torch.equal(tiles.open_gram("k", verify=True).tensor(), tiles.tiled_gram(model, x, path="k", **options).tensor())
try:
    tiles.tiled_gram(model, x, path="u", **options)
except PermissionError:
    sys.exit(7)
"""
    with tempfile.TemporaryDirectory() as name:  # that of pytest is for its owner alone
        place = Path(name)
        for each in ("k", "u"):
            shutil.copytree(finished, place / each)
        unfinish(place / "u")
        (place / "u" / "c" / "2" / "2").unlink()
        before, folders = snapshot(place), [place, *(each for each in place.rglob("*") if each.is_dir())]
        for each in folders:
            each.chmod(0o555)
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=place)
        for each in folders:
            each.chmod(0o755)
        assert found.returncode == 7, found.stderr
        assert snapshot(place) == before


def test_the_lock_is_given_back_after_an_error(store, monkeypatch):
    unfinish(store)
    (store / "c" / "0" / "0").unlink()
    with monkeypatch.context() as broken:
        broken.setattr("ldyn.kernels._tiles_engine.Job.fill", lambda *_: os.stat("/no/such/file"))
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                tiles.tiled_gram(MODEL, X, path=store, tile=3)
    tiles.tiled_gram(MODEL, X, path=store, tile=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x2": X[:5] + 1e-12}, "inputs x2$"),
        ({"x1": X.reshape(7, 1, 3)}, "inputs x1$"),
    ],
)
def test_other_second_inputs_and_other_shapes_are_other_kernels(tmp_path, changes, message):
    options = {"model": MODEL, "x1": X, "x2": X[:5], "tile": 3, "path": tmp_path / "k"}
    tiles.tiled_gram(**options)
    with pytest.raises(ValueError, match=rf"^path: expected a store of this kernel, got .* which differs in {message}"):
        tiles.tiled_gram(**{**options, **changes})


def test_the_last_tile_is_checked_too_and_what_kills_have_left_goes_away(store):
    unfinish(store)
    left = store / "c" / "2" / "2.0123.partial"
    left.write_bytes(b"half")
    tiles.tiled_gram(MODEL, X, path=store, tile=3)
    assert not left.exists()
    last = store / "c" / "2" / "2"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^path: expected intact tiles, got .*c/2/2 with 75 bytes for 76"):
        tiles.open_gram(store, verify=True)


# what a store says of itself


def test_a_later_format_is_refused(store):
    opened, _ = _tiles_store.open_store(store, write=True)
    later = _tiles_store._noted(replace(opened.manifest, format=2), finished=True)
    opened.array.update_attributes({_tiles_store.ATTRIBUTE: later})
    with pytest.raises(ValueError, match=r"^path: .* in format 2, expected 1$"):
        tiles.open_gram(store)


def test_a_run_does_not_end_while_a_tile_is_missing(store):
    unfinish(store)
    opened, _ = _tiles_store.open_store(store, write=True)
    opened.file((1, 2)).unlink()
    with pytest.raises(ValueError, match=r"^path: expected a folder that every worker writes to, got no tile \(1, 2\)"):
        opened.finish()
    assert not _tiles_store.open_store(store, write=False)[1]


def test_a_worker_that_cannot_see_the_folder_says_so(store, tmp_path, monkeypatch):
    # as on another machine: nothing is there under the name that the others use
    def elsewhere(job, opened, place):
        store.rename(tmp_path / "mounted elsewhere")
        fill(job, opened, place)

    fill = _tiles_engine.Job.fill
    unfinish(store)
    _tiles_store.open_store(store, write=True)[0].file((1, 2)).unlink()
    monkeypatch.setattr(_tiles_engine.Job, "fill", elsewhere)
    with pytest.raises(ValueError, match=rf"^path: expected a folder that every worker can reach, got {store}$"):
        tiles.tiled_gram(MODEL, X, path=store, tile=3)
    assert not store.exists()


class Described(nn.Sequential):
    """Shows something in its description."""

    def __init__(self, shown):
        super().__init__(*mlp((3, 4, 2)))
        self.shown = shown

    def extra_repr(self):
        return self.shown


def test_an_address_in_the_description_of_a_model_does_not_count_and_a_name_does(tmp_path):
    def gram(shown):
        return tiles.tiled_gram(Described(shown), X, path=tmp_path / "k", tile=3)

    gram("<function sine at 0x7f01ab>")
    gram("<function sine at 0x7f02CD>")
    with pytest.raises(ValueError, match=r"^path: .* which differs in architecture of the model$"):
        gram("<function cosine at 0x7f01ab>")
