"""A causal language model as a map from prompts with responses to the logits that predict the response tokens."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import output_tensor
from ldyn.dynamics._responses import Responses


class ResponseLogits(nn.Module):
    """A causal language model as a map from a batch to the logits that predict its response tokens."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a model in evaluation mode."""
        super().__init__()
        self.model = _checks.require_eval_mode(model, "model")
        self.accepts = frozenset(inspect.signature(model.forward).parameters)

    def forward(self, tokens: Tensor, real: Tensor, response: Tensor) -> Tensor:
        """Return (M, V): the logits one place before each response token."""
        if "input_ids" in self.accepts:
            places = (real.cumsum(1) - 1).clamp(min=0)
            offered = {"attention_mask": real.long(), "position_ids": places, "use_cache": False}
            output = self.model(input_ids=tokens, **{k: v for k, v in offered.items() if k in self.accepts})
        else:
            output = self.model(tokens)
        logits = output_tensor(output)  # nothing asked of its entries, which may be infinite where none is selected
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            size = ", ".join(map(str, tokens.shape))
            raise ValueError(f"model: expected logits of shape ({size}, V), got {_checks.describe(logits)}")
        selected: Tensor = logits[:, :-1][response[:, 1:]]
        return selected


def response_inputs(model: nn.Module, batch: Responses, name: str) -> dict[str, Tensor]:
    """Check that a batch can be given to a model and turn it into the arguments of `ResponseLogits`.

    Args:
        model: A causal language model.
        batch: Prompts with responses.
        name: The name of the batch, for messages.

    Returns:
        The keyword arguments.

    Raises:
        ValueError: If the batch is none, lies on another device, holds a token that is not in the vocabulary, or is
            padded on the left for a model that accepts no mask.
    """
    if not isinstance(batch, Responses):
        raise ValueError(f"{name}: expected Responses, as pack and chat make them, got {_checks.describe(batch)}")
    accepts = inspect.signature(_checks.require_eval_mode(model, "model").forward).parameters
    place = next((value.device for value in model.parameters()), batch.tokens.device)
    if batch.tokens.device != place:
        raise ValueError(f"{name}: expected the model's device {place}, got {batch.tokens.device}")
    vocabulary = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
    if vocabulary is not None and _checks.known_truth((batch.tokens < vocabulary).all()) is False:
        raise ValueError(f"{name}: expected token numbers below {vocabulary}, got {int(batch.tokens.max())}")
    if not {"attention_mask", "position_ids"} <= set(accepts) and not bool(batch.real[:, 0].all()):
        raise ValueError(
            f"{name}: expected padding on the right, for a model without attention_mask and position_ids, "
            "got it on the left"
        )
    return {"tokens": batch.tokens, "real": batch.real, "response": batch.response}
