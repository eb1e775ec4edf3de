"""Kernels in tiles: processes that are really killed, a disk that is full, and two runs at once.

The children are forked from a server that has imported everything, so that each takes a few milliseconds to start.
"""

import multiprocessing
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch

from ldyn.kernels import tiles
from ldyn.models import mlp

pytest.importorskip("dask")
pytest.importorskip("zarr")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")

F64 = torch.float64
CHILD = """
import os, pathlib, resource, signal, sys, time
import torch
from ldyn.kernels import _tiles_engine, tiles
from ldyn.models import mlp

torch.set_num_threads(1)
folder, count, tile, width, most = {folder!r}, {count}, {tile}, {width}, {most}
computed = _tiles_engine.Job.between

def logged(self, rows, columns):
    global most
    if rows.stop - rows.start > 1:
        most -= 1
        if most < 0:  # whoever is to kill this process is late
            time.sleep(600)
        with open(folder + ".log", "a") as log:
            log.write(f"{{rows.start}} {{columns.start}}\\n")
    return computed(self, rows, columns)

_tiles_engine.Job.between = logged
x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
{before}
try:
    tiles.tiled_gram(mlp((8, width, 3)), x, path=folder, tile=tile, progress=False)
except OSError:
    sys.exit(7)
"""
DIES_AT_A_RENAME = """
left, rename = {number}, pathlib.Path.replace

def dying(self, target):
    global left
    left -= 1
    if left == 0 and {late}:
        rename(self, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

pathlib.Path.replace = dying
"""
DISK_IS_FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"  # bytes for each file
OS_ERROR = 7


@pytest.fixture(scope="module")
def context():
    """Return a context whose processes start with everything imported."""
    found = multiprocessing.get_context("forkserver")
    lazily = ["dask", "distributed", "zarr", "torch.fx.experimental.symbolic_shapes"]  # what the first run imports
    found.set_forkserver_preload(["ldyn.kernels.tiles", "ldyn.models", *lazily])
    return found


def start(context, folder, count, tile, *, before="", width=16, most=1000):
    """Start a process that computes so many tiles at most and then waits."""
    script = CHILD.format(folder=str(folder), count=count, tile=tile, width=width, before=before, most=most)
    process = context.Process(target=exec, args=(script, {"__name__": "child"}))
    process.start()
    return process


def finish(folder, count, tile, *, width=16):
    """Take up in this process what is left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    try:
        return tiles.tiled_gram(mlp((8, width, 3)), x, path=folder, tile=tile, progress=False)
    finally:
        torch.set_num_threads(threads)


def chunks(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.match("c/*/*")}


def whole_tiles(folder):
    return {str(path.relative_to(folder)) for path in folder.glob("c/*/*") if path.suffix != ".partial"}


def test_ten_kills_at_random_moments_lose_one_tile_each_at_most(context, tmp_path):
    count, tile, rng = 180, 15, random.Random(0)
    folder = tmp_path / "killed"
    unbroken = finish(tmp_path / "unbroken", count, tile)
    for _ in range(10):
        known = whole_tiles(folder)
        goal = len(known) + rng.randint(1, 6)
        child = start(context, folder, count, tile, most=7)
        while child.is_alive() and len(whole_tiles(folder)) < goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert known <= whole_tiles(folder) != known
        with pytest.raises(ValueError, match=r"^path: expected a finished store, got .* with \d+ of 144 tiles"):
            tiles.open_gram(folder)
    begun = (tmp_path / "killed.log").read_text().splitlines()
    done = [name for name in whole_tiles(folder) if int(name.split("/")[1]) <= int(name.split("/")[2])]
    assert len(done) < 12 * 13 / 2 and len(done) <= len(begun) <= len(done) + 10
    resumed = finish(folder, count, tile)
    assert chunks(resumed.path) == chunks(unbroken.path)
    assert torch.equal(resumed.tensor(), unbroken.tensor())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return a run of nine tiles that nobody disturbs."""
    return finish(tmp_path_factory.mktemp("unbroken"), 9, 3)


@pytest.mark.parametrize(("number", "late"), [*((number, False) for number in range(1, 12)), (11, True)])
def test_a_kill_at_any_write_is_survived(context, unbroken, tmp_path, number, late):
    # eleven files are renamed into place: the metadata, nine tiles, and the metadata again
    folder = tmp_path / "k"
    child = start(context, folder, 9, 3, before=DIES_AT_A_RENAME.format(number=number, late=late))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    written = number if late else number - 1
    assert len(whole_tiles(folder)) == min(max(written - 1, 0), 9)
    assert len(list(folder.rglob("*.partial"))) == (not late)
    resumed = finish(folder, 9, 3)
    assert chunks(resumed.path) == chunks(unbroken.path)
    assert np.array_equal(tiles.open_gram(folder, verify=True).numpy(), unbroken.numpy())


def test_a_full_disk_is_an_oserror_and_the_run_can_be_taken_up(context, tmp_path):
    folder, sizes = tmp_path / "k", (90, 30)
    start(context, folder, *sizes, before=DIES_AT_A_RENAME.format(number=5, late=False)).join()
    before = {name: chunks(folder)[name] for name in whole_tiles(folder)}
    child = start(context, folder, *sizes, before=DISK_IS_FULL)
    child.join()
    assert child.exitcode == OS_ERROR
    assert len(before) == 3 and {name: chunks(folder)[name] for name in whole_tiles(folder)} == before
    assert chunks(finish(folder, *sizes).path) == chunks(finish(tmp_path / "unbroken", *sizes).path)


def test_a_folder_that_cannot_be_made_is_an_oserror():
    with pytest.raises(OSError, match="/proc"):
        tiles.tiled_gram(mlp((8, 3)), torch.zeros(2, 8, dtype=F64), path="/proc/kernel")


def test_two_runs_on_one_store_at_once_are_refused(context, tmp_path):
    folder, sizes = tmp_path / "k", (180, 15)
    child = start(context, folder, *sizes, most=7)
    while len(whole_tiles(folder)) < 3:
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match=r"^path: expected a store that nobody else is filling, got .*/k,"):
            finish(folder, *sizes)
    finally:
        child.kill()
        child.join()
    finish(folder, *sizes)


def test_one_folder_holds_one_kernel_and_interrupted_runs_of_others_are_refused(context, tmp_path):
    folder, sizes = tmp_path / "k", (90, 30)
    start(context, folder, *sizes, before=DIES_AT_A_RENAME.format(number=5, late=False)).join()
    before = chunks(folder)
    with pytest.raises(ValueError, match=r"differs in architecture of the model, .*parameters or buffers"):
        finish(folder, *sizes, width=8)
    assert chunks(folder) == before
