"""One step of learning, token by token: log-probabilities of responses, and how a step on one changes another.

A causal language model maps tokens (N, T) to logits (N, T, V), and those at position t predict the token at t + 1.
With prompt and response laid end to end and the response's own tokens fed in (teacher forcing) each response token
is one classification, and the decomposition A·K·G holds for each. Positions that predict no response token, inside
the prompt and at padding, are left out by *selecting* the others. They are never multiplied by zero, which would turn
an infinite logit there into NaN.

M is the number of response tokens in a batch, one response after another. Loss normalisation: a supervised step
descends −Σ_n w_n log π(y_n | x_n), where log π(y | x) is the sum over a response's tokens, or their mean where
``reduction="mean"`` is asked for, and the weights w are one unless given. Derived in the chapter
`book/dynamics/sequences.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Linearization, forward, gradients, pushforward
from ldyn.dynamics._change import centred
from ldyn.dynamics._response_logits import ResponseLogits, response_inputs
from ldyn.dynamics._responses import Reduction, Responses, chat, pack, require_reduction
from ldyn.dynamics.akg import AKG, Optimizer, energy, predicted_logits
from ldyn.foundations.softmax import log_softmax_jacobian
from ldyn.kernels.entk import entk

__all__ = [
    "Responses",
    "TokenChange",
    "chat",
    "log_prob_gradient",
    "pack",
    "predicted_change",
    "predicted_change_along",
    "response_logits",
    "sequence_kernel",
    "sequence_log_probs",
    "token_akg",
    "token_log_probs",
]


class TokenChange(NamedTuple):
    """What a change of the parameters does to the log-probabilities of responses, to first order.

    Attributes:
        logits: (M, V) logits before the change, at the place of each response token.
        change: (M, V) their change J Δθ.
        rows: (M, V) change of the log-probability of every token of the vocabulary there, A J Δθ.
        tokens: (M,) change for the response tokens themselves.
        sequences: (N,) their sum over each response, or the mean if that was asked for.
    """

    logits: Tensor
    change: Tensor
    rows: Tensor
    tokens: Tensor
    sequences: Tensor


def response_logits(model: nn.Module, batch: Responses) -> Tensor:
    """Compute the logits that predict the response tokens, with the response's own tokens fed in.

    Args:
        model: A causal language model in evaluation mode: any Hugging Face one, or any module that maps tokens
            (N, T) to logits (N, T, V).
        batch: N prompts with responses, on the model's device.

    Returns:
        (M, V) logits, detached; those of other positions are not looked at.

    Raises:
        ValueError: If the model is random, has no or mixed parameters or is on another device, its output has no
            logits (N, T, V), a selected one is not finite, a token is not in the vocabulary, or the batch is padded
            on the left and the model accepts no mask.
    """
    return forward(ResponseLogits(model), response_inputs(model, batch, "batch"))


def token_log_probs(model: nn.Module, batch: Responses) -> Tensor:
    """Compute log π(y_l | x, y_<l) for every response token.

    Args:
        model: A causal language model; see `response_logits`.
        batch: N prompts with responses, on the model's device.

    Returns:
        (M,) log-probabilities in nats, detached; ``batch.split`` cuts them into responses.

    Raises:
        ValueError: As in `response_logits`.
    """
    return _at_targets(torch.log_softmax(response_logits(model, batch), -1), batch)


def sequence_log_probs(model: nn.Module, batch: Responses, *, reduction: Reduction = "sum") -> Tensor:
    """Compute log π(y | x) for every response.

    Args:
        model: A causal language model; see `response_logits`.
        batch: N prompts with responses, on the model's device.
        reduction: "sum" for the logarithm of the response's probability, "mean" for that divided by its number of
            tokens.

    Returns:
        (N,) in nats, detached.

    Raises:
        ValueError: As in `response_logits`, or if the reduction is unknown.
    """
    require_reduction(reduction)
    return batch.reduce(token_log_probs(model, batch), reduction=reduction)


def log_prob_gradient(
    model: nn.Module, batch: Responses, *, reduction: Reduction = "sum", weights: Tensor | None = None
) -> Tensor:
    """Compute the gradient of Σ_n w_n log π(y_n | x_n) in the parameters.

    A step of gradient descent on the supervised loss, which is the negative of this sum, changes the parameters by
    the learning rate times the result.

    Args:
        model: A causal language model; see `response_logits`. Frozen parameters count too, tied ones once.
        batch: N prompts with responses, on the model's device.
        reduction: "sum" or "mean" over the tokens of a response; see `sequence_log_probs`.
        weights: (N,) weights w, by default all one. 1/N makes the mean over responses, 1/M with "sum" the mean over
            all tokens, and a negative one pushes a response down.

    Returns:
        (P,) in the order of ``model.parameters()``, zero for a parameter that the model does not use.

    Raises:
        ValueError: As in `response_logits`, or if the reduction or the weights are not as expected.
    """
    loss = _supervised_loss(model, batch, reduction, weights)
    slopes = gradients(ResponseLogits(model), response_inputs(model, batch, "batch"), lambda logits: loss(logits, None))
    parts = zip(slopes.values(), model.parameters(), strict=True)
    return -torch.cat([value.new_zeros(value.numel()) if part is None else part.reshape(-1) for part, value in parts])


def predicted_change_along(
    model: nn.Module, observed: Responses, delta: Tensor, *, reduction: Reduction = "sum"
) -> TokenChange:
    """Predict, to first order, what a change of the parameters does to the log-probabilities of responses.

    At response token m this is A_m J_m Δθ with A = I − 1πᵀ, from one product with the Jacobian; nothing of size V²
    is formed. The exact change is A_m Δz_m − KL_m 1 (see `ldyn.dynamics.akg.exact_change`).

    Args:
        model: A causal language model; see `response_logits`.
        observed: N prompts with responses, on the model's device.
        delta: (P,) change Δθ of the parameters, in the order of ``model.parameters()``.
        reduction: How `sequences` is normalised.

    Returns:
        Logits, their change, and the changes of log-probabilities, in nats.

    Raises:
        ValueError: As in `response_logits`, or if the change does not fit the parameters.
    """
    require_reduction(reduction)
    inputs, size = response_inputs(model, observed, "observed"), sum(value.numel() for value in model.parameters())
    vector = _checks.require_shape(_checks.require_real(delta, "delta", ndim=1), "delta", (size,))
    _checks.require_same(vector, "delta", next(model.parameters()), "the model's parameters")
    return _token_change(*pushforward(ResponseLogits(model), inputs, vector.detach()), observed, reduction)


def predicted_change(
    model: nn.Module,
    observed: Responses,
    updated: Responses,
    *,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    reduction: Reduction = "sum",
    weights: Tensor | None = None,
) -> TokenChange:
    """Predict, to first order, what one supervised step on some responses does to the log-probabilities of others.

    The step descends −Σ_n w_n log π(y_n | x_n) over `updated`. For plain gradient descent the prediction at response
    token m of `observed` is −η Σ_l A_m K_ml G_l, summed over the updated tokens. It takes one product with the
    transposed Jacobian and one with the Jacobian, about the cost of two training steps; no kernel is formed.

    Args:
        model: A causal language model; see `response_logits`.
        observed: Prompts with responses to watch, on the model's device.
        updated: Prompts with responses to learn, likewise.
        lr: Learning rate η of a plain gradient step.
        optimizer: In place of `lr`, what `ldyn.dynamics.akg.predicted_logits` takes: an optimiser of `torch.optim`
            over the model's parameters, or a function from gradients to changes, by name.
        reduction: How log π(y | x) is normalised, both in the loss and in `sequences`.
        weights: Weights w of the responses in `updated`; see `log_prob_gradient`.

    Returns:
        Logits, their change, and the changes of log-probabilities in nats, all of `observed`.

    Raises:
        ValueError: As in `response_logits`, unless exactly one of `lr` and `optimizer` is given, or if an argument
            is not as expected.
    """
    view, watched, learned = (
        ResponseLogits(model),
        response_inputs(model, observed, "observed"),
        response_inputs(model, updated, "updated"),
    )
    loss = _supervised_loss(model, updated, reduction, weights)
    moved = predicted_logits(view, watched, learned, None, lr=lr, optimizer=optimizer, loss=loss)
    return _token_change(*moved, observed, reduction)


def sequence_kernel(
    model: nn.Module,
    first: Responses,
    second: Responses | None = None,
    *,
    reduction: Reduction = "sum",
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the scalar sequence kernel ⟨∇ log π(y | x), ∇ log π(y′ | x′)⟩ for all pairs of responses.

    A supervised step with learning rate η on (x′, y′) changes log π(y | x) by η times this, to first order. It is
    the tangent kernel (`ldyn.kernels.entk.entk`) of the model whose one output is log π(y | x), and costs about one
    forward and backward pass for each response; no gradient of all parameters is held.

    Args:
        model: A causal language model; see `response_logits`.
        first: N1 prompts with responses, on the model's device.
        second: N2 of them; None means the first again, and a symmetric result.
        reduction: "sum" takes log π(y | x), "mean" divides it by the number of tokens, on both sides.
        chunk_size: How many responses are held at once; fewer take less memory and more time.

    Returns:
        (N1, N2).

    Raises:
        ValueError: As in `response_logits`, or if the reduction or the chunk size is not as expected.
    """
    require_reduction(reduction)
    rows = response_inputs(model, first, "first")
    columns = None if second is None else response_inputs(model, second, "second")
    return entk(_LogProbs(model, reduction), rows, columns, chunk_size=chunk_size)[:, :, 0, 0]


