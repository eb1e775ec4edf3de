"""A model at fixed parameters: its outputs example by example, and their plain Jacobians.

`Frozen` owns copies of parameters and buffers, so that a forward pass can hurt nothing of the caller's. `jacobian`
is the general route of the tangent kernel: it knows nothing of layers, and serves as oracle for everything that does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, jacrev, vmap

from ldyn import _checks
from ldyn._linearize import copied_parameters, logits_of

Batch = dict[str, object]
"""Checked and copied inputs: keyword arguments, or one positional argument under the key `POSITIONAL`."""

Patterns = str | Sequence[str] | None
"""Which parameters: all, or those whose name matches a pattern."""

Reduction = Callable[[Tensor], Tensor]
"""A linear map of outputs (N, V) to (N, C), whose kernel is wanted."""

POSITIONAL = ""


class Frozen:
    """A model at its current parameters.

    Attributes:
        parameters: copies by name, each a leaf that requires a gradient; tied parameters occur once.
        selected: names of the parameters that the kernel is taken over.
        first: the first parameter, for dtype and device.
    """

    def __init__(self, model: nn.Module, params: Patterns) -> None:
        """Check and copy.

        Args:
            model: Any module with parameters of one dtype on one device.
            params: Name patterns, or None for all parameters.

        Raises:
            ValueError: If the model is random or couples examples, its parameters are missing or mixed, or a
                pattern is none or matches nothing.
        """
        copies = copied_parameters(model)
        self._model = model
        self.first = next(iter(copies.values()))
        self.selected = _select(model, params)
        with torch.inference_mode(False):
            self.parameters = {name: value.requires_grad_() for name, value in copies.items()}

    def outputs(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the model once.

        Args:
            batch: N examples.
            parameters: Values to use instead of the copies, all of them.

        Returns:
            (N, V) with everything but the leading dimension of the model's output flattened row by row.

        Raises:
            ValueError: If the model returns no finite tensor with one row for each example.
        """
        buffers = {name: value.detach().clone() for name, value in self._model.named_buffers()}
        values = {**(self.parameters if parameters is None else parameters), **buffers}
        keywords = {name: value for name, value in batch.items() if name != POSITIONAL}
        arguments = (batch[POSITIONAL],) if POSITIONAL in batch else ()
        output = functional_call(self._model, values, arguments, keywords)
        found, count = logits_of(output), length(batch)
        if found.shape[0] != count:
            raise ValueError(
                f"model: expected an output whose leading dimension counts the {count} examples, "
                f"got {_checks.describe(found)}"
            )
        flat: Tensor = found.reshape(count, -1)
        return flat


def checked(x: object, name: str, first: Tensor) -> Batch:
    """Check the inputs against the parameters and copy them, so that an in-place first layer hurts nobody.

    Args:
        x: A tensor (N, ...), or a mapping of keyword arguments, of which every tensor is (N, ...).
        name: Its name, for the message.
        first: A parameter of the model.

    Returns:
        The copies.

    Raises:
        ValueError: If it is neither, is empty, the tensors disagree about N, or dtype or device do not fit.
    """
    given = dict(x) if isinstance(x, Mapping) else {POSITIONAL: x}
    if not any(isinstance(value, Tensor) for value in given.values()):
        raise ValueError(f"{name}: expected a tensor or a mapping with one, got {_checks.describe(x)}")
    batch: Batch = {}
    for key, value in given.items():
        if not isinstance(value, Tensor):
            batch[key] = value
            continue
        where = f"{name}[{key!r}]" if key else name
        _checks.require_nonempty(_checks.require_tensor(value, where, min_ndim=1), where)
        if value.device != first.device:
            raise ValueError(f"{where}: expected the model's device {first.device}, got {value.device}")
        if value.is_floating_point():
            _checks.require_finite(_checks.require_same(value, where, first, "the model's parameters"), where)
        with torch.inference_mode(False):
            batch[key] = value.detach().clone()
    counts = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor)}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{name}: expected as many examples in each tensor, got {counts}")
    return batch


