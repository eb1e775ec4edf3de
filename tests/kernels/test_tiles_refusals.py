"""Kernels in tiles: a store that is damaged or another's is refused, and so are bad arguments; all by name."""

import json
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from ldyn.kernels import _tiles_engine, tiles
from ldyn.models import mlp
from tests.kernels.tile_stores import MODEL, X, snapshot, unfinish

zarr = pytest.importorskip("zarr")
pytest.importorskip("dask")

F64 = torch.float64


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def refused(store, message, call, *arguments, **options):
    """Require an error that names the path, and that the folder is as before."""
    before = snapshot(store)
    with pytest.raises(ValueError, match=f"(?s)^path: {message}"):
        call(*arguments, **options)
    assert snapshot(store) == before


TILES = {
    "a flipped bit": (lambda file: flip(file, 11), r"expected intact tiles, got .*c/0/1 with a wrong checksum"),
    "a flipped bit in the checksum": (lambda file: flip(file, -1), r"expected intact tiles, got .*c/0/1 with a wrong"),
    "the end cut off": (lambda file: os.truncate(file, 40), r"expected intact tiles, got .*c/0/1 with 40 bytes for 76"),
    "an empty file": (lambda file: os.truncate(file, 0), r"expected intact tiles, got .*c/0/1 with 0 bytes for 76"),
    "more than there should be": (lambda file: os.truncate(file, 77), r"expected intact .*c/0/1 with 77 bytes for 76"),
}


@pytest.mark.parametrize("resumed", [True, False], ids=["unfinished", "finished"])
@pytest.mark.parametrize("damage", TILES)
def test_damaged_tiles_are_refused(store, damage, resumed):
    hurt, message = TILES[damage]
    hurt(store / "c" / "0" / "1")
    if resumed:
        unfinish(store)
        refused(store, "expected a finished store", tiles.open_gram, store)
    else:
        refused(store, message, tiles.open_gram, store, verify=True)
        gram = tiles.open_gram(store)
        assert gram.block(slice(3, None), slice(None)).shape == (4, 7)  # the other tiles can be read
        refused(store, message, gram.tensor)
        refused(store, message, gram.matmul, X)
        refused(store, message, tiles.solve, gram, X, ridge=1.0)
    refused(store, message, tiles.tiled_gram, MODEL, X, path=store, tile=3)


def test_a_missing_tile_is_refused_in_a_finished_store_alone(store):
    before = snapshot(store)
    gram = tiles.open_gram(store)
    (store / "c" / "2" / "0").unlink()
    message = r"expected a whole store, got none of the tile \(2, 0\): .*c/2/0 is missing"
    for verify in (True, False):
        refused(store, message, tiles.open_gram, store, verify=verify)
    refused(store, message, gram.tensor)
    refused(store, message, tiles.tiled_gram, MODEL, X, path=store, tile=3)
    unfinish(store)
    tiles.tiled_gram(MODEL, X, path=store, tile=3)
    assert snapshot(store) == before


@pytest.mark.parametrize("damage", [*TILES, "missing", "exchanged"])
@pytest.mark.parametrize("place", ["0/1", "1/0", "1/1"])
def test_what_is_damaged_can_be_computed_again_on_request(store, damage, place, monkeypatch):
    before, file = snapshot(store), store / "c" / place
    if damage == "missing":
        file.unlink()
    elif damage == "exchanged":
        file.write_bytes((store / "c" / "0" / "2").read_bytes())
    else:
        TILES[damage][0](file)
    again, fill = [], _tiles_engine.Job.fill
    monkeypatch.setattr(_tiles_engine.Job, "fill", lambda self, *rest: (again.append(rest[1]), fill(self, *rest)))
    gram = tiles.tiled_gram(MODEL, X, path=store, tile=3, repair=True)
    assert snapshot(store) == before and again in ([(0, 1)], [(1, 1)])
    assert torch.equal(gram.tensor(), tiles.open_gram(store, verify=True).tensor())
    other = {"model": mlp((3, 4, 2), seed=1), "x1": X, "path": store, "tile": 3, "repair": True}
    refused(store, "expected a store of this kernel", tiles.tiled_gram, **other)


def test_two_tiles_that_changed_places_are_refused(store):
    one, other = store / "c" / "0" / "1", store / "c" / "1" / "0"
    other.write_bytes(one.read_bytes())
    refused(
        store, r"expected a symmetric kernel, got .*c/1/0 that is not the mirror", tiles.open_gram, store, verify=True
    )


def test_every_changed_bit_of_a_tile_is_noticed(store):
    file = store / "c" / "1" / "1"
    gram = tiles.open_gram(store)
    for place in range(0, 76, 5):
        flip(file, place)
        refused(store, "expected intact tiles", gram.tensor)
        flip(file, place)
    gram.tensor()


