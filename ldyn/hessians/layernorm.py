"""LayerNorm and RMSNorm to second order, in closed form: derivatives, their products, spectra and norms.

With P = I − 11ᵀ/d for LayerNorm and P = I for RMSNorm, a row x of d features becomes y = γ ∘ x̂ + β, where x̂ = Px / σ
and σ = sqrt(|Px|²/d + eps). Without γ the map is d times the gradient of σ, so its Jacobian is symmetric and positive
semidefinite, and its second derivatives do not change when their three indices change places. All formulas are exact
for every eps ≥ 0. β enters no derivative in x. Derived in the chapter `book/hessians/layernorm.md`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldyn.hessians import _layernorm_core as core
from ldyn.hessians._layernorm_core import JacobianSpectrum, Kind
from ldyn.hessians._rmsnorm import (
    rmsnorm_hessian,
    rmsnorm_hessian_contraction,
    rmsnorm_hessian_norm,
    rmsnorm_hessian_vector_product,
    rmsnorm_jacobian,
    rmsnorm_jacobian_norm,
    rmsnorm_jacobian_spectrum,
    rmsnorm_jvp,
    rmsnorm_second_derivative,
    rmsnorm_vjp,
)

__all__ = [
    "HESSIAN_NORM_BOUND",
    "JacobianSpectrum",
    "layernorm_hessian",
    "layernorm_hessian_contraction",
    "layernorm_hessian_norm",
    "layernorm_hessian_vector_product",
    "layernorm_jacobian",
    "layernorm_jacobian_norm",
    "layernorm_jacobian_spectrum",
    "layernorm_jvp",
    "layernorm_second_derivative",
    "layernorm_vjp",
    "rmsnorm_hessian",
    "rmsnorm_hessian_contraction",
    "rmsnorm_hessian_norm",
    "rmsnorm_hessian_vector_product",
    "rmsnorm_jacobian",
    "rmsnorm_jacobian_norm",
    "rmsnorm_jacobian_spectrum",
    "rmsnorm_jvp",
    "rmsnorm_second_derivative",
    "rmsnorm_vjp",
]

HESSIAN_NORM_BOUND = 48 / (25 * math.sqrt(5))
"""Supremum over all rows of sqrt(d) · eps times the injective norm of the second derivatives; attained at v = eps/4."""


def layernorm_jacobian(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Write out the Jacobian of LayerNorm, ∂y_k/∂x_i = γ_k (P_ki − x̂_k x̂_i / d) / σ.

    Args:
        x: (..., d), a row of features in each place.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d, d) with index [k, i]; symmetric and positive semidefinite if γ is None.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True)
    return core.jacobian(rows, weight)


def layernorm_hessian(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Write out the second derivatives of LayerNorm.

    ∂²y_k/∂x_i∂x_j = −γ_k (P_ki x̂_j + P_kj x̂_i + P_ij x̂_k − 3 x̂_k x̂_i x̂_j / d) / (d σ²).

    Args:
        x: (..., d), a row of features in each place.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d, d, d) with index [k, i, j]; symmetric in all three if γ is None.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True)
    return core.hessian(rows, weight)


def layernorm_hessian_contraction(x: Tensor, r: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Compute the Hessian of rᵀy for LayerNorm, Σ_k r_k ∇²y_k, without the tensor.

    Args:
        x: (..., d), a row of features in each place.
        r: (..., d) upstream weights; batch dimensions broadcast with those of x.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d, d) with index [i, j], symmetric.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True, r=r)
    return core.contraction(rows, core.scaled(weight, r))


def layernorm_hessian_vector_product(
    x: Tensor, r: Tensor, v: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Multiply the Hessian of rᵀy for LayerNorm by a vector, (Σ_k r_k ∇²y_k) v, in O(d).

    Args:
        x: (..., d), a row of features in each place.
        r: (..., d) upstream weights; batch dimensions broadcast with those of x.
        v: (..., d) a direction, likewise.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d).

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True, r=r, v=v)
    return rows.finite(core.second_derivative(rows, core.scaled(weight, r), v))


def layernorm_second_derivative(
    x: Tensor, u: Tensor, v: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Differentiate LayerNorm along two directions, D²y[u, v], in O(d).

    Args:
        x: (..., d), a row of features in each place.
        u: (..., d) a direction; batch dimensions broadcast with those of x.
        v: (..., d) a direction, likewise.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d), index k.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True, u=u, v=v)
    return rows.finite(core.scaled(weight, core.second_derivative(rows, u, v)))


def layernorm_jvp(x: Tensor, v: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Multiply the Jacobian of LayerNorm by a direction in O(d).

    Args:
        x: (..., d), a row of features in each place.
        v: (..., d) a direction; batch dimensions broadcast with those of x.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d), how y moves to first order.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True, v=v)
    return rows.finite(core.scaled(weight, core.jacobian_product(rows, v)))


def layernorm_vjp(x: Tensor, r: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Multiply the transposed Jacobian of LayerNorm by upstream weights in O(d).

    Args:
        x: (..., d), a row of features in each place.
        r: (..., d) upstream weights; batch dimensions broadcast with those of x.
        weight: (d,) γ; None for ones.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (..., d), the gradient of rᵀy in x.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is constant.
    """
    rows = core.normalised(x, eps, weight, centred=True, r=r)
    return rows.finite(core.jacobian_product(rows, core.scaled(weight, r)))


def layernorm_jacobian_spectrum(x: Tensor, *, eps: float = 1e-5) -> JacobianSpectrum:
    """Find the eigenvalues of the Jacobian of LayerNorm without γ in closed form.

    Args:
        x: (..., d), a row of features in each place.
        eps: What is added to the variance, ≥ 0.

    Returns:
        Zero along 1; eps/σ³ along x̂; 1/σ orthogonal to both.

    Raises:
        ValueError: If x is empty, not finite or not floating, eps is negative, or eps is 0 and a row is constant.
    """
    rows = core.normalised(x, eps, centred=True)
    return core.spectrum(rows)


def layernorm_jacobian_norm(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Find the spectral norm of the Jacobian of LayerNorm without γ: 1/σ, or eps/σ³ where d = 2.

    Args:
        x: (..., d), a row of features in each place.
        eps: What is added to the variance, ≥ 0.

    Returns:
        (...), at most 1/sqrt(eps). With γ the norm is at most max |γ_k| times this.

    Raises:
        ValueError: If x is empty, not finite or not floating, eps is negative, or eps is 0 and a row is constant.
    """
    rows = core.normalised(x, eps, centred=True)
    return core.jacobian_norm(rows)


def layernorm_hessian_norm(x: Tensor, *, eps: float = 1e-5, kind: Kind = "injective") -> Tensor:
    """Find a norm of the second derivatives of LayerNorm without γ in closed form.

    Args:
        x: (..., d), a row of features in each place.
        eps: What is added to the variance, ≥ 0.
        kind: "injective", the supremum of r · D²y[u, v] over unit vectors, never above `HESSIAN_NORM_BOUND`
            / (sqrt(d) eps); or "flattening", the spectral norm of the tensor as a (d², d) matrix, never smaller.

    Returns:
        (...).

    Raises:
        ValueError: If x is empty, not finite or not floating, eps is negative, eps is 0 and a row is constant, or the
            kind is unknown.
    """
    rows = core.normalised(x, eps, centred=True)
    return core.hessian_norm(rows, kind)
