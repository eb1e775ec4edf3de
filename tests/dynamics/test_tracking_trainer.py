"""The tracker in the training loops of Hugging Face transformers and TRL."""

import copy
import math

import pytest
import torch

from ldyn.dynamics import sequences as sq
from ldyn.dynamics import tracking as tk
from ldyn.models import flat_parameters
from tests.language_models import small

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PROBES = (tk.Probe("chosen", "a", [1, 2], [3, 4, 5]), tk.Probe("rejected", "a", [1, 2], [6, 7]))
DATA = [
    {"input_ids": torch.tensor(row), "labels": torch.tensor(row)}
    for row in ([1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [1, 2, 6, 7, 3], [4, 4, 1, 2, 5], [0, 1, 2, 3, 9], [9, 8, 7, 6, 5])
]


@pytest.fixture
def model():
    return small("Llama", num_hidden_layers=1, attention_dropout=0.1)


class Witness(transformers.TrainerCallback):
    """Keeps the parameters around every optimiser step, independently of the tracker."""

    def __init__(self):
        self.states = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.states[state.global_step] = [copy.deepcopy(model).eval()]

    def on_optimizer_step(self, args, state, control, model, **_):
        self.states[state.global_step].append(copy.deepcopy(model).eval())


def trainer(model, folder, callbacks, **options):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_strategy": "no",
        "seed": 3,
        "max_steps": 4,
    }
    arguments = transformers.TrainingArguments(**(settings | options))
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=callbacks
    )


def check(rows, states):
    """Compare rows with the states that the witness kept: by the library's other route, at float32's precision."""
    watched = sq.pack([probe.prompt for probe in PROBES], [probe.response for probe in PROBES])
    for start in range(0, len(rows), len(PROBES)):
        record = rows[start : start + len(PROBES)]
        old, new = states[record[0].step]
        step = flat_parameters(new) - flat_parameters(old)
        told = sq.predicted_change_along(old, watched, step).sequences.tolist()
        before, after = (sq.sequence_log_probs(each, watched).tolist() for each in (old, new))
        assert step.norm() > 0
        assert [row.log_prob_before for row in record] == pytest.approx(before, abs=1e-5)
        assert [row.log_prob_after for row in record] == pytest.approx(after, abs=1e-5)
        assert [row.predicted for row in record] == pytest.approx(told, abs=1e-5)


def test_the_trainers_steps_are_recorded_with_accumulation_clipping_and_evaluation(model, tmp_path):
    tracker, witness = tk.Tracker(model, PROBES, tmp_path / "run.csv", every=2), Witness()
    callback = tk.tracking_callback(tracker, phase="sft")
    assert isinstance(callback, transformers.TrainerCallback)
    # six examples make three steps of two in an epoch
    running = trainer(
        model, tmp_path, [witness, callback], gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1
    )
    running.train()
    assert running.state.global_step == tracker.steps == 4
    stepped = [row for row in tracker.table if row.stepped]
    assert [(row.step, row.phase) for row in stepped] == [(0, "sft")] * 2 + [(2, "sft")] * 2
    check(stepped, witness.states)
    assert any(abs(row.measured) > 1e-3 for row in stepped)
    last = tracker.table[-2:]
    assert [(row.step, row.stepped) for row in last] == [(4, False)] * 2
    watched = sq.pack([PROBES[0].prompt], [PROBES[0].response])
    (value,) = sq.sequence_log_probs(copy.deepcopy(model).eval(), watched).tolist()
    assert last[0].log_prob_after == pytest.approx(value, abs=1e-5)
    assert str(tk.read_records(tmp_path / "run.csv")) == str(list(tracker.table))


def test_training_is_the_same_with_and_without(model, tmp_path):
    other = copy.deepcopy(model)
    trainer(other, tmp_path, []).train()
    trainer(model, tmp_path, [tk.tracking_callback(tk.Tracker(model, PROBES))]).train()
    assert torch.equal(flat_parameters(model), flat_parameters(other))


