"""Objectives of single responses and of single tokens' targets; public in `ldyn.dynamics.objectives`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldyn import _checks
from ldyn.dynamics._objectives import (
    one_hot,
    require_fit,
    require_log_probs,
    require_reference,
    require_share,
    set_field,
)


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute S = π − e_y at each token, what every objective of this module multiplies.

    It is the gradient of −log π_y in the logits, and points from the target to the prediction; a step moves the
    logits along −S. Derived in the chapter *Objectives*.

    Args:
        logits: (..., V).
        labels: (...) int tokens y of the response.

    Returns:
        (..., V), rows that sum to zero.

    Raises:
        ValueError: If the logits are not finite, or the labels no integers from 0 to V − 1 of the same shape.
    """
    target = one_hot(logits, labels)
    return torch.softmax(logits, -1) - target


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: −lp, the cross-entropy summed over the response's tokens.

    c = 1: the pull never fades by itself; what fades is the residual S = [π_l − e_{y_l}]_l that it multiplies.
    Frameworks average over tokens, which divides c by the number of tokens in the average. Derived in the chapter
    *Objectives*.
    """

    def loss(self, lp: Tensor) -> Tensor:
        """Compute the loss of each response.

        Args:
            lp: (...) log-probabilities, summed over tokens, in nats.

        Returns:
            (...) losses.

        Raises:
            ValueError: If a log-probability is not finite or above 0.
        """
        return -require_log_probs(lp, "lp")

    def coefficients(self, lp: Tensor) -> Tensor:
        """Return c = −∂ℓ/∂lp, so that G = c S.

        Args:
            lp: (...) log-probabilities.

        Returns:
            (...) ones.

        Raises:
            ValueError: As in `loss`.
        """
        return torch.ones_like(require_log_probs(lp, "lp").detach())


@dataclass(frozen=True)
class NPO:
    """Negative preference optimisation, for unlearning: (2/β) log(1 + (π/π_ref)^β) of a response to be forgotten.

    With r = lp − ref, c = −2 σ(βr): at the reference −1, as for gradient ascent on the cross-entropy, and it fades as
    the response is forgotten. Zhang et al., arXiv:2404.05868. Derived in the chapter *Objectives*.

    Attributes:
        beta: β > 0, in 1/nat.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        set_field(self, "beta", _checks.require_positive(self.beta, "beta"))

    def loss(self, lp: Tensor, *, ref: Tensor | None = None) -> Tensor:
        """Compute the loss of each response.

        Args:
            lp: (...) log-probabilities of the responses to be forgotten, summed over tokens, in nats.
            ref: (...) those under the reference model; constants.

        Returns:
            (...) losses.

        Raises:
            ValueError: If a log-probability is not finite or above 0, or the reference is missing or does not fit.
        """
        return -2 / self.beta * logsigmoid(-self.beta * self._ratio(lp, ref))

    def coefficients(self, lp: Tensor, *, ref: Tensor | None = None) -> Tensor:
        """Compute c = −∂ℓ/∂lp, so that G = c S.

        Args:
            lp: As in `loss`.
            ref: As in `loss`.

        Returns:
            (...) coefficients, from −2 to 0.

        Raises:
            ValueError: As in `loss`.
        """
        return -2 * torch.sigmoid(self.beta * self._ratio(lp, ref))

    def _ratio(self, lp: Tensor, ref: Tensor | None) -> Tensor:
        """Check the arguments and return r."""
        return require_log_probs(lp, "lp") - require_reference(
            ref, "ref", like=lp, like_name="lp", why="NPO compares the model with it"
        )


