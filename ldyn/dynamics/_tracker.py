"""The tracker; the public names are in `ldyn.dynamics.tracking`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ldyn import _checks
from ldyn._progress import progress_bar
from ldyn.dynamics._probes import Look, Probe, batched, fingerprint, look, require_label, trainable
from ldyn.dynamics._records import Record, RecordFile, Rows


class _Begun(NamedTuple):
    """A step that has begun: the parameters before it, or None if it is not recorded."""

    before: dict[str, Tensor] | None
    phase: str


class Tracker:
    """Record what optimiser steps do to the log-probabilities of chosen responses, measured and predicted.

    In a training loop::

        tracker = Tracker(model, probes, "run.csv", every=5)
        for batch in batches:
            loss(model, batch).backward()
            with tracker.step():
                optimizer.step()
            optimizer.zero_grad()

    Measuring is done in evaluation mode, and changes nothing of the model, of its gradients and modes, of the
    optimiser or of the generators of random numbers. A recorded step costs a few forward passes over the probes and,
    while it is measured, two copies of the parameters that require gradients: those before the step and the step
    itself. Other steps cost nothing. The model has to hold its parameters whole (not sharded over devices), and to
    be the module itself, not what ``torch.compile`` made of it.

    Δθ is the difference of the stored parameters, which is exact for numbers that are near each other. So the
    prediction is that of the step as it was rounded, like the measured change: for SmolLM2-135M in float32 and steps
    of AdamW at 3e-6, which change a response of nine tokens by 3 nats, it differs by 6e-4 nats from that of the step
    without rounding. The measured changes of such short responses are right to some 5e-5 nats there. Sums over tokens
    are taken in double precision, and logits in half precision are converted to float32 first.

    Args:
        model: A causal language model in any mode: any Hugging Face one, or any module that maps tokens (N, T)
            to logits (N, T, V).
        probes: The responses to watch, each with its own pair of kind and name.
        path: A CSV file for the rows, or None to keep them in memory alone.
        every: Record the steps 0, every, 2 every, and so on, counted from the first one of each phase.
        phase: A label for the rows, such as "sft" or "dpo".
        batch_size: How many probes go through the model at once.
        predict: Whether to compute the prediction, the larger part of the cost.
        resume: Whether a file that is there is continued: a record that was left incomplete is dropped, and
            steps are counted on from the last recorded one. After a restart from a checkpoint say with
            `continue_at` which step comes next. Without this, a file that is there is refused.
        progress: Whether to show a progress bar on the standard error stream, if tqdm is installed; it appears
            in runs of more than a few seconds.
        total: Number of steps to come, for that bar.

    Attributes:
        phase: the label of the rows to come; set it where another phase begins.
        every: which steps are recorded: the first one of each phase, and each `every`-th from there; it may be set.

    Raises:
        ValueError: If there is no probe, two have the same kind and name, a token is not in the vocabulary, a
            number is out of range, the model is random, it has no parameters or no logits (N, T, V), or the file is
            not as expected (see `resume`).
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe],
        path: str | Path | None = None,
        every: int = 1,
        *,
        phase: str = "train",
        batch_size: int = 8,
        predict: bool = True,
        resume: bool = False,
        progress: bool = False,
        total: int | None = None,
    ) -> None:
        self._every = _checks.require_integer(every, "every")
        self._probes = _distinct(probes)
        self._batches = batched(self._probes, _checks.require_integer(batch_size, "batch_size"))
        self._model, self._predict = _fitting(model, self._probes), bool(predict)
        self._panel = fingerprint(self._probes)
        self._file, self._table = None, list[Rows]()
        if path is not None:
            self._file = RecordFile(path, resume=resume, panel=self._panel, size=len(self._probes))
            self._table = list(self._file.records)
        last = self._table[-1][0] if self._table else None
        self._steps = 0 if last is None else last.step + last.stepped
        self._begun: _Begun | None = None
        self._phase = require_label(phase, "phase")
        self._start = self._first_step(self._steps)
        self._bar = progress_bar(total, desc="tracked", unit="step", done=self._steps, shown=progress)

    @property
    def every(self) -> int:
        """How many steps there are from one that is recorded to the next."""
        return self._every

    @every.setter
    def every(self, value: int) -> None:
        self._every = _checks.require_integer(value, "every")

    @property
    def phase(self) -> str:
        """The label of the rows to come."""
        return self._phase

    @phase.setter
    def phase(self, value: str) -> None:
        if require_label(value, "phase") != self._phase:
            self._phase = value
            self._start = self._first_step(self._steps)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The responses that are watched."""
        return self._probes

    @property
    def phase_start(self) -> int:
        """The number of the first step of the present phase, from which `every` is counted."""
        return self._start

    @property
    def steps(self) -> int:
        """Number of optimiser steps counted so far, those of a file that is continued included."""
        return self._steps

    @property
    def table(self) -> tuple[Record, ...]:
        """All rows, those of a file that is continued first."""
        return tuple(row for rows in self._table for row in rows)

    @contextmanager
    def step(self, *, record: bool | None = None) -> Iterator[None]:
        """Count the optimiser step that is taken in this context, and record it if it is its turn.

        Args:
            record: Whether to record this step, whatever `every` says.

        Yields:
            Nothing. If the context is left by an exception, nothing is counted or recorded.

        Raises:
            ValueError: If the contexts of two steps are nested, or after the step the parameters have other shapes
                or the model gives values that are not finite.
        """
        self.begin_step(record=record)
        try:
            yield
        except BaseException:
            self.abandon_step()
            raise
        self.end_step()

    def begin_step(self, *, record: bool | None = None) -> None:
        """Do the first half of `step`, for loops that no context can be put into; `end_step` is the second.

        Args:
            record: As in `step`.

        Raises:
            ValueError: If a step has begun and not ended.
        """
        if self._begun is not None:
            raise ValueError("step: expected the last step to end before another begins, got one inside another")
        wanted = (self._steps - self._start) % self.every == 0 if record is None else record
        before = {name: value.clone() for name, value in trainable(self._model).items()} if wanted else None
        self._begun = _Begun(before, self.phase)

    def end_step(self) -> None:
        """Do the second half of `step`: count it, and record it if it is its turn.

        Raises:
            ValueError: If none has begun, or as in `step`.
        """
        if self._begun is None:
            raise ValueError("end_step: expected a step that has begun, got none")
        (before, phase), self._begun = self._begun, None
        number, self._steps = self._steps, self._steps + 1
        if before is not None:
            self._add(number, phase, *self._looks(before))
        self._bar.update(1)

    def abandon_step(self) -> None:
        """Forget a step that has begun, if there is one, and do not count it."""
        self._begun = None

    def observe(self, *, phase: str | None = None) -> tuple[Record, ...]:
        """Look at the probes once, without a step, and record what is found.

        The rows have the same values before and after, and NaN as measured and predicted change.

        Args:
            phase: A label for these rows in place of the tracker's.

        Returns:
            The rows.

        Raises:
            ValueError: If it is called inside a step, or the model gives values that are not finite.
        """
        if self._begun is not None:
            raise ValueError("observe: expected to be called between steps, got a call inside one")
        label = self.phase if phase is None else require_label(phase, "phase")
        return self._add(self._steps, label, look(self._model, self._batches, plain_attention=self._predict))

    def continue_at(self, step: int) -> None:
        """Say which step comes next, after a return to an earlier state of the model.

        Records of that step and of later ones are dropped, in memory and in the file: they will be taken again. So are
        observations at that step in the present phase; those of an earlier phase, which ended there, are kept.

        Args:
            step: The number of the next step. It may also be larger than what was counted so far.

        Raises:
            ValueError: If it is no integer ≥ 0, or a step has begun.
        """
        number = _checks.require_integer(step, "step", minimum=0)
        if self._begun is not None:
            raise ValueError("continue_at: expected to be called between steps, got a call inside one")
        kept = next((at for at, rows in enumerate(self._table) if self._comes_again(rows[0], number)), len(self._table))
        if self._file is not None:
            self._file.keep(kept)
        del self._table[kept:]
        self._steps = number
        self._start = self._first_step(min(self._start, number))

    def close(self) -> None:
        """Take the progress bar away; rows are on the disk already."""
        self._bar.close()

    def _first_step(self, default: int) -> int:
        """Look up the first recorded step of the present phase."""
        found = (first.step for first, *_ in self._table if first.stepped and first.phase == self.phase)
        return next(found, default)

    def _comes_again(self, first: Record, step: int) -> bool:
        """Say whether a record will be taken again when the given step comes next."""
        return first.step > step or (first.step == step and (first.stepped or first.phase == self.phase))

    def _looks(self, before: dict[str, Tensor]) -> tuple[list[Look], list[Look]]:
        """Look at the probes before and after a step that has been taken."""
        now = {f"model.{name}": value.detach() for name, value in self._model.named_parameters()}
        for name, value in before.items():
            if name not in now or now[name].shape != value.shape:
                raise ValueError(f"model: expected {name.removeprefix('model.')!r} in the shape it had before the step")
        later = look(self._model, self._batches, plain_attention=self._predict)
        step = {name: now[name] - value for name, value in before.items()} if self._predict else None
        return look(self._model, self._batches, parameters=before, step=step), later

    def _add(self, step: int, phase: str, old: list[Look], new: list[Look] | None = None) -> Rows:
        """Write one record."""
        rows = []
        for probe, first, second in zip(self._probes, old, old if new is None else new, strict=True):
            measured = math.nan if new is None else second.log_prob - first.log_prob
            rows.append(
                Record(
                    step,
                    phase,
                    probe.kind,
                    probe.name,
                    len(probe.response),
                    first.log_prob,
                    second.log_prob,
                    measured,
                    first.change,
                    first.top,
                    second.top,
                    first.top_mass,
                    self._panel,
                )
            )
        record = tuple(rows)
        if self._file is not None:
            self._file.append(record)
        self._table.append(record)
        self._bar.set_postfix({kind: f"{value:.1f}" for kind, value in _means(record).items()}, refresh=False)
        return record


def _distinct(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Require at least one probe, and no two of the same kind and name."""
    if isinstance(probes, str | Probe) or not isinstance(probes, Sequence) or len(probes) == 0:
        raise ValueError(f"probes: expected at least one Probe in a sequence, got {_checks.describe(probes)}")
    seen = set()
    for place, probe in enumerate(probes):
        if not isinstance(probe, Probe):
            raise ValueError(f"probes[{place}]: expected a Probe, got {_checks.describe(probe)}")
        if (probe.kind, probe.name) in seen:
            raise ValueError(
                f"probes[{place}]: expected another kind or name than the probes before, got {probe.kind!r} "
                f"{probe.name!r} again"
            )
        seen.add((probe.kind, probe.name))
    return tuple(probes)


def _fitting(model: nn.Module, probes: Sequence[Probe]) -> nn.Module:
    """Require a model that takes the probes, by a look at the longest and the one with the largest token number."""
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise ValueError(f"model: expected a torch.nn.Module with parameters, got {_checks.describe(model)}")
    longest = max(probes, key=lambda probe: len(probe.prompt) + len(probe.response))
    highest = max(probes, key=lambda probe: max(probe.prompt + probe.response))
    extremes = [longest] if longest is highest else [longest, highest]
    try:
        look(model, batched(extremes, 2))
    except (IndexError, RuntimeError) as error:
        length, number = len(longest.prompt) + len(longest.response), max(highest.prompt + highest.response)
        raise ValueError(
            f"probes: expected what the model can run on, got token numbers up to {number} and up to {length} tokens, "
            f"and from the model: {error}"
        ) from error
    return model


def _means(record: Rows) -> dict[str, float]:
    """Average the log-probability after a step over the probes of each kind."""
    kinds = dict.fromkeys(row.kind for row in record)
    return {kind: statistics.fmean(row.log_prob_after for row in record if row.kind == kind) for kind in kinds}
