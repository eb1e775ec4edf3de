"""Responses to watch, and one look at them: now, or at former parameters with the derivative along a step."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import differentiable, forward, no_randomness, output_tensor, pushforward
from ldyn.dynamics._change import centred
from ldyn.dynamics._response_logits import ResponseLogits, response_inputs
from ldyn.dynamics._responses import Responses, chat, pack, token_numbers


@dataclass(frozen=True, init=False)
class Probe:
    """A response to watch while a model learns.

    Attributes:
        kind: the type of response, such as "chosen"; responses of a kind are plotted together.
        name: tells apart the probes of a kind.
        prompt: token numbers of the context, at least one.
        response: token numbers of the response, at least one.

    Raises:
        ValueError: If kind or name is no text of one line, or one of the sequences is empty or holds anything but
            non-negative integers.
    """

    kind: str
    name: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __init__(self, kind: str, name: str, prompt: Sequence[int] | Tensor, response: Sequence[int] | Tensor) -> None:
        object.__setattr__(self, "kind", require_label(kind, "kind"))
        object.__setattr__(self, "name", require_label(name, "name"))
        object.__setattr__(self, "prompt", tuple(token_numbers(prompt, "prompt")))
        object.__setattr__(self, "response", tuple(token_numbers(response, "response")))

    @classmethod
    def from_text(cls, tokenizer: Any, prompt: str, response: str, *, kind: str, name: str, end: bool = True) -> Probe:
        """Make a probe of a question and an answer, in the form an instruction-tuned model was trained on.

        Args:
            tokenizer: A Hugging Face tokenizer; see `ldyn.dynamics.sequences.chat`.
            prompt: The question.
            response: The answer.
            kind: As above.
            name: As above.
            end: Whether the token that ends a turn counts as part of the response.

        Returns:
            The probe.

        Raises:
            ValueError: If one of the texts gives no token, or kind or name is not as expected.
        """
        row = chat(tokenizer, [prompt], [response], end=end)
        return cls(kind, name, row.tokens[~row.response], row.targets)


class Look(NamedTuple):
    """What one look at a probe finds, in nats; sums over the response's tokens, but for the mean `top_mass`."""

    log_prob: float
    top: float
    top_mass: float
    change: float


class Batch(NamedTuple):
    """Some of the probes as one batch.

    Attributes:
        rows: their tokens.
        places: their places among all probes.
    """

    rows: Responses
    places: tuple[int, ...]


def batched(probes: Sequence[Probe], size: int) -> list[Batch]:
    """Cut probes into batches of similar length, so that little is padded.

    Args:
        probes: The probes.
        size: How many a batch holds at most.

    Returns:
        The batches, on the CPU.
    """
    lengths = [len(probe.prompt) + len(probe.response) for probe in probes]
    order = sorted(range(len(probes)), key=lengths.__getitem__)
    parts = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    return [
        Batch(pack([probes[at].prompt for at in part], [probes[at].response for at in part]), part) for part in parts
    ]


def fingerprint(probes: Sequence[Probe]) -> str:
    """Hash kinds, names and tokens of probes, in their order.

    Args:
        probes: The probes.

    Returns:
        Twelve hexadecimal digits.
    """
    text = json.dumps([(probe.kind, probe.name, probe.prompt, probe.response) for probe in probes])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """List the parameters that require gradients, detached and not copied.

    Args:
        model: The model.

    Returns:
        By the names they have in the module that looks at responses; tied ones once.
    """
    return {f"model.{name}": value.detach() for name, value in model.named_parameters() if value.requires_grad}


