"""The digits arrive as promised, and splits are disjoint, complete and repeatable."""

import subprocess
import sys

import pytest
import torch

from ldyn.data import Digits, digits, split


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
