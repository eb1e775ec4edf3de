"""A model's logits near its current parameters: values, Jacobian products, and nothing of the caller changed.

`Linearization` runs the model once on copies of its parameters and buffers and keeps the graph, so that products
with the Jacobian J (rows: logits, columns: parameters) and its transpose can be taken as often as one likes. Only
reverse-mode differentiation is used, which every differentiable PyTorch operation has.

`gradients` and `pushforward` take one product each and keep nothing: a forward and a backward pass, and a forward
pass in forward mode, where every operation has it. The rest is what any function needs that runs a caller's model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as _forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ldyn import _checks

Inputs = Tensor | Mapping[str, Tensor]
"""What a model is called with: one tensor, or keyword arguments."""

forward_ad: Any = _forward_ad  # its functions have no annotations


class Linearization:
    """The logits of a model at its current parameters, and their derivative.

    Attributes:
        logits: (M, V) detached; M contexts (all leading dimensions of the output, flattened), V classes.
        shape: the output's own shape (..., V).
        size: number P of parameters.
    """

    def __init__(self, model: nn.Module, x: Inputs, *, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Run the model once.

        Args:
            model: Any module whose output is a tensor (..., V), has such a tensor as ``.logits``, or is a
                tuple that starts with one.
            x: One tensor, or a mapping of keyword arguments.
            parameters: Where to linearise, by name, in place of the model's present parameters.

        Raises:
            ValueError: If the model is random or couples examples through batch statistics, its parameters
                are missing or mixed in dtype or device, the input does not fit them, or the output gives no
                finite logits that depend on the parameters.
        """
        copies = copied_parameters(model) if parameters is None else parameters
        inputs = copied_inputs(x, next(iter(copies.values())))
        with differentiable():
            own = {name: value.detach().requires_grad_() for name, value in copies.items()}
            logits = require_attached(_called(model, own, inputs))
            self._output = logits.reshape(-1, logits.shape[-1])
        self._parameters = list(own.values())
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._pullback: tuple[Tensor, list[Tensor], list[int]] | None = None
        self.size = sum(self._sizes)
        self.shape = logits.shape
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
        with differentiable():
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
        with differentiable():
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


class Pushed(NamedTuple):
    """Logits of a model and their derivative along a direction in parameter space.

    Attributes:
        logits: (..., V) detached, in the shape of the model's output.
        change: (..., V) the derivative J v.
    """

    logits: Tensor
    change: Tensor


