"""What the derivative of each known PyTorch function by its parameters looks like.

A rule reads the arguments of one call. If a watched parameter stands where the rule expects one, it makes the call on
the parameter's shadow and records how output gradients become contributions (`Direct` or `Outer`). In every other
case it answers NotImplemented, the call is made unchanged, and automatic differentiation sees the parameter itself.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ldyn.kernels._gram import Direct, Factor, Outer
from ldyn.kernels._trace import Layout, Recorder, Rule

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def _read(names: str, args: Arguments, kwargs: Keywords, **defaults: Any) -> dict[str, Any] | None:
    """Name the arguments of a call, or return None if they do not fit."""
    order = names.split()
    given = dict(zip(order, args, strict=False)) | kwargs
    return {**defaults, **given} if len(args) <= len(order) and given.keys() <= set(order) else None


class _Unchanged:
    """A tensor kept for later, with the promise that nobody has written to it since."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def __call__(self) -> Tensor:
        if self._tensor._version != self._version:
            raise ValueError(
                "model: expected tensors that a layer has read to stay as they are until its derivative is taken, "
                "got one modified in place"
            )
        return self._tensor


def _swap(recorder: Recorder, value: Any) -> tuple[str | None, Any]:
    """Return the name of a watched parameter and its shadow, or None and the value as it is."""
    name = recorder.name(value)
    return name, value if name is None else recorder.shadow(name)


def _matrix(recorder: Recorder, value: Any, *, flipped: bool) -> tuple[str | None, Any, bool]:
    """Return name, shadow and orientation of a watched matrix or of its transpose."""
    turned = recorder.turned(value)
    if turned is not None:
        return turned, recorder.shadow(turned).mT, not flipped
    name, shadow = _swap(recorder, value)
    return name, shadow, flipped


def _affine(
    recorder: Recorder, call: Callable[[Any, Any], Tensor], x: Tensor, weight: Any, bias: Any, *, flipped: bool
) -> Any:
    """Record y = x Wᵀ + b (or x W + b if flipped), W a matrix, over any number of leading dimensions."""
    name, shadow, turned = _matrix(recorder, weight, flipped=flipped)
    bias_name, bias_shadow = _swap(recorder, bias)
    if (name is None and bias_name is None) or not isinstance(weight, Tensor) or weight.ndim != 2 or x.ndim < 2:
        return NotImplemented
    if bias_name is not None and bias.ndim != 1:
        return NotImplemented
    output, inputs = call(shadow, bias_shadow), _Unchanged(x)

    def terms(grads: Tensor, layout: Layout) -> dict[str, Factor]:
        split = layout.split(grads, 1)
        split = split.reshape(*split.shape[:2], -1, 1, split.shape[-1])
        found: dict[str, Factor] = {}
        if name is not None:
            rows = layout.split(inputs())
            rows = rows.reshape(rows.shape[0], -1, 1, rows.shape[-1])
            found[name] = Outer(rows, split, flipped=turned)
        if bias_name is not None:
            found[bias_name] = Direct(_over_positions(split.squeeze(3)))
        return found

    return recorder.record("affine", (name, bias_name), output, output.ndim - 1, terms)


def _over_positions(grads: Tensor) -> Tensor:
    """Sum (C, N, T, O) over positions, if there is more than one."""
    return grads.squeeze(2) if grads.shape[2] == 1 else grads.sum(2)


