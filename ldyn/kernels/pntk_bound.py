"""How far a block of the tangent kernel is from a multiple of the identity, with a probability and with constants.

A network ends in a linear layer with weights W, (V, h), whose entries are independent of the body and of each other,
with mean zero and variance σ². Given the body, the block of two inputs is K = W A Wᵀ + c I, where A is the body's own
tangent kernel for the two inputs and c = φ·φ' (+ 1 with a bias). A number κ stands for the block, and the error is
D = K − κI. Every function here describes K and D *given the body*: only the head is random. Derived in the chapter
*How wide is wide enough for one number?*
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.kernels.entk import KINDS

__all__ = [
    "ErrorBound",
    "pntk_chaos_bound",
    "pntk_chaos_factor",
    "pntk_error_bound",
    "pntk_markov_bound",
    "pntk_second_moment",
    "pntk_variance",
]


class ErrorBound(NamedTuple):
    """Bounds that hold together with probability at least 1 − δ over a Gaussian head, the body being fixed.

    Attributes:
        numerator: (...) an upper bound on ‖K − κI‖_F.
        denominator: (...) a lower bound on ‖K‖_F; where it is not positive it says nothing.
        ratio: (...) an upper bound on ‖K − κI‖_F / ‖K‖_F: the quotient, or infinity where the denominator says nothing.
        cap: √V, which that ratio never exceeds, whatever the block.
    """

    numerator: Tensor
    denominator: Tensor
    ratio: Tensor
    cap: float


def pntk_error_bound(
    A: Tensor,
    c: Tensor | float,
    sigma2: float,
    k: int,
    delta: float,
    *,
    pairs: int = 1,
) -> ErrorBound:
    """Bound the error of putting one number in the place of a block of the tangent kernel, for a Gaussian head.

    With S = (A + Aᵀ)/2, L = log(2 V² M / δ) and M = `pairs`, the bounds are

        ‖K − κI‖_F ≤ σ² √((V−1)(V+4)) (√(2L) ‖A‖_F + L ‖A‖),
        ‖K‖_F ≥ √V (|σ² tr A + c| − 2σ² (‖S‖_F √(L/V) + ‖S‖ L/V)).

    They hold together with probability at least 1 − δ for each of the three numbers "first", "sum" and "trace", for
    any A and c: neither has to be symmetric or positive. For a batch of blocks with `pairs` = 1 each block has its own
    probability; set `pairs` to the number of blocks and the bounds hold for all of them at once.

    Args:
        A: (..., h, h) tangent kernel of the body for one pair of inputs, or for each of a batch.
        c: φ·φ' (+ 1 with a bias): a number, or a tensor that broadcasts against the batch (...).
        sigma2: Variance σ² of an entry of the head, > 0.
        k: Number V of outputs, ≥ 1.
        delta: Probability δ that the bounds may fail, in (0, 1).
        pairs: Number M of blocks for which they are to hold at once, ≥ 1.

    Returns:
        The two bounds, their quotient, and what the quotient can never exceed; in the dtype of `A`.

    Raises:
        ValueError: If `A` is no non-empty finite floating-point (..., h, h), `c` does not fit it, or a number is out of
            its range.
    """
    body = _body(A)
    shift = _head_term(c, body)
    variance, outputs, level = _checks.require_positive(sigma2, "sigma2"), _outputs(k), _level(delta)
    log = math.log(2 * outputs**2 * _checks.require_integer(pairs, "pairs") / level)
    symmetric = _symmetric(body)
    spread = math.sqrt(2 * log) * _frobenius(body) + log * _operator(body)
    numerator = variance * math.sqrt((outputs - 1) * (outputs + 4)) * spread
    slack = math.sqrt(log / outputs) * _frobenius(symmetric) + log / outputs * _operator(symmetric)
    denominator = math.sqrt(outputs) * ((variance * _trace(body) + shift).abs() - 2 * variance * slack)
    numerator = numerator.expand_as(denominator).clone()
    nothing = torch.full_like(denominator, math.inf)
    ratio = torch.where(denominator > 0, numerator / denominator, nothing)
    return ErrorBound(numerator, denominator, ratio, math.sqrt(outputs))


def pntk_variance(A: Tensor, sigma2: float, k: int, *, kind: str = "first", kurtosis: float = 3.0) -> Tensor:
    """Variance of the number κ over heads, exactly.

    With S = (A + Aᵀ)/2 and excess e = kurtosis − 3 it is σ⁴ (2 ‖S‖²_F + e Σ_a A²_aa) for "first", the same with e/V
    for "sum", and 1/V of that of "first" for "trace". The mean of all three is σ² tr A + c.

    Args:
        A: (..., h, h) tangent kernel of the body.
        sigma2: Variance σ² of an entry of the head, > 0.
        k: Number V of outputs, ≥ 1.
        kind: "first", "sum" or "trace".
        kurtosis: E w⁴ / σ⁴ of an entry, ≥ 1: 3 for a normal, 1.8 for a uniform distribution.

    Returns:
        (...) variances, in the dtype of `A`.

    Raises:
        ValueError: If `A` is no non-empty finite floating-point (..., h, h), the kind is unknown, or a number is out of
            its range.
    """
    body = _body(A)
    variance, outputs = _checks.require_positive(sigma2, "sigma2"), _outputs(k)
    excess = _excess(kurtosis) / (outputs if _kind(kind) == "sum" else 1)
    result = variance**2 * _form_variance(body, excess)
    return result / outputs if kind == "trace" else result


def pntk_second_moment(A: Tensor, sigma2: float, k: int, *, kind: str = "first", kurtosis: float = 3.0) -> Tensor:
    """Mean of ‖K − κI‖²_F over heads with independent entries of mean zero, exactly.

    With S = (A + Aᵀ)/2 and v = 2 ‖S‖²_F + (kurtosis − 3) Σ_a A²_aa it is

        σ⁴ (V−1) (V ‖A‖²_F + v)               for "trace",
        σ⁴ (V−1) (V ‖A‖²_F + v + v)           for "first",
        σ⁴ (V−1) (V ‖A‖²_F + v + 2 ‖S‖²_F)    for "sum".

    Means add up: the mean of ‖K(X, X') − K̂ ⊗ I‖²_F over all pairs of a data set is the sum over the batch.

    Args:
        A: (..., h, h) tangent kernel of the body.
        sigma2: Variance σ² of an entry of the head, > 0.
        k: Number V of outputs, ≥ 1.
        kind: "first", "sum" or "trace".
        kurtosis: E w⁴ / σ⁴ of an entry, ≥ 1.

    Returns:
        (...) second moments, in the dtype of `A`.

    Raises:
        ValueError: If `A` is no non-empty finite floating-point (..., h, h), the kind is unknown, or a number is out of
            its range.
    """
    body = _body(A)
    variance, outputs = _checks.require_positive(sigma2, "sigma2"), _outputs(k)
    diagonal = _form_variance(body, _excess(kurtosis))
    apart = {"trace": torch.zeros_like(diagonal), "first": diagonal, "sum": _form_variance(body, 0.0)}[_kind(kind)]
    return variance**2 * (outputs - 1) * (outputs * _frobenius(body).square() + diagonal + apart)


def pntk_markov_bound(
    A: Tensor, sigma2: float, k: int, delta: float, *, kind: str = "first", kurtosis: float = 3.0
) -> Tensor:
    """Bound ‖K − κI‖_F for every distribution of the head's entries: √(second moment / δ), by Markov's inequality.

    It holds with probability at least 1 − δ, and no bound that knows only the second moment is smaller: for a head
    whose entries are mostly zero it is attained in the limit.

    Args:
        A: (..., h, h) tangent kernel of the body.
        sigma2: Variance σ² of an entry of the head, > 0.
        k: Number V of outputs, ≥ 1.
        delta: Probability δ that the bound may fail, in (0, 1).
        kind: "first", "sum" or "trace".
        kurtosis: E w⁴ / σ⁴ of an entry, ≥ 1.

    Returns:
        (...) bounds, in the dtype of `A`.

    Raises:
        ValueError: As `pntk_second_moment`, or if `delta` is not in (0, 1).
    """
    level = _level(delta)
    return (pntk_second_moment(A, sigma2, k, kind=kind, kurtosis=kurtosis) / level).sqrt()


def pntk_chaos_factor(delta: float) -> float:
    """How many root mean squares bound the norm of a quadratic polynomial in normal variables, up to probability δ.

    A vector D whose entries are quadratic forms of normal variables less their means satisfies
    (E‖D‖^q)^(1/q) ≤ (q − 1) (E‖D‖²)^(1/2) for q ≥ 2 (hypercontractivity). Markov's inequality for ‖D‖^q, with the best
    q, gives the factor (q − 1) δ^(−1/q): 1/√δ down to δ = e⁻⁴, and with ℓ = log(1/δ) never more than e (ℓ − 1) where
    ℓ ≥ 2. It does not contain the size of D, so that it serves a block and a whole data set alike.

    Args:
        delta: Probability δ that the bound may fail, in (0, 1).

    Returns:
        The factor, > 1.

    Raises:
        ValueError: If `delta` is not in (0, 1).
    """
    log = -math.log(_level(delta))
    order = 2.0 if log <= 4 else (log + math.sqrt(log * (log - 4))) / 2
    return (order - 1) * math.exp(log / order)


def pntk_chaos_bound(A: Tensor, sigma2: float, k: int, delta: float, *, kind: str = "first") -> Tensor:
    """Bound ‖K − κI‖_F for a Gaussian head by its root mean square: no union over the entries of the block.

    It holds with probability at least 1 − δ. The factor is that of `pntk_chaos_factor`; for a data set multiply it by
    the root of the summed second moments instead.

    Args:
        A: (..., h, h) tangent kernel of the body.
        sigma2: Variance σ² of an entry of the head, > 0.
        k: Number V of outputs, ≥ 1.
        delta: Probability δ that the bound may fail, in (0, 1).
        kind: "first", "sum" or "trace".

    Returns:
        (...) bounds, in the dtype of `A`.

    Raises:
        ValueError: As `pntk_second_moment`, or if `delta` is not in (0, 1).
    """
    return pntk_chaos_factor(delta) * pntk_second_moment(A, sigma2, k, kind=kind).sqrt()


def _form_variance(body: Tensor, excess: float) -> Tensor:
    """Variance of wᵀAw for independent entries of variance 1 and kurtosis 3 + excess."""
    gaussian = 2 * _frobenius(_symmetric(body)).square()
    # at kurtosis 1 a diagonal body leaves exactly zero, of which rounding must not make a negative variance
    return (gaussian + excess * body.diagonal(dim1=-2, dim2=-1).square().sum(-1)).clamp_min(0)


def _body(A: Tensor) -> Tensor:
    """Require one square matrix or a batch of them."""
    return _checks.require_shape(_checks.require_real(A, "A", min_ndim=2), "A", ("...", "h", "h"))


def _head_term(c: Tensor | float, body: Tensor) -> Tensor:
    """Read c as a tensor that broadcasts against the batch of bodies."""
    if not isinstance(c, Tensor):
        return body.new_tensor(_checks.require_number(c, "c"))
    shift = _checks.require_same(_checks.require_real(c, "c"), "c", body, "A")
    batch = tuple(body.shape[:-2])
    if any(1 != one != other != 1 for one, other in zip(reversed(shift.shape), reversed(batch), strict=False)):
        raise ValueError(
            f"c: expected a shape that broadcasts against the batch {batch} of A, got {_checks.describe(c)}"
        )
    return shift


def _outputs(k: int) -> int:
    """Require a number of outputs."""
    return _checks.require_integer(k, "k")


def _level(delta: float) -> float:
    """Require a probability strictly between 0 and 1."""
    level = _checks.require_positive(delta, "delta")
    if level >= 1:
        raise ValueError(f"delta: expected a probability strictly between 0 and 1, got {level!r}")
    return level


def _excess(kurtosis: float) -> float:
    """Require a kurtosis that a distribution can have, and subtract that of the normal distribution."""
    value = _checks.require_number(kurtosis, "kurtosis")
    if value < 1:
        raise ValueError(f"kurtosis: expected E w⁴ / σ⁴ >= 1 (3 for a normal distribution), got {value!r}")
    return value - 3


def _kind(kind: str) -> str:
    """Require one of the three numbers."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    return kind


def _symmetric(body: Tensor) -> Tensor:
    """Symmetric part of each matrix."""
    return (body + body.mT) / 2


def _trace(body: Tensor) -> Tensor:
    """Trace of each matrix."""
    return body.diagonal(dim1=-2, dim2=-1).sum(-1)


def _frobenius(body: Tensor) -> Tensor:
    """Frobenius norm of each matrix."""
    norm: Tensor = torch.linalg.matrix_norm(body)
    return norm


def _operator(body: Tensor) -> Tensor:
    """Spectral norm of each matrix."""
    norm: Tensor = torch.linalg.matrix_norm(body, 2)
    return norm
