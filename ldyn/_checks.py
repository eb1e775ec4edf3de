"""Validation shared by every module of the library.

Each helper raises a ``ValueError`` that names the argument, says what was expected and what came, and
otherwise returns the value, narrowed. Checks of a tensor's *values* need the values: where there are none to
look at (inside ``torch.func.vmap``, under ``torch.compile``, on the meta device) they are passed over, so
that the mathematics stays transformable; checks of type, shape, dtype and device are always made.
"""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def describe(value: object) -> str:
    """Says in a few words what a value is, for the end of an error message.

    Args:
        value: Anything.

    Returns:
        For a tensor its dtype and shape, for a number the number, for anything else its type.
    """
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (bool, numbers.Number, str)) or value is None:
        return repr(value)
    return f"an object of type {type(value).__name__}"


def known_truth(condition: Tensor) -> bool | None:
    """Read a boolean scalar tensor where its value can be read.

    Args:
        condition: Boolean tensor with one element.

    Returns:
        Its value, or None inside ``torch.func.vmap``, under ``torch.compile`` or on the meta device, where
        there is no value to read.

    Raises:
        RuntimeError: If reading fails for any other reason, for instance an earlier error on the device.
    """
    if condition.is_meta or torch.compiler.is_compiling():
        return None
    try:
        return bool(condition)
    except RuntimeError as error:
        # vmap and fake tensors refuse to turn data into control flow; every other failure is a real one.
        if "vmap" in str(error) or "DataDependent" in type(error).__name__:
            return None
        raise


