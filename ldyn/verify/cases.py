"""Seeded test cases, and how the arrays inside a case are read and moved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import Invalid, Vacuous

Case = tuple[Any, ...]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cases:
    """A reproducible stream of random cases.

    Attributes:
        draw: Maps a NumPy generator to the arguments of both routes: tensors, arrays or numbers.
        count: How many cases.
        seed: Seed of the generator; the same seed gives the same cases.
    """

    draw: Callable[[np.random.Generator], Case]
    count: int = 200
    seed: int = 0

    def __iter__(self) -> Iterator[Case]:
        """Yield the cases, from a fresh generator each time."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.count):
            case = self.draw(rng)
            yield case if isinstance(case, tuple) else (case,)


def listed(cases: Iterable[Case]) -> list[Case]:
    """Return the cases as a list of tuples.

    Args:
        cases: A `Cases` or any iterable of argument tuples.

    Returns:
        A list with at least one case.

    Raises:
        Vacuous: If there is none.
    """
    result = [case if isinstance(case, tuple) else (case,) for case in cases]
    if not result:
        raise Vacuous("cases: expected at least one case, got none")
    return result


def as_array(value: Any, route: str) -> Array:
    """Read a number, an array or a tensor as float64, refusing what is not finite.

    Args:
        value: What a route returned.
        route: Its name, for the message.

    Returns:
        A float64 array.

    Raises:
        Invalid: If it holds NaN or infinity, is complex or is not numeric.
    """
    plain = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    if np.iscomplexobj(plain):
        raise Invalid(f"{route}: expected real numbers, got complex ones")
    try:
        array = np.asarray(plain, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise Invalid(f"{route}: expected numbers, got {type(value).__name__}") from error
    if not np.all(np.isfinite(array)):
        raise Invalid(f"{route}: expected finite numbers, got NaN or infinity")
    return array


def called(route: Callable[..., Any], name: str, case: Case, *lead: Any) -> Array:
    """Call a route on a case, and see that it leaves the case as it was for the other route and for controls.

    Args:
        route: The callable.
        name: What it is, for the messages.
        case: Its arguments.
        *lead: Arguments before those of the case.

    Returns:
        Its result as float64.

    Raises:
        Invalid: If it changes a floating-point argument, or its result is not finite and real.
    """
    before = flatten(case)[0]
    result = as_array(route(*lead, *case), name)
    if not np.array_equal(flatten(case)[0], before, equal_nan=True):
        raise Invalid(f"{name}: expected a route that leaves its arguments alone, got one that changes them")
    return result


def same_route(first: Any, second: Any) -> bool:
    """Tell whether two callables are one computation under two names.

    Args:
        first: A callable.
        second: Another.

    Returns:
        True for one object, equal bound methods, equal partials, and functions with the same code, constants,
        defaults and captured values.
    """
    if first is second or first == second:
        return True
    if isinstance(first, functools.partial) and isinstance(second, functools.partial):
        same_arguments = first.args == second.args and first.keywords == second.keywords
        return same_arguments and same_route(first.func, second.func)
    if isinstance(first, FunctionType) and isinstance(second, FunctionType):
        return _fingerprint(first) == _fingerprint(second)
    return False


def _fingerprint(function: FunctionType) -> tuple[Any, ...]:
    captured = tuple(_identity(cell.cell_contents) for cell in function.__closure__ or ())
    names = _code_fingerprint(function.__code__)[2]
    used = tuple(_identity(function.__globals__.get(name)) for name in names)
    defaults = repr((function.__defaults__, function.__kwdefaults__))
    return _code_fingerprint(function.__code__), captured, used, defaults


def _code_fingerprint(code: CodeType) -> tuple[Any, ...]:
    """Return what a code object does, and the global names that it or a function inside it uses."""
    inner = [_code_fingerprint(c) for c in code.co_consts if isinstance(c, CodeType)]
    constants = tuple(repr(c) for c in code.co_consts if not isinstance(c, CodeType))
    names = (*code.co_names, *(name for nested in inner for name in nested[2]))
    return code.co_code, constants, names, tuple(inner)


def _identity(value: Any) -> Any:
    """Return a number or a text itself, and of anything else which object it is."""
    return (type(value), value) if isinstance(value, (bool, int, float, str)) else id(value)


def require_two_routes(first: Any, second: Any) -> None:
    """Refuse a comparison of a computation with itself.

    Args:
        first: A callable.
        second: Another.

    Raises:
        Vacuous: If they are one computation.
        Invalid: If one is not callable.
    """
    for position, route in (("first", first), ("second", second)):
        if not callable(route):
            raise Invalid(f"{position} route: expected a callable, got {type(route).__name__}")
    if same_route(first, second):
        raise Vacuous("expected two independent routes, got the same callable on both sides")


def flatten(case: Case) -> tuple[Array, Callable[[Array], Case]]:
    """Read every floating-point entry of a case as one vector.

    Args:
        case: Arguments; integers and other objects stay fixed.

    Returns:
        The vector, and the map that puts another vector back into the same places.
    """
    arrays = [_floating(argument) for argument in case]
    vector = np.concatenate([a.ravel() for a in arrays if a is not None] or [np.zeros(0)])

    def rebuild(moved: Array) -> Case:
        result, start = [], 0
        for argument, array in zip(case, arrays, strict=True):
            if array is None:
                result.append(argument)
                continue
            piece = moved[start : start + array.size].reshape(array.shape).copy()
            start += array.size
            result.append(_like(argument, piece))
        return tuple(result)

    return vector, rebuild


def _floating(argument: Any) -> Array | None:
    if isinstance(argument, float):
        return np.asarray(argument)
    if hasattr(argument, "is_floating_point"):
        return np.asarray(argument.detach().cpu().numpy(), dtype=np.float64) if argument.is_floating_point() else None
    if isinstance(argument, np.ndarray) and np.issubdtype(argument.dtype, np.floating):
        return argument.astype(np.float64)
    return None


def _like(argument: Any, piece: Array) -> Any:
    if isinstance(argument, float):
        return float(piece)
    return argument.new_tensor(piece) if hasattr(argument, "new_tensor") else piece
