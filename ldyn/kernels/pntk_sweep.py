"""Measures what pseudo-NTKs do on all the handwritten digits, and keeps the results in a file of the library.

``python -m ldyn.kernels.pntk_sweep`` writes ``ldyn/_data/pntk_digits.csv``, which the chapter *What one number a pair
predicts* reads by `records`. It takes about forty minutes of one core; what the file already holds is not measured
again.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ldyn import _checks, data, models
from ldyn._progress import progress_bar
from ldyn.kernels._pntk_blocks import pntk_error, pseudo_ntks
from ldyn.kernels.entk import KINDS, entk
from ldyn.kernels.pntk_regression import extreme_eigenvalues, factorise, predict, relative_ridge
from ldyn.kernels.width import wide_mlp

__all__ = ["Record", "Run", "conv_net", "measure", "network", "records", "trained"]

FRACTION = 0.01
"""The ridge of the sweep in units of the mean eigenvalue, see `relative_ridge`."""

ALL = 1348
"""Training examples of the whole data set; the other 449 are held out."""

SOME = 400
"""Training examples, and held-out ones, of the records with five seeds."""

FEW = 100
"""Training examples, and held-out ones, of the small records, which can be measured again in a second."""

WIDTHS = {"mlp": (32, 128, 512), "conv": (5, 10, 20)}
"""The networks of the sweep: hidden units, channels."""

HEADER = (
    "# Pseudo-NTKs of networks on handwritten digits. Written by: python -m ldyn.kernels.pntk_sweep (float64).",
    "# Columns: ldyn.kernels.pntk_sweep.Record; an empty field is what is not defined.",
)


class Run(NamedTuple):
    """One network, and on how many examples its kernel is looked at."""

    net: str
    """"mlp" (64-h-h-10) or "conv" (two 3 × 3 convolutions of h channels)."""

    width: int
    """h."""

    seed: int
    """Seed of the initialisation and of the order of training."""

    state: str
    """"initial" or "trained"."""

    examples: int
    """Number N of training examples of the kernel; as many are held out, or all 449 there are."""


class Record(NamedTuple):
    """What was measured of one kernel of one network; NaN is what is not defined."""

    net: str
    """As in `Run`, and so are the next four."""

    width: int
    seed: int
    state: str
    examples: int
    kind: str
    """"entk" for the kernel of blocks K, or a pseudo-NTK κ: "first", "sum", "trace"."""

    parameters: int
    """Number P of parameters. Where P < NV the kernel K is singular."""

    network: float
    """Share of the held-out examples that the network itself classifies correctly."""

    error: float
    """‖K − κ ⊗ I‖_F / ‖K‖_F over all pairs of examples, held-out ones included."""

    norm_gap: float
    """(‖K‖_F − ‖κ ⊗ I‖_F) / ‖K‖_F over the same pairs."""

    largest: float
    """λ_max on the training examples."""

    smallest: float
    """λ_min on the training examples; zero for K where P < NV."""

    accuracy_ridge: float
    """Share of held-out examples that `predict` classifies correctly, from f₀ = 0 with the ridge 0.01 · tr K/(NV)."""

    difference_ridge: float
    """‖f_K − f_κ‖_F / ‖f_K‖_F of those predictions on the held-out examples."""

    accuracy: float
    """As `accuracy_ridge` without a ridge; NaN for a singular kernel."""

    difference: float
    """As `difference_ridge` without a ridge; NaN if K or κ is singular."""


def conv_net(channels: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Build a small convolutional network for digits, without biases, from a private generator.

    Two 3 × 3 convolutions that keep the size of the 8 × 8 picture, each followed by relu, and a linear head on all
    64 · h features. Weights are normal with variance 2/fan-in (the head's too), as in `ldyn.models.mlp`.

    Args:
        channels: h, the channels of both convolutions.
        seed: Seed of the private generator; the global one is left alone.
        dtype: Dtype of the parameters.

    Returns:
        A module that maps (..., 64) to (..., 10).

    Raises:
        ValueError: If the number of channels or the seed is no integer in range, or the dtype is no real
            floating-point dtype.
    """
    count = _checks.require_integer(channels, "channels")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a real floating-point dtype, got {dtype}")
    generator = torch.Generator().manual_seed(_checks.require_integer(seed, "seed", minimum=0))
    # Built without storage, so that the default initialisation draws nothing from the global generator.
    with torch.device("meta"):
        layers = [
            nn.Unflatten(-1, (1, 8, 8)),
            nn.Conv2d(1, count, 3, padding=1, bias=False, dtype=dtype),
            nn.ReLU(),
            nn.Conv2d(count, count, 3, padding=1, bias=False, dtype=dtype),
            nn.ReLU(),
            nn.Flatten(-3),
            nn.Linear(64 * count, 10, bias=False, dtype=dtype),
        ]
    model = nn.Sequential(*layers).to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, (2 / weight[0].numel()) ** 0.5, generator=generator)
    return model


