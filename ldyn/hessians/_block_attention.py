"""Attention as a stage of a Transformer block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ldyn.hessians import _block_forms as forms
from ldyn.hessians._attention_core import Heads, attend, token_covariances, token_third_moments
from ldyn.hessians._attention_functional import functional_blocks
from ldyn.hessians._attention_gauss_newton import Piece, gauss_newton_blocks, input_jacobian, pieces
from ldyn.hessians._attention_input import input_functional_blocks
from ldyn.hessians._block_stages import Both, Curvature, Parts, Stage

__all__ = ["Attention"]

LETTERS = "QKVO"
"""The four maps of attention: queries, keys, values and outputs."""


@dataclass(frozen=True, eq=False)
class Attention(Stage):
    """Multi-head self-attention with its output projection.

    Attributes:
        x: (L, d).
        parameters: "W_Q", "W_K", "W_V", "W_O", and any of "b_Q", "b_K", "b_V", "b_O".
        heads: How many heads share the columns.
        causal: Whether a token sees only itself and those before it.
        prefix: What comes before the names of the parameters.
    """

    x: Tensor
    parameters: Mapping[str, Tensor]
    heads: int
    causal: bool
    prefix: str

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of weights and biases."""
        return {f"{self.prefix}{name}": value.shape for name, value in self.parameters.items()}

    @cached_property
    def state(self) -> Heads:
        """The forward pass."""
        W_Q, W_K, W_V, W_O = (self.parameters[f"W_{letter}"] for letter in LETTERS)
        b_Q, b_K, b_V, b_O = (self.parameters.get(f"b_{letter}") for letter in LETTERS)
        weights, biases = (W_Q, W_K, W_V, W_O), (b_Q, b_K, b_V, b_O)
        return attend(self.x, weights, biases, heads=self.heads, causal=self.causal)

    @cached_property
    def covariances(self) -> Tensor:
        """The covariances of the tokens under each head and row, (H, L, d, d)."""
        return token_covariances(self.state.weights, self.x)

    @cached_property
    def pieces(self) -> Mapping[str, list[Piece]]:
        """The Jacobian by each weight with its bias as a last row, in factors."""
        return pieces(self.state, self.covariances, LETTERS)

    @property
    def output(self) -> Tensor:
        """Its value, (L, o)."""
        return self.state.outputs

    @cached_property
    def input_jacobian(self) -> Tensor:
        """Its derivative by the input, (L, o, L, d)."""
        return input_jacobian(self.state, self.covariances)

    def jacobian(self, name: str) -> Tensor:
        """Differentiate by a weight or a bias, (L · o, n)."""
        identity = torch.eye(self.output.numel(), dtype=self.x.dtype, device=self.x.device)
        return self.pull(identity, {name})[name].mT

    def pull(self, columns: Tensor, wanted: AbstractSet[str]) -> dict[str, Tensor]:
        """Multiply columns by the transposed Jacobians, each a sum over tokens of vectors beside matrices."""
        tokens = columns.reshape(*self.output.shape, -1)
        pulled: dict[str, Tensor] = {}
        for letter in LETTERS:
            names = {f"{self.prefix}{kind}_{letter}": kind for kind in "Wb"}
            names = {name: kind for name, kind in names.items() if name in wanted and name in self.shapes}
            if not names:
                continue
            groups = [_pulled(piece, tokens) for piece in self.pieces[letter]]
            whole = torch.cat(groups, dim=1) if len(groups) > 1 else groups[0]
            rows = self.parameters[f"W_{letter}"].shape[0]
            parts = {"W": whole[:rows].flatten(0, 1), "b": whole[rows:].flatten(0, 1)}
            if letter == "K":
                # a bias of the keys shifts all scores of a row alike, which softmax does not notice
                parts["b"] = columns.new_zeros(whole.shape[1], whole.shape[2])
            pulled |= {name: parts[kind] for name, kind in names.items()}
        return pulled

    def carry(self, loss: Curvature, wanted: AbstractSet[str], with_input: bool) -> Both:
        """Carry a loss over."""
        first, second = self._carried(loss, wanted, self.input_jacobian if with_input else None, None)
        if not with_input:
            return first, second
        shape = (*self.x.shape, *self.x.shape)
        first, second = (
            replace(part, input=part.input.reshape(shape)) for part in (first, second) if part.input is not None
        )
        return first, second

    def carry_along(self, loss: Curvature, wanted: AbstractSet[str], directions: Tensor) -> Both:
        """Carry a loss over, with the input moved only along some directions."""
        moved = forms.times(self.input_jacobian, directions)
        return self._carried(loss, wanted, moved.reshape(*self.output.shape, -1, 1), directions)

    def _carried(
        self, loss: Curvature, wanted: AbstractSet[str], J_X: Tensor | None, directions: Tensor | None
    ) -> Both:
        """Carry both parts over; what the first derivatives give is one function of either part."""
        names = [name for name in self.shapes if name in wanted]
        groups = [letter for letter in LETTERS if any(name.endswith(letter) for name in names)]
        found = {letter: self.pieces[letter] for letter in groups}
        outer = gauss_newton_blocks(found, J_X, loss.gauss_newton)
        pulled = loss.gradient @ (self.state.W_V @ self.state.W_O).mT
        thirds = token_third_moments(self.state.weights, self.x, pulled)
        bent = functional_blocks(self.state, self.covariances, thirds, loss.gradient, groups)
        if J_X is not None:
            with_tokens = input_functional_blocks(self.state, self.covariances, thirds, loss.gradient, groups)
            bent |= with_tokens if directions is None else _restricted(with_tokens, directions)
        if loss.functional is not None:
            carried = gauss_newton_blocks(found, J_X, loss.functional)
            bent = {pair: block.add_(bent[pair]) for pair, block in carried.items()}
        return self._parts(outer, names, J_X is not None), self._parts(bent, names, J_X is not None)

    def _parts(self, table: Mapping[tuple[str, str], Tensor], names: Sequence[str], with_input: bool) -> Parts:
        """Cut the blocks of weights with a bias as a last row into those of the parameters."""

        def rows(block: Tensor, name: str) -> Tensor:
            if name[-3:] == "b_K":
                # a bias of the keys moves all scores of a row alike, which softmax does not notice
                return block.new_zeros(()).expand(self.shapes[name].numel(), block.shape[1])
            size = self.shapes[name].numel()
            return block[len(block) - size :] if name[-3] == "b" else block[:size]

        def block(a: str, b: str) -> Tensor:
            pair = a[-1], b[-1]
            whole = table[pair] if pair in table else table[pair[::-1]].mT
            return rows(rows(whole, a).mT, b).mT

        theta = {(a, b): block(a, b) for i, a in enumerate(names) for b in names[i:]}
        if not with_input:
            return Parts(theta)
        mixed = {name: rows(table[name[-1], "X"], name).mT for name in names}
        return Parts(theta, mixed, table["X", "X"])


def _restricted(table: Mapping[tuple[str, str], Tensor], directions: Tensor) -> dict[tuple[str, str], Tensor]:
    """Move the tokens along some directions only, in blocks (a, "X")."""
    narrow = {pair: block @ directions for pair, block in table.items()}
    return {pair: directions.mT @ block if pair == ("X", "X") else block for pair, block in narrow.items()}


def _pulled(piece: Piece, tokens: Tensor) -> Tensor:
    """Multiply columns (L, o, C) by the transposed Jacobian of a group of columns, (rows, columns, C)."""
    answers = piece.matrix.mT @ tokens
    summed = (piece.vector.mT @ answers.flatten(1)).reshape(-1, *answers.shape[1:])
    return summed if piece.rows else summed.transpose(0, 1)