def require_tensor(value: object, name: str, *, ndim: int | None = None, min_ndim: int = 0) -> Tensor:
    """Require a tensor, if asked with a given number of dimensions.

    Args:
        value: The argument.
        name: Its name, for the message.
        ndim: The exact number of dimensions, or None.
        min_ndim: The least number of dimensions.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is no tensor, or has another number of dimensions.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {describe(value)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected a tensor with {ndim} dimension(s), got {describe(value)}")
    if value.ndim < min_ndim:
        raise ValueError(f"{name}: expected a tensor with at least {min_ndim} dimension(s), got {describe(value)}")
    return value


def require_floating(value: Tensor, name: str) -> Tensor:
    """Require a real floating-point dtype.

    Args:
        value: The tensor.
        name: Its name, for the message.

    Returns:
        The tensor.

    Raises:
        ValueError: If the dtype is integer, boolean or complex.
    """
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a real floating-point dtype, got {describe(value)}")
    return value


def require_nonempty(value: Tensor, name: str) -> Tensor:
    """Require at least one element.

    Args:
        value: The tensor.
        name: Its name, for the message.

    Returns:
        The tensor.

    Raises:
        ValueError: If the tensor has no element.
    """
    if value.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got {describe(value)}")
    return value


def require_finite(value: Tensor, name: str) -> Tensor:
    """Require that every element is finite.

    Args:
        value: The tensor.
        name: Its name, for the message.

    Returns:
        The tensor.

    Raises:
        ValueError: If an element is NaN or infinite.
    """
    # one pass without a copy of the tensor's size: a sum is finite only if every term is
    if known_truth(torch.isfinite(value.detach().sum())):
        return value
    finite = torch.isfinite(value.detach())
    if known_truth(finite.all()) is False:
        count = int((~finite).sum())
        raise ValueError(f"{name}: expected finite values, got {describe(value)} with {count} NaN or infinite value(s)")
    return value


def require_shape(value: Tensor, name: str, shape: Sequence[int | str | None]) -> Tensor:
    """Require a shape, in which some sizes may be left open.

    Args:
        value: The tensor.
        name: Its name, for the message.
        shape: Sizes from first to last; an integer is required as it is, None or a letter such as ``"V"``
            stands for any size, and a letter that occurs twice for the same size twice. A leading ``"..."``
            stands for any number of batch dimensions.

    Returns:
        The tensor.

    Raises:
        ValueError: If the shape differs.
    """
    wanted, sizes = list(shape), list(value.shape)
    if wanted and wanted[0] == "...":
        wanted = wanted[1:]
        fits = len(sizes) >= len(wanted)
        sizes = sizes[len(sizes) - len(wanted) :] if fits else sizes
    else:
        fits = len(sizes) == len(wanted)
    seen: dict[str, int] = {}
    if fits:
        for want, size in zip(wanted, sizes, strict=True):
            if isinstance(want, str):
                want = seen.setdefault(want, size)
            fits = fits and (want is None or want == size)
    if not fits:
        text = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape ({text}), got {describe(value)}")
    return value


def require_same(value: Tensor, name: str, other: Tensor, other_name: str) -> Tensor:
    """Require the dtype and the device of another tensor.

    Args:
        value: The tensor.
        name: Its name, for the message.
        other: The tensor to agree with.
        other_name: Its name, for the message.

    Returns:
        The tensor.

    Raises:
        ValueError: If dtype or device differ.
    """
    if value.dtype != other.dtype:
        raise ValueError(f"{name}: expected the dtype of {other_name} ({other.dtype}), got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {value.device}")
    return value


def require_real(value: object, name: str, *, ndim: int | None = None, min_ndim: int = 0) -> Tensor:
    """Require a non-empty tensor of finite floating-point numbers.

    Args:
        value: The argument.
        name: Its name, for the message.
        ndim: The exact number of dimensions, or None.
        min_ndim: The least number of dimensions.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is no tensor, has another number of dimensions, is not floating, is empty or has
            NaN or infinite values.
    """
    tensor = require_tensor(value, name, ndim=ndim, min_ndim=min_ndim)
    return require_finite(require_nonempty(require_floating(tensor, name), name), name)


def require_probabilities(value: object, name: str, *, atol: float | None = None) -> Tensor:
    """Require probability vectors along the last dimension.

    Args:
        value: The argument, (..., V).
        name: Its name, for the message.
        atol: How far a sum may be from 1; by default the square root of the dtype's machine epsilon.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is no floating tensor with a last dimension, has negative or non-finite entries, or
            does not sum to 1.
    """
    tensor = require_real(value, name, min_ndim=1)
    frozen = tensor.detach()
    tolerance = math.sqrt(torch.finfo(tensor.dtype).eps) if atol is None else atol
    if known_truth((frozen >= 0).all()) is False:
        raise ValueError(f"{name}: expected probabilities, got the negative entry {float(frozen.min()):.6g}")
    off = (frozen.sum(-1) - 1).abs().amax()
    if known_truth(off <= tolerance) is False:
        raise ValueError(f"{name}: expected probabilities that sum to 1, got a sum that is off by {float(off):.6g}")
    return tensor


def require_number(value: object, name: str) -> float:
    """Require a finite real number: a Python or NumPy number, or a tensor with one element and no dimension.

    Args:
        value: The argument.
        name: Its name, for the message.

    Returns:
        The number as a float.

    Raises:
        ValueError: If it is something else, a boolean, NaN or infinite.
    """
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite real number, got {describe(value)}")
    return float(value)


def require_positive(value: object, name: str) -> float:
    """Require a finite number greater than zero.

    Args:
        value: The argument.
        name: Its name, for the message.

    Returns:
        The number as a float.

    Raises:
        ValueError: If it is no finite number, zero or negative.
    """
    number = require_number(value, name)
    if number <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {number!r}")
    return number


def require_nonnegative(value: object, name: str) -> float:
    """Require a finite number that is not negative.

    Args:
        value: The argument.
        name: Its name, for the message.

    Returns:
        The number as a float.

    Raises:
        ValueError: If it is no finite number, or negative.
    """
    number = require_number(value, name)
    if number < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {number!r}")
    return number


def require_integer(value: object, name: str, *, minimum: int = 1) -> int:
    """Require an integer that is not too small.

    Args:
        value: The argument.
        name: Its name, for the message.
        minimum: The least value allowed.

    Returns:
        The integer.

    Raises:
        ValueError: If it is no integer, a boolean, or smaller than the minimum.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {describe(value)}")
    return int(value)


def require_eval_mode(model: object, name: str) -> nn.Module:
    """Require a model whose output for one example depends on neither chance nor the other examples.

    A module in training mode is accepted as long as nothing in it behaves differently there. Dropout that a
    ``forward`` calls as a function cannot be seen from outside and is not detected.

    Args:
        model: The argument.
        name: Its name, for the message.

    Returns:
        The module.

    Raises:
        ValueError: If it is no module, or contains active dropout, or batch normalisation that uses the
            statistics of the batch.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: expected a torch.nn.Module, got {describe(model)}")
    for path, module in model.named_modules():
        where = f"the {type(module).__name__} at {path!r}" if path else f"a {type(module).__name__}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"{name}: expected per-example outputs, got {where} without running statistics")
        if module.training and _depends_on_training(module):
            raise ValueError(f"{name}: expected evaluation mode (call .eval()), got {where} in training mode")
    return model


def _depends_on_training(module: nn.Module) -> bool:
    """Says whether a module itself (not its children) computes something else in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.RReLU)
