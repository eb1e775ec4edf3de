"""Objectives of a preferred and a rejected response; the public names are in `ldyn.dynamics.objectives`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldyn import _checks
from ldyn.dynamics._objectives import (
    require_lengths,
    require_log_probs,
    require_reference,
    require_share,
    set_field,
)


class Coefficients(NamedTuple):
    """What multiplies the residuals of supervised learning: G⁺ = c⁺ S⁺ and G⁻ = c⁻ S⁻, the sign included.

    A positive coefficient pulls its response up, as supervised learning does, a negative one pushes it down.
    """

    c_pos: Tensor
    c_neg: Tensor


class Pair(NamedTuple):
    """What an objective sees of its pairs: r⁺ and r⁻ as it measures them, and the tokens that each is divided by."""

    pos: Tensor
    neg: Tensor
    tokens_pos: Tensor | float
    tokens_neg: Tensor | float

    @property
    def margin(self) -> Tensor:
        """Return h = r⁺ − r⁻."""
        return self.pos - self.neg

    def opposed(self, pull: Tensor) -> Coefficients:
        """Return the coefficients of a loss of the margin alone, from the pull −∂ℓ/∂h."""
        return Coefficients(pull / self.tokens_pos, -pull / self.tokens_neg)


@dataclass(frozen=True)
class PairObjective(ABC):
    """A loss of the log-probabilities lp⁺ and lp⁻ of a preferred and a rejected response.

    With S = [π_l − e_{y_l}]_l, the gradient of −lp in the logits of a response's tokens, the gradients of the loss are
    G⁺ = c⁺ S⁺ and G⁻ = c⁻ S⁻ with c = −∂ℓ/∂lp. All objectives of pairs take the same arguments, so that one training
    loop serves them; a reference or lengths that an objective has no use for are accepted and not looked at. Derived
    in the chapter *Objectives*.
    """

    _against_reference: ClassVar[bool] = True

    def loss(
        self,
        lp_pos: Tensor,
        lp_neg: Tensor,
        *,
        ref_pos: Tensor | None = None,
        ref_neg: Tensor | None = None,
        len_pos: Tensor | int | None = None,
        len_neg: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the loss of each pair; nothing is averaged over pairs.

        Args:
            lp_pos: (...) log-probabilities of the preferred responses, summed over tokens, in nats.
            lp_neg: (...) those of the rejected responses.
            ref_pos: (...) log-probabilities of the preferred responses under the reference model, also summed;
                constants, into which no gradient flows.
            ref_neg: (...) those of the rejected responses.
            len_pos: (...) int numbers of tokens of the preferred responses, or one number.
            len_neg: (...) those of the rejected responses.

        Returns:
            (...) losses.

        Raises:
            ValueError: If a log-probability is not finite or above 0, shapes, dtypes or devices differ, a reference
                or a length is missing that the objective needs, or a length is not positive.
        """
        return self._loss(self._read(lp_pos, lp_neg, ref_pos, ref_neg, len_pos, len_neg))

    def coefficients(
        self,
        lp_pos: Tensor,
        lp_neg: Tensor,
        *,
        ref_pos: Tensor | None = None,
        ref_neg: Tensor | None = None,
        len_pos: Tensor | int | None = None,
        len_neg: Tensor | int | None = None,
    ) -> Coefficients:
        """Compute c⁺ = −∂ℓ/∂lp⁺ and c⁻ = −∂ℓ/∂lp⁻ of each pair, in closed form.

        Args:
            lp_pos: As in `loss`.
            lp_neg: As in `loss`.
            ref_pos: As in `loss`.
            ref_neg: As in `loss`.
            len_pos: As in `loss`.
            len_neg: As in `loss`.

        Returns:
            (...) coefficients for each of the two responses. They are functions of the log-probabilities and
            differentiable; detach them to use them as weights.

        Raises:
            ValueError: As in `loss`.
        """
        return self._coefficients(self._read(lp_pos, lp_neg, ref_pos, ref_neg, len_pos, len_neg))

    @abstractmethod
    def _loss(self, pair: Pair) -> Tensor:
        """Return the losses (...)."""

    @abstractmethod
    def _coefficients(self, pair: Pair) -> Coefficients:
        """Return the coefficients (...), derived by hand."""

    def _per_token(self) -> bool:
        """Say whether log-probabilities are divided by the number of tokens."""
        return False

    def _read(
        self,
        lp_pos: object,
        lp_neg: object,
        ref_pos: object,
        ref_neg: object,
        len_pos: object,
        len_neg: object,
    ) -> Pair:
        """Check the arguments, and reduce them to what the objective measures."""
        name = type(self).__name__
        pos = require_log_probs(lp_pos, "lp_pos")
        neg = require_log_probs(lp_neg, "lp_neg", like=pos, like_name="lp_pos")
        if self._against_reference:
            why = f"{name} compares the model with it"
            pos = pos - require_reference(ref_pos, "ref_pos", like=pos, like_name="lp_pos", why=why)
            neg = neg - require_reference(ref_neg, "ref_neg", like=neg, like_name="lp_neg", why=why)
        if not self._per_token():
            return Pair(pos, neg, 1.0, 1.0)
        why = f"this {name} divides by them"
        tokens_pos = require_lengths(len_pos, "len_pos", like=pos, like_name="lp_pos", why=why)
        tokens_neg = require_lengths(len_neg, "len_neg", like=neg, like_name="lp_neg", why=why)
        return Pair(pos / tokens_pos, neg / tokens_neg, tokens_pos, tokens_neg)


