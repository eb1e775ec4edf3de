"""The speed of a Transformer block's Hessian, side by side with automatic differentiation of the same loss.

The other side computes the total only, here both parts are kept. Its LayerNorm is written out: under ``torch.vmap`` the
second derivatives of PyTorch's own in weight and input at once are wrong. At 64 tokens it goes through the columns in
chunks, which is faster there and needs less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import table
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional

from ldyn.hessians.block import block, block_loss_hessian
from ldyn.hessians.losses import squared_error

F64 = torch.float64
WIDTH, UNITS, HEADS = 16, 64, 4
SHAPES = {
    "ln1.weight": (WIDTH,),
    "ln1.bias": (WIDTH,),
    **{f"attn.{kind}_{letter}": (WIDTH, WIDTH)[: 1 + (kind == "W")] for letter in "QKVO" for kind in "Wb"},
    "ln2.weight": (WIDTH,),
    "ln2.bias": (WIDTH,),
    "ffn.W1": (UNITS, WIDTH),
    "ffn.b1": (UNITS,),
    "ffn.W2": (WIDTH, UNITS),
    "ffn.b2": (WIDTH,),
}


def written_out(x: Tensor, p: dict[str, Tensor], norm: str) -> Tensor:
    """Evaluate a block in the operations that automatic differentiation handles best."""

    def normalise(t: Tensor, name: str) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return (
            centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        )

    def attend(u: Tensor) -> Tensor:
        q, k, v = ((u @ p[f"attn.W_{c}"] + p[f"attn.b_{c}"]).unflatten(1, (HEADS, -1)).transpose(0, 1) for c in "QKV")
        read = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1) @ v
        return read.transpose(0, 1).flatten(1) @ p["attn.W_O"] + p["attn.b_O"]

    def feed(u: Tensor) -> Tensor:
        return functional.gelu(u @ p["ffn.W1"].mT + p["ffn.b1"]) @ p["ffn.W2"].mT + p["ffn.b2"]

    if norm == "pre":
        x = x + attend(normalise(x, "ln1"))
        return x + feed(normalise(x, "ln2"))
    x = normalise(x + attend(x), "ln1")
    return normalise(x + feed(x), "ln2")


def both_sides(tokens: int, norm: str, chunk: int | None) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """Prepare one loss, its Hessian here and there, and make sure that the two agree."""
    generator = torch.Generator().manual_seed(0)
    p = {name: 0.4 * torch.randn(*shape, generator=generator, dtype=F64) for name, shape in SHAPES.items()}
    x, target = torch.randn(2, tokens, WIDTH, generator=generator, dtype=F64)
    counts = [value.numel() for value in p.values()]
    flat = torch.cat([value.reshape(-1) for value in p.values()])

    def loss(w: Tensor) -> Tensor:
        pieces = zip(SHAPES.items(), w.split(counts), strict=True)
        return (
            (written_out(x, {name: piece.view(shape) for (name, shape), piece in pieces}, norm) - target)
            .square()
            .mean()
        )

    def here() -> object:
        _, r, S = squared_error(block(x, p, heads=HEADS, norm=norm), target)
        return block_loss_hessian(x, p, r, S, heads=HEADS, norm=norm)

    def there() -> Tensor:
        if chunk is None:
            return hessian(loss)(flat)
        return vmap(lambda v: jvp(grad(loss), (flat,), (v,))[1], chunk_size=chunk)(torch.eye(len(flat), dtype=F64))

    error = float((here().matrix() - there()).abs().max())
    if error > 1e-12:
        raise SystemExit(f"the two Hessians differ by {error}")
    return here, there


def rows() -> Iterator[table.Row]:
    """Measure blocks of both kinds on short and long sequences."""
    for tokens, chunk, limit in ((8, None, 1.0), (64, 64, 5.0)):
        for norm in ("pre", "post"):
            ours, plain = table.timed(both_sides(tokens, norm, chunk), rounds=3)
            name = f"Hessian of a {norm}-LN block, d = {WIDTH}, L = {tokens}, both parts"
            peer = "torch.func.hessian, total" + ("" if chunk is None else f", in chunks of {chunk}")
            yield table.at_least(name, ours, peer, plain, limit)


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    table.publish("Transformer block", list(rows()))


if __name__ == "__main__":
    main()
