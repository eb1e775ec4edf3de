"""RMSNorm to second order, the same as LayerNorm but that no mean is removed; public in `ldyn.hessians.layernorm`."""

from __future__ import annotations

from torch import Tensor

from ldyn.hessians import _layernorm_core as core
from ldyn.hessians._layernorm_core import JacobianSpectrum, Kind


def rmsnorm_jacobian(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Write out the Jacobian of RMSNorm, ∂y_k/∂x_i = γ_k (δ_ki − x̂_k x̂_i / d) / σ.

    Args:
        x: (..., d), a row of features in each place.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d, d) with index [k, i]; symmetric and positive semidefinite if γ is None.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False)
    return core.jacobian(rows, weight)


def rmsnorm_hessian(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Write out the second derivatives of RMSNorm.

    ∂²y_k/∂x_i∂x_j = −γ_k (δ_ki x̂_j + δ_kj x̂_i + δ_ij x̂_k − 3 x̂_k x̂_i x̂_j / d) / (d σ²).

    Args:
        x: (..., d), a row of features in each place.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d, d, d) with index [k, i, j]; symmetric in all three if γ is None.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False)
    return core.hessian(rows, weight)


def rmsnorm_hessian_contraction(x: Tensor, r: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Compute the Hessian of rᵀy for RMSNorm, Σ_k r_k ∇²y_k, without the tensor.

    Args:
        x: (..., d), a row of features in each place.
        r: (..., d) upstream weights; batch dimensions broadcast with those of x.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d, d) with index [i, j], symmetric.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False, r=r)
    return core.contraction(rows, core.scaled(weight, r))


def rmsnorm_hessian_vector_product(
    x: Tensor, r: Tensor, v: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Multiply the Hessian of rᵀy for RMSNorm by a vector, (Σ_k r_k ∇²y_k) v, in O(d).

    Args:
        x: (..., d), a row of features in each place.
        r: (..., d) upstream weights; batch dimensions broadcast with those of x.
        v: (..., d) a direction, likewise.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d).

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False, r=r, v=v)
    return rows.finite(core.second_derivative(rows, core.scaled(weight, r), v))


def rmsnorm_second_derivative(
    x: Tensor, u: Tensor, v: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Differentiate RMSNorm along two directions, D²y[u, v], in O(d).

    Args:
        x: (..., d), a row of features in each place.
        u: (..., d) a direction; batch dimensions broadcast with those of x.
        v: (..., d) a direction, likewise.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d), index k.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False, u=u, v=v)
    return rows.finite(core.scaled(weight, core.second_derivative(rows, u, v)))


def rmsnorm_jvp(x: Tensor, v: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Multiply the Jacobian of RMSNorm by a direction in O(d).

    Args:
        x: (..., d), a row of features in each place.
        v: (..., d) a direction; batch dimensions broadcast with those of x.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d), how y moves to first order.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False, v=v)
    return rows.finite(core.scaled(weight, core.jacobian_product(rows, v)))


def rmsnorm_vjp(x: Tensor, r: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Multiply the transposed Jacobian of RMSNorm by upstream weights in O(d).

    Args:
        x: (..., d), a row of features in each place.
        r: (..., d) upstream weights; batch dimensions broadcast with those of x.
        weight: (d,) γ; None for ones.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (..., d), the gradient of rᵀy in x.

    Raises:
        ValueError: If a tensor is empty, not finite or not floating or does not fit x, eps is negative, or eps is 0 and
            a row is zero.
    """
    rows = core.normalised(x, eps, weight, centred=False, r=r)
    return rows.finite(core.jacobian_product(rows, core.scaled(weight, r)))


def rmsnorm_jacobian_spectrum(x: Tensor, *, eps: float = 1e-5) -> JacobianSpectrum:
    """Find the eigenvalues of the Jacobian of RMSNorm without γ in closed form.

    Args:
        x: (..., d), a row of features in each place.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        Zero, which does not occur; eps/σ³ along x̂; 1/σ orthogonal to it.

    Raises:
        ValueError: If x is empty, not finite or not floating, eps is negative, or eps is 0 and a row is zero.
    """
    rows = core.normalised(x, eps, centred=False)
    return core.spectrum(rows)


def rmsnorm_jacobian_norm(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Find the spectral norm of the Jacobian of RMSNorm without γ: 1/σ, or eps/σ³ where d = 1.

    Args:
        x: (..., d), a row of features in each place.
        eps: What is added to the mean square, ≥ 0.

    Returns:
        (...), at most 1/sqrt(eps). With γ the norm is at most max |γ_k| times this.

    Raises:
        ValueError: If x is empty, not finite or not floating, eps is negative, or eps is 0 and a row is zero.
    """
    rows = core.normalised(x, eps, centred=False)
    return core.jacobian_norm(rows)


def rmsnorm_hessian_norm(x: Tensor, *, eps: float = 1e-5, kind: Kind = "injective") -> Tensor:
    """Find a norm of the second derivatives of RMSNorm without γ in closed form.

    Args:
        x: (..., d), a row of features in each place.
        eps: What is added to the mean square, ≥ 0.
        kind: "injective", the supremum of r · D²y[u, v] over unit vectors, never above `HESSIAN_NORM_BOUND`
            / (sqrt(d) eps); or "flattening", the spectral norm of the tensor as a (d², d) matrix, never smaller.

    Returns:
        (...).

    Raises:
        ValueError: If x is empty, not finite or not floating, eps is negative, eps is 0 and a row is zero, or the
            kind is unknown.
    """
    rows = core.normalised(x, eps, centred=False)
    return core.hessian_norm(rows, kind)