def _linear(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Record functional.linear."""
    read = _read("input weight bias", args, kwargs, bias=None)
    if read is None:
        return NotImplemented
    x = read["input"]
    return _affine(recorder, lambda w, b: func(x, w, b), x, read["weight"], read["bias"], flipped=False)


def _matmul(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Record a product with a matrix on the right."""
    if len(args) != 2 or kwargs or not isinstance(args[0], Tensor):
        return NotImplemented
    return _affine(recorder, lambda w, _: func(args[0], w), args[0], args[1], None, flipped=True)


def _addmm(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Record torch.addmm(b, x, W)."""
    if len(args) != 3 or kwargs:
        return NotImplemented
    return _affine(recorder, lambda w, b: func(b, args[1], w), args[1], args[2], args[0], flipped=True)


def _transpose(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Remember which tensor is the transpose of a watched matrix."""
    name = recorder.name(args[0]) if args else None
    if name is None or args[0].ndim != 2 or kwargs:
        return NotImplemented
    if len(args) > 1 and sorted(place % 2 for place in args[1:] if isinstance(place, int)) != [0, 1]:
        return NotImplemented
    result = func(*args)
    recorder.turn(name, result)
    return result


def _convolution(dimensions: int) -> Rule:
    """Make the rule of a convolution over some spatial dimensions."""

    def rule(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        order = "input weight bias stride padding dilation groups"
        read = _read(order, args, kwargs, bias=None, stride=1, padding=0, dilation=1, groups=1)
        if read is None or read["input"].ndim != dimensions + 2:
            return NotImplemented
        (name, weight), (bias_name, bias) = _swap(recorder, read["weight"]), _swap(recorder, read["bias"])
        if name is None and bias_name is None:
            return NotImplemented
        geometry = [read[key] for key in ("stride", "padding", "dilation", "groups")]
        output, inputs = func(read["input"], weight, bias, *geometry), _Unchanged(read["input"])
        kernel = tuple(weight.shape[2:])

        def terms(grads: Tensor, layout: Layout) -> dict[str, Factor]:
            split = layout.split(grads.flatten(3).transpose(2, 3), 1)
            groups = geometry[3]
            split = split.reshape(*split.shape[:2], -1, groups, grads.shape[2] // groups)
            found: dict[str, Factor] = {}
            if name is not None:
                rows = layout.split(_patches(inputs(), kernel, *geometry[:3]))
                found[name] = Outer(rows.reshape(rows.shape[0], split.shape[2], groups, -1), split)
            if bias_name is not None:
                found[bias_name] = Direct(_over_positions(split.flatten(3)))
            return found

        return recorder.record("convolution", (name, bias_name), output, 1, terms)

    return rule


def _patches(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Cut (B, C, *space) into what each output position sees: (B, T, C·K)."""
    count = len(kernel)
    strides, dilations = _each(stride, count), _each(dilation, count)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilations, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(size, size) for size in _each(0 if padding == "valid" else padding, count)]
    x = functional.pad(x, [size for pair in reversed(pads) for size in pair])
    for place, (size, step, spread) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + place, spread * (size - 1) + 1, step)[..., ::spread]
    # now (B, C, *out, *kernel)
    x = x.movedim(1, 1 + count).flatten(1, count) if count > 1 else x.movedim(1, 2)
    return x.flatten(2)


def _each(value: Any, count: int) -> list[int]:
    """Spell out one number for each dimension."""
    numbers = [int(value)] if isinstance(value, int) else [int(each) for each in value]
    return numbers * count if len(numbers) == 1 else numbers


def _embedding(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Record functional.embedding: each position selects a row."""
    order = "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    read = _read(order, args, kwargs, padding_idx=None, max_norm=None, scale_grad_by_freq=False)
    name = recorder.name(read["weight"]) if read else None
    if read is None or name is None or read["max_norm"] is not None or read["scale_grad_by_freq"]:
        return NotImplemented
    tokens, weight, skipped = _Unchanged(read["input"]), recorder.shadow(name), read["padding_idx"]
    output = func(read["input"], weight, skipped)
    if skipped is not None and skipped < 0:
        skipped += len(weight)

    def terms(grads: Tensor, layout: Layout) -> dict[str, Factor]:
        numbers = layout.split(tokens())
        numbers = numbers.reshape(len(numbers), -1)
        split = layout.split(grads, 1)
        split = split.reshape(*split.shape[:2], -1, 1, split.shape[-1])
        if skipped is not None:
            split = split * (numbers != skipped)[..., None, None]
        return {name: Outer(numbers, split, flipped=True)}

    return recorder.record("embedding", (name,), output, output.ndim - 1, terms)


def _scaled(
    recorder: Recorder,
    names: tuple[str | None, str | None],
    output: Tensor,
    normed: Callable[[], Tensor],
    trailing: int,
) -> Tensor:
    """Record y = w ∘ x̂ + b with parameters over the trailing dimensions, or over the channels if `trailing` is 0."""
    channels = trailing == 0
    leading = 1 if channels else output.ndim - trailing

    size = math.prod(output.shape[1:2] if channels else output.shape[leading:])

    def reduce(product: Tensor, layout: Layout) -> Direct:
        if channels and product.ndim > 3:
            product = product.flatten(3).sum(3)
        split = layout.split(product, 1)
        return Direct(_over_positions(split.reshape(*split.shape[:2], -1, size)))

    def terms(grads: Tensor, layout: Layout) -> dict[str, Factor]:
        weight, bias = names
        found: dict[str, Factor] = {}
        if weight is not None:
            found[weight] = reduce(grads * normed(), layout)
        if bias is not None:
            found[bias] = reduce(grads, layout)
        return found

    return recorder.record("scale", names, output, leading, terms)


def _normalisation(order: str, trailing: Callable[[Keywords], int]) -> Rule:
    """Make the rule of a function that normalises without parameters, then scales and shifts."""

    def rule(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        read = _read(order, args, kwargs)
        if read is None or read.get("training"):
            return NotImplemented
        swapped = {key: _swap(recorder, read.get(key)) for key in ("weight", "bias")}
        names = swapped["weight"][0], swapped["bias"][0]
        if names == (None, None) or read["input"].ndim < 2:
            return NotImplemented
        inputs = _Unchanged(read["input"])
        shadows = {key: shadow for key, (_, shadow) in swapped.items() if key in read}
        output = func(**(read | shadows))
        plain = {key: value for key, value in read.items() if key not in ("weight", "bias", "input")}
        return _scaled(recorder, names, output, lambda: func(inputs(), **plain), trailing(read))

    return rule


def _elementwise(sign: float | None, *, in_place: bool = False) -> Rule:
    """Make the rule of x + w (sign 1), x − w (sign −1), or x ∘ w (None), where w is broadcast to x."""

    def rule(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        if len(args) != 2 or kwargs or not all(isinstance(each, Tensor) for each in args):
            return NotImplemented
        watched = [place for place in (0, 1) if recorder.name(args[place]) is not None]
        if len(watched) != 1 or (in_place and (watched == [0] or args[0]._is_view())):
            return NotImplemented
        (place,) = watched
        other, (name, shadow) = args[1 - place], _swap(recorder, args[place])
        shape = _broadcast(shadow, other)
        own = (1,) * (len(shape) - shadow.ndim) + tuple(shadow.shape)
        # examples run over leading dimensions along which the parameter repeats
        leading = next((k for k, size in enumerate(own) if size != 1), len(own))
        if name is None or leading == 0 or other.dtype != shadow.dtype:
            return NotImplemented
        factor = _Unchanged(other) if sign is None else None
        slope = 1.0 if sign is None or place == 0 else sign
        output = func(*((shadow, other) if place == 0 else (other, shadow)))

        def terms(grads: Tensor, layout: Layout) -> dict[str, Factor]:
            split = layout.split(grads * slope if factor is None else grads * factor(), 1)
            tail = shape[leading:]
            split = split.reshape(*split.shape[:2], -1, *tail).sum(2)
            repeated = [k + 2 for k, size in enumerate(own[leading:]) if size == 1 and tail[k] != 1]
            return {name: Direct((split.sum(repeated) if repeated else split).reshape(*split.shape[:2], -1))}

        return recorder.record("elementwise", (name,), output, leading, terms)

    return rule


def _broadcast(one: Tensor, other: Tensor) -> tuple[int, ...]:
    """Return the shape of the two tensors' sum."""
    pairs = zip_longest(reversed(one.shape), reversed(other.shape), fillvalue=1)
    return tuple(size if size != 1 else rest for size, rest in pairs)[::-1]


def _attention(recorder: Recorder, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Look inside functional.multi_head_attention_forward, whose projections are ordinary linear maps."""
    return recorder.through(_UNWRAPPED_ATTENTION, args, kwargs)


# PyTorch's own code, without its first statement's question whether somebody watches: it would ask for ever.
_UNWRAPPED_ATTENTION = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda _: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)

# what x.T and x.mT call
_TRANSPOSED = [inspect.getattr_static(Tensor, name).__get__ for name in ("T", "mT")]

_LAYER_NORM = _normalisation("input normalized_shape weight bias eps", lambda read: len(read["normalized_shape"]))
_GROUP_NORM = _normalisation("input num_groups weight bias eps", lambda _: 0)
_BATCH_NORM = _normalisation("input running_mean running_var weight bias training momentum eps", lambda _: 0)

RULES: dict[Any, Rule] = {
    functional.linear: _linear,
    functional.conv1d: _convolution(1),
    functional.conv2d: _convolution(2),
    functional.conv3d: _convolution(3),
    functional.embedding: _embedding,
    functional.layer_norm: _LAYER_NORM,
    functional.rms_norm: _LAYER_NORM,
    functional.group_norm: _GROUP_NORM,
    functional.batch_norm: _BATCH_NORM,
    functional.multi_head_attention_forward: _attention,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), _matmul),
    **dict.fromkeys((torch.t, Tensor.t, torch.transpose, Tensor.transpose, *_TRANSPOSED), _transpose),
    **dict.fromkeys((torch.add, Tensor.add), _elementwise(1.0)),
    **dict.fromkeys((torch.sub, Tensor.sub), _elementwise(-1.0)),
    **dict.fromkeys((torch.mul, Tensor.mul), _elementwise(None)),
    Tensor.add_: _elementwise(1.0, in_place=True),
    Tensor.sub_: _elementwise(-1.0, in_place=True),
}
"""The rules, by function."""