def length(batch: Batch) -> int:
    """Count the examples of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def take(batch: Batch, index: slice | list[int]) -> Batch:
    """Return some examples of a batch."""
    return {key: value[index] if isinstance(value, Tensor) else value for key, value in batch.items()}


def jacobian(frozen: Frozen, batch: Batch, names: Sequence[str], reduction: Reduction) -> Tensor:
    """Differentiate every output of every example by some parameters, knowing nothing of the model.

    Args:
        frozen: The model.
        batch: N examples.
        names: Names of parameters with P elements together.
        reduction: Linear map of outputs (N, V) to (N, C).

    Returns:
        (C, N, P), parameters in the order of `names`, each read row by row.
    """
    chosen = {name: frozen.parameters[name] for name in names}
    # Whatever torch.func cannot transform (recurrent layers, control flow by data), plain differentiation can.
    with suppress(Exception), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        formed = _jacobian_by_vmap(frozen, batch, chosen, reduction)
        if _is_confirmed(formed, frozen, batch, chosen, reduction):
            return formed
    return _jacobian_by_loop(frozen, batch, chosen, reduction)


def pull(
    outputs: Tensor,
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    *,
    at_once: int,
    confirmed: bool = True,
) -> list[Tensor | None]:
    """Differentiate the outputs of all examples by intermediate values, one reverse sweep for many outputs.

    Args:
        outputs: (N, C).
        inputs: Tensors or gradient edges of shapes S.
        at_once: How many of the C outputs a sweep carries.
        confirmed: Whether a sweep that carries several outputs is compared with a plain one.

    Returns:
        For each input (C, *S), the derivative of Σ_i outputs[i, c], or None where the outputs do not depend on it.
    """
    count, width = outputs.shape
    eye = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    parts: list[Sequence[Tensor | None]] = []
    for start in range(0, width, at_once):
        rows = eye[start : start + at_once].unsqueeze(1).expand(-1, count, -1)
        parts.append(_rows_times_jacobian(outputs, inputs, rows, confirmed=confirmed))
    return [None if any(part is None for part in each) else _joined(each) for each in zip(*parts, strict=True)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    """Concatenate along the first dimension, without a copy where there is nothing to join."""
    found = [part for part in parts if part is not None]
    return found[0] if len(found) == 1 else torch.cat(found)


def _rows_times_jacobian(
    outputs: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], rows: Tensor, *, confirmed: bool
) -> list[Tensor | None]:
    """Pull the cotangents (c, N, C) back, batched where every backward formula allows it."""

    def grad(cotangent: Tensor, *, batched: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            outputs, inputs, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    if len(rows) > 1:
        weights = pattern(len(rows), rows)
        with suppress(RuntimeError), warnings.catch_warnings():  # a backward formula that torch.vmap cannot batch
            warnings.filterwarnings("ignore", message="There is a performance drop")
            formed = list(grad(rows, batched=True))
            if not confirmed:
                return formed
            expected = grad(torch.tensordot(weights, rows, dims=1), batched=False)
            if all(
                one is None or other is None or same_up_to_rounding(torch.tensordot(weights, one, dims=1), other)
                for one, other in zip(formed, expected, strict=True)
            ):
                return formed
    single = [grad(row, batched=False) for row in rows]
    return [
        None if each[0] is None else torch.stack([part for part in each if part is not None])
        for each in zip(*single, strict=True)
    ]


def _is_confirmed(
    formed: Tensor, frozen: Frozen, batch: Batch, chosen: dict[str, Tensor], reduction: Reduction
) -> bool:
    """Compare one weighted sum of gradients with a plain reverse pass."""
    # Not all batching rules of torch.vmap are right: nested as here, that of PReLU silently gives wrong numbers
    # when there are as many examples as outputs.
    width, count, _ = formed.shape
    weights = pattern(width * count, formed).view(width, count)
    outputs = reduction(frozen.outputs(batch))
    parts = torch.autograd.grad((outputs * weights.T).sum(), list(chosen.values()), allow_unused=True)
    expected = [
        torch.zeros_like(value) if part is None else part for part, value in zip(parts, chosen.values(), strict=True)
    ]
    sums = torch.tensordot(weights, formed, dims=2)
    return same_up_to_rounding(sums, torch.cat([part.flatten() for part in expected]))


def pattern(count: int, like: Tensor) -> Tensor:
    """Return numbers of a pattern that no reordering or repetition of rows leaves alone."""
    return torch.cos(torch.arange(1, count + 1, dtype=torch.float64)).to(like)


def same_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Compare up to rounding, which differs with the number of rows in a product of matrices.

    Args:
        one: A tensor.
        other: Another.

    Returns:
        Whether shapes agree, and entries to the square root of the machine epsilon times the largest entry.
    """
    if one.shape != other.shape:
        return False
    scale = other.abs().amax() if other.numel() else other.new_zeros(())
    return bool(((one - other).abs() <= scale * torch.finfo(other.dtype).eps ** 0.5).all())


def _jacobian_by_vmap(frozen: Frozen, batch: Batch, chosen: dict[str, Tensor], reduction: Reduction) -> Tensor:
    """Map the reverse-mode Jacobian of one example over the examples."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in batch.items() if key not in tensors}
    # detached, so that no second graph grows beneath the one that torch.func builds
    fixed = {name: value.detach() for name, value in frozen.parameters.items()}

    def single(parameters: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        one: Batch = {key: value.unsqueeze(0) for key, value in example.items()}
        return reduction(frozen.outputs({**rest, **one}, {**fixed, **parameters})).squeeze(0)

    parts = vmap(jacrev(single), in_dims=(None, 0))(chosen, tensors)
    return torch.cat([parts[name].detach().reshape(*parts[name].shape[:2], -1) for name in chosen], dim=-1).transpose(
        0, 1
    )


def _jacobian_by_loop(frozen: Frozen, batch: Batch, chosen: dict[str, Tensor], reduction: Reduction) -> Tensor:
    """Differentiate one example after the other."""
    rows = []
    for place in range(length(batch)):
        outputs = reduction(frozen.outputs(take(batch, [place])))
        parts = pull(outputs, list(chosen.values()), at_once=outputs.shape[1])
        rows.append(
            torch.cat(
                [
                    value.new_zeros(outputs.shape[1], value.numel()) if part is None else part.reshape(len(part), -1)
                    for part, value in zip(parts, chosen.values(), strict=True)
                ],
                dim=-1,
            )
        )
    return torch.stack(rows, dim=1)


def _select(model: nn.Module, params: Patterns) -> list[str]:
    """Name the parameters that match a pattern; a tied parameter matches by any of its names."""
    every = dict(model.named_parameters(remove_duplicate=False))
    own = {id(value): name for name, value in model.named_parameters()}
    if params is None:
        return list(own.values())
    patterns = [params] if isinstance(params, str) else list(params) if isinstance(params, Sequence) else [params]
    if not patterns:
        raise ValueError("params: expected at least one name pattern, got none")
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"params: expected name patterns, got {_checks.describe(pattern)}")
        names = {own[id(value)] for name, value in every.items() if fnmatchcase(name, pattern)}
        if not names:
            raise ValueError(f"params: expected a pattern that matches a parameter, got {pattern!r}")
        found |= names
    return [name for name in own.values() if name in found]
