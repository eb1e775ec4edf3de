"""The empirical tangent kernel of a network, exactly, and as fast as the structure of its layers allows.

For outputs f(x) of a model with parameters w, the kernel's block of two examples is K(x, x') = J(x) J(x')ᵀ with the
Jacobian J = ∂f/∂w: entry [a, b] is the inner product of the gradients of outputs a and b. The sum over parameters
splits into layers. For a linear layer an example's gradient is a sum of outer products of output gradients g_t and
inputs u_t over positions t, so that the inner product of two such gradients is Σ_ts (u_t·u'_s + 1)(g_t·g'_s), the 1
for the bias: no gradient need be formed. Derived in the chapter *The tangent kernel*.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Inputs, copied_parameters, differentiable, gradients, no_randomness, pushforward
from ldyn._progress import progress_bar
from ldyn.kernels._features import Features, Run, Settings
from ldyn.kernels._frozen import Batch, Frozen, Patterns, Reduction, checked, jacobian, length, take
from ldyn.kernels._gram import WORKSPACE

METHODS = ("auto", "structured", "jacobian")
"""The ways to compute a kernel."""

KINDS = ("trace", "sum", "first")
"""The three reductions of a block (V, V) to a number that go by the name of pseudo-NTK."""


def entk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    params: Patterns = None,
    method: str = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    """Empirical tangent kernel: block [i, j] is J(x1_i) J(x2_j)ᵀ, summed (not averaged) over parameters.

    Three methods give the same numbers. "jacobian" forms the Jacobian of every example by ``torch.func`` and
    contracts: N·V·P numbers, and the oracle for everything else. "structured" watches one forward pass, takes one
    reverse sweep that carries all outputs, and multiplies factors layer by layer: linear maps, convolutions and
    embeddings as outer products, in pairs of positions or as gradients, whichever multiplies less; normalisations
    and other scales and shifts as the small gradients they have. Parameters that any other operation touches (a
    recurrent layer, a parametrised weight, your own function) go the Jacobian's way, they alone. "auto" is
    structured, unless such parameters make up more than half: then one Jacobian of everything costs less.

    Args:
        model: Any module in evaluation mode whose output for an example depends on that example alone. It
            returns (N, ...), has such a tensor as ``.logits`` or under the key "logits", or returns a tuple that
            starts with one. V counts an example's outputs, trailing dimensions flattened row by row.
        x1: N1 examples: a tensor (N1, ...), or a mapping of keyword arguments (N1, ...).
        x2: N2 examples, likewise; None for those of x1, which halves the work.
        params: Which parameters count: None for all, frozen ones too, or name patterns such as ``"*.weight"``.
            A tied parameter counts once and matches by any of its names.
        method: "auto", "structured" or "jacobian".
        chunk_size: How many rows and columns of examples are held at once; by default as many as a moderate
            workspace takes. The result does not depend on it.

    Returns:
        (N1, N2, V, V) with index [i, j, a, b] = ⟨∂f_a(x1_i)/∂w, ∂f_b(x2_j)/∂w⟩, a view of storage ordered
        [a, i, b, j]; in the dtype and on the device of the parameters.

    Raises:
        ValueError: If the model is random, couples examples or gives no finite (N, ...) outputs that depend on
            its parameters; if inputs are empty or do not fit in dtype or device; if an option is unknown or a
            pattern matches nothing.
    """
    return _kernel(model, x1, x2, params, method, chunk_size, _every, traced=False)


def pntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    kind: str = "trace",
    params: Patterns = None,
    method: str = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    """Pseudo-NTK: one number for each block K of the tangent kernel, without forming the block.

    Three normalisations are in use: "trace" is tr K / V, the best multiple of the identity in Frobenius norm;
    "sum" is 1ᵀK1 / V, the kernel of Σ_a f_a / √V; "first" is K_11, the kernel of the first output. The last two
    cost one gradient of a number for each example.

    Args:
        model: As for `entk`.
        x1: N1 examples, as for `entk`.
        x2: N2 examples, or None for those of x1.
        kind: "trace", "sum" or "first".
        params: As for `entk`.
        method: As for `entk`.
        chunk_size: As for `entk`.

    Returns:
        (N1, N2) in the dtype and on the device of the parameters.

    Raises:
        ValueError: As for `entk`, or if the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if kind == "trace":
        kernel = _kernel(model, x1, x2, params, method, chunk_size, _every, traced=True, averaged=True)
    else:
        reduction = _normalised_sum if kind == "sum" else _first
        kernel = _kernel(model, x1, x2, params, method, chunk_size, reduction, traced=False)
    return kernel[:, :, 0, 0]


