"""A model's logits near its current parameters: values, Jacobian products, and nothing of the caller changed.

`Linearization` runs the model once on copies of its parameters and buffers and keeps the graph, so that products
with the Jacobian J (rows: logits, columns: parameters) and its transpose can be taken as often as one likes. Only
reverse-mode differentiation is used, which every differentiable PyTorch operation has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldyn import _checks

Inputs = Tensor | Mapping[str, Tensor]
"""What a model is called with: one tensor, or keyword arguments."""


class Linearization:
    """The logits of a model at its current parameters, and their derivative.

    Attributes:
        logits: (M, V) detached; M contexts (all leading dimensions of the output, flattened), V classes.
        size: number P of parameters.
    """

    def __init__(self, model: nn.Module, x: Inputs) -> None:
        """Run the model once.

        Args:
            model: Any module whose output is a tensor (..., V), has such a tensor as ``.logits``, or is a
                tuple that starts with one.
            x: One tensor, or a mapping of keyword arguments.

        Raises:
            ValueError: If the model is random or couples examples through batch statistics, its parameters
                are missing or mixed in dtype or device, the input does not fit them, or the output gives no
                finite logits that depend on the parameters.
        """
        _checks.require_eval_mode(model, "model")
        first = _uniform_parameters(model)
        inputs = _copied(x, first)
        with _differentiable():
            # clones: neither the parameters nor a buffer that a forward pass writes to is the caller's
            own = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
            extra = {name: value.detach().clone() for name, value in model.named_buffers()}
            arguments = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
            with _no_randomness(first.device):
                output = functional_call(model, {**own, **extra}, *arguments)
            logits = _logits(output)
            self._output = logits.reshape(-1, logits.shape[-1])
        self._parameters = list(own.values())
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._pullback: tuple[Tensor, list[Tensor], list[int]] | None = None
        self.size = sum(self._sizes)
        self.logits = self._output.detach()

    def vector(self, value: object, name: str) -> Tensor:
        """Check a vector of parameter changes.

        Args:
            value: The argument.
            name: Its name, for the message.

        Returns:
            The vector, detached.

        Raises:
            ValueError: If it is not a finite tensor (P,) of the parameters' dtype and device.
        """
        tensor = _checks.require_real(value, name, ndim=1)
        _checks.require_shape(tensor, name, (self.size,))
        return _checks.require_same(tensor, name, self._parameters[0], "the model's parameters").detach()

    def jvp(self, vectors: Tensor) -> Tensor:
        """Multiplies the Jacobian by a vector, or by several at once.

        Args:
            vectors: (P,) or (c, P).

        Returns:
            (M, V) or (c, M, V).
        """
        with _differentiable():
            dual, pulled, used = self._transposed()
            shapes = [(*vectors.shape[:-1], *parameter.shape) for parameter in self._parameters]
            pieces = torch.split(vectors, self._sizes, dim=-1)
            (product,) = torch.autograd.grad(
                pulled,
                dual,
                [pieces[place].reshape(shapes[place]) for place in used],
                retain_graph=True,
                is_grads_batched=vectors.ndim == 2,
            )
        return product

    def vjp(self, rows: Tensor) -> Tensor:
        """Multiplies the transposed Jacobian by a cotangent, or by several at once.

        Args:
            rows: (M, V) or (c, M, V).

        Returns:
            (P,) or (c, P).
        """
        batched = rows.ndim == 3
        with _differentiable():
            parts = torch.autograd.grad(
                self._output,
                self._parameters,
                rows,
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
            )
        lead = rows.shape[:1] if batched else ()
        # built by hand: for batched rows, PyTorch's own zeros for unused parameters lack the leading dimension
        filled = [
            parameter.new_zeros(*lead, parameter.numel()) if part is None else part.reshape(*lead, -1)
            for part, parameter in zip(parts, self._parameters, strict=True)
        ]
        return torch.cat(filled, dim=-1)

    def _transposed(self) -> tuple[Tensor, list[Tensor], list[int]]:
        """Build u -> J^T u once, with its graph: it is linear, and its own transpose is v -> J v."""
        if self._pullback is None:
            dual = torch.zeros_like(self._output, requires_grad=True)
            parts = torch.autograd.grad(self._output, self._parameters, dual, create_graph=True, allow_unused=True)
            used = [place for place, part in enumerate(parts) if part is not None]
            self._pullback = dual, [part for part in parts if part is not None], used
        return self._pullback


@contextmanager
def _differentiable() -> Iterator[None]:
    """Switches gradients on, whatever the caller has set, and attention to the kernel that allows two of them."""
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _no_randomness(device: torch.device) -> Iterator[None]:
    """Refuses a forward pass that draws from the global generators, and puts them back in any case."""
    cuda = [device] if device.type == "cuda" else []
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(place) for place in cuda)]
    drew = False
    try:
        yield
    finally:
        after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(place) for place in cuda)]
        drew = not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        if drew:
            torch.set_rng_state(before[0])
            for place, state in zip(cuda, before[1:], strict=True):
                torch.cuda.set_rng_state(state, place)
    if drew:
        raise ValueError("model: expected the same output every time, got a forward pass that draws random numbers")


def _uniform_parameters(model: nn.Module) -> Tensor:
    """Return the first parameter after checking that all agree in dtype and device."""
    named = list(model.named_parameters())
    if not named:
        raise ValueError("model: expected a module with parameters, got one without")
    (first_name, first), *others = named
    for name, parameter in named:
        _checks.require_floating(parameter, f"model, parameter {name!r}")
        _checks.require_finite(parameter, f"model, parameter {name!r}")
    for name, parameter in others:
        _checks.require_same(parameter, f"model, parameter {name!r}", first, f"parameter {first_name!r}")
    return first


def _copied(x: Inputs, first: Tensor) -> Tensor | dict[str, Tensor]:
    """Check the input against the parameters and copy it, so that an in-place first layer hurts nobody."""
    if isinstance(x, Mapping):
        return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in x.items()}
    _checks.require_nonempty(_checks.require_tensor(x, "x"), "x")
    if x.device != first.device:
        raise ValueError(f"x: expected the model's device {first.device}, got {x.device}")
    if x.is_floating_point():
        _checks.require_finite(_checks.require_same(x, "x", first, "the model's parameters"), "x")
    with torch.inference_mode(False):
        return x.detach().clone()


def _logits(output: object) -> Tensor:
    """Find the logits in what a model returned."""
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"model: expected logits (..., V) as output, got {_checks.describe(found)}")
    _checks.require_real(found, "model, its output", min_ndim=1)
    if not found.requires_grad:
        raise ValueError("model: expected an output that depends on the parameters, got one cut off from them")
    return found
