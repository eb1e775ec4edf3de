"""What a loss says about a model's outputs, r and S, checked and put into one form."""

from __future__ import annotations

import torch
from torch import Tensor

from ldyn import _checks

__all__ = ["checked_output", "dense", "is_per_token"]


def checked_output(
    r: object, S: object, shape: tuple[int, int], like: Tensor, *, names: tuple[str, str] = ("r", "S")
) -> tuple[Tensor, Tensor]:
    """Require the gradient and the Hessian of a loss at outputs (L, o).

    Args:
        r: (L, o) the gradient.
        S: The Hessian, (L, o, o) where tokens do not interact in the loss, else (L, o, L, o); symmetric.
        shape: L and o.
        like: A tensor whose dtype and device both must have.
        names: What the caller calls the two, for the messages.

    Returns:
        The two, S in the form in which it came.

    Raises:
        ValueError: If a shape, dtype or device does not fit, a value is not finite, or S is not symmetric.
    """
    tokens, outputs = shape
    gradient = _checks.require_real(r, names[0])
    _checks.require_shape(gradient, names[0], shape)
    _checks.require_same(gradient, names[0], like, "the input")
    hessian = _checks.require_real(S, names[1])
    forms = ((tokens, outputs, outputs), (tokens, outputs, tokens, outputs))
    if tuple(hessian.shape) not in forms:
        raise ValueError(f"{names[1]}: expected shape {forms[0]} or {forms[1]}, got {_checks.describe(hessian)}")
    _checks.require_same(hessian, names[1], like, "the input")
    mirrored = hessian.mT if is_per_token(hessian) else hessian.permute(2, 3, 0, 1)
    tolerance = 100 * torch.finfo(hessian.dtype).eps * hessian.detach().abs().max()
    gap = (hessian - mirrored).detach().abs().max()
    if _checks.known_truth(gap <= tolerance) is False:
        raise ValueError(
            f"{names[1]}: expected a symmetric Hessian, got one whose mirror image differs by {float(gap):.3g}"
        )
    return gradient, hessian


def is_per_token(S: Tensor) -> bool:
    """Say whether the loss's Hessian couples the outputs of one token only, (L, o, o)."""
    return S.ndim == 3


def dense(S: Tensor) -> Tensor:
    """Write the loss's Hessian out as one matrix, (L · o, L · o)."""
    tokens, outputs = S.shape[:2]
    if is_per_token(S):
        full = S.new_zeros(tokens, outputs, tokens, outputs)
        index = torch.arange(tokens, device=S.device)
        full[index, :, index] = S
        S = full
    return S.reshape(tokens * outputs, tokens * outputs)