def network(net: str, width: int, seed: int) -> nn.Sequential:
    """Build a network of the sweep at its standard initialisation.

    Args:
        net: "mlp" or "conv".
        width: h.
        seed: Seed of a private generator.

    Returns:
        A module that maps (..., 64) to (..., 10) in float64.

    Raises:
        ValueError: If the name is unknown, or a number is no integer in range.
    """
    if net not in WIDTHS:
        raise ValueError(f"net: expected one of {list(WIDTHS)}, got {net!r}")
    if net == "conv":
        return conv_net(width, seed=seed)
    return wide_mlp((64, width, width, 10), parameterisation="standard", seed=seed)


def trained(model: nn.Module, train: data.Digits, *, seed: int = 0, steps: int = 600) -> nn.Module:
    """Trains a copy of a network by SGD on the mean cross-entropy.

    The learning rate is 0.1, a batch has 64 examples, and gradients are clipped to a norm of 1.

    Args:
        model: Network to start from; it is left as it is.
        train: Examples to train on.
        seed: Seed of the order of the examples.
        steps: Number of steps.

    Returns:
        The trained copy.

    Raises:
        ValueError: If the model, the examples or a number is one that `ldyn.models.sgd` refuses.
    """
    copy = models.moved(model, torch.zeros_like(models.flat_parameters(model)))
    for _ in models.sgd(copy, train.images, train.labels, lr=0.1, steps=steps, batch_size=64, seed=seed):
        pass
    return copy


def measure(model: nn.Module, run: Run) -> tuple[Record, ...]:
    """Measure the tangent kernel of a network on digits, and its three pseudo-NTKs.

    Memory: about 30 (10 N)² bytes, which is 5.4 GB for all the digits.

    Args:
        model: The network, at the weights that are meant.
        run: What it is, for the record; `examples` says how many digits to take from each part of the standard
            split (`ldyn.data.split`).

    Returns:
        Four records: of the kernel, and of its pseudo-NTKs "first", "sum" and "trace".

    Raises:
        ValueError: If the number of examples is not in 1 to 1348, or the model is one that `entk` refuses.
    """
    count = _checks.require_integer(run.examples, "run.examples")
    if count > ALL:
        raise ValueError(f"run.examples: expected at most {ALL}, got {count}")
    parts = data.split(data.digits())
    train, held = (data.Digits(part.images[:count], part.labels[:count]) for part in parts)
    with torch.no_grad():
        network_accuracy = _accuracy(model(held.images), held.labels)
    size = models.flat_parameters(model).numel()
    # the pairs of all examples: training, held-out, and twice those between them
    cross, alone = entk(model, held.images, train.images), entk(model, held.images)
    reduced_cross, reduced_alone = pseudo_ntks(cross)._asdict(), pseudo_ntks(alone)._asdict()
    kernel = entk(model, train.images)
    reduced = pseudo_ntks(kernel)._asdict()
    pairs = {
        kind: [(kernel, reduced[kind], 1), (cross, reduced_cross[kind], 2), (alone, reduced_alone[kind], 1)]
        for kind in KINDS
    }
    errors = {kind: _error(parts) for kind, parts in pairs.items()}
    del alone, pairs
    targets, ridge = one_hot(train.labels, 10).to(kernel.dtype), relative_ridge(kernel, FRACTION)
    found = {
        "entk": _regressions(kernel, targets, cross, ridge, singular=size < 10 * count),
        **{kind: _regressions(reduced[kind], targets, reduced_cross[kind], ridge) for kind in KINDS},
    }
    whole = found["entk"]
    return tuple(
        Record(
            run.net,
            run.width,
            run.seed,
            run.state,
            run.examples,
            kind=kind,
            parameters=size,
            network=network_accuracy,
            error=errors[kind][0] if kind in errors else math.nan,
            norm_gap=errors[kind][1] if kind in errors else math.nan,
            largest=one.largest,
            smallest=one.smallest,
            accuracy_ridge=_accuracy(one.ridge, held.labels),
            difference_ridge=_relative(one.ridge, whole.ridge) if kind in errors else math.nan,
            accuracy=math.nan if one.ridgeless is None else _accuracy(one.ridgeless, held.labels),
            difference=_relative(one.ridgeless, whole.ridgeless) if kind in errors else math.nan,
        )
        for kind, one in found.items()
    )


