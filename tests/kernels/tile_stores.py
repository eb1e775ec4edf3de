"""A small kernel in tiles, for the tests that hurt its store."""

from __future__ import annotations

from pathlib import Path

import torch

from ldyn.models import mlp

MODEL = mlp((3, 4, 2))
X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Read all files of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfinish(store: Path) -> None:
    """Have the metadata say that tiles may be missing."""
    file = store / "zarr.json"
    file.write_text(file.read_text().replace('"finished": true', '"finished": false'))