def test_two_trainings_stand_in_one_table_and_a_resumed_one_goes_on(model, tmp_path):
    path, saved = tmp_path / "run.csv", {"save_strategy": "steps", "save_steps": 2}
    fresh = copy.deepcopy(model)
    tracker = tk.Tracker(model, PROBES, path)
    trainer(model, tmp_path / "sft", [tk.tracking_callback(tracker, phase="sft")], max_steps=3).train()
    callback = tk.tracking_callback(tracker, phase="dpo")
    trainer(model, tmp_path / "dpo", [callback], **saved).train()
    steps = [(row.step, row.phase, row.stepped) for row in tracker.table[::2]]
    assert steps == [
        *((step, "sft", True) for step in range(3)),
        (3, "sft", False),
        *((step, "dpo", True) for step in range(3, 7)),
        (7, "dpo", False),
    ]
    # another process would begin like this, and go on from the checkpoint after two steps
    again = tk.Tracker(fresh, PROBES, path, resume=True, phase="dpo")
    resumed = trainer(fresh, tmp_path / "dpo", [tk.tracking_callback(again)], **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "dpo" / "checkpoint-2"))
    assert [(row.step, row.phase, row.stepped) for row in again.table[::2]] == steps
    for one, other in zip(again.table, tracker.table, strict=True):
        assert one[:5] == other[:5]
        for first, second in zip(one[5:12], other[5:12], strict=True):
            assert first == pytest.approx(second, abs=1e-5) or (math.isnan(first) and math.isnan(second))
    assert str(tk.read_records(path)) == str(list(again.table))


def test_a_phase_whose_steps_are_there_is_not_mixed_up(model, tmp_path):
    tracker = tk.Tracker(model, PROBES)
    tracker.observe()
    callback = tk.tracking_callback(tracker)
    trainer(model, tmp_path, [callback], max_steps=2).train()
    assert [row.step for row in tracker.table[::2]] == [0, 0, 1, 2]  # what was observed before is kept
    table = tracker.table
    with pytest.raises(ValueError, match=r"tracker: expected a phase of its own .* got 'train'"):
        trainer(model, tmp_path, [callback], max_steps=2).train()
    assert tracker.table == table
    tracker.continue_at(0)
    trainer(model, tmp_path, [callback], max_steps=2).train()
    assert [row.step for row in tracker.table[::2]] == [0, 1, 2]


def test_an_interrupted_step_is_forgotten(model, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step == 1:
                raise KeyboardInterrupt

    tracker = tk.Tracker(model, PROBES)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, [tk.tracking_callback(tracker), Interrupt()]).train()
    assert tracker.steps == 1
    trainer(model, tmp_path, [tk.tracking_callback(tracker, phase="second", observe=False)], max_steps=1).train()
    assert [(row.step, row.phase) for row in tracker.table[::2]] == [(0, "train"), (1, "second")]


def test_other_processes_than_the_first_do_nothing(model):
    tracker = tk.Tracker(model, PROBES)
    callback = tk.tracking_callback(tracker)
    state = transformers.TrainerState(is_world_process_zero=False)
    arguments = type("Arguments", (), {"load_best_model_at_end": False})()
    for event in ("on_train_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_train_end"):
        getattr(callback, event)(arguments, state, None)
    assert tracker.table == () and tracker.steps == 0


def test_only_a_tracker_is_taken():
    with pytest.raises(ValueError, match="tracker: expected a Tracker, got an object of type list"):
        tk.tracking_callback([])


def test_the_dpo_trainer_of_trl_takes_the_same_callback(model, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        word: number for number, word in enumerate("<end> one two three four five six seven eight nine ten".split())
    }
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    pairs = [{"prompt": "one two", "chosen": " three four five", "rejected": " six seven"}] * 4
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True
    )
    tracker = tk.Tracker(model, PROBES)
    trl.DPOTrainer(
        ref_model=copy.deepcopy(model),
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[tk.tracking_callback(tracker, phase="dpo")],
    ).train()
    assert [(row.step, row.phase) for row in tracker.table[::2]] == [(0, "dpo"), (1, "dpo"), (2, "dpo")]
