"""Eigenvalues of a loss's curvature: the extreme ones, and the density of all.

A matrix of P × P numbers is never formed. `curvature_operator` multiplies vectors by the Hessian of a model's loss, its
Gauss–Newton part or the Fisher matrix; `top_eigenvalues` hands such an operator to ARPACK through SciPy; `lanczos`
runs Lanczos' process with full reorthogonalisation, and `spectral_density` reads the distribution of all eigenvalues
from it. The last three take any symmetric operator, also those of curvlinops. Derived in the chapter *Spectrum*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldyn import _checks
from ldyn._progress import progress_bar
from ldyn.hessians._lanczos import Lanczos, Quadrature, lanczos, product, random_generator, start_vector
from ldyn.hessians._spectrum_curvature import curvature_operator
from ldyn.hessians._spectrum_operator import Operator, SymmetricOperator, as_operator

__all__ = [
    "Eigenpairs",
    "Lanczos",
    "Operator",
    "Quadrature",
    "SpectralDensity",
    "SymmetricOperator",
    "curvature_operator",
    "lanczos",
    "spectral_density",
    "top_eigenvalues",
]

_ARPACK = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
_DENSE = 32  # up to this size the whole matrix is cheaper than an iteration


class Eigenpairs(NamedTuple):
    """Some eigenvalues of a symmetric operator A.

    Attributes:
        values: (k,) descending for "largest", ascending for "smallest", by descending size for "magnitude".
        vectors: (P, k) orthonormal, column by column in the same order.
        residuals: (k,) the norms of A v − λ v: each value is at most this far from an eigenvalue of A.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """An estimate of how the P eigenvalues of an operator are distributed, as a probability density.

    Attributes:
        nodes: (K,) where the mass sits before smoothing, probe after probe.
        weights: (K,) how much of it, ≥ 0, with sum one.
        grid: (G,) ascending, equally spaced.
        density: (G,) the mass smoothed by normal densities of standard deviation `width`; its integral is one up to
            the tails beyond the grid, which are less than 10⁻⁶.
        width: That standard deviation.
        probes: Number of start vectors.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor
    width: float
    probes: int

    def moment(self, order: int) -> float:
        """Estimate tr(A^order) / P, the mean of a power of the eigenvalues.

        Args:
            order: The power ≥ 0; without bias up to twice the number of steps, less one.

        Returns:
            Σ_i w_i λ_i^order.

        Raises:
            ValueError: If the order is no integer ≥ 0.
        """
        power = _checks.require_integer(order, "order", minimum=0)
        return float((self.weights * self.nodes**power).sum())


def top_eigenvalues(
    operator: Operator,
    k: int = 1,
    *,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
    tolerance: float | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """Compute k extreme eigenvalues of a symmetric operator, with their eigenvectors, by ARPACK.

    The iteration starts from a vector of a private generator, so that the same call gives the same numbers. Small
    matrices, and requests for nearly all eigenvalues, are written out and diagonalised.

    Args:
        operator: As in `lanczos`.
        k: How many, between 1 and P.
        which: "largest" and "smallest" by sign, "magnitude" by absolute value.
        tolerance: The iteration stops when residuals are estimated to be below this fraction of their eigenvalues;
            the error of an eigenvalue is of the order of the residual's square where it stands apart. None asks for
            what the precision gives: 10⁻¹⁰ in double precision, 10⁻⁴ in single.
        seed: Seed of the generator.

    Returns:
        Values, vectors and the norms of their residuals, in the operator's dtype and on its device.

    Raises:
        ValueError: If the operator is no square operator in single or double precision, an option is out of range, or
            a product is not finite.
        RuntimeError: If the iteration does not converge to the tolerance.
    """
    matrix = as_operator(operator)
    count = _checks.require_integer(k, "k")
    if count > matrix.size:
        raise ValueError(f"k: expected at most {matrix.size}, the size of the operator, got {count}")
    if which not in _ARPACK:
        raise ValueError(f"which: expected one of {sorted(_ARPACK)}, got {_checks.describe(which)}")
    single = matrix.dtype == torch.float32
    accuracy = (1e-4 if single else 1e-10) if tolerance is None else _checks.require_positive(tolerance, "tolerance")
    start = start_vector(matrix, random_generator(seed))
    if matrix.size <= _DENSE or count > matrix.size // 2:
        values, vectors = torch.linalg.eigh(matrix.dense().double())
    else:
        values, vectors = _arpack(matrix, count, which, accuracy, start)
    order = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which].argsort(stable=True)[:count]
    values, vectors = values[order].to(matrix.dtype), vectors[:, order].to(matrix.dtype)
    images = torch.stack([product(matrix, vector) for vector in vectors.T], dim=1)
    return Eigenpairs(values, vectors, torch.linalg.vector_norm(images - vectors * values, dim=0))


def spectral_density(
    operator: Operator,
    *,
    steps: int = 80,
    probes: int = 8,
    seed: int = 0,
    width: float | None = None,
    points: int = 1024,
    progress: bool = False,
) -> SpectralDensity:
    """Estimate the density of all eigenvalues by Lanczos quadrature from random start vectors.

    Each probe gives nodes and weights that integrate polynomials up to degree 2·steps − 1 exactly against the spectral
    measure of its start vector, whose mean over directions is the distribution of the eigenvalues. A single eigenvalue
    weighs 1/P, and outliers show at their place with a weight that scatters around it.

    Args:
        operator: As in `lanczos`.
        steps: Steps of Lanczos' process for each probe; one product each, and memory for as many vectors.
        probes: Number of start vectors; the error of a mean over eigenvalues falls as 1/√(probes · P).
        seed: Seed of the private generator of the start vectors, uniform in direction.
        width: Standard deviation of the normal densities that replace the nodes, > 0; None takes a hundredth of the
            range of the nodes.
        points: Size of the grid, at least 2.
        progress: Whether to show a progress bar on the standard error stream after some seconds, if tqdm is installed.

    Returns:
        Nodes and weights, and the smoothed density on a grid that reaches five widths beyond the nodes.

    Raises:
        ValueError: If the operator is no square operator in single or double precision, an option is out of range, or
            a product is not finite.
    """
    matrix = as_operator(operator)
    count, room = _checks.require_integer(probes, "probes"), _checks.require_integer(points, "points", minimum=2)
    _checks.require_integer(steps, "steps")
    spread = None if width is None else _checks.require_positive(width, "width")
    generator = random_generator(seed)
    rules = []
    with progress_bar(count, desc="spectral density", unit="probe", shown=progress) as bar:
        for _ in range(count):
            rules.append(lanczos(matrix, steps, start=start_vector(matrix, generator)).quadrature())
            bar.update(1)
    nodes = torch.cat([rule.nodes for rule in rules])
    weights = torch.cat([rule.weights for rule in rules]) / count
    reach, size = float(nodes.max() - nodes.min()), float(nodes.abs().max())
    if spread is None:
        # a multiple of the identity has a range of rounding only: there its size sets the scale
        spread = (reach if reach > math.sqrt(torch.finfo(nodes.dtype).eps) * size else size or 1.0) / 100
    low, high = float(nodes.min()) - 5 * spread, float(nodes.max()) + 5 * spread
    grid = torch.linspace(low, high, room, dtype=nodes.dtype, device=nodes.device)
    bumps = torch.exp(-(((grid[:, None] - nodes) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
    return SpectralDensity(nodes, weights, grid, bumps @ weights, spread, count)


def _arpack(matrix: SymmetricOperator, count: int, which: str, accuracy: float, start: Tensor) -> tuple[Tensor, Tensor]:
    """Run ARPACK in double precision, the products in the operator's own."""
    linalg = import_module("scipy.sparse.linalg")

    def multiply(vector: Any) -> Any:
        given = torch.as_tensor(np.ascontiguousarray(vector).reshape(-1))
        return product(matrix, given.to(matrix.dtype).to(matrix.device)).double().cpu().numpy()

    shaped = linalg.LinearOperator(matrix.shape, matvec=multiply, dtype=np.float64)
    # newer versions of SciPy draw a new vector where an invariant subspace ends the iteration: from a fixed seed, then
    seeded = {"rng": 0} if "rng" in signature(linalg.eigsh).parameters else {}
    try:
        values, vectors = linalg.eigsh(
            shaped, k=count, which=_ARPACK[which], v0=start.double().cpu().numpy(), tol=accuracy, **seeded
        )
    except linalg.ArpackNoConvergence as error:
        found = len(error.eigenvalues)
        raise RuntimeError(
            f"top_eigenvalues: {found} of {count} eigenvalues converged to the tolerance {accuracy:.1g}; "
            "ask for fewer, or for a larger tolerance"
        ) from error
    return torch.as_tensor(values).to(matrix.device), torch.as_tensor(vectors).to(matrix.device)
