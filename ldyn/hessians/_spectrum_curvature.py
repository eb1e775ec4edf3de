"""The curvature of a model's loss as an operator, by reverse-mode differentiation alone.

Second derivatives in forward mode are shorter to write, but in PyTorch 2.13 they are wrong for ``layer_norm`` with a
weight: so are ``torch.func.hessian`` of a function that contains it, and forward mode over ``jacrev``. Reverse mode
twice is right there, and every differentiable operation has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldyn import _checks
from ldyn._linearize import Inputs, Linearization, copied_parameters, differentiable
from ldyn.foundations.softmax import softmax_jacobian_vector_product
from ldyn.hessians._spectrum_operator import SymmetricOperator

Kind = Literal["hessian", "gauss_newton", "functional", "fisher"]
"""Which curvature."""

Loss = Literal["cross_entropy", "squared_error"]
"""Which loss."""

_KINDS = ("hessian", "gauss_newton", "functional", "fisher")
_LOSSES = ("cross_entropy", "squared_error")
_REDUCTIONS = ("mean", "sum")


def curvature_operator(
    model: nn.Module,
    x: Inputs,
    y: Tensor | None = None,
    *,
    kind: Kind = "hessian",
    loss: Loss = "cross_entropy",
    reduction: Literal["mean", "sum"] = "mean",
    batch_size: int | None = None,
) -> SymmetricOperator:
    """Curvature of a model's loss in its parameters, as an operator that multiplies vectors (P,).

    "hessian" is the second derivative of the loss; "gauss_newton" its part Jᵀ S J with S the Hessian of the loss at
    the outputs; "functional" the rest, Σ_k r_k ∇²z_k with r the gradient at the outputs. "fisher" is the Fisher
    matrix of a classifier, with labels drawn from the model; for the cross-entropy it is the Gauss–Newton part, with
    the same normalisation.

    Parameters and data are copied: the operator stays that of the present parameters while training goes on.
    A product costs about two gradients while all data are one batch, whose graph is kept; with several batches each
    product runs the model again, and memory is that of one batch. Attention runs on its plain kernel, the one that can
    be differentiated twice.

    Args:
        model: Module in evaluation mode whose output is (..., V), has such a tensor as ``.logits``, or is a tuple that
            starts with one. Tied parameters count once; frozen ones count too.
        x: The model's input: one tensor, or a mapping of keyword arguments, with the N examples along the first
            dimension.
        y: For the cross-entropy labels (...), integers from 0 to V − 1; for the squared error targets (..., V). None
            is enough for "gauss_newton" and "fisher", in which they do not occur.
        kind: Which curvature.
        loss: "cross_entropy" of each context, or "squared_error" of each output, without a half.
        reduction: "mean" divides by the number of contexts (cross-entropy) or of outputs (squared error), which are
            PyTorch's means; "sum" by one.
        batch_size: Examples in a batch; None takes all at once.

    Returns:
        The operator of shape (P, P), in the order of ``model.parameters()``, each flattened row by row; in the dtype
        and on the device of the parameters.

    Raises:
        ValueError: If the model draws random numbers or uses batch statistics, has no parameters or mixed ones, its
            parameters are not in single or double precision, the data are empty or do not fit each other or the model,
            an option is unknown, or "fisher" is asked for with the squared error, which is no likelihood before a
            variance is chosen.
    """
    for name, value, known in (("kind", kind, _KINDS), ("loss", loss, _LOSSES), ("reduction", reduction, _REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {_checks.describe(value)}")
    if kind == "fisher" and loss != "cross_entropy":
        raise ValueError(f"kind: expected 'gauss_newton' for the loss {loss!r}, which is no likelihood, got 'fisher'")
    copies = copied_parameters(model)
    like = next(iter(copies.values()))
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model: expected parameters in float32 or float64, got {like.dtype}")
    data, targets = _copied(x), None if y is None else _checks.require_tensor(y, "y").detach().clone()
    if targets is None and kind in ("hessian", "functional"):
        raise ValueError(f"y: expected labels or targets for kind {kind!r}, got None")
    examples = _examples(data)
    step = examples if batch_size is None else _checks.require_integer(batch_size, "batch_size")
    spans = [slice(start, start + step) for start in range(0, examples, step)]

    def batch(span: slice) -> _Batch:
        part = None if targets is None else targets[span]
        return _Batch(model, _part(data, span), parameters=copies, kind=kind, loss=loss, targets=part)

    first = batch(spans[0])
    if first.shape[0] != min(step, examples):
        got = f"{first.shape[0]} row(s) for {min(step, examples)} example(s)"
        raise ValueError(f"model: expected an output (N, ..., V) with one row for each example, got {got}")
    if targets is not None:
        _require_targets(targets, (examples, *first.shape[1:]), loss, like)
    terms = first.shape[1:-1] if loss == "cross_entropy" else first.shape[1:]
    scale = 1.0 if reduction == "sum" else 1 / (examples * terms.numel())

    def batches() -> Iterator[_Batch]:
        yield from [first] if len(spans) == 1 else map(batch, spans)

    def rows(vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for near in batches():
            total += near.product(vectors)
        return scale * total

    return SymmetricOperator(first.size, like.dtype, like.device, rows)


class _Batch(Linearization):
    """The curvature of the summed loss of one batch; graphs are built when first needed, and kept."""

    def __init__(
        self,
        model: nn.Module,
        x: Inputs,
        *,
        parameters: Mapping[str, Tensor],
        kind: Kind,
        loss: Loss,
        targets: Tensor | None,
    ) -> None:
        super().__init__(model, x, parameters=parameters)
        self._kind, self._loss, self._targets = kind, loss, targets
        self._gradient: list[tuple[int, Tensor]] | None = None

    def product(self, vectors: Tensor) -> Tensor:
        """Multiply c vectors, as rows (c, P); one alone without ``vmap``, which not every operation has."""
        multiply = self._twice if self._kind in ("hessian", "functional") else self._through_outputs
        return multiply(vectors[0]).unsqueeze(0) if len(vectors) == 1 else multiply(vectors)

    def _through_outputs(self, vectors: Tensor) -> Tensor:
        """Gauss–Newton: forwards by J, across by S, and back by Jᵀ."""
        change = self.jvp(vectors)
        if self._loss == "squared_error":
            return self.vjp(2 * change)
        return self.vjp(softmax_jacobian_vector_product(self.logits.expand_as(change), change))

    def _twice(self, vectors: Tensor) -> Tensor:
        """Differentiate the gradient's product with the vectors."""
        own = self._parameters
        pieces = torch.split(vectors, [parameter.numel() for parameter in own], dim=-1)
        lead = vectors.shape[:-1]
        with differentiable():
            parts = self._gradients()
            found: tuple[Tensor | None, ...] = (None,) * len(own)
            if parts:
                found = torch.autograd.grad(
                    [part for _, part in parts],
                    own,
                    [pieces[place].reshape(*lead, *own[place].shape) for place, _ in parts],
                    retain_graph=True,
                    is_grads_batched=vectors.ndim == 2,
                    allow_unused=True,
                )
        filled = [
            vectors.new_zeros(*lead, parameter.numel()) if part is None else part.reshape(*lead, -1)
            for part, parameter in zip(found, own, strict=True)
        ]
        return torch.cat(filled, dim=-1).detach()

    def _gradients(self) -> list[tuple[int, Tensor]]:
        """Build once the gradient by those parameters on whose value it depends, with its graph."""
        if self._gradient is None:
            value = self._value(self._output)
            if self._kind == "functional":
                (slope,) = torch.autograd.grad(value, self._output, retain_graph=True)
                value = (slope.detach() * self._output).sum()
            parts = torch.autograd.grad(value, self._parameters, create_graph=True, allow_unused=True)
            self._gradient = [
                (place, part) for place, part in enumerate(parts) if part is not None and part.requires_grad
            ]
        return self._gradient

    def _value(self, outputs: Tensor) -> Tensor:
        """Sum the loss over the batch."""
        assert self._targets is not None
        if self._loss == "squared_error":
            return (outputs - self._targets.reshape(outputs.shape)).square().sum()
        return functional.cross_entropy(outputs, self._targets.reshape(-1).long(), reduction="sum")


