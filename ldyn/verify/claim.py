"""A claim: a labelled statement with its evidence and its negative controls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from .cases import Case
from .derivation import Derivation
from .display import render_html, render_text
from .errors import Invalid, Refuted, Undecided, Vacuous, Verdict, VerificationError
from .finding import Finding, at_least
from .index import Where
from .inequality import inequality
from .numeric import agreement, convergence, coverage
from .symbolic import decide_equal

NUMERIC = ("agrees", "converges", "bounds", "covers")
_LABEL = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Check:
    """A check that passed, with the way to repeat it on a wrong form."""

    finding: Finding
    repeat: Callable[[Any], Finding]
    symbolic: bool


class Claim:
    """Evidence for the statement that carries the same label; use it as a context manager.

    Leaving the context checks that the evidence is complete and shows it. A check that does not pass raises at
    once, so a claim that is displayed has passed.
    """

    def __init__(self, label: str, *, uses: Sequence[str] = (), unproved: str = "") -> None:
        """Open a claim.

        Args:
            label: The label of the statement on the same page: lower-case words joined by hyphens.
            uses: Labels of the statements that this one rests on.
            unproved: Why there is no symbolic proof; shown to the reader. Empty if there is one.

        Raises:
            Invalid: If a label is malformed or the claim uses itself.
        """
        for name in (label, *uses):
            if not isinstance(name, str) or not _LABEL.fullmatch(name):
                raise Invalid(f"label: expected lower-case words joined by hyphens, got {name!r}")
        if isinstance(uses, str) or label in uses:
            raise Invalid(f"uses: expected a sequence of other labels, got {uses!r}")
        self.label, self.uses, self.unproved = label, tuple(uses), unproved.strip()
        self._checks: list[Check] = []
        self._controls: list[dict[str, str]] = []
        self._closed = False

    def __enter__(self) -> Claim:
        """Return the claim itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Check that the evidence is complete and show it, unless an error is on its way."""
        if error is None:
            self._require_complete()
            self._closed = True
            _show(self)

    @property
    def status(self) -> str:
        """``proved`` or ``checked``, computed from the evidence."""
        self._require_complete()
        return "proved" if any(check.symbolic for check in self._checks) else "checked"

    def record(self) -> dict[str, Any]:
        """Return the evidence as plain data.

        Returns:
            Label, status, scopes of the proofs, evidence, controls, labels used, and why it is unproved, if it is.
        """
        evidence = [
            {key: value for key, value in asdict(check.finding).items() if key not in ("verdict", "refused")}
            for check in self._checks
        ]
        scopes = list(dict.fromkeys(check.finding.scope for check in self._checks if check.symbolic))
        return {
            "label": self.label,
            "status": self.status,
            "scopes": scopes,
            "evidence": evidence,
            "controls": list(self._controls),
            "uses": list(self.uses),
            "unproved": self.unproved,
        }

    def proves(
        self, claimed: Any, reference: Any = None, *, scope: str, where: Where | None = None, what: str = ""
    ) -> Check:
        """Accept a symbolic identity, or a derivation whose steps were decided one by one.

        Args:
            claimed: The closed form (expression or matrix), or a chain begun by `derive`.
            reference: The other side; left out for a chain, whose start it is.
            scope: The sizes that the proof covers, for example ``"every V"`` or ``"V = 3"``.
            where: Definitions, as for `derive`; a chain brings its own.
            what: The statement, in a few words.

        Returns:
            The check, for use as `against` in `rejects`.

        Raises:
            Invalid: If the scope is empty or a side is missing.
        """
        if isinstance(claimed, Derivation):
            if reference is not None or len(claimed.steps) < 2:
                raise Invalid("claimed: expected a chain of at least one step and no reference")
            if claimed.relation != "=":
                return self._proves_ordered(claimed, scope, what)
            claimed, reference, where = claimed.last, claimed.first, claimed.where
        if reference is None or not scope.strip():
            raise Invalid("proves: expected a reference and a scope, got none")

        def repeat(form: Any) -> Finding:
            decision = decide_equal(form, reference, where)
            difference = f"differs at an instance, relatively by at least {at_least(decision.witness)}"
            result = {Verdict.TRUE: "difference exactly zero", Verdict.FALSE: difference}.get(
                decision.verdict, "undecided"
            )
            return Finding("proves", decision.verdict, decision.verdict is Verdict.FALSE, what, scope, result)

        return self._accept(repeat, claimed, symbolic=True)

    def _proves_ordered(self, chain: Derivation, scope: str, what: str) -> Check:
        """Accept a chain with inequalities; a control replaces its last expression."""
        from .symbolic import decide_nonnegative

        def repeat(form: Any) -> Finding:
            if form is chain.last:
                verdict, result = Verdict.TRUE, "every step decided"
            else:
                verdict = decide_nonnegative(form - chain.first, chain.where)
                result = "fails at an instance" if verdict is Verdict.FALSE else "not refuted"
            return Finding("proves", verdict, verdict is Verdict.FALSE, what, scope, result)

        return self._accept(repeat, chain.last, symbolic=True)

    def agrees(
        self,
        claimed: Callable[..., Any],
        reference: Callable[..., Any],
        cases: Iterable[Case],
        *,
        rtol: float = 1e-10,
        what: str = "",
    ) -> Check:
        """Accept that two independent routes give the same numbers; see `ldyn.verify.numeric.agreement`.

        Args:
            claimed: The closed form.
            reference: An independent route.
            cases: Arguments for both.
            rtol: Largest allowed relative error.
            what: The statement, in a few words.

        Returns:
            The check.
        """
        stored = list(cases)
        return self._accept(lambda form: agreement(form, reference, stored, rtol=rtol, what=what), claimed)

    def converges(
        self,
        approximation: Callable[..., Any],
        exact: Callable[..., Any],
        cases: Iterable[Case],
        *,
        order: float,
        what: str = "",
        **options: Any,
    ) -> Check:
        """Accept the order of a remainder; see `ldyn.verify.numeric.convergence`.

        Args:
            approximation: Maps h and a case to the approximation.
            exact: Maps the same to the exact value.
            cases: Arguments that follow h.
            order: The claimed order.
            what: The statement, in a few words.
            **options: `steps` and `magnitude`.

        Returns:
            The check.
        """
        stored = list(cases)
        return self._accept(
            lambda form: convergence(form, exact, stored, order=order, what=what, **options), approximation
        )

    def bounds(
        self,
        value: Callable[..., Any],
        bound: Callable[..., Any],
        cases: Iterable[Case],
        *,
        what: str = "",
        **options: Any,
    ) -> Check:
        """Accept an inequality that survives a search for violations; see `ldyn.verify.inequality.inequality`.

        Args:
            value: The quantity that is bounded.
            bound: The claimed upper bound; a control takes its place.
            cases: Arguments for both.
            what: The statement, in a few words.
            **options: `atol`, `sharp`, `project` and `search`.

        Returns:
            The check.
        """
        stored = list(cases)
        return self._accept(lambda form: inequality(value, form, stored, what=what, **options), bound)

    def covers(self, event: Callable[..., Any], *, at_least: float, what: str = "", **options: Any) -> Check:
        """Accept a probability statement; see `ldyn.verify.numeric.coverage`.

        Args:
            event: Maps a generator and n to n booleans.
            at_least: The claimed probability.
            what: The statement, in a few words.
            **options: `trials` and `seed`.

        Returns:
            The check.
        """
        return self._accept(lambda form: coverage(form, at_least=at_least, what=what, **options), event)

    def rejects(self, what: str, wrong: Any, *, against: Check | None = None, erratum: str = "") -> None:
        """Put a wrong form in the place of the claimed one and require that the same check refuses it.

        Args:
            what: What is wrong with it, in a few words.
            wrong: An expression or matrix for a proof, a callable for a numeric check.
            against: The check that must refuse; by default the last one that takes such a form.
            erratum: The row of the errata page that this control refutes, for example ``"S0-1"``.

        Raises:
            Vacuous: If there is no check to refuse it, or it is not refused by the margin.
            VerificationError: If the check cannot be carried out on it.
            Invalid: If it gives NaN or raises: a control must be a well-formed near miss.
        """
        self._require_open()
        if not what.strip():
            raise Invalid("what: expected what is wrong with the form, got an empty text")
        if against is not None and against not in self._checks:
            raise Invalid(f"against: expected a check of claim {self.label}, got one that is not")
        wants_symbolic = not callable(wrong)
        fitting = [check for check in self._checks if check.symbolic == wants_symbolic]
        if against is None and not fitting:
            raise Vacuous(f"rejects ({what}): expected an earlier check that takes such a form, got none")
        check = against or fitting[-1]
        try:
            finding = check.repeat(wrong)
        except VerificationError:
            raise
        except Exception as error:
            raise Invalid(f"rejects ({what}): expected a well-formed near miss, got {error!r}") from error
        if not finding.refused:
            raise Vacuous(
                f"rejects ({what}): the check accepts the wrong form, or refuses it by no margin: {finding.result}"
            )
        self._controls.append({"what": what, "kind": finding.kind, "result": finding.result, "erratum": erratum})

    def _accept(self, repeat: Callable[[Any], Finding], claimed: Any, *, symbolic: bool = False) -> Check:
        self._require_open()
        check = Check(repeat(claimed).require(), repeat, symbolic)
        self._checks.append(check)
        return check

    def _require_open(self) -> None:
        if self._closed:
            raise Invalid(f"claim {self.label}: expected evidence inside the with block, got some after it")

    def _require_complete(self) -> None:
        kinds = [check.finding.kind for check in self._checks]
        missing = []
        if "proves" not in kinds and not self.unproved:
            missing.append("a proof, or unproved= with the reason")
        if not any(kind in NUMERIC for kind in kinds):
            missing.append("a numeric check")
        if not self._controls:
            missing.append("a negative control")
        if missing:
            raise Vacuous(f"claim {self.label}: expected {'; '.join(missing)}; got none")
        if "proves" in kinds and self.unproved:
            raise Invalid(f"claim {self.label}: expected unproved= only where there is no proof")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        record = self.record()
        return {"text/plain": render_text(record), "text/html": render_html(record)}

    def __repr__(self) -> str:
        """Return the evidence as text, or what is still open."""
        return render_text(self.record()) if self._closed else f"Claim({self.label!r}, open)"


def _show(claim: Claim) -> None:
    """Display the evidence where a notebook front end is listening."""
    import sys

    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is not None:
            display(claim)


__all__ = ["Check", "Claim", "Invalid", "Refuted", "Undecided", "Vacuous"]
