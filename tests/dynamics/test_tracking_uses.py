"""Refusals by name, greedy answers, pictures and the progress bar of the tracker."""

import math
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from ldyn import plots
from ldyn.dynamics import tracking as tk
from ldyn.models import causal_transformer, double_precision
from tests.language_models import small

F64 = torch.float64
V = 9
PROBES = (
    tk.Probe("chosen", "a", [1, 2], [3, 4, 5]),
    tk.Probe("chosen", "b", [3], [4]),
    tk.Probe("other", "a", [1], [6]),
)


def tiny(**options):
    return causal_transformer(V, width=8, seed=1, **options)


def llama(**options):
    return double_precision(small("Llama", vocab_size=V, **options))


def recorded(*, phases=("train",), predict=True, probes=PROBES):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = tk.Tracker(model, probes, predict=predict)
    for phase in phases:
        tracker.phase = phase
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.tensor([[1, 2, 3]])).log_softmax(-1)[0, 1, 3].neg().backward()
            with tracker.step():
                optimizer.step()
    tracker.observe()
    return tracker.table


# --- refusals ----------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Gives the next token's logits for the last place only."""

    def __init__(self):
        super().__init__()
        self.model = tiny()

    def forward(self, tokens):
        return self.model(tokens)[:, -1]


class Random(Wrong):
    def forward(self, tokens):
        return self.model(tokens) + torch.randn(V, dtype=F64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "a", [1], [2]), "kind: expected a text of one line, got ''"),
        (("two\nlines", "a", [1], [2]), "kind: expected a text of one line"),
        (("chosen", 3, [1], [2]), "name: expected a text of one line, got 3"),
        (("chosen", "a", [], [2]), "prompt: expected at least one token number"),
        (("chosen", "a", [1], []), "response: expected at least one token number"),
        (("chosen", "a", torch.ones(2), [2]), r"prompt\[0\]: expected an integer >= 0, got 1.0"),
        (("chosen", "a", [1], torch.ones(1, 2, dtype=torch.int64)), "response: expected at least one token number"),
        (("chosen", "a", [1], [-2]), r"response\[0\]: expected an integer >= 0, got -2"),
        (("chosen", "a", [1], "text"), "response: expected at least one token number"),
    ],
)
def test_probes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        tk.Probe(*arguments)


def test_probes_hold_plain_numbers_and_can_be_compared():
    one = tk.Probe(kind="chosen", name="a", prompt=torch.tensor([1, 2]), response=[3])
    assert one == tk.Probe("chosen", "a", (1, 2), torch.tensor([3])) and hash(one) == hash(one)
    assert one.prompt == (1, 2) and one.response == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": []}, "probes: expected at least one Probe"),
        ({"probes": PROBES[0]}, "probes: expected at least one Probe"),
        ({"probes": [PROBES[0], 3]}, r"probes\[1\]: expected a Probe, got 3"),
        ({"probes": [PROBES[0], PROBES[0]]}, r"probes\[1\]: expected another kind or name .* 'chosen' 'a' again"),
        ({"probes": [tk.Probe("a", "a", [1], [V])]}, "probes: expected what the model can run on"),
        (
            {"probes": [tk.Probe("a", "a", [V, 1], [1])]},
            "probes: expected .* got token numbers up to 9 and up to 3 tokens",
        ),
        ({"probes": [tk.Probe("a", "a", [1] * 15, [1] * 3)]}, "probes: expected .* and up to 18 tokens"),
        ({"every": 0}, "every: expected an integer >= 1, got 0"),
        ({"every": 1.5}, "every: expected an integer >= 1, got 1.5"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"phase": ""}, "phase: expected a text of one line"),
        ({"model": "tiny"}, "model: expected a torch.nn.Module with parameters"),
        ({"model": nn.Identity()}, "model: expected a torch.nn.Module with parameters"),
        ({"model": Wrong()}, r"model: expected logits of shape \(2, 5, V\)"),
        ({"model": Random()}, "model: expected the same output every time"),
    ],
)
def test_trackers_are_refused_by_name(change, message):
    model = change.get("model", tiny())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        tk.Tracker(**({"model": model, "probes": PROBES} | change))
    assert torch.equal(state, torch.get_rng_state())


def test_a_token_outside_a_hugging_face_vocabulary_is_named():
    with pytest.raises(ValueError, match="probes: expected token numbers below 9, got 9"):
        tk.Tracker(llama(), [tk.Probe("a", "a", [1, 9], [2])])


