"""A tracker inside the training loop of Hugging Face transformers or TRL; the public name is in `tracking`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ldyn.dynamics._tracker import Tracker


def tracking_callback(tracker: Tracker, *, phase: str | None = None, observe: bool = True) -> Any:
    """Put a tracker into a ``transformers.Trainer``, or into one of TRL's trainers.

    Each optimiser step of the trainer, after gradient accumulation and clipping, is one step of the tracker. Its
    number is the trainer's own, ``state.global_step``, counted from the first step of the phase; so when training is
    resumed from a checkpoint, the tracker goes on from there too, and records of later steps are dropped and taken
    again. In a distributed run the first process records.

    Args:
        tracker: Made of the model that the trainer is given.
        phase: The tracker's phase from the beginning of the training on; None leaves it as it is then.
        observe: Whether to measure once more at the end, so that the table holds the trained model's values. With
            ``load_best_model_at_end`` nothing is measured there: the model is no longer that of the last step.

    Returns:
        A ``transformers.TrainerCallback``, for the trainer's argument ``callbacks``. Training that starts from step
        0 in a phase whose steps the table holds already raises a ``ValueError``.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tracker is none.
    """
    if not isinstance(tracker, Tracker):
        raise ValueError(f"tracker: expected a Tracker, got an object of type {type(tracker).__name__}")
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ImportError("tracking_callback() needs transformers: pip install transformers") from error
    return type("TrackingCallback", (_Events, transformers.TrainerCallback), {})(tracker, phase, observe)


class _Events:
    """What the callback does at the trainer's events."""

    def __init__(self, tracker: Tracker, phase: str | None, observe: bool) -> None:
        self.tracker, self.phase, self.observe = tracker, phase, observe

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Find the place in the table at which this training begins."""
        if not state.is_world_process_zero:
            return
        tracker = self.tracker
        tracker.abandon_step()  # what an interrupted training left
        if self.phase is not None:
            tracker.phase = self.phase
        begun = any(row.stepped and row.phase == tracker.phase for row in tracker.table)
        if begun and state.global_step == 0:
            raise ValueError(
                f"tracker: expected a phase of its own for a training that starts at step 0, got {tracker.phase!r}, "
                f"whose steps the table holds; to take them again, call continue_at({tracker.phase_start}) before"
            )
        number = tracker.phase_start + state.global_step
        if number != tracker.steps:
            tracker.continue_at(number)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a step."""
        if state.is_world_process_zero:
            self.tracker.begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End it."""
        if state.is_world_process_zero:
            self.tracker.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the trained model."""
        if self.observe and state.is_world_process_zero and not args.load_best_model_at_end:
            self.tracker.observe()