def entk_vector_product(model: nn.Module, x1: Inputs, x2: Inputs, v: Tensor) -> Tensor:
    """Tangent kernel times a vector, Σ_j K(x1_i, x2_j) v_j: one vjp at x2 and one jvp at x1, no kernel.

    Args:
        model: As for `entk`; all parameters count.
        x1: N1 examples, as for `entk`.
        x2: N2 examples, likewise.
        v: (N2, V), one cotangent for each example of x2, its outputs flattened row by row.

    Returns:
        (N1, V).

    Raises:
        ValueError: As for `entk`, or if v does not fit the outputs in shape, dtype or device.
    """
    parameters = copied_parameters(model)
    first = next(iter(parameters.values()))
    counts = [length(checked(x, name, first)) for x, name in ((x1, "x1"), (x2, "x2"))]
    rows = _checks.require_same(_checks.require_real(v, "v", ndim=2), "v", first, "the model's parameters").detach()

    def weighted(logits: Tensor) -> Tensor:
        outputs = logits.reshape(counts[1], -1)
        _checks.require_shape(rows, "v", tuple(outputs.shape))
        return (outputs * rows).sum()

    pulled = gradients(model, x2, weighted, parameters=parameters)
    direction = {name: value for name, value in pulled.items() if value is not None}
    try:
        change: Tensor = pushforward(model, x1, direction, parameters=parameters).change
        return change.reshape(counts[0], change.numel() // counts[0])
    except (
        NotImplementedError,
        RuntimeError,
    ):  # an operation that can be differentiated in reverse mode only, and once
        return _by_gradients(Frozen(model, None), checked(x1, "x1", first), direction)


def _by_gradients(frozen: Frozen, batch: Batch, direction: dict[str, Tensor]) -> Tensor:
    """Multiply the Jacobian (N, V, P) by a direction, one example after the other, in reverse mode alone."""
    flat = torch.cat([value.reshape(-1) for value in direction.values()])
    with differentiable():
        rows = [jacobian(frozen, take(batch, [i]), list(direction), _every) @ flat for i in range(length(batch))]
    return torch.cat(rows, dim=1).T


def _every(outputs: Tensor) -> Tensor:
    """Keep all outputs."""
    return outputs


def _normalised_sum(outputs: Tensor) -> Tensor:
    """Return Σ_a f_a / √V, as (N, 1)."""
    scale: float = outputs.shape[1] ** -0.5
    return outputs.sum(1, keepdim=True) * scale


def _first(outputs: Tensor) -> Tensor:
    """Return the first output, as (N, 1)."""
    return outputs[:, :1]


def _kernel(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None,
    params: Patterns,
    method: str,
    chunk_size: int | None,
    reduction: Reduction,
    *,
    traced: bool,
    averaged: bool = False,
) -> Tensor:
    """Compute (N1, N2, C, C) for the reduced outputs, or (N1, N2, 1, 1) with its trace."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    size = None if chunk_size is None else _checks.require_integer(chunk_size, "chunk_size")
    frozen = Frozen(model, params)
    left = checked(x1, "x1", frozen.first)
    right = left if x2 is None else checked(x2, "x2", frozen.first)
    with differentiable(), no_randomness(frozen.first.device):
        settings = Settings(frozen, reduction, method, traced)
        with no_randomness(frozen.first.device):  # first of all, since chance looks like coupled examples later
            alone = settings.run(take(left, [0]))
        width = alone[0].shape[1]
        if size is None:
            size = max(1, 8 * WORKSPACE // max(settings.kept(*alone), 1))
        outputs = 1 if traced else width
        total = frozen.first.new_zeros(outputs, length(left), outputs, length(right))
        _fill(total, settings, (left, right), size, alone)
    if averaged:
        total /= width
    return total.detach().permute(1, 3, 0, 2)


def _fill(total: Tensor, settings: Settings, sides: tuple[Batch, Batch], size: int, alone: Run) -> None:
    """Fill the kernel (C, N1, C, N2) block by block; where both sides are one, each pair of chunks once."""
    left, right = sides
    symmetric = left is right
    rows, columns = _chunks(length(left), size), _chunks(length(right), size)
    steps = len(rows) * (len(rows) + 1) // 2 if symmetric else len(rows) * len(columns)
    with progress_bar(steps, desc="tangent kernel", unit="pair", leave=False, shown=steps > 1) as progress:
        for place, row in enumerate(rows):
            one = Features(settings, take(left, row), None if place else alone)
            for column in columns[place:] if symmetric else columns:
                same = symmetric and column == row
                two = one if same else Features(settings, take(right, column))
                block = one.gram(two)
                total[:, row, :, column] = block
                if symmetric and not same:
                    total[:, column, :, row] = block.permute(2, 3, 0, 1)
                progress.update()


def _chunks(count: int, size: int) -> list[slice]:
    """Cut a range."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
