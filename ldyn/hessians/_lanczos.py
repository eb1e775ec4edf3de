"""Lanczos' process with full reorthogonalisation, and the quadrature rule that it carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.hessians._spectrum_operator import Operator, SymmetricOperator, as_operator


class Quadrature(NamedTuple):
    """A rule Σ_i w_i f(λ_i), the Gauss rule of the spectral measure that a start vector sees.

    Attributes:
        nodes: (m,) λ, ascending: the eigenvalues of T.
        weights: (m,) w ≥ 0, which sum to one: squared first entries of the eigenvectors of T.
    """

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Lanczos:
    """What m steps leave behind: A Q = Q T + r eᵀ with e the last unit vector.

    Attributes:
        Q: (P, m) orthonormal columns that span v, A v, …, A^{m−1} v.
        T: (m, m) symmetric, tridiagonal, with non-negative entries beside the diagonal.
        residual: (P,) r, orthogonal to the columns of Q; zero up to rounding if they span an invariant subspace.
        complete: Whether the process ended because they do.
    """

    Q: Tensor
    T: Tensor
    residual: Tensor
    complete: bool

    def quadrature(self) -> Quadrature:
        """Turn T into nodes and weights.

        Returns:
            The rule, exact for polynomials up to degree 2m − 1.
        """
        nodes, vectors = torch.linalg.eigh(self.T)
        weights = vectors[0].square()
        return Quadrature(nodes, weights / weights.sum())


def lanczos(operator: Operator, steps: int, *, start: Tensor | None = None, seed: int = 0) -> Lanczos:
    """Run Lanczos' process on a symmetric operator.

    Every new vector is made orthogonal to all before it, twice. Without this, rounding lets directions that have
    converged come back, and one eigenvalue shows as many. Costs one product for each step, memory for m vectors, and
    4 m² P multiplications.

    Args:
        operator: A symmetric matrix (P, P), what `curvature_operator` returns, or anything else with ``shape``,
            ``dtype``, ``device`` and ``@``, an operator of curvlinops for instance.
        steps: m, at least 1; the process ends earlier, after at most P steps, at an invariant subspace.
        start: (P,) the vector to start from, not zero. None draws one from a private generator, uniform in direction.
        seed: Seed of that generator.

    Returns:
        The vectors, the tridiagonal matrix and the residual.

    Raises:
        ValueError: If the operator is no square operator in single or double precision, the steps or the seed are no
            integers in range, the start vector does not fit or is zero, or a product is not finite.
    """
    matrix = as_operator(operator)
    count = min(_checks.require_integer(steps, "steps"), matrix.size)
    q = start_vector(matrix, random_generator(seed)) if start is None else _required_start(start, matrix)
    # a coupling this small is what rounding leaves of zero; it would enter the quadrature squared
    negligible = 100 * torch.finfo(matrix.dtype).eps
    basis = q.new_zeros(count, matrix.size)
    alphas, betas, scale = [], [], 0.0
    for step in range(count):
        basis[step] = q
        image = product(matrix, q)
        known = basis[: step + 1]
        alpha = q @ image
        residual = image
        for _ in range(2):
            residual = residual - known.T @ (known @ residual)
        beta = torch.linalg.vector_norm(residual)
        scale = max(scale, float(torch.linalg.vector_norm(image)))
        alphas.append(alpha)
        complete = float(beta) <= negligible * scale
        if complete or step + 1 == count:
            break
        betas.append(beta)
        q = residual / beta
    diagonal = torch.diag(torch.stack(alphas))
    beside = torch.diag(torch.stack(betas), 1) if betas else torch.zeros_like(diagonal)
    return Lanczos(known.T.clone(), diagonal + beside + beside.T, residual, complete)


def random_generator(seed: int) -> torch.Generator:
    """Open a private generator.

    Args:
        seed: Its seed, an integer ≥ 0.

    Returns:
        The generator.

    Raises:
        ValueError: If the seed is out of range.
    """
    return torch.Generator().manual_seed(_checks.require_integer(seed, "seed", minimum=0))


def start_vector(matrix: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Draw a vector of length one, uniform in direction.

    Args:
        matrix: The operator that it is for.
        generator: Where the numbers come from, on the processor, in double precision on every device.

    Returns:
        (P,).
    """
    drawn = torch.randn(matrix.size, dtype=torch.float64, generator=generator)
    vector: Tensor = drawn / torch.linalg.vector_norm(drawn)
    return vector.to(matrix.dtype).to(matrix.device)


def product(matrix: SymmetricOperator, vector: Tensor) -> Tensor:
    """Multiplies one vector, and requires a finite result.

    Args:
        matrix: The operator.
        vector: (P,).

    Returns:
        (P,).

    Raises:
        ValueError: If the product has another shape, or is not finite.
    """
    image = matrix.rows(vector.unsqueeze(0)).squeeze(0)
    return _checks.require_finite(
        _checks.require_shape(image, "operator, its product", (matrix.size,)), "operator, its product"
    )


def _required_start(start: Tensor, matrix: SymmetricOperator) -> Tensor:
    """Check a start vector and scale it to length one."""
    vector = _checks.require_real(start, "start", ndim=1).detach()
    _checks.require_shape(vector, "start", (matrix.size,))
    if vector.dtype != matrix.dtype or vector.device != matrix.device:
        got = f"{vector.dtype} on {vector.device}"
        raise ValueError(f"start: expected {matrix.dtype} on {matrix.device}, as the operator's, got {got}")
    largest = vector.abs().max()
    if float(largest) == 0:
        raise ValueError("start: expected a vector that is not zero, got zeros")
    scaled: Tensor = vector / largest
    scaled /= torch.linalg.vector_norm(scaled)
    return scaled
