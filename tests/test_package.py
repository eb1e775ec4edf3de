"""The package as a whole: what importing it loads, what it offers, and that its functions are documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ldyn

HEAVY = ("matplotlib", "scipy", "sklearn", "sphinx", "sympy", "transformers")
PRIVATE_PARTS = ("ldyn.verify.sphinx_gate",)


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for info in pkgutil.walk_packages(ldyn.__path__, "ldyn."):
        if info.name.rpartition(".")[2].startswith("_") or info.name in PRIVATE_PARTS:
            continue
        module = importlib.import_module(info.name)
        for name, member in inspect.getmembers(module, inspect.isfunction):
            if member.__module__ == info.name and not name.startswith("_"):
                yield f"{info.name}.{name}", member


FUNCTIONS = dict(public_functions())


@pytest.mark.parametrize("statement", ["import ldyn", "import ldyn.foundations", "import ldyn; ldyn.foundations"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in HEAVY if name in loaded] == []


def test_parts_are_imported_when_they_are_named() -> None:
    code = "import ldyn, sys; assert 'ldyn.foundations' not in sys.modules; ldyn.foundations"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_are_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(ldyn, "non" + "sense")
    assert {"foundations", "plots", "verify", "__version__"} <= set(dir(ldyn))


def test_the_version_is_the_project_s() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{ldyn.__version__}"\n' in project


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_say_what_they_take_and_give(name: str) -> None:
    function = FUNCTIONS[name]
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    assert text.splitlines()[0].endswith(".")
    if signature.parameters:
        assert "Args:" in text
    for parameter in signature.parameters:
        assert f"{parameter}:" in text or f"{parameter} (" in text
    if signature.return_annotation not in (None, "None", inspect.Signature.empty):
        assert "Returns:" in text or "Yields:" in text
