"""LayerNorm and RMSNorm in one: an orthogonal projection P, then division by σ = sqrt(|Px|²/d + eps).

P removes the mean for LayerNorm and does nothing for RMSNorm; every formula below holds for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldyn import _checks

Kind = Literal["injective", "flattening"]
"""Which norm of a third-order tensor."""


class Normalised(NamedTuple):
    """Rows after normalisation, and what their derivatives are made of.

    Attributes:
        hat: (..., d) x̂ = Px / σ.
        inverse: (..., 1) 1/σ.
        spread: (..., 1) |Px|², in units in which nothing overflows.
        floor: (..., 1) eps, in the same units.
        centred: Whether P removes the mean.
        given: The caller's tensors by name, whose values have not been looked at yet.
    """

    hat: Tensor
    inverse: Tensor
    spread: Tensor
    floor: Tensor
    centred: bool
    given: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """The number d of features."""
        return self.hat.shape[-1]

    @property
    def rank(self) -> int:
        """The rank of P."""
        return self.size - self.centred

    @property
    def share(self) -> Tensor:
        """(..., 1) ρ = |x̂|²/d = v / (v + eps), with v = |Px|²/d."""
        return self.spread / (self.spread + self.size * self.floor)

    @property
    def rest(self) -> Tensor:
        """(..., 1) 1 − ρ, not computed by a difference."""
        return self.size * self.floor / (self.spread + self.size * self.floor)

    def project(self, vector: Tensor) -> Tensor:
        """Multiply by P along the last dimension."""
        return _deviation(vector) if self.centred else vector

    def finite(self, result: Tensor) -> Tensor:
        """Return a result on which every given tensor has a bearing; where it is not finite, find out who is to blame.

        One look at what comes out costs less than one at each thing that went in.
        """
        if not _checks.known_truth(result.detach().sum().isfinite()):
            for name, tensor in self.given.items():
                _checks.require_finite(tensor, name)
        return result


class JacobianSpectrum(NamedTuple):
    """The eigenvalues of a Jacobian without γ, and how often each occurs.

    Attributes:
        values: (..., 3) zero; eps/σ³, which belongs to x̂; and 1/σ, which belongs to what is orthogonal to x̂.
        multiplicities: How often each of the three occurs; they add up to d.
    """

    values: Tensor
    multiplicities: tuple[int, int, int]

    def eigenvalues(self) -> Tensor:
        """List them all in ascending order.

        Returns:
            (..., d).
        """
        return self.values.repeat_interleave(torch.tensor(self.multiplicities, device=self.values.device), dim=-1)


def normalised(x: Tensor, eps: object, weight: object = None, *, centred: bool, **vectors: object) -> Normalised:
    """Check the arguments of a function, but for their values, and normalise the rows of its input.

    Args:
        x: (..., d).
        eps: What is added to the variance, or to the mean square.
        weight: γ, (d,) or None.
        centred: Whether the mean is removed.
        **vectors: The other arguments by name, (..., d), with batch dimensions that broadcast with those of x.

    Returns:
        The rows.

    Raises:
        ValueError: If one of the tensors is empty, not floating or does not fit x; or eps is no number ≥ 0, or is
            zero and a row has nothing to divide by.
    """
    given = _given(x, weight, vectors)
    root_eps = math.sqrt(_checks.require_nonnegative(eps, "eps"))
    if root_eps == 0:
        _require_spread(x.detach(), centred)
    # twice: the rounding of the first mean is as large as the deviations where the mean is much larger than they
    moved = _deviation(_deviation(x)) if centred else x
    # squares of rows measured by their own size neither overflow nor vanish
    size = torch.linalg.vector_norm(moved.detach(), math.inf, dim=-1, keepdim=True)
    unit = size.clamp(min=max(root_eps, torch.finfo(x.dtype).tiny)).reciprocal()
    relative = moved * unit
    spread, floor = dot(relative, relative), (root_eps * unit).square()
    inverse = torch.add(floor, spread, alpha=1 / x.shape[-1]).rsqrt()
    return Normalised(relative * inverse, unit * inverse, spread, floor, centred, given)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Multiply along the last dimension and add up, (..., 1)."""
    product: Tensor = torch.linalg.vecdot(left, right)
    return product.unsqueeze(-1)


