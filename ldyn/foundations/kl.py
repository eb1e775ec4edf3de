"""How far a step moves a model's predictions: the Kullback–Leibler divergence, its expansion and its bounds.

Two halves. `categorical_kl` and `kl_bounds` live in logit space: they are exact or hold for every change of the
logits. `fisher_matrix`, `fisher_vector_product` and `quadratic_kl` are the second-order model in parameter space,
which has no such guarantee. Derived in the chapter `book/foundations/kl.md`.

"A context" below is one position at which the model predicts: every entry of the output's leading dimensions, so
N for logits (N, V), and N·T for a language model's (N, T, V). All averages give each context the same weight.
"""

from __future__ import annotations

from math import factorial, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Inputs, Linearization

__all__ = [
    "KLBounds",
    "categorical_kl",
    "fisher_matrix",
    "fisher_vector_product",
    "kl_bounds",
    "quadratic_kl",
    "sgd_step_norm_bound",
]

_SMALL = 0.25  # below it the series is used, above it the formula loses no more than three bits
_SERIES = tuple(1 / factorial(order + 2) for order in range(12))
_CHUNK = 2**21  # numbers held at once for a block of Fisher rows


class KLBounds(NamedTuple):
    """What can be said about KL(p‖p′) without computing it; every field has the logits' leading shape (...).

    Attributes:
        quadratic: ½ Var_p(Δ), the second-order value. An approximation, not a bound.
        lower: Var_p(Δ) (e^{−R} − 1 + R)/R², a lower bound.
        upper: Var_p(Δ) (e^{R} − 1 − R)/R², an upper bound, or `range_bound` where that is smaller.
        range_bound: R²/8, an upper bound that needs no p.
        third_order: R³/(36√3), an upper bound of abs(KL(p‖p′) − quadratic).
    """

    quadratic: Tensor
    lower: Tensor
    upper: Tensor
    range_bound: Tensor
    third_order: Tensor


def categorical_kl(logits: Tensor, new_logits: Tensor) -> Tensor:
    """Compute KL(p‖p′) in nats between the softmaxes of two sets of logits.

    Evaluates log E_p[exp(Δ − E_p Δ)] with Δ the change of the logits as a sum of terms none of which is negative,
    so that the result is never negative, keeps its relative accuracy however close p and p′ are, and overflows
    for no finite logits of reasonable size (±10³ and far beyond). Differentiable, also where Δ = 0. Float16 and
    bfloat16 are computed in float32. Memory is a small multiple of the input's.

    Args:
        logits: (..., V) logits of p.
        new_logits: (..., V) logits of p′, of the same shape, dtype and device.

    Returns:
        (...) divergences; neither summed nor averaged.

    Raises:
        ValueError: If an argument is no finite non-empty floating-point tensor with a last dimension, or the two
            differ in shape, dtype or device.
    """
    _require_pair(logits, new_logits, "new_logits")
    wide, new_wide = _widened(logits), _widened(new_logits)
    log_p, change = _centred(wide, new_wide - wide)
    p = log_p.exp()
    large = change > 1
    # exp(log_p + change) can exceed the largest float only where p' has moved its mass: factor that scale out
    rise = torch.where(large, log_p + change, torch.zeros_like(change))
    top = rise.detach().amax(-1, keepdim=True)
    top = torch.where(top > 1, top, torch.zeros_like(top))
    gentle = p * _phi(torch.where(large, torch.zeros_like(change), change)) * (-top).exp()
    steep = (rise - top).exp() - p * (1 + change) * (-top).exp()
    excess = torch.where(large, steep, gentle).sum(-1, keepdim=True)
    result = top + torch.log1p(excess + torch.expm1(-top))
    return result.squeeze(-1).to(logits.dtype)


