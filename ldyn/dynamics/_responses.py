"""Prompts with their responses as one padded batch; the public names are in `ldyn.dynamics.sequences`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldyn import _checks

Reduction = Literal["sum", "mean"]
"""How the log-probabilities of one response's tokens become one number: their sum, or their mean."""


Side = Literal["right", "left"]
"""Where the shorter rows of a batch are padded."""


@dataclass(frozen=True, eq=False)
class Responses:
    """Prompts with their responses, padded to one length.

    Attributes:
        tokens: (N, T) int64 token numbers; at padding, any number the model accepts.
        real: (N, T) bool, False at padding, which may stand before or after the tokens of a row but not between.
        response: (N, T) bool, True at the tokens whose probability counts. They need not be adjacent: in a
            conversation of several turns they are those of the assistant.

    Raises:
        ValueError: If shapes, dtypes or devices disagree, padding interrupts a row, or a row has no response token,
            one at padding, or one with nothing before it.
    """

    tokens: Tensor
    real: Tensor
    response: Tensor

    def __post_init__(self) -> None:
        tokens = _checks.require_nonempty(_checks.require_tensor(self.tokens, "tokens", ndim=2), "tokens")
        if tokens.dtype != torch.int64:
            raise ValueError(f"tokens: expected dtype torch.int64, got {_checks.describe(tokens)}")
        for name in ("real", "response"):
            mask = _checks.require_shape(_checks.require_tensor(getattr(self, name), name), name, tuple(tokens.shape))
            if mask.dtype != torch.bool or mask.device != tokens.device:
                what = f"{_checks.describe(mask)} on {mask.device}"
                raise ValueError(f"{name}: expected dtype torch.bool on {tokens.device}, got {what}")
        edges = self.real.int().diff(dim=1, prepend=torch.zeros_like(self.real[:, :1], dtype=torch.int32))
        needs = (
            ("real: expected one unbroken run of tokens in each row, got another", (edges == 1).sum(1) == 1),
            (
                "response: expected response tokens only where real is True, got one elsewhere",
                self.real | ~self.response,
            ),
            ("response: expected a token before the first response token, got none", ~self.response | (edges != 1)),
            ("response: expected at least one response token in each row, got a row without", self.response.any(1)),
        )
        for message, holds in needs:
            if _checks.known_truth(holds.all()) is False:
                raise ValueError(message)

    def __len__(self) -> int:
        """Return the number N of rows."""
        return len(self.tokens)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> Responses:
        """Return some of the rows, at the same padded length."""
        index: Any = [rows] if isinstance(rows, int) else rows
        return Responses(self.tokens[index], self.real[index], self.response[index])

    @property
    def targets(self) -> Tensor:
        """(M,) the response tokens."""
        return self.tokens[self.response]

    @property
    def owners(self) -> Tensor:
        """(M,) the row that each response token belongs to."""
        return self.response.nonzero()[:, 0]

    @property
    def counts(self) -> Tensor:
        """(N,) number L of response tokens in each row."""
        return self.response.sum(1)

    def to(self, device: torch.device | str) -> Responses:
        """Copy to a device.

        Args:
            device: Where to.

        Returns:
            The same rows there.
        """
        return Responses(self.tokens.to(device), self.real.to(device), self.response.to(device))

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Cuts values for all response tokens into those of each response.

        Args:
            values: (M, ...).

        Returns:
            N tensors (L, ...), L differing from one to the next.

        Raises:
            ValueError: If there is not one value, or row of values, for each response token.
        """
        return torch.split(self._one_each(values), self.counts.tolist())

    def reduce(self, values: Tensor, *, reduction: Reduction = "sum") -> Tensor:
        """Turn values for all response tokens into one for each response.

        Args:
            values: (M, ...).
            reduction: "sum" over the tokens of a response, or "mean": the sum divided by their number.

        Returns:
            (N, ...).

        Raises:
            ValueError: If there is not one value for each response token, or the reduction is neither of the two.
        """
        require_reduction(reduction)
        total = values.new_zeros(len(self), *values.shape[1:]).index_add(0, self.owners, self._one_each(values))
        if reduction == "sum":
            return total
        return total / self.counts.to(values.dtype).view(-1, *(1,) * (values.ndim - 1))

    def _one_each(self, values: object) -> Tensor:
        """Check that there is one value, or row of values, for each response token."""
        tensor = _checks.require_tensor(values, "values", min_ndim=1)
        if len(tensor) != (count := int(self.response.sum())):
            raise ValueError(
                f"values: expected one for each of {count} response tokens, got {_checks.describe(tensor)}"
            )
        return tensor


def pack(
    prompts: Sequence[Sequence[int] | Tensor],
    responses: Sequence[Sequence[int] | Tensor],
    *,
    pad_token: int = 0,
    side: Side = "right",
) -> Responses:
    """Lay each response after its prompt and pad the rows to one length.

    Args:
        prompts: N sequences of token numbers, each with at least one: a model predicts from something.
        responses: N sequences of token numbers, each with at least one.
        pad_token: What to pad with; nothing depends on it.
        side: Where to pad. A causal model cannot see what comes later, so padding on the right is right for every
            model; on the left the model has to accept ``attention_mask`` and ``position_ids``.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there are not as many prompts as responses, or none, one is empty or holds anything but
            non-negative integers, or the side is unknown.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side: expected 'right' or 'left', got {side!r}")
    if len(prompts) != len(responses) or len(prompts) == 0:
        raise ValueError(
            f"responses: expected as many as prompts and at least one, got {len(responses)}, {len(prompts)}"
        )
    pad = _checks.require_integer(pad_token, "pad_token", minimum=0)
    pairs = [
        (token_numbers(prompt, f"prompts[{place}]"), token_numbers(response, f"responses[{place}]"))
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens = torch.full((len(pairs), length), pad, dtype=torch.int64)
    real, answer = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        size = len(prompt) + len(response)
        start = 0 if side == "right" else length - size
        tokens[row, start : start + size] = torch.tensor(prompt + response)
        real[row, start : start + size] = True
        answer[row, start + len(prompt) : start + size] = True
    return Responses(tokens, real, answer)


def chat(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    end: bool = True,
    side: Side = "right",
) -> Responses:
    """Turn questions and answers into a batch, in the form an instruction-tuned model was trained on.

    A question becomes the user's turn in the tokenizer's chat template, up to where the assistant begins to speak;
    prompt and response are turned into tokens separately, so that the same response has the same tokens after every
    prompt. Without a chat template the question's text is the prompt.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompts: N questions.
        responses: N answers.
        end: Whether the token that ends a turn (the tokenizer's ``eos_token``) counts as part of the response.
        side: Where to pad; see `pack`.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there are not as many questions as answers, or none, or one of either gives no token.
    """

    def numbers(text: str) -> list[int]:
        return [int(number) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def asked(text: str) -> str:
        if not getattr(tokenizer, "chat_template", None):
            return text
        turn = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    last = [] if not end or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return pack(
        [numbers(asked(prompt)) for prompt in prompts],
        [numbers(response) + last for response in responses],
        pad_token=last[0] if last else 0,
        side=side,
    )


def token_numbers(value: Sequence[int] | Tensor, name: str) -> list[int]:
    """Check one sequence of token numbers and return it as a list."""
    numbers = value.tolist() if isinstance(value, Tensor) and value.ndim == 1 else value
    if isinstance(numbers, str | Tensor) or not isinstance(numbers, Sequence) or len(numbers) == 0:
        raise ValueError(f"{name}: expected at least one token number in a row, got {_checks.describe(value)}")
    return [_checks.require_integer(number, f"{name}[{place}]", minimum=0) for place, number in enumerate(numbers)]


def require_reduction(value: object) -> None:
    """Require one of the two reductions.

    Args:
        value: The argument.

    Raises:
        ValueError: If it is neither "sum" nor "mean".
    """
    if value not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {_checks.describe(value)}")