@dataclass(frozen=True)
class DPO(PairObjective):
    """Direct preference optimisation: −log σ(βh), h the difference of the two log-ratios to the reference.

    c⁺ = −c⁻ = β σ(−βh): the pull fades once the pair is separated and never changes its sign. In TRL, ``DPOTrainer``
    with loss type ``sigmoid``, whose logged ``logps/chosen`` are means over a batch of such sums. Rafailov et al.,
    arXiv:2305.18290.

    Attributes:
        beta: β > 0, in 1/nat.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        set_field(self, "beta", _checks.require_positive(self.beta, "beta"))

    def _loss(self, pair: Pair) -> Tensor:
        return -logsigmoid(self.beta * pair.margin)

    def _coefficients(self, pair: Pair) -> Coefficients:
        return pair.opposed(self.beta * torch.sigmoid(-self.beta * pair.margin))


@dataclass(frozen=True)
class SPIN(DPO):
    """Self-play fine-tuning: DPO against the model's own previous iterate.

    The preferred response is one of the data, the rejected one was sampled from the previous iterate, and that iterate
    is the reference. So h = 0 when an iteration begins, and c⁺ = −c⁻ = β/2. Its paper writes λ for β. Chen et al.,
    arXiv:2401.01335.

    Attributes:
        beta: β > 0, in 1/nat.
    """


@dataclass(frozen=True)
class CDPO(PairObjective):
    """Conservative DPO: the cross-entropy to a preference that holds with probability 1 − ε.

    The loss is −(1 − ε) log σ(βh) − ε log σ(−βh), and c⁺ = −c⁻ = β (1 − ε − σ(βh)), which changes its sign at
    σ(βh) = 1 − ε. TRL's loss type ``robust`` is another function: there the second term is subtracted and the whole
    divided by 1 − 2ε, which makes it an unbiased estimate of the loss under clean labels. Mitchell, *A note on DPO
    with noisy preferences* (2023).

    Attributes:
        beta: β > 0, in 1/nat.
        label_smoothing: ε, from 0 (plain DPO) to below ½.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        set_field(self, "beta", _checks.require_positive(self.beta, "beta"))
        set_field(self, "label_smoothing", require_share(self.label_smoothing, "label_smoothing", below=0.5))

    def _loss(self, pair: Pair) -> Tensor:
        scaled, epsilon = self.beta * pair.margin, self.label_smoothing
        return -(1 - epsilon) * logsigmoid(scaled) - epsilon * logsigmoid(-scaled)

    def _coefficients(self, pair: Pair) -> Coefficients:
        # 1 − ε − σ(m) = σ(−m) − ε, in which nothing cancels while m is large and ε = 0
        return pair.opposed(self.beta * (torch.sigmoid(-self.beta * pair.margin) - self.label_smoothing))


@dataclass(frozen=True)
class IPO(PairObjective):
    """Identity preference optimisation: (h − 1/(2β))².

    c⁺ = −c⁻ = 1/β − 2h: the pull falls in proportion to what is missing and reverses at h = 1/(2β). TRL's loss type
    ``ipo`` is the variant with `average_log_prob`, in which h is a difference of means over tokens. Azar et al.,
    arXiv:2310.12036, where β is τ.

    Attributes:
        beta: β > 0; 1/(2β) is the margin aimed at, in nats (nats per token with `average_log_prob`).
        average_log_prob: Whether each log-ratio is divided by the number of the response's tokens.
    """

    beta: float = 0.1
    average_log_prob: bool = False

    def __post_init__(self) -> None:
        set_field(self, "beta", _checks.require_positive(self.beta, "beta"))
        if not isinstance(self.average_log_prob, bool):
            raise ValueError(f"average_log_prob: expected True or False, got {_checks.describe(self.average_log_prob)}")

    def _per_token(self) -> bool:
        return self.average_log_prob

    def _loss(self, pair: Pair) -> Tensor:
        return (pair.margin - 1 / (2 * self.beta)).square()

    def _coefficients(self, pair: Pair) -> Coefficients:
        return pair.opposed(1 / self.beta - 2 * pair.margin)