def _deviation(vector: Tensor) -> Tensor:
    """Subtract the mean along the last dimension."""
    return torch.sub(vector, vector.sum(-1, keepdim=True), alpha=1 / vector.shape[-1])


def _require_spread(rows: Tensor, centred: bool) -> None:
    """Refuse rows that eps = 0 leaves without a divisor."""
    _checks.require_finite(rows, "x")
    empty = rows.amax(-1) == rows.amin(-1) if centred else (rows == 0).all(-1)
    if _checks.known_truth(empty.any()):
        what = "constant" if centred else "zero"
        raise ValueError(f"x: expected no {what} row where eps is 0, got {int(empty.sum())} such row(s)")


def _given(x: object, weight: object, vectors: Mapping[str, object]) -> dict[str, Tensor]:
    """Require an input, the scale γ or None, and vectors that fit the input; collect them by name."""
    rows = _checks.require_tensor(x, "x", min_ndim=1)
    given = {"x": _checks.require_nonempty(_checks.require_floating(rows, "x"), "x")}
    for name, value in vectors.items():
        vector = _checks.require_same(_checks.require_tensor(value, name, min_ndim=1), name, rows, "x")
        if vector.shape != rows.shape:
            _require_broadcast(vector, name, rows)
        given[name] = vector
    if weight is not None:
        gamma = _checks.require_same(_checks.require_tensor(weight, "weight"), "weight", rows, "x")
        given["weight"] = _checks.require_shape(gamma, "weight", rows.shape[-1:])
    return given


def _require_broadcast(vector: Tensor, name: str, x: Tensor) -> None:
    """Require a vector (..., d) whose batch dimensions broadcast with those of x."""
    _checks.require_shape(vector, name, ("...", x.shape[-1]))
    _checks.require_nonempty(vector, name)
    pairs = zip(reversed(vector.shape), reversed(x.shape), strict=False)
    if any(1 not in pair and pair[0] != pair[1] for pair in pairs):
        expected, got = tuple(x.shape), tuple(vector.shape)
        raise ValueError(f"{name}: expected a shape that broadcasts with that of x {expected}, got {got}")


def scaled(weight: Tensor | None, values: Tensor) -> Tensor:
    """Multiply by γ along the last dimension."""
    return values if weight is None else weight * values


def jacobian(rows: Normalised, weight: Tensor | None) -> Tensor:
    """Return diag(γ) (P − x̂ x̂ᵀ/d) / σ, (..., d, d)."""
    hat, size = rows.hat, rows.size
    front = rows.finite(scaled(weight, rows.inverse))
    shift = -front / size if rows.centred else torch.zeros_like(front)
    matrix = torch.addcmul(shift.unsqueeze(-1), (front * hat).unsqueeze(-1), hat.unsqueeze(-2), value=-1 / size)
    matrix.diagonal(dim1=-2, dim2=-1).add_(front)
    return matrix


def jacobian_product(rows: Normalised, vector: Tensor) -> Tensor:
    """Return (P − x̂ x̂ᵀ/d) v / σ, (..., d), without the scale γ."""
    along = dot(rows.hat, vector)
    return torch.addcmul(rows.project(vector), along, rows.hat, value=-1 / rows.size) * rows.inverse