def _copied(x: Inputs) -> Inputs:
    """Copy the input, which the operator outlives."""
    if isinstance(x, Mapping):
        return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in x.items()}
    return _checks.require_nonempty(_checks.require_tensor(x, "x", min_ndim=1), "x").detach().clone()


def _examples(x: Inputs) -> int:
    """Count the examples, on which all tensors must agree."""
    tensors = [value for value in x.values() if isinstance(value, Tensor)] if isinstance(x, Mapping) else [x]
    sizes = sorted({len(value) if value.ndim else 0 for value in tensors})
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(f"x: expected tensors with the same number of examples first, at least one, got {sizes}")
    return sizes[0]


def _part(x: Inputs, span: slice) -> Inputs:
    """Take some of the examples."""
    if isinstance(x, Mapping):
        return {name: value[span] if isinstance(value, Tensor) else value for name, value in x.items()}
    return x[span]


def _require_targets(targets: Tensor, outputs: tuple[int, ...], loss: Loss, like: Tensor) -> None:
    """Check labels or targets against the shape of all outputs (N, ..., V)."""
    if targets.device != like.device:
        raise ValueError(f"y: expected the model's device {like.device}, got {targets.device}")
    if loss == "squared_error":
        _checks.require_finite(_checks.require_same(targets, "y", like, "the model's parameters"), "y")
        _checks.require_shape(targets, "y", outputs)
        return
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"y: expected integer labels, got {_checks.describe(targets)}")
    _checks.require_shape(targets, "y", outputs[:-1])
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= outputs[-1]:
        raise ValueError(f"y: expected labels from 0 to {outputs[-1] - 1}, got {low} to {high}")