def token_akg(
    model: nn.Module,
    observed: Responses,
    updated: Responses,
    *,
    reduction: Reduction = "sum",
    weights: Tensor | None = None,
) -> AKG:
    """Compute the blocks A_m, K_ml and G_l of a supervised step, one for each pair of tokens.

    Forms two Jacobians and M·L·V² numbers: meant for small models, as the definition that `predicted_change` agrees
    with. Stacked, A is block-diagonal (MV × MV), K is (MV × LV) and G is LV long.

    Args:
        model: A causal language model; see `response_logits`.
        observed: Prompts with M response tokens to watch, on the model's device.
        updated: Prompts with L response tokens to learn, likewise.
        reduction: How log π(y | x) is normalised in the loss.
        weights: Weights w of the responses in `updated`; see `log_prob_gradient`.

    Returns:
        A (M, V, V), K (M, L, V, V) and G (L, V); ``.predict(lr)`` is (M, V).

    Raises:
        ValueError: As in `response_logits`, or if an argument is not as expected.
    """
    view = ResponseLogits(model)
    watched = Linearization(view, response_inputs(model, observed, "observed"))
    learned = Linearization(view, response_inputs(model, updated, "updated"))
    loss = _supervised_loss(model, updated, reduction, weights)
    kernel = torch.einsum("map,lbp->mlab", _jacobian(watched), _jacobian(learned))
    return AKG(log_softmax_jacobian(watched.logits), kernel, energy(learned.logits, None, loss=loss))