@dataclass(frozen=True)
class KTO:
    """Kahneman–Tversky optimisation: λ (1 − σ(u)) of single responses that are marked desirable or not.

    With r = lp − ref, u = β(r − z₀) for a desirable response and β(z₀ − r) for an undesirable one, and
    c = ±λβ σ(u) σ(−u), positive for a desirable one. It vanishes at both ends: also a response on which the model is
    badly wrong is left alone. Ethayarajh et al., arXiv:2402.01306. In TRL, ``KTOTrainer`` with loss type ``kto``.
    Derived in the chapter *Objectives*.

    Attributes:
        beta: β > 0, in 1/nat.
        desirable_weight: λ > 0 of desirable responses.
        undesirable_weight: λ > 0 of undesirable ones.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            set_field(self, name, _checks.require_positive(getattr(self, name), name))

    def loss(
        self,
        lp: Tensor,
        *,
        desirable: Tensor | bool,
        ref: Tensor | None = None,
        z0: Tensor | float = 0.0,
    ) -> Tensor:
        """Compute the loss of each response.

        Args:
            lp: (...) log-probabilities, summed over tokens, in nats.
            desirable: (...) bool, or one for all.
            ref: (...) log-probabilities under the reference model; constants.
            z0: z₀ ≥ 0, an estimate of the divergence from the reference in nats, one number. No gradient flows into
                it, whatever it was computed from: without this rule the lemma would have a further term.

        Returns:
            (...) losses.

        Raises:
            ValueError: If a log-probability is not finite or above 0, the reference is missing or does not fit,
                `desirable` is not boolean or does not fit, or z₀ is no number or negative.
        """
        scaled, weight, _ = self._read(lp, desirable, ref, z0)
        return weight * torch.sigmoid(-scaled)

    def coefficients(
        self,
        lp: Tensor,
        *,
        desirable: Tensor | bool,
        ref: Tensor | None = None,
        z0: Tensor | float = 0.0,
    ) -> Tensor:
        """Compute c = −∂ℓ/∂lp, so that G = c S.

        Args:
            lp: As in `loss`.
            desirable: As in `loss`.
            ref: As in `loss`.
            z0: As in `loss`.

        Returns:
            (...) coefficients, at most λβ/4 in size.

        Raises:
            ValueError: As in `loss`.
        """
        scaled, weight, sign = self._read(lp, desirable, ref, z0)
        return sign * weight * self.beta * torch.sigmoid(scaled) * torch.sigmoid(-scaled)

    def _read(self, lp: Tensor, desirable: object, ref: object, z0: object) -> tuple[Tensor, Tensor, Tensor]:
        """Check the arguments and return u, λ and the sign of each response."""
        checked = require_log_probs(lp, "lp")
        ratio = checked - require_reference(
            ref, "ref", like=checked, like_name="lp", why="KTO compares the model with it"
        )
        good = torch.tensor(desirable, device=lp.device) if isinstance(desirable, bool) else desirable
        if not isinstance(good, Tensor) or good.dtype != torch.bool or good.device != lp.device:
            raise ValueError(f"desirable: expected booleans on {lp.device}, got {_checks.describe(desirable)}")
        if good.ndim and good.shape != lp.shape:
            raise ValueError(f"desirable: expected the shape of lp {tuple(lp.shape)}, got {tuple(good.shape)}")
        start = _checks.require_nonnegative(z0.detach() if isinstance(z0, Tensor) else z0, "z0")
        one = torch.ones_like(ratio.detach())
        sign = torch.where(good, one, -one)
        weight = torch.where(good, one * self.desirable_weight, one * self.undesirable_weight)
        return sign * self.beta * (ratio - start), weight, sign


@dataclass(frozen=True)
class Reinforce:
    """The policy-gradient loss −Â lp of sampled responses with advantages Â.

    c = Â: a response with a negative advantage is pushed down for as long as it is sampled, however unlikely it is.
    Its gradient is an unbiased estimate of that of the expected reward if the responses are samples of the model and
    the advantage is the reward less anything that does not depend on the response. Williams (1992). Derived in the
    chapter *Objectives*.
    """

    def loss(self, lp: Tensor, *, advantages: Tensor) -> Tensor:
        """Compute the loss of each response.

        Args:
            lp: (...) log-probabilities, summed over tokens, in nats.
            advantages: (...) advantages; constants, into which no gradient flows.

        Returns:
            (...) losses.

        Raises:
            ValueError: If a log-probability is not finite or above 0, or the advantages are not finite or do not fit.
        """
        return -self.coefficients(lp, advantages=advantages) * lp

    def coefficients(self, lp: Tensor, *, advantages: Tensor) -> Tensor:
        """Return c = −∂ℓ/∂lp, so that G = c S.

        Args:
            lp: As in `loss`.
            advantages: As in `loss`.

        Returns:
            (...) the advantages.

        Raises:
            ValueError: As in `loss`.
        """
        like = require_log_probs(lp, "lp")
        return require_fit(_checks.require_real(advantages, "advantages"), "advantages", like, "lp").detach()


@dataclass(frozen=True)
class SoftTargets:
    """Cross-entropy −Σ_k t_k log π_k of single tokens to target distributions t, as in distillation.

    The loss reads every log-probability of a token, so the lemma gives one coefficient for each label: c_k = t_k
    multiplies π − e_k, the residual that label k would have alone, and G = Σ_k t_k (π − e_k) = π − t. Derived in the
    chapter *Objectives*.
    """

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each token.

        Args:
            logits: (..., V).
            targets: (..., V) probabilities t; constants.

        Returns:
            (...) losses, in nats. A sequence's loss is the sum over its tokens.

        Raises:
            ValueError: If the logits are not finite, or the targets no probabilities or of another shape, dtype or
                device.
        """
        return -(self.coefficients(logits, targets) * torch.log_softmax(logits, -1)).sum(-1)

    def coefficients(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weight of each label's residual, so that G = Σ_k c_k (π − e_k).

        Args:
            logits: As in `loss`.
            targets: As in `loss`.

        Returns:
            (..., V) the targets.

        Raises:
            ValueError: As in `loss`.
        """
        z = _checks.require_real(logits, "logits", min_ndim=1)
        checked = _checks.require_probabilities(targets, "targets")
        return require_fit(checked, "targets", z, "logits").detach()

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute G = π − t.

        Args:
            logits: As in `loss`.
            targets: As in `loss`.

        Returns:
            (..., V) gradient of each token's loss in its logits.

        Raises:
            ValueError: As in `loss`.
        """
        return torch.softmax(logits, -1) - self.coefficients(logits, targets)


@dataclass(frozen=True)
class LabelSmoothing:
    """Cross-entropy of single tokens to (1 − ε) e_y + (ε/V) 1, PyTorch's ``label_smoothing``.

    `SoftTargets` with c_k = (1 − ε) 1[k = y] + ε/V, so G = π − (1 − ε) e_y − (ε/V) 1: the label is pulled up, and
    pushed down where π_y exceeds its target. Derived in the chapter *Objectives*.

    Attributes:
        epsilon: ε, from 0 (plain cross-entropy) to below 1.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        set_field(self, "epsilon", require_share(self.epsilon, "epsilon", below=1.0))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each token.

        Args:
            logits: (..., V).
            labels: (...) int labels y.

        Returns:
            (...) losses, in nats. A sequence's loss is the sum over its tokens.

        Raises:
            ValueError: If the logits are not finite, or the labels no integers from 0 to V − 1 of the same shape.
        """
        return SoftTargets().loss(logits, self.coefficients(logits, labels))

    def coefficients(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weight of each label's residual, so that G = Σ_k c_k (π − e_k).

        Args:
            logits: As in `loss`.
            labels: As in `loss`.

        Returns:
            (..., V) the smoothed targets.

        Raises:
            ValueError: As in `loss`.
        """
        target = one_hot(logits, labels)
        return (1 - self.epsilon) * target + self.epsilon / target.shape[-1]

    def residual(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute G = π − (1 − ε) e_y − (ε/V) 1.

        Args:
            logits: As in `loss`.
            labels: As in `loss`.

        Returns:
            (..., V) gradient of each token's loss in its logits.

        Raises:
            ValueError: As in `loss`.
        """
        return SoftTargets().residual(logits, self.coefficients(logits, labels))