def edit(store, change):
    file = store / "zarr.json"
    text = json.loads(file.read_text())
    change(text, text["attributes"]["ldyn_tiled_gram"])
    file.write_text(json.dumps(text))


METADATA = {
    "gone": lambda store: (store / "zarr.json").unlink(),
    "empty": lambda store: (store / "zarr.json").write_text(""),
    "half": lambda store: os.truncate(store / "zarr.json", 300),
    "not text": lambda store: (store / "zarr.json").write_bytes(b"\xff\xfe{"),
    "another kind": lambda store: edit(store, lambda text, own: own["manifest"].update(kind="sum")),
    "another hash": lambda store: edit(store, lambda text, own: own["manifest"].update(parameters="0" * 64)),
    "no kind": lambda store: edit(store, lambda text, own: own["manifest"].pop("kind")),
    "no digest": lambda store: edit(store, lambda text, own: own.pop("digest")),
    "finished, more or less": lambda store: edit(store, lambda text, own: own.update(finished="perhaps")),
    "nothing of ours": lambda store: edit(store, lambda text, own: text["attributes"].clear()),
    "a list": lambda store: edit(store, lambda text, own: text["attributes"].update(ldyn_tiled_gram=[1])),
    "another shape": lambda store: edit(store, lambda text, own: text.update(shape=[7, 8])),
    "another dtype": lambda store: edit(store, lambda text, own: text.update(data_type="int64", fill_value=0)),
    "other chunks": lambda store: edit(
        store, lambda text, own: text["chunk_grid"]["configuration"].update(chunk_shape=[3, 2])
    ),
    "no checksums": lambda store: edit(store, lambda text, own: text["codecs"].pop()),
    "an unknown codec": lambda store: edit(store, lambda text, own: text["codecs"].append({"name": "mystery"})),
    "other files": lambda store: edit(
        store, lambda text, own: text["chunk_key_encoding"]["configuration"].update(separator=".")
    ),
}


@pytest.mark.parametrize("damage", METADATA)
def test_damaged_metadata_are_refused(store, damage):
    METADATA[damage](store)
    for resumed in (False, True):
        call = (tiles.tiled_gram, MODEL, X) if resumed else (tiles.open_gram,)
        options = {"path": store, "tile": 3} if resumed else {"path": store}
        refused(store, r"expected a (whole )?store", *call, **options)


class Doubled(nn.Sequential):
    """Like its parent in all that can be read off, and yet another function."""

    def forward(self, x):
        """Double what comes out."""
        return 2 * super().forward(x)


def lookalike():
    """Return a model whose class bears the name of another."""
    namespace = {"__module__": nn.Sequential.__module__, "__qualname__": "Sequential"}
    disguised = type("Sequential", (Doubled,), namespace)
    return disguised(*MODEL)


def with_buffer(model):
    model = pickle.loads(pickle.dumps(model))
    model[0].register_buffer("extra", torch.ones(1, dtype=F64))
    return model


def changed(model, by):
    model = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model[2].bias[1] += by
    return model


OTHERS = {
    "parameters": ({"model": changed(MODEL, 1e-15)}, "parameters or buffers of the model$"),
    "a buffer": ({"model": with_buffer(MODEL)}, "parameters or buffers of the model$"),
    "architecture": ({"model": mlp((3, 4, 2), activation="relu")}, "architecture of the model, param"),
    "class": ({"model": Doubled(*MODEL)}, "architecture of the model$"),
    "function": ({"model": lookalike()}, r"with \S+ between examples 0 and 0, where the model now says"),
    "inputs": ({"x1": X + torch.eye(7, 3, dtype=F64) * 1e-15}, "inputs x1, inputs x2$"),
    "second inputs": ({"x2": X}, r"symmetry .* \(True in the store, False asked for\)$"),
    "fewer inputs": ({"x1": X[:6]}, r"shape \(\(7, 7\) in the store, \(6, 6\) asked for\)"),
    "kind": ({"kind": "sum"}, r"kind \('trace' in the store, 'sum' asked for\)$"),
    "tile": ({"tile": 4}, r"tile \(3 in the store, 4 asked for\)$"),
    "parameters that count": ({"params": "0.*"}, r"choice of parameters \(params\)$"),
    "method": ({"method": "jacobian"}, r"method \('auto' in the store, 'jacobian' asked for\)$"),
    "dtype": ({"model": mlp((3, 4, 2)).float(), "x1": X.float()}, r"dtype \('float64' in the store, 'float32' asked"),
}


