"""Kernels in tiles: the numbers, what the caller keeps, and the same call on a Dask cluster."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldyn.kernels import tiles
from ldyn.kernels.entk import KINDS, pntk
from ldyn.models import mlp

distributed = pytest.importorskip("distributed")
zarr = pytest.importorskip("zarr")

F64 = torch.float64


def inputs(count, size=3, seed=0, dtype=F64):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contents(folder):
    """Read all files of a store but the metadata, which holds nothing of the numbers."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.match("c/*/*")}


@settings(max_examples=15, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.integers(1, 11),
    kind=st.sampled_from(KINDS),
    symmetric=st.booleans(),
    seed=st.integers(0, 100),
)
def test_every_shape_agrees_with_the_kernel_in_one_piece(counts, tile, kind, symmetric, seed):
    model = mlp((3, 4, 2), seed=seed)
    x1, x2 = inputs(counts[0], seed=seed), None if symmetric else inputs(counts[1], seed=seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        gram = tiles.tiled_gram(model, x1, x2, path=Path(folder) / "new" / "k", kind=kind, tile=tile, progress=False)
        whole = gram.tensor()
        torch.testing.assert_close(whole, pntk(model, x1, x2, kind=kind), rtol=1e-12, atol=1e-13)
        assert gram.shape == tuple(whole.shape) and gram.kind == kind and gram.tile == tile and gram.dtype == F64
        if symmetric:
            assert torch.equal(whole, whole.T)
        top, left = (seed % (size + 1) for size in gram.shape)
        assert torch.equal(gram.block(slice(top), slice(left, None)), whole[:top, left:])
        v = inputs(gram.shape[1], size=2, seed=seed + 2)
        torch.testing.assert_close(gram.matmul(v), whole @ v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gram.matmul(v[:, 0]), whole @ v[:, 0], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(gram.array().compute(scheduler="synchronous"), gram.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_model(tmp_path, dtype):
    model, x = mlp((3, 4, 2), dtype=dtype), inputs(5, dtype=dtype)
    gram = tiles.tiled_gram(model, x, path=tmp_path / "k", tile=2)
    assert gram.tensor().dtype == gram.matmul(x).dtype == gram.dtype == dtype
    assert gram.numpy().dtype == zarr.open_array(tmp_path / "k").dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(gram.tensor(), pntk(model, x))


class Named(nn.Module):
    """Takes keyword arguments, one of which is no tensor, and has a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = mlp((3, 4, 2))
        self.register_buffer("factor", torch.tensor(2.0, dtype=F64))

    def forward(self, points, *, power=1):
        return self.inner(points) * self.factor**power


def test_options_and_keyword_inputs_reach_the_kernel(tmp_path):
    model, x = Named(), {"points": inputs(5), "power": 2}
    options = {"params": ["inner.0.*"], "method": "jacobian", "kind": "sum"}
    gram = tiles.tiled_gram(model, x, path=tmp_path / "k", tile=2, **options)
    torch.testing.assert_close(gram.tensor(), pntk(model, x, **options), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(gram.tensor(), pntk(model, x, kind="sum"))


def test_a_finished_store_is_opened_and_not_computed_again(tmp_path, monkeypatch):
    model, x = mlp((3, 4, 2)), inputs(7)
    first = tiles.tiled_gram(model, x, path=tmp_path / "k", tile=3)
    before = contents(first.path)
    monkeypatch.setattr("ldyn.kernels._tiles_engine.Job.fill", None)
    monkeypatch.chdir(tmp_path)
    again = tiles.tiled_gram(model, x, path="k", tile=3)
    opened = tiles.open_gram(str(tmp_path / "k"), verify=True)
    assert contents(first.path) == before
    assert again.path == opened.path == first.path
    for gram in (again, opened):
        assert torch.equal(gram.tensor(), first.tensor())
        assert (gram.kind, gram.tile, gram.shape, gram.symmetric) == ("trace", 3, (7, 7), True)
    assert not list(tmp_path.rglob("*.partial"))


def test_products_have_the_same_bits_with_any_number_of_threads(tmp_path):
    gram, threads = tiles.tiled_gram(mlp((3, 4, 2)), inputs(23), path=tmp_path / "k", tile=4), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(gram.matmul(inputs(23)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_tile_of_zeros_is_written(tmp_path):
    model, x = nn.Linear(3, 2, bias=False, dtype=F64), torch.zeros(4, 3, dtype=F64)
    gram = tiles.tiled_gram(model, x, path=tmp_path / "k", tile=2)
    assert len(contents(gram.path)) == 4
    assert torch.equal(tiles.open_gram(tmp_path / "k", verify=True).tensor(), torch.zeros(4, 4, dtype=F64))


def test_the_store_is_a_plain_zarr_array_in_which_what_is_missing_is_nan(tmp_path):
    gram = tiles.tiled_gram(mlp((3, 4, 2)), inputs(5), path=tmp_path / "k", tile=2)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "k", mode="r")[:], gram.numpy())
    (tmp_path / "k" / "c" / "1" / "2").unlink()
    assert np.isnan(zarr.open_array(tmp_path / "k", mode="r")[2:4, 4:]).all()


def test_nothing_of_the_callers_changes(tmp_path):
    model, x = mlp((3, 4, 2)), inputs(5)
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, kept, noise = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    tiles.tiled_gram(model, x, path=tmp_path / "k", tile=2)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(x, kept) and torch.equal(noise, torch.get_rng_state())
    assert model.training and torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.get_default_dtype() == torch.float32 and all(p.requires_grad for p in model.parameters())


@pytest.fixture(scope="module")
def client():
    """Start two worker processes with one thread each."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as found:
        yield found


def test_two_workers_give_the_same_bits_as_one_process(client, tmp_path):
    threads = torch.get_num_threads()
    model, x = Named(), {"points": inputs(41), "power": 1}
    torch.set_num_threads(1)  # as workers have it
    try:
        here = tiles.tiled_gram(model, x, path=tmp_path / "here", tile=8)
    finally:
        torch.set_num_threads(threads)
    there = tiles.tiled_gram(model, x, path=tmp_path / "there", tile=8, client=client)
    assert contents(there.path) == contents(here.path) and len(contents(here.path)) == 36
    v = inputs(41, size=3)
    assert torch.equal(there.matmul(v, client=client), here.matmul(v))
    near, far = (tiles.solve(there, v, ridge=20.0, client=each, progress=False) for each in (None, client))
    assert torch.equal(near.solution, far.solution) and near.iterations == far.iterations
    assert client.status == "running"


def test_a_cluster_takes_up_what_another_run_has_left(client, tmp_path):
    model, x = mlp((3, 16, 2)), inputs(60)
    whole = tiles.tiled_gram(model, x, path=tmp_path / "k", tile=4, client=client)
    before, metadata = contents(whole.path), (whole.path / "zarr.json").read_text()
    for place in ("0/0", "2/3", "3/2", "14/5"):
        (whole.path / "c" / place).unlink()
    (whole.path / "zarr.json").write_text(metadata.replace('"finished": true', '"finished": false'))
    tiles.tiled_gram(model, x, path=tmp_path / "k", tile=4, client=client)
    assert contents(whole.path) == before


def test_an_error_on_a_worker_arrives_and_the_client_stays_usable(client, tmp_path):
    path = tmp_path / "k"
    gram = tiles.tiled_gram(mlp((3, 4, 2)), inputs(9), path=path, tile=2)
    damaged = path / "c" / "3" / "1"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^path: expected intact tiles, got .*c/3/1 with 35 bytes for 36"):
        gram.matmul(inputs(9), client=client)
    assert client.submit(sum, [1, 2]).result() == 3
