"""Small networks, a pretrained language model, and training steps that can be looked at before they are taken."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ldyn import _checks
from ldyn._language import LanguageModel, causal_transformer, double_precision, language_model

__all__ = [
    "ACTIVATIONS",
    "LanguageModel",
    "SGDStep",
    "causal_transformer",
    "double_precision",
    "evaluate",
    "flat_parameters",
    "language_model",
    "mlp",
    "moved",
    "sgd",
]

Loss = Callable[[Tensor, Tensor], Tensor]
"""A function of a model's outputs and the targets to one number."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""The activations `mlp` knows, by name."""

GAIN: dict[str, float] = {"gelu": 2**0.5, "relu": 2**0.5, "silu": 2**0.5}
"""Standard deviation of the weights, times the root of the fan-in, for activations where it is not 1."""


@dataclass(frozen=True, eq=False)
class SGDStep:
    """One step of `sgd`, computed and not yet taken.

    Attributes:
        index: Number of steps taken before this one.
        loss: Loss on this step's batch, at the parameters before the step.
        gradient: (P,) gradient of the loss after clipping and before weight decay is added.
        raw_norm: Euclidean norm of the gradient before clipping.
        delta: (P,) change of the parameters, −lr · (gradient + weight_decay · parameters).
    """

    index: int
    loss: float
    gradient: Tensor
    raw_norm: float
    delta: Tensor


