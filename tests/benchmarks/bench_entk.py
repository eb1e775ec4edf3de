"""The tangent kernel's speed and memory, side by side with the plain route and, if there is one, with a peer.

LDYN_PEER_PYTHON names the Python of an environment with ``jax==0.4.23 jaxlib==0.4.23 'numpy<2' 'scipy<1.13'
neural-tangents==0.6.5``; without it that comparison is left out.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import memory
import numpy as np
import table
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldyn.kernels import _gram
from ldyn.kernels.entk import entk, pntk
from ldyn.models import mlp

F64 = torch.float64
SIZES = (784, 512, 512, 512, 10)
EXAMPLES = 32
PLAIN = "torch.func: vmap(jacrev), contracted"
PLAIN_SUM = "torch.func: vmap(grad), contracted"
SHARED = ", formed once for both sides"


def per_example(model: nn.Module, x: Tensor, transform: Callable, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return every example's derivative by every parameter, (N, ..., P_l) for each, by torch.func."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def single(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return reduce(functional_call(model, values, (example.unsqueeze(0),)).squeeze(0))

    parts = vmap(transform(single), in_dims=(None, 0))(parameters, x)
    return [part.flatten(-parameters[name].ndim) for name, part in parts.items()]


def plain_blocks(model: nn.Module, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Contract Jacobians, one parameter after the other: those of two sets of inputs, or of one with itself."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no batching rule
        left = per_example(model, x, jacrev, lambda z: z)
        right = left if other is None else per_example(model, other, jacrev, lambda z: z)
        return sum(torch.einsum("iap,jbp->ijab", one, two) for one, two in zip(left, right, strict=True))


def plain_sum(model: nn.Module, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Compute the kernel of the normalised sum of outputs by contracting gradients, likewise."""

    def normalised(z: Tensor) -> Tensor:
        return z.sum() * z.shape[-1] ** -0.5

    with torch.no_grad():
        left = per_example(model, x, grad, normalised)
        right = left if other is None else per_example(model, other, grad, normalised)
        return sum(one @ two.T for one, two in zip(left, right, strict=True))


def agree(one: Tensor, other: Tensor) -> None:
    """Stop if two routes differ: a fast wrong answer is worth nothing."""
    error = float((one - other).abs().max() / other.abs().max())
    if not error < 1e-11:
        sys.exit(f"the routes differ by {error:.1e}")


class Peer:
    """The other library, in a process that answers when asked."""

    def __init__(self, python: str, model: nn.Sequential, x: Tensor) -> None:
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        arrays = {f"w{k}": layer.weight.detach().numpy() for k, layer in enumerate(layers)}
        arrays |= {f"b{k}": layer.bias.detach().numpy() for k, layer in enumerate(layers)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.npz"
            np.savez(path, layers=len(layers), x=x.numpy(), kernel=entk(model, x).numpy(), **arrays)
            # one thread, as on this side
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            self._process = subprocess.Popen(
                [python, Path(__file__).parent / "peer_neural_tangents.py", path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"XLA_FLAGS": flags},
            )
            error = float(self._process.stdout.readline())
        if not error < 1e-11:
            sys.exit(f"the peer's kernel differs by {error:.1e}")

    def seconds(self) -> float:
        """Ask for one evaluation, timed over there."""
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def network() -> tuple[nn.Sequential, Tensor, str]:
    """Build a fully connected network, inputs for it, and its name."""
    x = torch.randn(EXAMPLES, SIZES[0], dtype=F64, generator=torch.Generator().manual_seed(0))
    return mlp(SIZES, activation="relu"), x, f"{'-'.join(map(str, SIZES))} network, N = {EXAMPLES}, float64"


def peer_rows(python: str) -> Iterator[table.Row]:
    """Measure the same network over there, turn by turn."""
    model, x, name = network()
    peer = Peer(python, model, x)
    here, there = [], []
    for _ in range(9):
        here += table.timed([lambda: entk(model, x)], rounds=1)
        there.append(statistics.median(peer.seconds() for _ in range(11)))
    peer.close()
    ours, theirs = statistics.median(here), statistics.median(there)
    yield table.at_most(f"all blocks of a {name}", ours, "neural-tangents, structured, jit", theirs, 1.0)


def network_rows() -> Iterator[table.Row]:
    """Measure a fully connected network, against the documented recipe and, for the limit, a leaner form of it."""
    model, x, name = network()
    cases = (
        (f"all blocks of a {name}", entk, plain_blocks, PLAIN, 300, 3),
        (f"pseudo-NTK (sum) of a {name}", partial(pntk, kind="sum"), plain_sum, PLAIN_SUM, 40, 15),
    )
    for what, ours, plain, peer, limit, rounds in cases:
        agree(ours(model, x), plain(model, x, x))
        calls = [partial(ours, model, x), partial(plain, model, x, x), partial(plain, model, x)]
        here, documented, lean = table.timed(calls, rounds=rounds)
        yield table.at_least(what, here, peer + SHARED, lean, limit)
        yield table.at_least(what, here, peer, documented, None)


class Transformer(nn.Module):
    """Two encoder layers on given vectors, their mean, and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True, "dtype": F64}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **options) for _ in range(2))
        self.head = nn.Linear(width, 10, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (N, T, d)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def convolutional() -> nn.Module:
    """Build a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 25, 10),
    ).to(F64)


