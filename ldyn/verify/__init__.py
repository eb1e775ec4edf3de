"""Verification of mathematical statements: derivations, claims with evidence, and a gate for a book's build.

The engine knows no topic and is of use to other books. `derive` checks each step of a symbolic derivation when it
is written; `Claim` collects evidence under a statement's label and refuses to close without negative controls;
`ldyn.verify.sphinx_gate` puts the evidence beside the statement and fails the build where any is missing.
"""

from .cases import Cases
from .claim import Check, Claim
from .derivation import Derivation, derive
from .errors import Invalid, Refuted, Undecided, Vacuous, Verdict, VerificationError
from .finding import Finding
from .index import contract, delta, dimension, indices, partial, total, unfold, vector
from .inequality import inequality
from .numeric import agreement, convergence, coverage
from .symbolic import decide_equal, decide_nonnegative

__all__ = [
    "Cases",
    "Check",
    "Claim",
    "Derivation",
    "Finding",
    "Invalid",
    "Refuted",
    "Undecided",
    "Vacuous",
    "Verdict",
    "VerificationError",
    "agreement",
    "contract",
    "convergence",
    "coverage",
    "decide_equal",
    "decide_nonnegative",
    "delta",
    "derive",
    "dimension",
    "indices",
    "inequality",
    "partial",
    "total",
    "unfold",
    "vector",
]