def copied_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Check a model and copy its parameters.

    Args:
        model: As in `Linearization`.

    Returns:
        The copies by name, detached; tied parameters once.

    Raises:
        ValueError: If the model depends on chance or on the batch, or its parameters are missing, not finite, or
            mixed in dtype or device.
    """
    _checks.require_eval_mode(model, "model")
    uniform_parameters(model)
    with torch.inference_mode(False):
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def forward(model: nn.Module, x: Inputs, *, parameters: Mapping[str, Tensor] | None = None, name: str = "x") -> Tensor:
    """Run a model once, without a graph.

    Args:
        model: As in `Linearization`.
        x: As in `Linearization`.
        parameters: `copied_parameters` of the model, if they are at hand: copying takes as long as a pass.
        name: What the caller calls `x`, for messages.

    Returns:
        (..., V) its logits, in the shape of its output.

    Raises:
        ValueError: As in `Linearization`.
    """
    own = copied_parameters(model) if parameters is None else parameters
    inputs = copied_inputs(x, next(iter(own.values())), name)
    with torch.inference_mode(False), torch.no_grad():
        return _called(model, own, inputs)


def gradients(
    model: nn.Module,
    x: Inputs,
    loss: Callable[[Tensor], Tensor],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    name: str = "x",
) -> dict[str, Tensor | None]:
    """Differentiate a loss of the logits by every parameter: one forward and one backward pass.

    Args:
        model: As in `Linearization`.
        x: As in `Linearization`.
        loss: From logits (..., V), in the shape of the model's output, to a scalar that depends on them.
        parameters: As in `forward`.
        name: As in `forward`.

    Returns:
        The gradient of each parameter by its name, None where the loss does not depend on it.

    Raises:
        ValueError: As in `Linearization`.
    """
    copies = copied_parameters(model) if parameters is None else parameters
    inputs = copied_inputs(x, next(iter(copies.values())), name)
    with differentiable(order=1):
        own = {name: value.detach().requires_grad_() for name, value in copies.items()}
        value = loss(require_attached(_called(model, own, inputs)))
        parts = torch.autograd.grad(value, list(own.values()), allow_unused=True)
    dense = [part.to_dense() if part is not None and part.is_sparse else part for part in parts]
    return dict(zip(own, dense, strict=True))


def pushforward(
    model: nn.Module,
    x: Inputs,
    direction: Mapping[str, Tensor] | Tensor,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    name: str = "x",
) -> Pushed:
    """Differentiate the logits along a direction in parameter space, keeping no graph where that is possible.

    Forward mode costs about as much as a forward and a backward pass, and the memory of a forward pass. Where an
    operation lacks it, the product is taken in reverse mode through `Linearization` instead.

    Args:
        model: As in `Linearization`.
        x: As in `Linearization`.
        direction: (P,), in the order of ``model.parameters()``; or a tensor of a parameter's shape by its name,
            in which parameters that are left out do not move. Of the parameters' dtype and device.
        parameters: As in `forward`.
        name: As in `forward`.

    Returns:
        Logits and derivative.

    Raises:
        ValueError: As in `Linearization`.
        NotImplementedError: If the model fails for another reason than a missing rule of forward mode.
        RuntimeError: Likewise.
    """
    copies = copied_parameters(model) if parameters is None else parameters
    if isinstance(direction, Tensor):
        pieces = torch.split(direction, [value.numel() for value in copies.values()])
        direction = {name: part.view_as(copies[name]) for name, part in zip(copies, pieces, strict=True)}
    inputs = copied_inputs(x, next(iter(copies.values())), name)
    try:
        return _forward_mode(model, inputs, direction, copies)
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
    local = Linearization(model, x, parameters=copies)
    flat = [direction.get(name, torch.zeros_like(value)).reshape(-1) for name, value in copies.items()]
    change = local.jvp(torch.cat(flat).detach())
    return Pushed(local.logits.reshape(local.shape), change.reshape(local.shape))


def _forward_mode(
    model: nn.Module,
    inputs: Tensor | dict[str, Any],
    direction: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> Pushed:
    """Run the model once on dual numbers."""
    with differentiable(), forward_ad.dual_level():
        own = {name: value.detach() for name, value in parameters.items()}
        for name, tangent in direction.items():
            own[name] = forward_ad.make_dual(own[name], tangent.detach())
        with _NoGradStopsTangents():
            output = _called(model, own, inputs)
        logits, change = forward_ad.unpack_dual(output)
        return Pushed(logits.detach(), torch.zeros_like(logits) if change is None else change.detach())


class _NoGradStopsTangents(TorchFunctionMode):
    """Has forward mode take what a model computes under ``torch.no_grad`` as constant, as reverse mode does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


def _called(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor | dict[str, Any]) -> Tensor:
    """Call the model with other parameters and return its logits, in the shape of its output."""
    # clones, since a forward pass may write to a buffer, and it is the caller's
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    arguments: tuple[Any, ...] = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    with no_randomness(next(iter(parameters.values())).device):
        output = functional_call(model, {**parameters, **buffers}, *arguments)
    return logits_of(output)


@contextmanager
def differentiable(*, order: int = 2) -> Iterator[None]:
    """Switches gradients on; order 2 also attention to the one kernel with forward mode and second derivatives."""
    plain = sdpa_kernel(SDPBackend.MATH) if order > 1 else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), plain:
        yield


@contextmanager
def no_randomness(device: torch.device) -> Iterator[None]:
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


def uniform_parameters(model: nn.Module) -> Tensor:
    """Require parameters that are finite and agree in dtype and device."""
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


def copied_inputs(x: Inputs, first: Tensor, name: str = "x") -> Tensor | dict[str, Tensor]:
    """Check the input against the parameters and copy it, so that an in-place first layer hurts nobody."""
    if isinstance(x, Mapping):
        with torch.inference_mode(False):
            return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in x.items()}
    _checks.require_nonempty(_checks.require_tensor(x, name), name)
    if x.device != first.device:
        raise ValueError(f"{name}: expected the model's device {first.device}, got {x.device}")
    if x.is_floating_point():
        _checks.require_finite(_checks.require_same(x, name, first, "the model's parameters"), name)
    with torch.inference_mode(False):
        return x.detach().clone()


def output_tensor(output: object) -> Tensor:
    """Find the tensor of logits in what a model returned, whatever its entries."""
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"model: expected logits (..., V) as output, got {_checks.describe(found)}")
    return found


def logits_of(output: object) -> Tensor:
    """Find the logits in what a model returned, and require that they are finite."""
    return _checks.require_real(output_tensor(output), "model, its output", min_ndim=1)


def require_attached(logits: Tensor) -> Tensor:
    """Require logits that depend on the parameters."""
    if not logits.requires_grad:
        raise ValueError("model: expected an output that depends on the parameters, got one cut off from them")
    return logits