def mlp(
    sizes: Sequence[int],
    *,
    activation: str = "tanh",
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Build a fully connected network, initialised from a private generator.

    Weights are normal with variance gain²/fan-in (gain √2 for relu, gelu and silu, 1 otherwise), biases are
    zero. The activation stands between the linear layers, not after the last one.

    Args:
        sizes: Widths from input to output, at least two; (64, 16, 10) has one hidden layer.
        activation: A key of `ACTIVATIONS`; "identity" gives a deep linear network.
        bias: Whether the linear layers have a bias.
        seed: Seed of the private generator; the global one is left alone.
        dtype: Dtype of the parameters, whatever the default dtype is.

    Returns:
        A module that maps (..., sizes[0]) to (..., sizes[-1]).

    Raises:
        ValueError: If there are fewer than two sizes, a size or the seed is no integer in range, the
            activation is unknown, or the dtype is no real floating-point dtype.
    """
    widths = [_checks.require_integer(size, f"sizes[{place}]") for place, size in enumerate(sizes)]
    if len(widths) < 2:
        raise ValueError(f"sizes: expected at least two widths, got {len(widths)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a real floating-point dtype, got {dtype}")
    generator = torch.Generator().manual_seed(_checks.require_integer(seed, "seed", minimum=0))
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        # Built without storage, so that the default initialisation draws nothing from the global generator.
        layer = nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_(0.0, GAIN.get(activation, 1.0) * fan_in**-0.5, generator=generator)
            if bias:
                layer.bias.zero_()
        layers += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def flat_parameters(model: nn.Module) -> Tensor:
    """Copy the parameters of a model into one vector.

    Args:
        model: Any module with at least one parameter; tied parameters count once.

    Returns:
        (P,) detached copy, in the order of ``model.parameters()``, each tensor read row by row.

    Raises:
        ValueError: If the model is no module, or has no parameters.
    """
    parts = [parameter.detach().reshape(-1) for parameter in _parameters(model)]
    return torch.cat(parts).clone()


def evaluate(model: nn.Module, x: Tensor, parameters: Tensor) -> Tensor:
    """Evaluate a model at other parameters, as a differentiable function of them.

    Args:
        model: Any module with parameters; it is not changed.
        x: Its input.
        parameters: (P,) the parameters to use, in the order of ``model.parameters()``.

    Returns:
        What the model returns for `x` at these parameters.

    Raises:
        ValueError: If the model has no parameters, or the shape of `parameters` does not fit it.
    """
    own = _parameters(model)
    sizes = [parameter.numel() for parameter in own]
    _checks.require_shape(_checks.require_tensor(parameters, "parameters"), "parameters", (sum(sizes),))
    names = [name for name, _ in model.named_parameters()]
    pieces = zip(names, torch.split(parameters, sizes), own, strict=True)
    output: Tensor = functional_call(model, {name: piece.view_as(old) for name, piece, old in pieces}, (x,))
    return output


def moved(model: nn.Module, delta: Tensor) -> nn.Module:
    """Copy a model with its parameters moved by a vector; the model itself stays where it is.

    Args:
        model: Any module with parameters.
        delta: (P,) change of the parameters, in the order of ``model.parameters()``.

    Returns:
        A deep copy at parameters + delta.

    Raises:
        ValueError: If the model has no parameters, or the shape of `delta` does not fit them.
    """
    _parameters(model)
    other = copy.deepcopy(model)
    _move(other, delta)
    return other


def sgd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    lr: float,
    steps: int,
    batch_size: int | None = None,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    seed: int = 0,
    loss: Loss = functional.cross_entropy,
) -> Iterator[SGDStep]:
    """Trains a model by stochastic gradient descent, handing out each step before it is taken.

    The step is −lr · (clip(g) + weight_decay · parameters), where clip(g) shortens the gradient g of the
    batch loss to norm `clip` if it is longer; decay is added after clipping. While the loop's body runs, the
    model still has the parameters from before the step; the step is taken when the loop asks for the next
    one, so that leaving the loop early leaves the last step untaken. Only the parameters of `model` change,
    in place; their ``.grad`` is not touched.

    Args:
        model: The module to train; all of its parameters must require gradients.
        inputs: (N, ...) examples.
        targets: (N, ...) what `loss` compares with; class labels (N,) for the default.
        lr: Learning rate, > 0.
        steps: Number of steps, ≥ 0.
        batch_size: Examples for each step, between 1 and N: every pass is shuffled anew and an incomplete
            last batch left out. None takes all N every time.
        weight_decay: Coefficient ≥ 0 of the parameters in the step.
        clip: Largest norm of the gradient, > 0; None never clips.
        seed: Seed of the private generator that shuffles.
        loss: Outputs and targets to a number; the default is the mean cross-entropy over the batch.

    Returns:
        An iterator over the steps.

    Raises:
        ValueError: If an argument is out of range or the model has frozen parameters. It is raised by the
            call itself, before any step.
    """
    rate, decay = (
        _checks.require_positive(lr, "lr"),
        _checks.require_nonnegative(weight_decay, "weight_decay"),
    )
    longest = None if clip is None else _checks.require_positive(clip, "clip")
    total = _checks.require_integer(steps, "steps", minimum=0)
    count = len(_checks.require_nonempty(_checks.require_tensor(inputs, "inputs", min_ndim=1), "inputs"))
    if len(_checks.require_tensor(targets, "targets", min_ndim=1)) != count:
        raise ValueError(f"targets: expected {count} as there are inputs, got {_checks.describe(targets)}")
    size = count if batch_size is None else _checks.require_integer(batch_size, "batch_size")
    if size > count:
        raise ValueError(f"batch_size: expected at most the {count} examples there are, got {size}")
    if not all(parameter.requires_grad for parameter in _parameters(model)):
        raise ValueError("model: expected every parameter to require gradients, got a frozen one")
    generator = torch.Generator().manual_seed(_checks.require_integer(seed, "seed", minimum=0))

    def walk() -> Iterator[SGDStep]:
        batches = _batches(count, size, generator)
        for index in range(total):
            batch = next(batches).to(inputs.device)
            value, gradient = _gradient(model, loss, inputs[batch], targets[batch])
            norm = float(torch.linalg.vector_norm(gradient))
            if longest is not None and norm > longest:
                gradient = gradient * (longest / norm)
            delta = -rate * (gradient + decay * flat_parameters(model))
            yield SGDStep(index, value, gradient, norm, delta)
            _move(model, delta)

    return walk()


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a model that has some."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    if not parameters:
        raise ValueError(f"model: expected a torch.nn.Module with parameters, got {_checks.describe(model)}")
    return parameters


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches for ever, one shuffled pass after another."""
    while True:
        order = torch.arange(count) if size == count else torch.randperm(count, generator=generator)
        yield from order[: count - count % size].view(-1, size)


def _gradient(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Compute the loss and its flat gradient without touching the parameters' ``.grad``."""
    parameters = _parameters(model)
    with torch.enable_grad():
        value = loss(model(inputs), targets)
        parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return float(value.detach()), torch.cat([part.reshape(-1) for part in parts])


def _move(model: nn.Module, delta: Tensor) -> None:
    """Add a flat vector to the parameters, in place."""
    parameters = _parameters(model)
    sizes = [parameter.numel() for parameter in parameters]
    _checks.require_shape(_checks.require_tensor(delta, "delta"), "delta", (sum(sizes),))
    with torch.no_grad():
        for parameter, piece in zip(parameters, torch.split(delta.detach(), sizes), strict=True):
            parameter.add_(piece.view_as(parameter))