def records(path: Path | None = None) -> tuple[Record, ...]:
    """Read the results of the sweep.

    Args:
        path: Another file of the same form; None for the one that comes with the library.

    Returns:
        The records in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file's columns are not those of `Record`.
    """
    source = resources.files("ldyn").joinpath("_data", "pntk_digits.csv") if path is None else path
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = list(csv.reader(lines))
    if not rows or tuple(rows[0]) != Record._fields:
        raise ValueError(f"path: expected the columns {', '.join(Record._fields)}, got {rows[0] if rows else 'none'}")
    kinds = list(get_type_hints(Record).values())
    return tuple(Record._make(_read(text, kind) for text, kind in zip(row, kinds, strict=True)) for row in rows[1:])


class _Regression(NamedTuple):
    """The ends of a kernel's spectrum, and its predictions with a ridge and without."""

    largest: float
    smallest: float
    ridge: Tensor
    ridgeless: Tensor | None


def _regressions(
    kernel: Tensor, targets: Tensor, cross: Tensor, ridge: float, *, singular: bool = False
) -> _Regression:
    """Predict with a ridge, and without one where the kernel has an inverse."""
    ridgeless = ends = None
    if not singular:
        try:
            plain = factorise(kernel)
            ridgeless, ends = predict(plain, targets, cross), extreme_eigenvalues(kernel, factorisation=plain)
            del plain  # one factor of this size at a time
        except ValueError:  # singular to rounding
            singular = True
    solver = factorise(kernel, ridge=ridge)
    if ends is None:
        ends = extreme_eigenvalues(kernel, factorisation=solver, singular=True)
    return _Regression(ends.largest, ends.smallest, predict(solver, targets, cross), ridgeless)


def _error(pairs: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[float, float]:
    """Return ‖K − κ ⊗ I‖/‖K‖ and (‖K‖ − ‖κ ⊗ I‖)/‖K‖ over several parts of a kernel, each counted so many times."""
    apart = whole = reduced = 0.0
    for blocks, numbers, times in pairs:
        error = pntk_error(blocks, numbers)
        apart += times * error.absolute**2
        whole += times * error.norm**2
        reduced += times * blocks.shape[-1] * float(numbers.square().sum())
    return math.sqrt(apart / whole), 1 - math.sqrt(reduced / whole)


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose largest output is the label's."""
    return float((outputs.argmax(-1) == labels).double().mean())


def _relative(outputs: Tensor | None, reference: Tensor | None) -> float:
    """Return the distance of predictions from others, relative to those."""
    if outputs is None or reference is None:
        return math.nan
    return float(torch.linalg.vector_norm(outputs - reference) / torch.linalg.vector_norm(reference))


def _read(text: str, kind: type) -> object:
    """Read a field of the file."""
    return kind(text) if text or kind is str else math.nan


def _write(path: Path, rows: Sequence[Record]) -> None:
    """Append records to a file, which gets its header first if it is new."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            file.writelines(f"{line}\n" for line in HEADER)
            writer.writerow(Record._fields)
        writer.writerows([["" if value != value else value for value in row] for row in rows])


def plan() -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
    """List the networks of the sweep.

    Yields:
        Name, width, seed, and the numbers of examples to look at: few and some for five seeds, then all for two.
    """
    for seeds, sizes in ((range(5), (FEW, SOME)), (range(2), (ALL,))):
        for seed in seeds:
            for net, widths in WIDTHS.items():
                for width in widths:
                    yield net, width, seed, sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep from the command line and append what is missing to the file.

    Args:
        arguments: The command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ldyn.kernels.pntk_sweep",
        description="Measure pseudo-NTKs of networks on all 1797 digits (forty minutes of one core, 6 GB of memory).",
    )
    default = Path(str(resources.files("ldyn").joinpath("_data", "pntk_digits.csv")))
    parser.add_argument("--output", type=Path, default=default, help="file to append to (default: %(default)s)")
    parser.add_argument("--examples", type=int, choices=(FEW, SOME, ALL), help="only the kernels of so many examples")
    parser.add_argument("--net", choices=tuple(WIDTHS), help="only these networks")
    chosen = parser.parse_args(arguments)
    done = {record[:5] for record in records(chosen.output)} if chosen.output.exists() else set()
    train = data.split(data.digits()).train
    jobs = [job for job in plan() if chosen.net in (None, job[0])]
    with progress_bar(len(jobs), desc="networks", unit="network") as progress:
        for net, width, seed, sizes in jobs:
            wanted = [
                Run(net, width, seed, state, examples)
                for state in ("initial", "trained")
                for examples in sizes
                if chosen.examples in (None, examples)
            ]
            missing = [run for run in wanted if tuple(run) not in done]
            model = network(net, width, seed)
            later = trained(model, train, seed=seed) if any(run.state == "trained" for run in missing) else model
            for run in missing:
                _write(chosen.output, measure(model if run.state == "initial" else later, run))
            progress.update()


if __name__ == "__main__":
    main()
