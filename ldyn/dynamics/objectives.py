"""Objectives of fine-tuning, each as a loss of log-probabilities and as what it multiplies supervised learning by.

A loss that depends on the logits of a response only through the response's log-probability lp has the gradient
G = c S in them, where S = [π_l − e_{y_l}]_l is the gradient of supervised learning, the loss −lp, and c = −∂ℓ/∂lp is
one number. G points from the target to the prediction, and a step moves the logits along −G; so c > 0 pulls the
response up and c < 0 pushes it down. All that tells these objectives apart is c:

- of a pair: `DPO`, `CDPO`, `IPO`, `SLiC`, `SPPO`, `SPIN` and `SimPO` give ``Coefficients(c_pos, c_neg)``;
- of one response: `SFT`, `KTO`, `NPO` and `Reinforce` give one tensor of coefficients;
- of each token: `GRPO` gives one for each token, its normalisation included;
- of each label: `SoftTargets` and `LabelSmoothing` give one for each label.

Each is a frozen dataclass with its hyperparameters, ``loss(...)`` and ``coefficients(...)``; for those of a pair the
two methods are described once, at `PairObjective`. Losses are not averaged over pairs or responses, coefficients are
closed forms, and log-probabilities are sums over tokens: where an objective divides by lengths, it asks for them.
Derived in the chapter *Objectives*.
"""

from ldyn.dynamics._objectives_group import GRPO, group_advantages
from ldyn.dynamics._objectives_single import KTO, NPO, SFT, LabelSmoothing, Reinforce, SoftTargets, residual
from ldyn.dynamics._preference import CDPO, DPO, IPO, SPIN, SPPO, Coefficients, PairObjective, SimPO, SLiC

__all__ = [
    "CDPO",
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "NPO",
    "SFT",
    "SPIN",
    "SPPO",
    "Coefficients",
    "LabelSmoothing",
    "PairObjective",
    "Reinforce",
    "SLiC",
    "SimPO",
    "SoftTargets",
    "group_advantages",
    "residual",
]