def kl_bounds(logits: Tensor, delta: Tensor) -> KLBounds:
    """Bounds KL(p‖p′) for p = softmax(z) and p′ = softmax(z + Δ) from the variance and the range of Δ.

    With R = max Δ − min Δ. All bounds hold for every z and Δ; they are evaluated in floating point and not rounded
    outwards, so leave room for a few units in the last place. Float16 and bfloat16 are computed in float32.
    Hoeffding's lemma gives `range_bound`, generalised self-concordance `lower` and `upper`.

    Args:
        logits: (..., V) logits z.
        delta: (..., V) change Δ of the logits, of the same shape, dtype and device.

    Returns:
        Five tensors (...), in nats; see `KLBounds`.

    Raises:
        ValueError: If an argument is no finite non-empty floating-point tensor with a last dimension, or the two
            differ in shape, dtype or device.
    """
    _require_pair(logits, delta, "delta")
    step = _widened(delta)
    reach = step.amax(-1) - step.amin(-1)
    log_p, change = _centred(_widened(logits), step)
    scaled = change / torch.where(reach > 0, reach, torch.ones_like(reach)).unsqueeze(-1)
    share = (log_p.exp() * scaled**2).sum(-1)  # Var_p(delta) / R^2, at most 1/4
    range_bound = reach**2 / 8
    # beyond 30 in logarithms: the share may underflow and the exponential overflow while their product does neither
    far = reach > 30
    log_share = torch.logsumexp(log_p + 2 * scaled.abs().log(), -1)
    far_upper = (log_share + reach + torch.log1p(-(1 + reach) * (-reach).exp())).exp()
    near_upper = share * _phi(torch.where(far, torch.zeros_like(reach), reach))
    bounds = (
        share * reach**2 / 2,
        share * _phi(-reach),
        torch.minimum(torch.where(far, far_upper, near_upper), range_bound),
        range_bound,
        reach**3 / (36 * sqrt(3)),
    )
    return KLBounds(*(bound.to(logits.dtype) for bound in bounds))


