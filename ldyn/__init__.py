"""Learning dynamics of neural networks: the functions that the book derives and checks.

Importing the package loads nothing else. Each part is imported when it is first named:

    foundations   derivatives, softmax and Kullback–Leibler divergence
    data, models  what several chapters compute on
    plots         the one figure style of the book (needs matplotlib)
    verify        derivations and claims checked by machine (needs SymPy)
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"

_PARTS = ("data", "dynamics", "foundations", "hessians", "kernels", "models", "plots", "verify")


def __getattr__(name: str) -> ModuleType:
    """Import a part of the library when it is first named.

    Args:
        name: The attribute asked of the package.

    Returns:
        The part of that name.

    Raises:
        AttributeError: If the library has no part of that name.
    """
    if name in _PARTS and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, parts that are not yet imported included.

    Returns:
        The names in alphabetical order.
    """
    parts = (part for part in _PARTS if find_spec(f"{__name__}.{part}") is not None)
    return sorted({"__version__", *parts})