def look(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    step: Mapping[str, Tensor] | None = None,
    plain_attention: bool = False,
) -> list[Look]:
    """Look at every probe once, in evaluation mode, and leave the model as it is.

    Args:
        model: A causal language model, in whatever mode.
        batches: The probes.
        parameters: Values of some parameters to use in place of the model's own, named as by `trainable`.
        step: Δθ, by the same names: along it the log-probabilities are differentiated.
        plain_attention: Whether to compute attention by the kernel that forward mode uses, for a look that is to be
            compared with one along a step.

    Returns:
        One for each probe, in the order of the probes; `change` is NaN without a step.

    Raises:
        ValueError: If the model is random, its output has no logits (N, T, V) or one that is not finite, or a probe
            does not fit it.
    """
    found: dict[int, Look] = {}
    with evaluation(model):
        view = ResponseLogits(model)
        own = {name: value.detach() for name, value in view.named_parameters()} | dict(parameters or {})
        place = next(model.parameters()).device
        for batch, places in batches:
            rows = batch.to(place)
            inputs, change = response_inputs(model, rows, "probes"), None
            if step is not None:
                logits, change = pushforward(view, inputs, step, parameters=own)
            elif plain_attention:
                with differentiable():
                    logits = forward(view, inputs, parameters=own)
            else:
                logits = forward(view, inputs, parameters=own)
            found.update(zip(places, _looks(logits, change, rows), strict=True))
    return [found[at] for at in range(len(found))]


def _looks(logits: Tensor, change: Tensor | None, rows: Responses) -> Iterator[Look]:
    """Turn response logits (M, V), and their change, into one look for each response."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits, change = logits.float(), None if change is None else change.float()
    table, targets = logits.log_softmax(-1), rows.targets[:, None]
    tops = table.amax(-1)
    columns = [table.gather(-1, targets).squeeze(-1), tops, tops.exp()]
    if change is not None:
        columns.append(centred(logits, change).gather(-1, targets).squeeze(-1))
    # added up in double precision, whatever the model computes in, so that long responses lose nothing
    for part in rows.split(torch.stack(columns, dim=1).cpu()):
        log_prob, top, mass, *rest = (math.fsum(column) for column in part.T.tolist())
        yield Look(log_prob, top, mass / len(part), rest[0] if rest else math.nan)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own afterwards."""
    # flag by flag: a model's own train() and eval() may do more than set it
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def greedy_response(
    model: nn.Module,
    prompt: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    stop: int | Collection[int] = (),
) -> tuple[int, ...]:
    """Continue a prompt with the most likely token, again and again.

    Uses nothing but the model's forward pass, and its cache of keys and values where it has one in the form that
    Hugging Face's models have; of equally likely tokens the first is taken.

    Args:
        model: A causal language model, in whatever mode; it is looked at in evaluation mode.
        prompt: Token numbers, at least one.
        max_new_tokens: How many tokens to add at most.
        stop: The token, or tokens, after which to stop; the one that was found is the last of the response.

    Returns:
        The tokens of the response, as `Probe` takes them.

    Raises:
        ValueError: If the prompt is empty or not of token numbers, the count no positive integer, or the model gives
            no finite logits (N, T, V).
    """
    tokens = token_numbers(prompt, "prompt")
    count = _checks.require_integer(max_new_tokens, "max_new_tokens")
    ends = {stop} if isinstance(stop, int) else set(stop)
    place, response = next(model.parameters()).device, list[int]()
    cache, fresh = None, tokens
    with evaluation(model), no_randomness(place), torch.no_grad():
        response_inputs(model, pack([tokens], [tokens[:1]]).to(place), "prompt")
        while len(response) < count and not ends.intersection(response[-1:]):
            logits, cache = _next_logits(model, torch.tensor([fresh], device=place), cache)
            response.append(int(logits.argmax()))
            fresh = tokens + response if cache is None else response[-1:]
    return tuple(response)


def _next_logits(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the logits (V,) behind the last token, and the model's cache if it has one."""
    accepts = inspect.signature(model.forward).parameters
    keeps = {"input_ids", "past_key_values", "use_cache"} <= set(accepts)
    options = {"past_key_values": cache, "use_cache": True} if keeps else {}
    output = model(input_ids=tokens, **options) if "input_ids" in accepts else model(tokens)
    logits = output_tensor(output)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"model: expected logits of shape (1, {tokens.shape[1]}, V), got {_checks.describe(logits)}")
    last = _checks.require_finite(logits[0, -1], "model, its output")
    return last, getattr(output, "past_key_values", None) if keeps else None


def require_label(value: object, name: str) -> str:
    """Require a text that is not empty and stands on one line.

    Args:
        value: The argument.
        name: Its name, for the message.

    Returns:
        The text.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"{name}: expected a text of one line, got {_checks.describe(value)}")
    return value