def test_steps_out_of_order_are_refused_and_nothing_is_lost():
    tracker = tk.Tracker(tiny(), PROBES)
    with pytest.raises(ValueError, match="end_step: expected a step that has begun"):
        tracker.end_step()
    with pytest.raises(ValueError, match="one inside another"), tracker.step(), tracker.step():
        pass
    assert tracker.steps == 0 and tracker.table == ()
    for call in (tracker.observe, lambda: tracker.continue_at(0)):
        with pytest.raises(ValueError, match="between steps, got a call inside one"), tracker.step():
            call()
    with pytest.raises(ValueError, match="step: expected an integer >= 0, got -1"):
        tracker.continue_at(-1)
    with pytest.raises(ValueError, match="phase: expected a text"):
        tracker.phase = None
    with pytest.raises(ValueError, match="every: expected an integer >= 1, got 0"):
        tracker.every = 0
    with tracker.step():
        pass
    assert tracker.steps == 1


def test_a_model_of_another_shape_after_the_step_is_refused():
    model = tiny()
    tracker = tk.Tracker(model, PROBES)
    with pytest.raises(ValueError, match=r"model: expected 'head.weight' in the shape it had before the step"):
        with tracker.step():
            model.head = nn.Linear(8, V + 1, bias=False, dtype=F64)
    assert tracker.table == ()


def test_a_step_that_makes_the_model_diverge_is_named():
    model = tiny()
    tracker = tk.Tracker(model, PROBES)
    with pytest.raises(ValueError, match="model, its output: expected finite values"), tracker.step(), torch.no_grad():
        model.head.weight.fill_(math.inf)
    assert tracker.table == ()


# --- greedy answers ----------------------------------------------------------------------------------------------


def by_hand(model, prompt, count):
    """Token after token, the whole row anew each time."""
    tokens = list(prompt)
    for _ in range(count):
        output = model(torch.tensor([tokens]))
        tokens.append(int(getattr(output, "logits", output)[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("build", [tiny, llama])
def test_greedy_answers_are_those_of_whole_rows(build):
    model = build().train()
    for prompt in ([1, 2], torch.tensor([5]), [3, 3, 8, 1]):
        plain = prompt if isinstance(prompt, list) else prompt.tolist()
        with torch.no_grad():
            expected = by_hand(model.eval(), plain, 7)
        model.train()
        assert tk.greedy_response(model, prompt, 7) == expected and model.training
        stop = expected[3]
        short = expected[: expected.index(stop) + 1]
        assert tk.greedy_response(model, prompt, 7, stop=stop) == short
        assert tk.greedy_response(model, prompt, 7, stop=[stop, 100]) == short
        assert tk.greedy_response(model, prompt, 2) == expected[:2]


def test_every_token_of_a_greedy_answer_is_the_top_token():
    model = llama()
    answer = tk.greedy_response(model, [1, 2], 6)
    (row,) = tk.Tracker(model, [tk.Probe("greedy", "a", [1, 2], answer)]).observe()
    assert row.log_prob_before == row.top_before


def test_the_cache_of_keys_and_values_is_used():
    model, lengths = llama(), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tk.greedy_response(model, [1, 2, 3], 4)
    assert lengths == [3, 1, 1, 1]


def test_greedy_answers_are_refused_by_name():
    for arguments, message in (
        ((tiny(), [], 3), "prompt: expected at least one token number"),
        ((tiny(), [1], 0), "max_new_tokens: expected an integer >= 1, got 0"),
        ((llama(), [9], 1), "prompt: expected token numbers below 9, got 9"),
        ((Wrong(), [1, 2], 1), r"model: expected logits of shape \(1, 2, V\)"),
        ((Random(), [1, 2], 1), "model: expected the same output every time"),
    ):
        with pytest.raises(ValueError, match=message):
            tk.greedy_response(*arguments)


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def _closed():
    with mpl.rc_context():
        yield
    plt.close("all")


@pytest.mark.usefixtures("_closed")
def test_a_picture_shows_the_means_of_each_kind_and_ends_after_the_last_step():
    table = [row for row in recorded() if row.stepped]
    (ax,) = tk.plot_records(table).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["chosen", "other"]
    assert list(lines["chosen"].get_xdata()) == [0, 1, 2]
    chosen = [row for row in table if row.kind == "chosen"]
    expected = [sum(row.log_prob_before for row in chosen[at : at + 2]) / 2 for at in (0, 2)]
    expected.append(sum(row.log_prob_after for row in chosen[2:]) / 2)
    assert list(lines["chosen"].get_ydata()) == pytest.approx(expected)
    assert ax.get_xlabel() == "optimiser steps taken" and "(nats)" in ax.get_ylabel()
    drawn = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(drawn) == 2 and len({style[1:] for style in drawn}) == 2


@pytest.mark.usefixtures("_closed")
def test_pictures_of_changes_show_both():
    table = recorded()
    (ax,) = tk.plot_records(table, y="prediction", by="name").axes
    lines = {line.get_label(): line for line in ax.lines[:3]}
    assert list(lines) == ["chosen, a", "chosen, b", "other, a"]
    rows = [row for row in table if row.kind == "other" and row.stepped]
    assert list(lines["other, a"].get_xdata()) == [row.predicted for row in rows]
    assert list(lines["other, a"].get_ydata()) == [row.measured for row in rows]
    (ax,) = tk.plot_records(table, y="measured", by="name").axes
    assert list(ax.lines[5].get_ydata()) == [row.predicted for row in rows]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*lines, "predicted"]
    (ax,) = tk.plot_records(recorded(predict=False), y="measured").axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["chosen", "other"]


@pytest.mark.usefixtures("_closed")
@pytest.mark.parametrize("y", ["log_prob", "top", "top_mass", "measured"])
def test_phases_with_steps_are_marked(y):
    (ax,) = tk.plot_records(recorded(phases=("sft", "dpo")), y=y).axes
    assert [text.get_text() for text in ax.texts] == ["sft", "dpo"]
    assert [text.get_position()[0] for text in ax.texts] == [0, 2]
    (ax,) = tk.plot_records(recorded(), y=y).axes
    assert not ax.texts


@pytest.mark.usefixtures("_closed")
def test_pictures_leave_the_callers_style_alone_and_have_the_books():
    mpl.rcParams["lines.linewidth"] = 9.0
    before = dict(mpl.rcParams)
    fig = tk.plot_records(recorded())
    assert dict(mpl.rcParams) == before
    assert fig.get_size_inches()[0] == pytest.approx(plots.WIDTHS["text"]) and fig.axes[0].lines[0].get_linewidth() < 2
    _, ax = plt.subplots()
    assert tk.plot_records(recorded(), ax=ax) is ax.figure


@pytest.mark.usefixtures("_closed")
def test_many_kinds_are_told_apart_without_colour():
    probes = [tk.Probe(f"kind {number}", "a", [1], [number % V]) for number in range(12)]
    (ax,) = tk.plot_records(recorded(probes=probes)).axes
    assert len({(line.get_linestyle(), line.get_marker(), line.get_color()) for line in ax.lines}) == 12
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines[:8]}) == 8