def fisher_matrix(model: nn.Module, x: Inputs) -> Tensor:
    """Compute the Fisher information matrix of a classifier's parameters, averaged over contexts.

    F = mean over contexts of Jᵀ (diag(p) − p pᵀ) J, where J (V, P) is the Jacobian of the context's logits and
    p their softmax: the labels are the model's own, not data. It is the Hessian at zero, in the change of the
    parameters, of the mean KL divergence, in either direction. Costs the smaller of M·V and 2·P backward passes
    over all of `x`, in blocks, and memory for P × P numbers.

    Args:
        model: Module in evaluation mode whose output is logits (..., V), has them as ``.logits``, or is a tuple
            that starts with them. Tied parameters count once; frozen ones count too.
        x: The model's input: one tensor, or a mapping of keyword arguments.

    Returns:
        (P, P) symmetric, in the order of ``model.parameters()``, each flattened row by row; the dtype and device
        of the parameters.

    Raises:
        ValueError: If the model draws random numbers or uses batch statistics, has no parameters or mixed ones,
            the input does not fit, or the output is no finite tensor of logits that depends on the parameters.
    """
    local = Linearization(model, x)
    p = local.logits.softmax(-1)
    contexts, classes = p.shape
    block = max(1, _CHUNK // max(local.size, contexts * classes))
    if contexts * classes <= 2 * local.size:
        return _symmetric(_fisher_by_rows(local, p, max(1, block // classes)) / contexts)
    like = local.vjp(torch.zeros_like(p))
    columns = [
        local.vjp(_covariance_product(p, local.jvp(unit)))
        for unit in torch.split(torch.eye(local.size, dtype=like.dtype, device=like.device), block)
    ]
    return _symmetric(torch.cat(columns) / contexts)


def fisher_vector_product(model: nn.Module, x: Inputs, vector: Tensor) -> Tensor:
    """Multiplies the Fisher matrix of `fisher_matrix` by a vector without building it.

    Costs one forward and three backward passes. Attention runs on its plain kernel, the one that can be
    differentiated twice.

    Args:
        model: As in `fisher_matrix`.
        x: As in `fisher_matrix`.
        vector: (P,) in the order of ``model.parameters()``, of the parameters' dtype and device.

    Returns:
        (P,) the product F·vector, averaged over contexts.

    Raises:
        ValueError: As in `fisher_matrix`, or if `vector` is not a finite tensor (P,) of the right dtype and device.
    """
    local = Linearization(model, x)
    p = local.logits.softmax(-1)
    change = local.jvp(local.vector(vector, "vector"))
    return local.vjp(_covariance_product(p, change)) / len(p)


def quadratic_kl(model: nn.Module, x: Inputs, delta: Tensor) -> Tensor:
    """Predicts the mean KL divergence of a step Δ in the parameters to second order: ½ Δᵀ F Δ.

    Computed as half the mean variance of the linearised change of the logits, hence never negative. It is an
    approximation with an error of third order in Δ, the same for both directions of the divergence; for what is
    guaranteed, measure the change of the logits and call `kl_bounds`.

    Args:
        model: As in `fisher_matrix`, at the parameters from before the step.
        x: As in `fisher_matrix`.
        delta: (P,) change of the parameters, in the order of ``model.parameters()``.

    Returns:
        Scalar tensor, in nats, averaged over contexts.

    Raises:
        ValueError: As in `fisher_matrix`, or if `delta` is not a finite tensor (P,) of the right dtype and device.
    """
    local = Linearization(model, x)
    step = local.vector(delta, "delta")
    log_p, change = _centred(local.logits, local.jvp(step))
    return (log_p.exp() * change**2).sum(-1).mean() / 2


def sgd_step_norm_bound(lr: float, weight_decay: float, param_norm: float, clip: float = 1.0) -> float:
    """Bounds the length of an SGD step −lr · (g + weight_decay · θ) whose gradient g was clipped before decay.

    The bound lr · (clip + weight_decay · ‖θ‖) is attained when g has norm `clip` and points along θ.

    Args:
        lr: Learning rate, ≥ 0.
        weight_decay: Coefficient of the parameters in the step, ≥ 0.
        param_norm: Euclidean norm of the parameters, ≥ 0.
        clip: Norm to which the gradient is clipped, ≥ 0.

    Returns:
        Largest possible Euclidean norm of the step (not its square).

    Raises:
        ValueError: If an argument is no finite number, or negative.
    """
    rate = _checks.require_nonnegative(lr, "lr")
    decay = _checks.require_nonnegative(weight_decay, "weight_decay")
    norm = _checks.require_nonnegative(param_norm, "param_norm")
    return rate * (_checks.require_nonnegative(clip, "clip") + decay * norm)


def _require_pair(logits: Tensor, other: Tensor, name: str) -> None:
    """Check two tensors (..., V) that belong together, the first being the logits."""
    for value, called in ((logits, "logits"), (other, name)):
        _checks.require_real(value, called, min_ndim=1)
    _checks.require_shape(other, name, logits.shape)
    _checks.require_same(other, name, logits, "logits")


def _widened(value: Tensor) -> Tensor:
    """Turn half precision into float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _phi(x: Tensor) -> Tensor:
    """Compute e^x − 1 − x without cancellation; the sum it appears in has no negative term."""
    small = x.abs() < _SMALL
    inner, outer = torch.where(small, x, torch.zeros_like(x)), torch.where(small, torch.ones_like(x), x)
    series = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * inner + coefficient
    return torch.where(small, series * inner**2, torch.expm1(outer) - outer)


def _centred(logits: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and delta minus its mean under p, the mean taken so that tiny spreads survive."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    # relative to the likeliest class first: a common shift of all logits then costs no digits
    change = delta - delta.gather(-1, logits.argmax(-1, keepdim=True))
    for _ in range(2):
        change = change - (p * change).sum(-1, keepdim=True)
    return log_p, change


def _covariance_product(p: Tensor, change: Tensor) -> Tensor:
    """Multiplies diag(p) − p pᵀ by vectors (..., V)."""
    return p * (change - (p * change).sum(-1, keepdim=True))


def _fisher_by_rows(local: Linearization, p: Tensor, block: int) -> Tensor:
    """Sum Bᵀ B over contexts, row k of a context's B being √p_k times the gradient of log p_k."""
    contexts, classes = p.shape
    identity = torch.eye(classes, dtype=p.dtype, device=p.device)
    total: Tensor | None = None
    for places in torch.split(torch.arange(contexts, device=p.device), block):
        mine = p[places]
        roots = mine.sqrt().unsqueeze(-1) * (identity - mine.unsqueeze(-2))
        rows = p.new_zeros(len(places), classes, contexts, classes)
        rows[torch.arange(len(places), device=p.device), :, places] = roots
        pulled = local.vjp(rows.flatten(0, 1))
        total = pulled.T @ pulled if total is None else total.addmm_(pulled.T, pulled)
    assert total is not None  # there is at least one context
    return total


def _symmetric(matrix: Tensor) -> Tensor:
    """Remove what rounding left of asymmetry."""
    return (matrix + matrix.T) / 2
