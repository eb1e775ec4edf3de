"""Objectives of a group of sampled responses, token by token; public in `ldyn.dynamics.objectives`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.dynamics._objectives import require_log_probs, require_reference, require_share, set_field

Normalization = Literal["response", "token", "constant"]
"""How the losses of a group's tokens become one number."""


def group_advantages(rewards: Tensor, *, ddof: int = 0, eps: float = 0.0, scale: bool = True) -> Tensor:
    """Compute the advantages (r − mean)/(std + ε) of the responses of each group.

    With binary rewards of which a share p is 1, and ddof = eps = 0, they are √((1−p)/p) and −√(p/(1−p)), and the
    positive ones add up to G√(p(1−p)), as do the negative ones with the other sign. Shao et al., arXiv:2402.03300,
    do not say which standard deviation is meant; TRL takes ddof = 1 and eps = 1e-4. Derived in the chapter
    *Objectives*.

    Args:
        rewards: (..., G) rewards of the G responses to one prompt.
        ddof: What is subtracted from G in the variance: 0, or 1 for Bessel's correction.
        eps: ε ≥ 0, added to the standard deviation.
        scale: Whether to divide at all; without, the result is r − mean (Liu et al., arXiv:2503.20783).

    Returns:
        (..., G) advantages, each group adding up to zero; all zero where the rewards of a group are equal.

    Raises:
        ValueError: If the rewards are no finite floating tensor with a last dimension, ddof is not 0 or 1, G does
            not exceed ddof, or eps is negative.
    """
    values = _checks.require_real(rewards, "rewards", min_ndim=1)
    if ddof not in (0, 1) or isinstance(ddof, bool):
        raise ValueError(f"ddof: expected 0 or 1, got {_checks.describe(ddof)}")
    floor = _checks.require_nonnegative(eps, "eps")
    size = values.shape[-1]
    if size <= ddof:
        raise ValueError(f"rewards: expected more than {ddof} response(s) in a group for ddof={ddof}, got {size}")
    # measured from one of the rewards, so that equal ones give exact zeros
    shifted = values - values[..., :1]
    centred = shifted - shifted.mean(-1, keepdim=True)
    if not scale:
        return centred
    equal = (shifted == 0).all(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (size - ddof)
    deviation = torch.where(equal, torch.ones_like(variance), variance).sqrt()
    return torch.where(equal, torch.zeros_like(centred), centred / (deviation + floor))


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation: PPO's clipped ratio at each token, and a penalty for leaving a reference.

    With ρ = exp(lp − old), the loss of token t of response i is −min(ρÂ_i, clip(ρ, 1 − ε, 1 + ε')Â_i) + β k₃, where
    k₃ = e^d − d − 1 and d = ref − lp. Its coefficient is [ρÂ_i 1_active − β(1 − e^d)] w_it: a token is *inactive*
    where Â > 0 and ρ > 1 + ε', or Â < 0 and ρ < 1 − ε, and only there. What multiplies each token, w_it, is the
    normalisation; for G responses of n_i tokens it is

    - ``"response"``: 1/(G n_i), the mean over each response's tokens, then over responses (the paper; TRL's
      ``grpo``);
    - ``"token"``: 1/Σ_j n_j, the mean over all tokens of the group (TRL's ``bnpo``, and ``dapo`` with one batch);
    - ``"constant"``: 1/(G · max_length), with which a token weighs the same in a short and in a long response (TRL's
      ``dr_grpo``).

    With old = lp and β = 0 the coefficients are those of `Reinforce` times w_it. Schulman et al.,
    arXiv:1707.06347; Shao et al., arXiv:2402.03300. Derived in the chapter *Objectives*.

    Attributes:
        epsilon: ε, at least 0 and below 1: how far the ratio may fall.
        epsilon_high: ε' ≥ 0: how far it may rise; by default ε.
        beta: β ≥ 0, weight of the penalty.
        normalization: See above.
        max_length: The constant of ``"constant"``, and None for the others.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    normalization: Normalization = "response"
    max_length: int | None = None

    def __post_init__(self) -> None:
        set_field(self, "epsilon", require_share(self.epsilon, "epsilon", below=1.0))
        if self.epsilon_high is not None:
            set_field(self, "epsilon_high", _checks.require_nonnegative(self.epsilon_high, "epsilon_high"))
        set_field(self, "beta", _checks.require_nonnegative(self.beta, "beta"))
        if self.normalization not in ("response", "token", "constant"):
            got = _checks.describe(self.normalization)
            raise ValueError(f"normalization: expected 'response', 'token' or 'constant', got {got}")
        if self.normalization == "constant":
            set_field(self, "max_length", _checks.require_integer(self.max_length, "max_length"))
        elif self.max_length is not None:
            raise ValueError(f"max_length: expected None for {self.normalization!r}, got {self.max_length!r}")

    def loss(
        self,
        lp: Tensor,
        *,
        old_lp: Tensor,
        advantages: Tensor,
        ref_lp: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of each group.

        Args:
            lp: (..., G, T) log-probabilities of the G responses' tokens, padded to T, in nats. What stands at padding
                is not looked at, and may be infinite or NaN.
            old_lp: (..., G, T) those under the model that sampled the responses; constants.
            advantages: (..., G) advantages of the responses; constants.
            ref_lp: (..., G, T) those under the reference model, needed if β > 0; constants.
            mask: (..., G, T) bool, True at the tokens that count, at least one in each response; by default all.

        Returns:
            (...) losses, normalised as the field says.

        Raises:
            ValueError: If a log-probability that counts is not finite or above 0, shapes, dtypes or devices differ,
                the reference is missing although β > 0, or a response has no token.
        """
        read = self._read(lp, old_lp, advantages, ref_lp, mask)
        gain = read.advantages
        limit = torch.where(gain > 0, (1 + self._high) * gain, (1 - self.epsilon) * gain)
        each = -torch.where(read.active, read.ratio * gain, limit)
        if read.gap is not None:
            each = each + self.beta * (torch.expm1(read.gap) - read.gap)
        return (each * read.weights).sum((-2, -1))

    def coefficients(
        self,
        lp: Tensor,
        *,
        old_lp: Tensor,
        advantages: Tensor,
        ref_lp: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute c_it = −∂ℓ/∂lp_it of each token, so that G_it = c_it S_it; the normalisation is included.

        Args:
            lp: As in `loss`.
            old_lp: As in `loss`.
            advantages: As in `loss`.
            ref_lp: As in `loss`.
            mask: As in `loss`.

        Returns:
            (..., G, T) coefficients, zero at padding.

        Raises:
            ValueError: As in `loss`.
        """
        read = self._read(lp, old_lp, advantages, ref_lp, mask)
        each = torch.where(read.active, read.ratio * read.advantages, 0.0)
        if read.gap is not None:
            each = each + self.beta * torch.expm1(read.gap)
        return each * read.weights

    @property
    def _high(self) -> float:
        """How far the ratio may rise."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _read(self, lp: object, old_lp: object, advantages: object, ref_lp: object, mask: object) -> _Tokens:
        """Check the arguments and reduce them to what both methods need."""
        now = _checks.require_floating(_checks.require_tensor(lp, "lp", min_ndim=2), "lp")
        real = _mask(mask, now)
        now = require_log_probs(_selected(now, real), "lp")
        why = "the ratio is taken to it" if old_lp is None else ""
        old = require_reference(_selected(old_lp, real), "old_lp", like=now, like_name="lp", why=why)
        if isinstance(advantages, Tensor):
            _checks.require_shape(advantages, "advantages", now.shape[:-1])
        given = _checks.require_same(_checks.require_real(advantages, "advantages"), "advantages", now, "lp")
        gain = given.detach().unsqueeze(-1)
        gap = None
        if self.beta > 0:
            why = f"beta is {self.beta:g}"
            gap = require_reference(_selected(ref_lp, real), "ref_lp", like=now, like_name="lp", why=why) - now
        change = now - old
        # compared as logarithms: expm1 is exact where the ratio is close to 1
        grown = torch.expm1(change.detach())
        active = ~(((gain > 0) & (grown > self._high)) | ((gain < 0) & (grown < -self.epsilon)))
        # the exponential of an inactive token could overflow and spoil the gradient of those that count
        ratio = torch.where(active, change, 0.0).exp()
        return _Tokens(ratio, active, gain, gap, self._weights(real).to(now.dtype))

    def _weights(self, real: Tensor) -> Tensor:
        """Return w_it, zero at padding, in float64."""
        counts = real.sum(-1, keepdim=True).double()
        size = real.shape[-2]
        total = {
            "response": size * counts,
            "token": counts.sum(-2, keepdim=True),
            "constant": torch.full_like(counts, size * float(self.max_length or 0)),
        }[self.normalization]
        return real / total


class _Tokens(NamedTuple):
    """What a clipped loss needs of each token: all (..., G, T) but the advantages, which are (..., G, 1)."""

    ratio: Tensor
    active: Tensor
    advantages: Tensor
    gap: Tensor | None
    weights: Tensor


def _mask(mask: object, like: Tensor) -> Tensor:
    """Require a boolean mask that leaves each response a token."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    real = _checks.require_tensor(mask, "mask")
    if real.dtype != torch.bool or real.device != like.device:
        raise ValueError(f"mask: expected dtype torch.bool on {like.device}, got {_checks.describe(real)}")
    if real.shape != like.shape:
        raise ValueError(f"mask: expected the shape of lp {tuple(like.shape)}, got {tuple(real.shape)}")
    if _checks.known_truth(real.any(-1).all()) is False:
        raise ValueError("mask: expected at least one token in each response, got a response without")
    return real


def _selected(value: object, real: Tensor) -> object:
    """Replace what stands at padding by 0 before anything reads it, if the value is a tensor that fits."""
    fits = isinstance(value, Tensor) and value.shape == real.shape and value.device == real.device
    return value.masked_fill(~real, 0) if isinstance(value, Tensor) and fits else value