def test_pictures_are_refused_by_name():
    table = recorded()
    for records, options, message in (
        (table, {"y": "loss"}, "y: expected one of .* got 'loss'"),
        (table, {"by": "phase"}, "by: expected 'kind' or 'name', got 'phase'"),
        ([], {}, "records: expected at least one Record, got 0"),
        ([1], {}, "records: expected at least one Record"),
        (table[-3:], {"y": "measured"}, "records: expected at least one step"),
    ):
        with pytest.raises(ValueError, match=message):
            tk.plot_records(records, **options)


# --- progress, text, imports -------------------------------------------------------------------------------------


class Bar:
    """Stands in for tqdm's bar and keeps what it is told."""

    def __init__(self, **options):
        self.options, self.seen, self.closed = options, [], False

    def update(self, count):
        self.seen.append(count)

    def set_postfix(self, values, *, refresh):
        assert not refresh  # else the bar appears before its time
        self.seen.append(values)

    def close(self):
        self.closed = True


def test_progress_is_counted_in_steps_and_shows_each_kind(monkeypatch):
    tqdm, bars = pytest.importorskip("tqdm"), []
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    tracker = tk.Tracker(tiny(), PROBES, every=2, progress=True, total=3)
    for _ in range(3):
        with tracker.step():
            pass
    (bar,) = bars
    assert (bar.options["total"], bar.options["initial"]) == (3, 0) and bar.options["delay"] > 0
    assert [entry if isinstance(entry, int) else list(entry) for entry in bar.seen] == [
        ["chosen", "other"], 1, 1, ["chosen", "other"], 1,
    ]  # fmt: skip
    tracker.close()
    tracker.close()
    assert bar.closed
    tk.Tracker(tiny(), PROBES)
    assert len(bars) == 1


def test_a_short_run_shows_no_bar_and_prints_nothing(capfd):
    tracker = tk.Tracker(tiny(), PROBES, progress=True)
    with tracker.step():
        pass
    tracker.close()
    assert capfd.readouterr() == ("", "")


def test_text_becomes_a_probe_in_the_chat_form():
    class Words:
        chat_template, eos_token_id = "yes", 8

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [len(word) for word in text.split()]}

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            return f"user {turns[0]['content']} assistant:"

    probe = tk.Probe.from_text(Words(), "a bb", "ccc a", kind="chosen", name="one")
    assert (probe.prompt, probe.response) == ((4, 1, 2, 10), (3, 1, 8))
    assert tk.Probe.from_text(Words(), "a", "ccc", kind="chosen", name="one", end=False).response == (3,)


def test_nothing_heavy_is_imported():
    heavy = ("transformers", "matplotlib", "pandas", "scipy", "sympy")
    code = f"import sys, ldyn.dynamics.tracking; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