def hessian(rows: Normalised, weight: Tensor | None) -> Tensor:
    """Return the tensor of second derivatives, (..., d, d, d) with index [k, i, j]."""
    rows.finite(scaled(weight, rows.inverse))
    hat, size = rows.hat, rows.size
    front = rows.inverse.square() / size
    own = front * hat
    # All but two of the deltas is affine in x̂_k, with coefficients that depend on i and j alone.
    mean = front / size if rows.centred else torch.zeros_like(front)
    slope = torch.addcmul(mean.unsqueeze(-1), own.unsqueeze(-1), hat.unsqueeze(-2), value=3 / size)
    slope.diagonal(dim1=-2, dim2=-1).sub_(front)
    factor, slope = hat.unsqueeze(-1).unsqueeze(-1), slope.unsqueeze(-3)
    if rows.centred:
        shared = mean * hat
        offset = shared.unsqueeze(-1) + shared.unsqueeze(-2)
        tensor = torch.addcmul(offset.unsqueeze(-3), factor, slope)
    else:
        tensor = factor * slope
    own = own.unsqueeze(-1)
    tensor.diagonal(dim1=-3, dim2=-2).sub_(own)
    tensor.diagonal(dim1=-3, dim2=-1).sub_(own)
    return tensor if weight is None else tensor * weight.unsqueeze(-1).unsqueeze(-1)


def second_derivative(rows: Normalised, u: Tensor, v: Tensor) -> Tensor:
    """Return D²x̂[u, v], (..., d), without the scale γ; also Σ_k u_k ∇²x̂_k v, for the tensor is symmetric."""
    hat, centred_u, centred_v = rows.hat, rows.project(u), rows.project(v)
    along_u, along_v = dot(hat, u), dot(hat, v)
    bent = torch.addcmul(dot(centred_u, v), along_u, along_v, value=-3 / rows.size)
    total = torch.addcmul(torch.addcmul(along_v * centred_u, along_u, centred_v), bent, hat)
    return total * (rows.inverse.square() / -rows.size)


def contraction(rows: Normalised, r: Tensor) -> Tensor:
    """Return Σ_k r_k ∇²x̂_k, (..., d, d)."""
    hat, front = rows.hat, rows.inverse.square() / rows.size
    along = dot(hat, r)
    half = rows.finite(front * torch.addcmul(rows.project(r), along, hat, value=-1.5 / rows.size))
    pull = front * along
    shift = pull / rows.size if rows.centred else torch.zeros_like(pull)
    # adding the transposed product would be symmetric to the last digit, and three times as slow
    matrix = torch.addcmul(shift.unsqueeze(-1), half.unsqueeze(-1), hat.unsqueeze(-2), value=-1)
    matrix = torch.addcmul(matrix, hat.unsqueeze(-1), half.unsqueeze(-2), value=-1)
    matrix.diagonal(dim1=-2, dim2=-1).sub_(pull)
    return matrix


def jacobian_norm(rows: Normalised) -> Tensor:
    """Return the spectral norm of the Jacobian without γ, (...)."""
    factor = 1 if rows.rank > 1 else rows.rest if rows.rank == 1 else 0
    return (rows.finite(rows.inverse) * factor)[..., 0]


def hessian_norm(rows: Normalised, kind: Kind) -> Tensor:
    """Return a norm of the tensor of second derivatives without γ, (...)."""
    if kind not in ("injective", "flattening"):
        raise ValueError(f"kind: expected 'injective' or 'flattening', got {_checks.describe(kind)}")
    share, rest = rows.share, rows.rest
    if kind == "injective":
        straight = 3 * share.sqrt() * rest
        bent = torch.full_like(straight, 2 / math.sqrt(3))
        norm = torch.where(share >= 1 / 3, bent, straight) if rows.rank > 1 else straight
    else:
        radial = share * (rows.rank - 1 + 9 * rest.square())
        norm = (torch.maximum(radial, 2 * share) if rows.rank > 1 else radial).sqrt()
    return (norm / math.sqrt(rows.size) * rows.finite(rows.inverse).square())[..., 0]


def spectrum(rows: Normalised) -> JacobianSpectrum:
    """Return the eigenvalues of the Jacobian without γ."""
    values = torch.cat([torch.zeros_like(rows.inverse), rows.rest * rows.inverse, rows.finite(rows.inverse)], dim=-1)
    along = min(rows.rank, 1)
    return JacobianSpectrum(values, (rows.size - rows.rank, along, rows.rank - along))
