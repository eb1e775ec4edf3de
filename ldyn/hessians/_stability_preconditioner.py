"""The preconditioner that Adam has reached, and the curvature as Adam sees it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn.hessians._spectrum_operator import Operator, SymmetricOperator, as_operator

__all__ = ["adam_preconditioner", "preconditioned"]


def adam_preconditioner(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Read the denominators by which Adam divides its next step: √(s/(1 − β₂ᵗ)) + ε, with s as of the last step.

    Args:
        model: The module that is being trained.
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` over all of its parameters, after at least one step.

    Returns:
        (P,) the denominators, in the order of ``model.parameters()``.

    Raises:
        ValueError: If the optimiser is another one, or has not yet moved one of the model's parameters.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
        raise ValueError(f"optimizer: expected torch.optim.Adam or AdamW, got {_checks.describe(optimizer)}")
    if not isinstance(model, nn.Module) or not list(model.parameters()):
        raise ValueError(f"model: expected a torch.nn.Module with parameters, got {_checks.describe(model)}")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parts: list[Tensor] = []
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if parameter not in groups or "exp_avg_sq" not in state:
            raise ValueError(f"optimizer: expected to have moved every parameter, got none of its steps for {name!r}")
        group = groups[parameter]
        moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        parts.append((moment.detach().sqrt() / correction**0.5 + group["eps"]).reshape(-1))
    return torch.cat(parts)


def preconditioned(operator: Operator, preconditioner: Tensor) -> SymmetricOperator:
    """Multiply a curvature from both sides by the inverse root of a diagonal preconditioner.

    P^(−1/2) H P^(−1/2) is symmetric and has the eigenvalues of P⁻¹H, which decide about the stability of steps
    −η P⁻¹ g. Derived in the chapter hessians/stability.

    Args:
        operator: H (P, P), as in `ldyn.hessians.spectrum.lanczos`.
        preconditioner: (P,) the diagonal of P, positive; that of `adam_preconditioner`, for instance.

    Returns:
        The operator.

    Raises:
        ValueError: If `operator` is no square operator, or the preconditioner does not fit it or is not positive.
    """
    matrix = as_operator(operator)
    diagonal = _checks.require_shape(
        _checks.require_real(preconditioner, "preconditioner"), "preconditioner", (matrix.size,)
    )
    if diagonal.dtype != matrix.dtype or diagonal.device != matrix.device:
        got = f"{diagonal.dtype} on {diagonal.device}"
        raise ValueError(f"preconditioner: expected {matrix.dtype} on {matrix.device}, got {got}")
    smallest = float(diagonal.detach().amin())
    if smallest <= 0:
        raise ValueError(f"preconditioner: expected values > 0, got {smallest:.6g}")
    scale = diagonal.detach().rsqrt()
    return SymmetricOperator(
        matrix.size, matrix.dtype, matrix.device, lambda vectors: matrix.rows(vectors * scale) * scale
    )