@contextmanager
def forced(pairs: bool) -> Iterator[None]:
    """Has every layer with positions go the same way."""
    chosen = _gram._pairs_are_cheaper
    _gram._pairs_are_cheaper = lambda left, right: pairs
    try:
        yield
    finally:
        _gram._pairs_are_cheaper = chosen


def by(route: bool, model: nn.Module, x: Tensor) -> Tensor:
    """Compute all blocks by one route."""
    with forced(route):
        return entk(model, x, method="structured")


def layered_rows() -> Iterator[table.Row]:
    """Measure layers with positions."""
    torch.manual_seed(0)
    cases = [("convolutional network, 16 × 16", convolutional(), torch.randn(16, 1, 15, 15, dtype=F64))]
    cases += [(f"Transformer, d = 128, T = {t}", Transformer(128), torch.randn(8, t, 128, dtype=F64)) for t in (16, 64)]
    for name, model, x in cases:
        model.eval()
        agree(entk(model, x), plain_blocks(model, x))
        ours, plain = table.timed([lambda m=model, x=x: entk(m, x), lambda m=model, x=x: plain_blocks(m, x)], rounds=3)
        yield table.at_least(f"all blocks of a {name}, N = {len(x)}", ours, PLAIN + SHARED, plain, 1)
        calls = [lambda m=model, x=x: entk(m, x), *(lambda m=model, x=x, r=r: by(r, m, x) for r in (True, False))]
        ours, pairs, gradients = table.timed(calls, rounds=9)
        better = "pairs of positions everywhere" if pairs < gradients else "gradients everywhere"
        yield table.at_most(
            f"the same: {name}, choice of route", ours, f"the better: {better}", min(pairs, gradients), 1.1
        )


SETUP = """
import torch
from ldyn.kernels.entk import entk
from ldyn.models import mlp

torch.set_num_threads(1)
width, count = int(sys.argv[1]), int(sys.argv[2])
model = mlp((64, width, width, width, 10), activation="relu")
x = torch.randn(count, 64, dtype=torch.float64)
entk(mlp((64, 8, 10)), x[:2])
"""


def memory_rows() -> Iterator[table.Row]:
    """Measure what the peak memory grows with."""
    for width, count in ((512, 16), (512, 64), (2048, 16), (2048, 64)):
        parameters = 64 * width + 2 * width**2 + 13 * width + 10
        jacobians = count * 10 * parameters * 8 / 2**20
        outputs = 10
        activations = count * (3 * width + outputs) * (outputs + 2)
        # the kernel and one temporary of its size; activations, their gradients for each output, and one sweep's
        # temporaries; a copy of the parameters; and 20 MB for whatever the libraries keep
        budget = 20 + (2 * (count * outputs) ** 2 + 2 * activations + parameters) * 8 / 2**20
        used = memory.growth(SETUP, "entk(model, x)", width, count)
        yield table.Row(
            f"peak memory of a network of width {width}, N = {count}",
            f"{used:.0f} MB",
            "the Jacobians alone, N·V·P numbers",
            f"{jacobians:.0f} MB",
            f"{used / jacobians:.3f} ×",
            f"≤ {budget:.0f} MB",
            used <= budget,
        )


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    missed = table.publish("tangent kernel", [*network_rows(), *layered_rows(), *memory_rows()], stop=False)
    python = os.environ.get("LDYN_PEER_PYTHON")
    if python:
        missed += table.publish("tangent kernel, peer", list(peer_rows(python)), stop=False)
    if missed:
        sys.exit(f"limits not kept: {missed}")


if __name__ == "__main__":
    main()