@dataclass(frozen=True)
class SLiC(PairObjective):
    """Sequence likelihood calibration: a hinge, max(0, δ − lp⁺ + lp⁻) − λ lp_sft, with no reference model.

    c⁺ = −c⁻ is 1 while the margin lp⁺ − lp⁻ is below δ and 0 from there on. The second term is supervised learning
    on a third sequence, whose gradient in that sequence's logits is λ S_sft. TRL's loss type ``hinge``,
    max(0, 1 − βh), is β times the hinge for the margin h to a reference with δ = 1/β and λ = 0. Zhao et al.,
    arXiv:2305.10425.

    Attributes:
        delta: δ > 0, the margin aimed at, in nats.
        regularization: λ ≥ 0.
    """

    delta: float = 1.0
    regularization: float = 0.0

    _against_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        set_field(self, "delta", _checks.require_positive(self.delta, "delta"))
        set_field(self, "regularization", _checks.require_nonnegative(self.regularization, "regularization"))

    def loss(
        self,
        lp_pos: Tensor,
        lp_neg: Tensor,
        *,
        ref_pos: Tensor | None = None,
        ref_neg: Tensor | None = None,
        len_pos: Tensor | int | None = None,
        len_neg: Tensor | int | None = None,
        lp_sft: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of each pair; nothing is averaged over pairs.

        Args:
            lp_pos: (...) log-probabilities of the preferred responses, summed over tokens, in nats.
            lp_neg: (...) those of the rejected responses.
            ref_pos: Not looked at.
            ref_neg: Not looked at.
            len_pos: Not looked at.
            len_neg: Not looked at.
            lp_sft: (...) log-probabilities of the sequences of the second term; needed if λ > 0.

        Returns:
            (...) losses.

        Raises:
            ValueError: If a log-probability is not finite or above 0, shapes, dtypes or devices differ, or `lp_sft`
                is missing although λ > 0.
        """
        hinge = super().loss(lp_pos, lp_neg)
        if lp_sft is None and self.regularization == 0:
            return hinge
        if lp_sft is None:
            raise ValueError(
                f"lp_sft: expected log-probabilities, because regularization is {self.regularization:g}, got None"
            )
        anchor = require_log_probs(lp_sft, "lp_sft", like=lp_pos, like_name="lp_pos")
        return hinge - self.regularization * anchor

    def sft_coefficients(self, lp_sft: Tensor) -> Tensor:
        """Return what multiplies S of the third sequence: λ, whatever its probability.

        Args:
            lp_sft: (...) log-probabilities of the sequences of the second term.

        Returns:
            (...) the constant λ.

        Raises:
            ValueError: If a log-probability is not finite or above 0.
        """
        return torch.full_like(require_log_probs(lp_sft, "lp_sft").detach(), self.regularization)

    def _loss(self, pair: Pair) -> Tensor:
        return torch.relu(self.delta - pair.margin)

    def _coefficients(self, pair: Pair) -> Coefficients:
        return pair.opposed((pair.margin < self.delta).to(pair.margin.dtype))


@dataclass(frozen=True)
class SPPO(PairObjective):
    """Self-play preference optimisation with certain labels: (r⁺ − 1/(2β))² + (r⁻ + 1/(2β))².

    The two log-ratios have a target each: c⁺ = 1/β − 2r⁺ and c⁻ = −(1/β + 2r⁻). At the reference c⁻ = −1/β is a
    negative gradient of full size; it vanishes at r⁻ = −1/(2β) and changes its sign beyond. TRL's loss type
    ``sppo_hard``. Wu et al., arXiv:2405.00675, where 1/β is η.

    Attributes:
        beta: β > 0; 1/(2β) is the target, in nats.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        set_field(self, "beta", _checks.require_positive(self.beta, "beta"))

    def _loss(self, pair: Pair) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pair.pos - target).square() + (pair.neg + target).square()

    def _coefficients(self, pair: Pair) -> Coefficients:
        return Coefficients(1 / self.beta - 2 * pair.pos, -(1 / self.beta + 2 * pair.neg))


@dataclass(frozen=True)
class SimPO(PairObjective):
    """Simple preference optimisation: −log σ(m), m = β lp⁺/n⁺ − β lp⁻/n⁻ − γ, with no reference model.

    c⁺ = β σ(−m)/n⁺ and c⁻ = −β σ(−m)/n⁻, n being numbers of tokens: the shorter response is moved more. The
    log-probabilities are sums over tokens, and the objective divides them by the lengths itself. In TRL,
    ``CPOTrainer`` with loss type ``simpo`` and ``cpo_alpha=0``. Meng et al., arXiv:2405.14734.

    Attributes:
        beta: β > 0, in tokens/nat.
        gamma: γ ≥ 0, the margin aimed at.
    """

    beta: float = 2.0
    gamma: float = 1.0

    _against_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        set_field(self, "beta", _checks.require_positive(self.beta, "beta"))
        set_field(self, "gamma", _checks.require_nonnegative(self.gamma, "gamma"))

    def _per_token(self) -> bool:
        return True

    def _loss(self, pair: Pair) -> Tensor:
        return -logsigmoid(self.beta * pair.margin - self.gamma)

    def _coefficients(self, pair: Pair) -> Coefficients:
        return pair.opposed(self.beta * torch.sigmoid(self.gamma - self.beta * pair.margin))
