"""Executed cells are kept in a cache that belongs to one state of the library.

The notebook cache knows a chapter's cells but not the code they call, so an edit of the library would leave
stale results in print. Here the cache's folder is named after a hash of all that a cell's result rests on
besides the cell: the library, the pinned packages, the interpreter. Another state of the library means
another, empty folder, and every chapter is read and executed again; an edit of prose keeps the folder and
executes nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from myst_nb.core.execute.cache import NotebookClientCache
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.config import Config

KEPT = 3
"""How many states of the library keep their cache, the current one included."""


def library_hash(root: Path) -> str:
    """Hash the library's files, the lock file and the interpreter's version."""
    digest = hashlib.sha256(sys.version.split()[0].encode())
    library = (path for path in (root / "ldyn").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in [*sorted(root.glob("requirements*.lock")), *sorted(library)]:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def name_cache(app: Sphinx, config: Config) -> None:
    """Point the notebook cache to the folder of this state of the library."""
    state = library_hash(Path(app.srcdir))
    caches = Path(app.outdir).parent / "cells"
    current = caches / state
    current.mkdir(parents=True, exist_ok=True)
    current.touch()
    by_age = sorted((path for path in caches.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    config["nb_execution_cache_path"] = str(current)
    config["library_hash"] = state


def fill_from_cache(start: Callable[[NotebookClientCache], None]) -> Callable[[NotebookClientCache], None]:
    """Have a notebook that is found in the cache keep its identity, so that its outputs are written out too.

    MyST-NB renders the cached copy but writes the notebook it was given, which would then be empty. Printed text is
    joined here as well: MyST-NB's own `nb_merge_streams` joins it on the page and repeats it in the notebook.
    """

    def start_client(client: NotebookClientCache) -> None:
        given = client.notebook
        start(client)
        if client.notebook is not given:
            given.update(client.notebook)
            client._notebook = given
        for cell in given.cells:
            if cell.cell_type == "code":
                cell.outputs = joined_streams(cell.outputs)

    return start_client


def joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join the pieces in which a cell's printed text arrived; how many there are is a matter of chance."""
    joined: list[NotebookNode] = []
    streams: dict[str, NotebookNode] = {}
    for output in outputs:
        if output.output_type == "stream" and output.name in streams:
            streams[output.name].text += output.text
        else:
            joined.append(output)
            if output.output_type == "stream":
                streams[output.name] = output
    return joined


def setup(app: Sphinx) -> dict[str, Any]:
    # A changed value of an "env" setting has Sphinx read every page again.
    app.add_config_value("library_hash", "", "env", types=(str,))
    app.connect("config-inited", name_cache)
    NotebookClientCache.start_client = fill_from_cache(NotebookClientCache.start_client)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