@pytest.mark.parametrize("resumed", [True, False], ids=["unfinished", "finished"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_store_of_another_kernel_is_refused(store, other, resumed):
    changes, message = OTHERS[other]
    if resumed:
        unfinish(store)
        (store / "c" / "2" / "2").unlink()
    options = {"model": MODEL, "x1": X, "tile": 3, "path": store, **changes}
    refused(store, f"expected a store of this kernel, got .*{message}", tiles.tiled_gram, **options)


def test_the_same_choice_of_parameters_may_be_written_in_another_way(store):
    every = [name for name, _ in MODEL.named_parameters()]
    assert tiles.tiled_gram(MODEL, X, path=store, tile=3, params=every).shape == (7, 7)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    for call in (lambda path: tiles.tiled_gram(MODEL, X, path=path), tiles.open_gram):
        refused(tmp_path, "expected a folder, got the file .*/file", call, file)
        refused(tmp_path, "expected a store of tiled_gram, got .*, which has no zarr.json", call, tmp_path)
        for bad in (None, 3, ""):
            with pytest.raises(ValueError, match=r"^path: expected a path to a folder, got"):
                call(bad)
    assert file.read_text() == "precious"
    with pytest.raises(
        ValueError, match=r"^path: expected a store of tiled_gram, got .*/none, which has no zarr\.json"
    ):
        tiles.open_gram(tmp_path / "none")
    foreign = tmp_path / "foreign"
    zarr.create_array(store=str(foreign), data=np.eye(3))
    group = tmp_path / "group"
    zarr.create_group(store=str(group))
    for call in (lambda path: tiles.tiled_gram(MODEL, X, path=path), tiles.open_gram):
        refused(foreign, "expected a store of tiled_gram, got .*, an array that something else", call, foreign)
        refused(group, "expected a store of tiled_gram, got .* cannot be read", call, group)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 0}, "^tile: expected an integer >= 1, got 0"),
        ({"tile": 2.0}, "^tile: expected an integer"),
        ({"kind": "mean"}, r"^kind: expected one of \('trace', 'sum', 'first'\), got 'mean'"),
        ({"method": None}, "^method: expected one of .* got None"),
        ({"params": "none*"}, "^params: "),
        ({"client": 3}, r"^client: expected a distributed\.Client or None, got 3"),
        ({"x1": X.float()}, "^x1: expected the dtype of the model's parameters"),
        ({"x2": X[:0]}, "^x2: expected at least one element"),
        ({"model": nn.Sequential(mlp((3, 2)), nn.Dropout())}, r"^model: expected evaluation mode"),
        ({"model": mlp((3, 4, 2), dtype=torch.bfloat16), "x1": X.bfloat16()}, "^model: expected parameters in one of"),
    ],
)
def test_bad_arguments_are_refused_and_leave_no_folder(tmp_path, changes, message):
    options = {"model": MODEL, "x1": X, "path": tmp_path / "k", **changes}
    with pytest.raises(ValueError, match=message):
        tiles.tiled_gram(**options)
    assert not (tmp_path / "k").exists()


def test_an_asynchronous_client_is_refused(tmp_path):
    members = dict.fromkeys(("submit", "scatter", "gather", "nthreads"))
    later = types.SimpleNamespace(asynchronous=True, **members)
    with pytest.raises(ValueError, match=r"^client: expected .* that waits for results, got an asynchronous one"):
        tiles.tiled_gram(MODEL, X, path=tmp_path / "k", client=later)


def test_bad_parts_and_factors_are_refused_by_name(finished):
    gram = tiles.open_gram(finished)
    with pytest.raises(ValueError, match=r"^rows: expected a slice without a step, got slice\(None, None, 2\)"):
        gram.block(slice(None, None, 2), slice(None))
    with pytest.raises(ValueError, match=r"^columns: expected a slice without a step, got 3"):
        gram.block(slice(None), 3)
    with pytest.raises(ValueError, match=r"^v: expected shape \(7,\) or \(7, C\), got .*\(6, 3\)"):
        gram.matmul(X[:6])
    with pytest.raises(ValueError, match=r"^v: expected the dtype of the kernel \(torch\.float64\)"):
        gram.matmul(X.float())
    with pytest.raises(ValueError, match=r"^v: expected the device of the kernel \(cpu\), got meta"):
        gram.matmul(X.to("meta"))


@pytest.mark.parametrize("name", ["zarr", "dask"])
def test_without_the_extra_the_call_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{name} is missing: pip install "ldyn\[tiles\]"'):
        tiles.tiled_gram(MODEL, X, path=tmp_path / "k")
    assert not (tmp_path / "k").exists()


def test_importing_the_module_loads_none_of_the_extra():
    script = """
import sys, ldyn.kernels.tiles
sys.exit(str({"zarr", "dask", "distributed", "scipy", "numcodecs"} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "set()"
