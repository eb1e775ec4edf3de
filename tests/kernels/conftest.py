"""What tests of this room are given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldyn.kernels import tiles
from tests.kernels.tile_stores import MODEL, X


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a kernel in tiles once."""
    return tiles.tiled_gram(MODEL, X, path=tmp_path_factory.mktemp("store") / "k", tile=3).path


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of it to hurt."""
    return shutil.copytree(finished, tmp_path / "k")
