"""Softmax, log-softmax and log-sum-exp: first, second and third derivatives with respect to the logits.

Throughout, p = softmax(z / τ) for logits z with the V classes along the last dimension, every derivative is
taken with respect to z, and Σ = diag(p) − p pᵀ. Log-sum-exp is the cumulant generating function of a random
variable with law p: its derivatives are the mean, the covariance and the third cumulant. Derived in the
chapter *Softmax*.

The complements 1 − p_k are summed from the other classes where p_k is close to 1. So every entry keeps its
relative accuracy for logits of any size, also where the probabilities are within rounding of 0 and 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn._checks import require_positive, require_real, require_same, require_shape

JACOBIAN_NORM_BOUND = 0.5
"""Supremum over all logits and all V of the spectral norm of the softmax Jacobian (temperature 1)."""

HESSIAN_NORM_BOUND = math.sqrt(2 / 27)
"""Supremum over all logits and all V of the injective norm of the softmax Hessian (temperature 1)."""


class JacobianNormBounds(NamedTuple):
    """Bounds on the spectral norm of the softmax Jacobian, each of shape (...)."""

    lower: Tensor
    upper: Tensor


def softmax_jacobian(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Jacobian of softmax: ∂p_i/∂z_j = (δ_ij p_i − p_i p_j) / τ, the covariance matrix of the classes.

    Args:
        logits: z, shape (..., V).
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        Symmetric positive semidefinite matrices, shape (..., V, V), with index [i, j].

    Raises:
        ValueError: If the logits are not a non-empty tensor of finite floating-point numbers with at least
            one dimension, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    p, rest = _probabilities(logits, tau)
    return _covariance(p, rest) / tau


def softmax_hessian(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Hessian of softmax: ∂²p_k/∂z_i∂z_j = p_k [(δ_ki − p_i)(δ_kj − p_j) − Σ_ij] / τ².

    The tensor is symmetric in all three indices: it is the third cumulant of the classes.

    Args:
        logits: z, shape (..., V).
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        Tensor of shape (..., V, V, V) with index [k, i, j].

    Raises:
        ValueError: If the logits are not a non-empty tensor of finite floating-point numbers with at least
            one dimension, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    p, rest = _probabilities(logits, tau)
    centred = _centring(p, rest)
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    return p[..., None, None] * (products - _covariance(p, rest).unsqueeze(-3)) / tau**2


def log_softmax_jacobian(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Jacobian of log-softmax: ∂ log p_i/∂z_j = (δ_ij − p_j) / τ, that is A / τ with A = I − 1 pᵀ.

    Args:
        logits: z, shape (..., V).
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        Matrices of shape (..., V, V) with index [i, j]; not symmetric.

    Raises:
        ValueError: If the logits are not a non-empty tensor of finite floating-point numbers with at least
            one dimension, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    return _centring(*_probabilities(logits, tau)) / tau


def log_softmax_hessian(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Hessian of log-softmax, the same for every component: ∂² log p_k/∂z_i∂z_j = −(δ_ij p_i − p_i p_j) / τ².

    Args:
        logits: z, shape (..., V).
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        Symmetric negative semidefinite matrices, shape (..., V, V), with index [i, j]; there is no index k
        because nothing depends on it.

    Raises:
        ValueError: If the logits are not a non-empty tensor of finite floating-point numbers with at least
            one dimension, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    return -_covariance(*_probabilities(logits, tau)) / tau**2


def softmax_jacobian_vector_product(logits: Tensor, vector: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax Jacobian times a vector, p ∘ (v − pᵀv) / τ, in O(V); the Jacobian is symmetric, so also vᵀJ.

    Args:
        logits: z, shape (..., V).
        vector: v, shape (..., V) or one that broadcasts to it along the batch.
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        J v, shape (..., V).

    Raises:
        ValueError: If an argument is not a non-empty tensor of finite floating-point numbers, the vector does
            not fit the logits in shape, dtype or device, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    p, _ = _probabilities(logits, tau)
    return p * _centred(p, _direction(vector, "vector", logits)) / tau


def softmax_hessian_contraction(logits: Tensor, weights: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weighted sum of the softmax Hessians, Σ_k r_k ∇²p_k = (diag(c) − c pᵀ − p cᵀ) / τ².

    Here c = p ∘ (r − pᵀr). This is the Hessian of the mean pᵀr of a fixed reward r; the V×V×V tensor is never
    formed.

    Args:
        logits: z, shape (..., V).
        weights: r, shape (..., V) or one that broadcasts to it along the batch.
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        Symmetric matrices, shape (..., V, V), with index [i, j].

    Raises:
        ValueError: If an argument is not a non-empty tensor of finite floating-point numbers, the weights do
            not fit the logits in shape, dtype or device, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    p, rest = _probabilities(logits, tau)
    centred = _centred(p, _direction(weights, "weights", logits))
    pairs = centred.unsqueeze(-1) + centred.unsqueeze(-2)
    off_diagonal = -p.unsqueeze(-1) * p.unsqueeze(-2) * pairs
    return _with_diagonal(off_diagonal, p * centred * (rest - p)) / tau**2


def third_cumulant(logits: Tensor, r: Tensor, u: Tensor, v: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Third joint cumulant E[(r − Er)(u − Eu)(v − Ev)] / τ³ under p: the third derivative of log-sum-exp.

    It is symmetric in r, u and v. At temperature 1 it equals the softmax Hessian applied to the three
    directions, Σ_kij r_k u_i v_j ∂²p_k/∂z_i∂z_j; in O(V).

    Args:
        logits: z, shape (..., V).
        r: First direction, shape (..., V) or one that broadcasts to it along the batch.
        u: Second direction, likewise.
        v: Third direction, likewise.
        temperature: τ > 0: the derivative is that of logsumexp(z / τ).

    Returns:
        D³ logsumexp(z / τ)[r, u, v], shape (...).

    Raises:
        ValueError: If an argument is not a non-empty tensor of finite floating-point numbers, a direction
            does not fit the logits in shape, dtype or device, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    p, _ = _probabilities(logits, tau)
    product = p
    for name, direction in (("r", r), ("u", u), ("v", v)):
        product = product * _centred(p, _direction(direction, name, logits))
    return product.sum(-1) / tau**3


def softmax_jacobian_norm_bounds(logits: Tensor, *, temperature: float = 1.0) -> JacobianNormBounds:
    """Bounds on the spectral norm of the softmax Jacobian from the two largest probabilities, in O(V).

    With p₁ ≥ p₂ the two largest probabilities,
    max{p₂, V/(V−1) p₁(1−p₁)} ≤ τ‖J‖₂ ≤ min{p₁, 2 p₁(1−p₁)} ≤ ½.

    Args:
        logits: z, shape (..., V).
        temperature: τ > 0 in p = softmax(z / τ).

    Returns:
        Lower and upper bound, each of shape (...); at most a factor 2 apart, equal for V = 2 and where the
        two largest probabilities are equal.

    Raises:
        ValueError: If the logits are not a non-empty tensor of finite floating-point numbers with at least
            one dimension, or the temperature is not a positive number.
    """
    tau = require_positive(temperature, "temperature")
    p, rest = _probabilities(logits, tau)
    size = p.shape[-1]
    if size == 1:
        return JacobianNormBounds(torch.zeros_like(p[..., 0]), torch.zeros_like(p[..., 0]))
    largest = p.topk(2, dim=-1).values
    spread = (p * rest).amax(-1)
    lower = torch.maximum(largest[..., 1], spread * (size / (size - 1)))
    upper = torch.minimum(largest[..., 0], 2 * spread)
    return JacobianNormBounds(lower / tau, upper / tau)


def _probabilities(logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Check the logits; return p and 1 − p, both accurate to rounding relative to themselves."""
    z = require_real(logits, "logits", min_ndim=1)
    p = torch.softmax(z / tau, dim=-1)
    # Only the largest probability can exceed one half, where 1 − p would cancel: sum the others instead.
    is_top = _is_top(p)
    others = torch.where(is_top, torch.zeros_like(p), p).sum(-1, keepdim=True)
    return p, torch.where(is_top, others, 1 - p)


