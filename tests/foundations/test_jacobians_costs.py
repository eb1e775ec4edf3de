"""What a chain of Jacobians costs, against numbers that count their own multiplications."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldyn.foundations.jacobians import chain_costs


def refused(pattern, widths):
    with pytest.raises(ValueError, match=pattern):
        chain_costs(widths)


class Counted:
    """A number that counts the multiplications of its kind."""

    done = 0

    def __init__(self, value):
        self.value = value

    def __mul__(self, other):
        Counted.done += 1
        return Counted(self.value * other.value)

    def __add__(self, other):
        return Counted(self.value + other.value)


def counted(shape):
    return np.array([Counted(1.0) for _ in range(math.prod(shape))], dtype=object).reshape(shape)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_costs_are_the_multiplications_that_are_done(widths):
    layers = [counted((after, before)) for before, after in pairwise(widths)]
    expected = chain_costs(widths)
    for start, chain, cost in (
        (widths[0], layers, expected.forward),
        (widths[-1], [layer.T for layer in reversed(layers)], expected.reverse),
    ):
        Counted.done = 0
        for _ in range(start):
            vector = counted((start,))
            for layer in chain:
                vector = layer @ vector
        assert Counted.done == cost
        assert Counted.done == start * expected.one_pass


def test_costs_are_exact_integers_and_accept_torch_sizes():
    assert chain_costs((64, 32, 10)) == (2368, 64 * 2368, 10 * 2368)
    assert chain_costs(torch.Size([10**6, 10**7, 1])).forward == 10**6 * (10**13 + 10**7)


@pytest.mark.parametrize("widths", [[], [3]])
def test_costs_need_a_chain(widths):
    refused(rf"^widths: expected at least two widths, got {len(widths)}", widths)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3"])
def test_costs_need_positive_integers(bad):
    refused(r"^widths\[1\]: expected an integer >= 1", [2, bad, 3])


@pytest.mark.parametrize("widths", ["23", 5, None, {2, 3}])
def test_costs_need_a_sequence(widths):
    refused(r"^widths: expected a list or tuple", widths)