class _LogProbs(nn.Module):
    """A causal language model as a map from a batch to the log-probabilities (N, 1) of its responses."""

    def __init__(self, model: nn.Module, reduction: Reduction) -> None:
        super().__init__()
        self.view, self.reduction = ResponseLogits(model), reduction

    def forward(self, tokens: Tensor, real: Tensor, response: Tensor) -> Tensor:
        """Return (N, 1)."""
        batch = Responses(tokens, real, response)
        values = _at_targets(torch.log_softmax(self.view(tokens, real, response), -1), batch)
        return batch.reduce(values, reduction=self.reduction)[:, None]


def _supervised_loss(
    model: nn.Module, batch: Responses, reduction: Reduction, weights: Tensor | None
) -> Callable[[Tensor, object], Tensor]:
    """Return −Σ_n w_n log π(y_n | x_n) as a function of the response logits (M, V)."""
    require_reduction(reduction)
    if weights is not None:
        _checks.require_shape(_checks.require_real(weights, "weights", ndim=1), "weights", (len(batch),))
        _checks.require_same(weights, "weights", next(model.parameters()), "the model's parameters")

    def loss(logits: Tensor, _: object) -> Tensor:
        values = batch.reduce(_at_targets(torch.log_softmax(logits, -1), batch), reduction=reduction)
        return -(values if weights is None else values * weights.detach()).sum()

    return loss


def _token_change(logits: Tensor, change: Tensor, observed: Responses, reduction: Reduction) -> TokenChange:
    """Turn a change of the response logits into changes of log-probabilities."""
    rows = centred(logits, change)
    tokens = _at_targets(rows, observed)
    return TokenChange(logits, change, rows, tokens, observed.reduce(tokens, reduction=reduction))


def _at_targets(rows: Tensor, batch: Responses) -> Tensor:
    """Pick from each row (M, V) the entry of the response token."""
    return rows.gather(-1, batch.targets[:, None]).squeeze(-1)


def _jacobian(local: Linearization) -> Tensor:
    """(M, V, P) Jacobian of the response logits, row by row."""
    count, size = local.logits.shape
    rows = torch.eye(count * size, dtype=local.logits.dtype, device=local.logits.device)
    return local.vjp(rows.view(-1, count, size)).view(count, size, -1)
