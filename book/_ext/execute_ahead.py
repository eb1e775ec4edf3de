"""Chapters that are not in the cache are executed before the pages are read, two at a time.

MyST-NB executes a chapter when it reads its page, one after the other, and a chapter uses one thread. Here those that
have to be executed are found first and share the processors; what they print goes into the cache that MyST-NB reads.
A chapter that fails is left to MyST-NB, which executes it again and reports the error on its page.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution
from myst_nb.core.read import create_nb_reader
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

# A chapter with a language model needs a few gigabytes, so more than two at once would ask much of a laptop.
AT_ONCE = min(2, os.cpu_count() or 1)

logger = logging.getLogger(__name__)


def execute_ahead(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Execute what the pages about to be read will ask for."""
    settings = env.mystnb_config
    if settings.execution_mode != "cache":
        return
    cache = get_cache(settings.execution_cache_path)
    waiting = {name: notebook for name in docnames if (notebook := _missing(env, name, cache)) is not None}
    first = [name for name in app.config.execute_first if name in waiting]
    order = [*first, *(name for name in waiting if name not in first)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: dict[Future[ExecutionResult], str] = {
            pool.submit(_executed, waiting[name], Path(env.doc2path(name)), settings): name for name in order
        }
        # The cache is a small data base, written by this thread alone.
        for number, future in enumerate(as_completed(running), 1):
            name, result = running[future], future.result()
            outcome = "failed after" if result.err else "in"
            logger.info("executed %s %s %.0f s (%d of %d)", name, outcome, result.time, number, len(running))
            if result.err is None:
                bundle = CacheBundleIn(result.nb, env.doc2path(name), data={"execution_seconds": result.time})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def _missing(env: BuildEnvironment, name: str, cache: JupyterCacheAbstract) -> NotebookNode | None:
    """Read a page as a notebook if it has cells that the cache does not know."""
    path = env.doc2path(name)
    text = Path(path).read_text(encoding="utf-8")
    reader = create_nb_reader(path, env.myst_config, env.mystnb_config, text)
    notebook = reader.read(text) if reader is not None else None
    if notebook is None or not any(cell.cell_type == "code" for cell in notebook.cells):
        return None
    try:
        cache.match_cache_notebook(notebook)
    except KeyError:
        return notebook
    return None


def _executed(notebook: NotebookNode, path: Path, settings: Any) -> ExecutionResult:
    """Execute a notebook in its own folder, as MyST-NB would."""
    return single_nb_execution(
        notebook, cwd=str(path.parent), timeout=settings.execution_timeout, allow_errors=settings.execution_allow_errors
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    # The longest chapters, which are to start first; an order and nothing else, so no page is read again for it.
    app.add_config_value("execute_first", [], "", types=(list,))
    app.connect("env-before-read-docs", execute_ahead)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