def _is_top(p: Tensor) -> Tensor:
    """Mark one largest entry along the last dimension."""
    positions = torch.arange(p.shape[-1], device=p.device)
    return positions == p.argmax(-1, keepdim=True)


def _direction(value: Tensor, name: str, logits: Tensor) -> Tensor:
    """Check that a vector fits the logits: same dtype, device and V, batch dimensions that broadcast."""
    vector = require_same(require_real(value, name, min_ndim=1), name, logits, "logits")
    require_shape(vector, name, ("...", logits.shape[-1]))
    pairs = zip(reversed(vector.shape), reversed(logits.shape), strict=False)
    if vector.ndim > logits.ndim or any(size not in (1, batch) for size, batch in list(pairs)[1:]):
        expected, got = tuple(logits.shape), tuple(vector.shape)
        raise ValueError(f"{name}: expected a shape that broadcasts to that of logits {expected}, got {got}")
    return vector


def _centred(p: Tensor, vector: Tensor) -> Tensor:
    """Return the vector minus its mean under p; measured from the likeliest class, so that nothing cancels there."""
    reference = vector.expand_as(p).gather(-1, p.argmax(-1, keepdim=True))
    shifted = vector - reference
    return shifted - (p * shifted).sum(-1, keepdim=True)


def _with_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    """Return the matrix with its diagonal replaced."""
    eye = torch.eye(diagonal.shape[-1], dtype=torch.bool, device=diagonal.device)
    return torch.where(eye, diagonal.unsqueeze(-1), matrix)


def _covariance(p: Tensor, rest: Tensor) -> Tensor:
    """Return the matrix diag(p) − p pᵀ, with p (1 − p) on its diagonal."""
    return _with_diagonal(-p.unsqueeze(-1) * p.unsqueeze(-2), p * rest)


def _centring(p: Tensor, rest: Tensor) -> Tensor:
    """Return the matrix I − 1 pᵀ, with 1 − p on its diagonal."""
    rows = -p.unsqueeze(-2).expand(*p.shape[:-1], p.shape[-1], p.shape[-1])
    return _with_diagonal(rows, rest)
