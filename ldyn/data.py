"""The data sets that chapters use, loaded without a network and split without surprises."""

import json
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks

__all__ = ["Digits", "Preference", "Split", "digits", "preferences", "split"]


class Digits(NamedTuple):
    """Handwritten digits as plain tensors.

    Attributes:
        images: (N, 64) float64, each pixel in [0, 1], rows of the 8 × 8 picture one after another.
        labels: (N,) int64, the digit 0 to 9 that each picture shows.
    """

    images: Tensor
    labels: Tensor


class Split(NamedTuple):
    """A data set cut in two disjoint parts.

    Attributes:
        train: The part to fit on.
        test: The part to keep aside.
    """

    train: Digits
    test: Digits


class Preference(NamedTuple):
    """A question with an answer to prefer and one to reject.

    Attributes:
        prompt: The question.
        chosen: The preferred answer: concrete, correct, courteous.
        rejected: The other: vague, wrong, dismissive, or claiming too much.
        chosen_paraphrase: What the preferred answer says, in other words.
        rejected_paraphrase: What the rejected answer says, in other words.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_paraphrase: str
    rejected_paraphrase: str


def digits() -> Digits:
    """Load the 1797 handwritten digits that ship with scikit-learn.

    Returns:
        Images (1797, 64) in float64 scaled from the stored 0 to 16 to [0, 1], and labels (1797,) in int64.
        Every call returns fresh tensors, so that changing one changes no other caller's data.

    Raises:
        ImportError: If scikit-learn is not installed (``pip install "ldyn[data]"``).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = 'digits() reads the data that scikit-learn ships: pip install "ldyn[data]"'
        raise ImportError(message) from error
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float64) / 16
    return Digits(images, torch.tensor(bunch.target, dtype=torch.int64))


def preferences() -> tuple[Preference, ...]:
    """Load the 36 pairs of answers that were written for the chapter `book/dynamics/tracking.md`.

    The data are part of the library, under the licence CC BY 4.0. Answers are short, of 5 to 20 words.

    Returns:
        The pairs, always in the same order.
    """
    lines = resources.files("ldyn").joinpath("_data", "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Preference(**json.loads(line)) for line in lines)


def split(data: Digits, *, test_fraction: float = 0.25, seed: int = 0) -> Split:
    """Cuts a data set into a training and a test part, always the same way for the same seed.

    Args:
        data: Images (N, ...) and labels (N,).
        test_fraction: Share of the examples that goes to the test part, strictly between 0 and 1; the count
            is rounded to the nearest integer.
        seed: Seed of a private generator; the global one is left alone.

    Returns:
        The two parts, each in shuffled order.

    Raises:
        ValueError: If the lengths differ, the fraction is not strictly between 0 and 1, one part would be
            empty, or the seed is no integer ≥ 0.
    """
    images = _checks.require_tensor(data.images, "data.images", min_ndim=1)
    labels = _checks.require_shape(data.labels, "data.labels", (len(images),))
    fraction, count = _checks.require_positive(test_fraction, "test_fraction"), len(images)
    held_out = round(fraction * count)
    if not 0 < held_out < count:
        raise ValueError(
            f"test_fraction: expected a share that leaves neither part empty, got {test_fraction!r}"
            f" of {count} example(s)"
        )
    generator = torch.Generator().manual_seed(_checks.require_integer(seed, "seed", minimum=0))
    order = torch.randperm(count, generator=generator).to(images.device)
    test, train = order[:held_out], order[held_out:]
    return Split(Digits(images[train], labels[train]), Digits(images[test], labels[test]))
