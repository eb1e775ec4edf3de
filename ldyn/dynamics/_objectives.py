"""What the objectives share: checks of log-probabilities, references and hyperparameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldyn import _checks


def set_field(target: object, name: str, value: float | None) -> None:
    """Store the checked value of a field of a frozen dataclass, from within its ``__post_init__``.

    Args:
        target: The dataclass.
        name: The field.
        value: What a check returned.
    """
    object.__setattr__(target, name, value)


def require_share(value: object, name: str, *, below: float) -> float:
    """Require a number from 0, inclusive, to a limit, exclusive.

    Args:
        value: The argument.
        name: Its name, for the message.
        below: The limit.

    Returns:
        The number as a float.

    Raises:
        ValueError: If it is no finite number in this range.
    """
    number = _checks.require_number(value, name)
    if not 0 <= number < below:
        raise ValueError(f"{name}: expected a number >= 0 and < {below:g}, got {number!r}")
    return number


def require_log_probs(value: object, name: str, *, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """Require logarithms of probabilities: finite, and not above 0 by more than rounding.

    Args:
        value: The argument.
        name: Its name, for the message.
        like: A tensor whose shape, dtype and device it must have, or None.
        like_name: The name of that tensor.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is no such tensor.
    """
    tensor = _checks.require_real(value, name)
    if like is not None:
        require_fit(tensor, name, like, like_name)
    slack = math.sqrt(torch.finfo(tensor.dtype).eps)
    if _checks.known_truth((tensor.detach() <= slack).all()) is False:
        largest = float(tensor.detach().max())
        raise ValueError(f"{name}: expected log-probabilities, which are <= 0, got the entry {largest:.6g}")
    return tensor


def require_fit(value: Tensor, name: str, like: Tensor, like_name: str) -> Tensor:
    """Require the shape, dtype and device of another tensor.

    Args:
        value: The tensor.
        name: Its name, for the message.
        like: The tensor to agree with.
        like_name: Its name, for the message.

    Returns:
        The tensor.

    Raises:
        ValueError: If shape, dtype or device differ.
    """
    if value.shape != like.shape:
        expected, got = tuple(like.shape), tuple(value.shape)
        raise ValueError(f"{name}: expected the shape of {like_name} {expected}, got {got}")
    return _checks.require_same(value, name, like, like_name)


def require_reference(value: object, name: str, *, like: Tensor, like_name: str, why: str) -> Tensor:
    """Require log-probabilities under the reference model; they are constants, so no gradient flows into them.

    Args:
        value: The argument, possibly None.
        name: Its name, for the message.
        like: The trained model's log-probabilities.
        like_name: Their name, for the message.
        why: What the objective needs them for, for the message.

    Returns:
        The tensor, detached.

    Raises:
        ValueError: If it is missing, or does not fit.
    """
    if value is None:
        raise ValueError(f"{name}: expected log-probabilities under the reference model, because {why}, got None")
    return require_log_probs(value, name, like=like, like_name=like_name).detach()


def require_lengths(value: object, name: str, *, like: Tensor, like_name: str, why: str) -> Tensor:
    """Require numbers of tokens, one for each log-probability or one for all.

    Args:
        value: A Python integer, or an integer tensor of the shape and on the device of `like`, possibly None.
        name: Its name, for the message.
        like: The log-probabilities.
        like_name: Their name, for the message.
        why: What the objective needs them for, for the message.

    Returns:
        The lengths in the dtype of `like`.

    Raises:
        ValueError: If they are missing, no integers, do not fit, or are not positive.
    """
    if value is None:
        raise ValueError(f"{name}: expected numbers of tokens, because {why}, got None")
    if not isinstance(value, Tensor):
        return torch.full_like(like.detach(), _checks.require_integer(value, name))
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {_checks.describe(value)}")
    if value.shape != like.shape or value.device != like.device:
        expected = f"the shape and device of {like_name} ({tuple(like.shape)}, {like.device})"
        raise ValueError(f"{name}: expected {expected}, got {_checks.describe(value)} on {value.device}")
    if _checks.known_truth((value >= 1).all()) is False:
        raise ValueError(f"{name}: expected at least one token in each response, got {int(value.min())}")
    return value.to(like.dtype)


def one_hot(logits: object, labels: object) -> Tensor:
    """Require logits and a label for each row of them, and return e_y.

    Args:
        logits: (..., V).
        labels: (...) int labels y.

    Returns:
        (..., V) in the dtype of the logits.

    Raises:
        ValueError: If the logits are not finite, or the labels no integers from 0 to V − 1 of the same shape.
    """
    z = _checks.require_real(logits, "logits", min_ndim=1)
    y = _checks.require_tensor(labels, "labels")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels: expected integers, got {_checks.describe(y)}")
    _checks.require_shape(y, "labels", z.shape[:-1])
    if y.device != z.device:
        raise ValueError(f"labels: expected the device of logits ({z.device}), got {y.device}")
    if _checks.known_truth(((y >= 0) & (y < z.shape[-1])).all()) is False:
        raise ValueError(f"labels: expected 0 to {z.shape[-1] - 1}, got {int(y.min())} to {int(y.max())}")
    return torch.zeros_like(z.detach()).scatter(-1, y.long().unsqueeze(-1), 1.0)
