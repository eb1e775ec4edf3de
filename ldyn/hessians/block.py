"""The Hessian of a loss behind a Transformer block, or behind several, by the names of the parameters.

A pre-LN block is x₁ = x + attention(LN₁ x), y = x₁ + ffn(LN₂ x₁); a post-LN block is u = LN₁(x + attention(x)),
y = LN₂(u + ffn(u)). Going backwards, the loss is kept to second order at each interface: its gradient, and its Hessian
in two parts. Tokens stay apart until attention mixes them, so that above it a curvature takes L · d² numbers. Derived
in the chapter *The Transformer block*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ldyn import _checks
from ldyn.hessians import _block_forms as forms
from ldyn.hessians._block_attention import Attention
from ldyn.hessians._block_layers import FeedForward, Norm
from ldyn.hessians._block_parameters import (
    NAMES,
    BlockOptions,
    BlockParameters,
    NormPlace,
    block_parameters,
    checked_parameters,
)
from ldyn.hessians._block_stages import Chain, Curvature, Parts, Residual, Stage
from ldyn.hessians._blocks import Blocks, LossHessian, require_names
from ldyn.hessians._output import checked_output

__all__ = [
    "NAMES",
    "BlockOptions",
    "BlockParameters",
    "InterfaceCurvature",
    "NormPlace",
    "block",
    "block_loss_hessian",
    "block_parameters",
    "propagate_curvature",
    "stack_loss_hessian",
]

INPUT = "x"


class InterfaceCurvature(NamedTuple):
    """A loss as a function of what flows between two blocks, to second order.

    Attributes:
        gradient: (L, d).
        gauss_newton: (L, d, L, d) the Gauss–Newton part of the Hessian.
        functional: (L, d, L, d) the functional part.
    """

    gradient: Tensor
    gauss_newton: Tensor
    functional: Tensor


def block(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    heads: int,
    norm: NormPlace = "pre",
    activation: str = "gelu",
    eps: float = 1e-5,
    causal: bool = False,
) -> Tensor:
    """Apply a Transformer block to one sequence.

    Args:
        x: (L, d).
        parameters: Tensors under the names of `NAMES`; any bias may be absent. ln1 and ln2 have weight and bias (d,);
            W_Q and W_K are (d, heads · k), W_V (d, heads · v), W_O (heads · v, d); W1 is (m, d), W2 (d, m).
        heads: How many heads share the columns of W_Q, W_K and W_V.
        norm: "pre" or "post".
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        eps: What LayerNorm adds to the variance.
        causal: Whether a token sees only itself and those before it.

    Returns:
        (L, d).

    Raises:
        ValueError: If a shape, dtype or device does not fit, a value is not finite, a name or an option is unknown, or
            eps is 0 and a row that is normalised is constant.
    """
    return _stage(x, parameters, "", heads, norm, activation, eps, causal).output


def block_loss_hessian(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    r: Tensor,
    S: Tensor,
    *,
    heads: int,
    norm: NormPlace = "pre",
    activation: str = "gelu",
    eps: float = 1e-5,
    causal: bool = False,
    wrt: Sequence[str] | None = None,
) -> LossHessian:
    """Compute the Hessian of a loss of the block's outputs in its parameters and, if asked, in its input.

    Args:
        x: (L, d).
        parameters: As for `block`.
        r: (L, d) gradient of the loss at the outputs.
        S: Hessian of the loss at the outputs, symmetric: (L, d, d) where the loss adds up over tokens, else
            (L, d, L, d).
        heads: As for `block`.
        norm: "pre" or "post".
        activation: As for `block`.
        eps: As for `block`.
        causal: As for `block`.
        wrt: The variables, names of parameters or "x", in the order wanted; None for all parameters in the order of
            `NAMES`.

    Returns:
        The blocks, Gauss–Newton and functional part apart; variables are flattened row by row. Normalised
        as the loss that r and S come from.

    Raises:
        ValueError: As for `block`; or if r or S do not fit or S is not symmetric, or a name in `wrt` is unknown or
            occurs twice.
    """
    stage = _stage(x, parameters, "", heads, norm, activation, eps, causal)
    return _assembled(stage, [name for name in NAMES if name in parameters], x, r, S, wrt)


def stack_loss_hessian(
    x: Tensor,
    parameters: Sequence[Mapping[str, Tensor]],
    r: Tensor,
    S: Tensor,
    *,
    heads: int,
    norm: NormPlace = "pre",
    activation: str = "gelu",
    eps: float = 1e-5,
    causal: bool = False,
    wrt: Sequence[str] | None = None,
) -> LossHessian:
    """Compute the Hessian of a loss behind several blocks, one after another.

    Args:
        x: (L, d).
        parameters: Those of each block, the first to act first; as for `block`.
        r: (L, d) gradient of the loss at the outputs of the last block.
        S: Its Hessian there, (L, d, d) or (L, d, L, d).
        heads: As for `block`; the options are the same for all blocks.
        norm: "pre" or "post".
        activation: As for `block`.
        eps: As for `block`.
        causal: As for `block`.
        wrt: The variables, in the order wanted: "x", or a parameter's name behind the number of its block, as in
            "0.attn.W_Q"; None for all parameters, block by block.

    Returns:
        As `block_loss_hessian`.

    Raises:
        ValueError: As for `block_loss_hessian`, or if there is no block.
    """
    stages = _stages(x, parameters, heads, norm, activation, eps, causal)
    names = [f"{index}.{name}" for index, own in enumerate(parameters) for name in NAMES if name in own]
    return _assembled(Chain(stages), names, x, r, S, wrt)


def propagate_curvature(
    x: Tensor,
    parameters: Sequence[Mapping[str, Tensor]],
    r: Tensor,
    S: Tensor,
    *,
    heads: int,
    norm: NormPlace = "pre",
    activation: str = "gelu",
    eps: float = 1e-5,
    causal: bool = False,
) -> tuple[InterfaceCurvature, ...]:
    """Carry a loss back through a stack of blocks, to second order in what flows between them.

    Args:
        x: (L, d).
        parameters: Those of each of the N blocks, the first to act first.
        r: (L, d) gradient of the loss at the outputs of the last block.
        S: Its Hessian there, (L, d, d) or (L, d, L, d).
        heads: As for `block`; the options are the same for all blocks.
        norm: "pre" or "post".
        activation: As for `block`.
        eps: As for `block`.
        causal: As for `block`.

    Returns:
        The loss at the N + 1 interfaces: at the input of block 0 first, at the outputs last, where the functional part
        is zero.

    Raises:
        ValueError: As for `stack_loss_hessian`.
    """
    stages = _stages(x, parameters, heads, norm, activation, eps, causal)
    return tuple(reversed([_interface(loss) for loss in Chain(stages).interfaces(_loss(stages[-1], x, r, S))]))


def _stages(
    x: Tensor,
    parameters: Sequence[Mapping[str, Tensor]],
    heads: int,
    norm: NormPlace,
    activation: str,
    eps: float,
    causal: bool,
) -> list[Stage]:
    """Evaluate blocks one after another."""
    if isinstance(parameters, Mapping) or not isinstance(parameters, Sequence) or not parameters:
        raise ValueError(
            f"parameters: expected a sequence with the parameters of each block, got {_checks.describe(parameters)}"
        )
    stages: list[Stage] = []
    here = x
    for index, own in enumerate(parameters):
        stages.append(_stage(here, own, f"{index}.", heads, norm, activation, eps, causal))
        here = stages[-1].output
    return stages


def _stage(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    prefix: str,
    heads: int,
    norm: NormPlace,
    activation: str,
    eps: float,
    causal: bool,
) -> Stage:
    """Evaluate one block."""
    _checks.require_real(x, "x", ndim=2)
    checked = checked_parameters(parameters, x, heads, prefix=prefix)
    floor = _checks.require_nonnegative(eps, "eps")
    if norm not in ("pre", "post"):
        raise ValueError(f"norm: expected 'pre' or 'post', got {_checks.describe(norm)}")

    def own(part: str) -> dict[str, Tensor]:
        return {name.removeprefix(part): value for name, value in checked.items() if name.startswith(part)}

    def normalise(inputs: Tensor, part: str) -> Norm:
        return Norm(inputs, own(part), floor, f"{prefix}{part}")

    def attend(inputs: Tensor) -> Attention:
        return Attention(inputs, own("attn."), heads, bool(causal), f"{prefix}attn.")

    def feed(inputs: Tensor) -> FeedForward:
        return FeedForward(inputs, own("ffn."), activation, f"{prefix}ffn.")

    if norm == "pre":
        first = normalise(x, "ln1.")
        attention = Residual(Chain([first, attend(first.output)]), x)
        second = normalise(attention.output, "ln2.")
        return Chain([attention, Residual(Chain([second, feed(second.output)]), attention.output)])
    attention = Residual(attend(x), x)
    first = normalise(attention.output, "ln1.")
    fed = Residual(feed(first.output), first.output)
    return Chain([attention, first, fed, normalise(fed.output, "ln2.")])


def _loss(stage: Stage, x: Tensor, r: Tensor, S: Tensor) -> Curvature:
    """Check what is known of the loss at the outputs."""
    gradient, hessian = checked_output(r, S, (x.shape[0], x.shape[1]), stage.output)
    return Curvature(gradient, hessian, None)


def _interface(loss: Curvature) -> InterfaceCurvature:
    """Write the curvature at an interface out."""
    full = forms.dense(loss.gauss_newton)
    bent = full.new_zeros(full.shape) if loss.functional is None else forms.dense(loss.functional)
    return InterfaceCurvature(loss.gradient, full, bent)


def _assembled(
    stage: Stage, names: Sequence[str], x: Tensor, r: Tensor, S: Tensor, wrt: Sequence[str] | None
) -> LossHessian:
    """Carry the loss through, and put the blocks into order."""
    known = [*names, INPUT]
    chosen = tuple(names) if wrt is None else require_names(wrt, "wrt", known)
    both = stage.carry(_loss(stage, x, r, S), frozenset(chosen) - {INPUT}, INPUT in chosen)
    shapes = {**stage.shapes, INPUT: x.shape}
    gauss_newton, functional = (Blocks(chosen, _ordered(part, chosen)) for part in both)
    return LossHessian({name: shapes[name] for name in chosen}, gauss_newton, functional)


def _ordered(part: Parts, names: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """Pick the blocks (a, b) in which a stands before b among the names, whichever acts first."""
    known = dict(part.theta)
    for name, block_ in part.mixed.items():
        known[INPUT, name] = block_
    if part.input is not None:
        known[INPUT, INPUT] = forms.matrix(forms.dense(part.input))
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    return {(a, b): known[a, b] if (a, b) in known else known[b, a].mT for a, b in pairs}
