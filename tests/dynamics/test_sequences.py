"""Token by token: log-probabilities, the step's prediction and the kernel, each against a route that shares no code."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from ldyn.dynamics import sequences as sq
from ldyn.dynamics.akg import exact_change
from ldyn.foundations.kl import categorical_kl
from ldyn.models import causal_transformer, flat_parameters, moved

F64 = torch.float64
V = 7
OBSERVED = ([[1, 2], [3], [5, 0, 2]], [[4, 5, 6], [2, 2], [1]])
UPDATED = ([[1, 3, 4], [6]], [[0, 6, 1], [2, 3]])


def tiny(*, tied=False, seed=1, vocabulary=V):
    return causal_transformer(vocabulary, width=4, heads=2, tied=tied, seed=seed)


def log_prob(model, prompt, response, parameters=None):
    """Log-probability of one response, token by token, one unpadded row at a time."""
    names = [name for name, _ in model.named_parameters()]
    values = dict(zip(names, parameters, strict=True)) if parameters is not None else dict(model.named_parameters())
    row = torch.tensor([list(prompt) + list(response)])
    table = functional_call(model, values, (row,))[0].log_softmax(-1)
    return torch.stack([table[len(prompt) + place - 1, token] for place, token in enumerate(response)])


def gradient(model, prompt, response, *, mean=False):
    value = log_prob(model, prompt, response)
    total = value.mean() if mean else value.sum()
    parts = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def slope(errors, rates):
    """Least-squares slope of log error in log rate."""
    x, y = torch.tensor(rates, dtype=F64).log(), torch.stack(errors).log()
    return ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()


token_lists = st.lists(st.integers(0, V - 1), min_size=1, max_size=4)
pairs = st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=4)


# --- log-probabilities -----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(pairs, st.integers(0, V - 1))
def test_padded_batches_give_what_single_rows_give(rows, pad):
    model = tiny()
    prompts, responses = zip(*rows, strict=True)
    batch = sq.pack(prompts, responses, pad_token=pad)
    single = [log_prob(model, *row).detach() for row in rows]
    torch.testing.assert_close(sq.token_log_probs(model, batch), torch.cat(single), rtol=1e-12, atol=1e-13)
    sums = torch.stack([value.sum() for value in single])
    means = torch.stack([value.mean() for value in single])
    torch.testing.assert_close(sq.sequence_log_probs(model, batch), sums, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sq.sequence_log_probs(model, batch, reduction="mean"), means, rtol=1e-12, atol=1e-13)
    for one, other in zip(batch.split(sq.token_log_probs(model, batch)), single, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_probabilities_of_all_responses_of_one_length_sum_to_one():
    every = list(itertools.product(range(V), repeat=3))
    batch = sq.pack([[2, 5]] * len(every), every)
    assert torch.logsumexp(sq.sequence_log_probs(tiny(), batch), 0).abs() < 1e-13


def test_the_place_before_a_token_predicts_it_not_its_own():
    model = tiny()
    batch = sq.pack([[1, 2]], [[4, 5, 6]])
    logits = model(batch.tokens)[0].detach()
    torch.testing.assert_close(sq.response_logits(model, batch), logits[1:4])
    assert (sq.response_logits(model, batch) - logits[2:5]).abs().max() > 0.1


def test_turns_that_are_not_adjacent_count_each_token_once():
    model = tiny()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    marked = torch.tensor([[False, True, False, False, True]])
    batch = sq.Responses(tokens, torch.ones_like(marked), marked)
    table = model(tokens)[0].log_softmax(-1).detach()
    torch.testing.assert_close(sq.token_log_probs(model, batch), torch.stack([table[0, 2], table[3, 5]]))


class Forbidding(nn.Module):
    """Gives some tokens, or whole places, no probability at all."""

    def __init__(self, model, after):
        super().__init__()
        self.model, self.after = model, after

    def forward(self, tokens):
        logits = self.model(tokens)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[:, self.after :] = True
        return logits.masked_fill(banned, -math.inf)


def test_infinite_logits_at_other_places_do_no_harm_but_multiplying_by_zero_would():
    prompts, responses = [[1, 2], [3]], [[4, 5], [2]]
    batch, plain = sq.pack(prompts, responses), tiny()
    model = Forbidding(plain, 3)  # the last place predicts nothing; here it is padding or the end of the response
    torch.testing.assert_close(sq.token_log_probs(model, batch), sq.token_log_probs(plain, batch))
    torch.testing.assert_close(sq.log_prob_gradient(model, batch), sq.log_prob_gradient(plain, batch))
    change = sq.predicted_change(model, batch, batch, lr=0.1)
    torch.testing.assert_close(change.rows, sq.predicted_change(plain, batch, batch, lr=0.1).rows)
    assert all(bool(part.isfinite().all()) for part in change)
    table = model(batch.tokens)[:, :-1].log_softmax(-1)
    picked = Forbidding(plain, 1)(batch.tokens)[:, :-1].gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    assert table.isfinite().all() and (picked * batch.response[:, 1:]).sum().isnan()


def test_infinite_logits_at_a_selected_place_are_refused():
    with pytest.raises(ValueError, match="model, its output: expected finite values"):
        sq.token_log_probs(Forbidding(tiny(), 1), sq.pack([[1]], [[2, 3]]))


# --- one step: the exact identity and first order --------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_equal_those_of_single_rows(tied, reduction):
    model, weights = tiny(tied=tied), torch.tensor([0.5, -2.0], dtype=F64)
    batch = sq.pack(*UPDATED)
    rows = [gradient(model, *row, mean=reduction == "mean") for row in zip(*UPDATED, strict=True)]
    expected = torch.einsum("n,np->p", weights, torch.stack(rows))
    found = sq.log_prob_gradient(model, batch, reduction=reduction, weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    plain = sq.log_prob_gradient(model, batch, reduction=reduction)
    torch.testing.assert_close(plain, rows[0] + rows[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_prediction_is_the_sum_of_the_blocks(tied, reduction):
    model, observed, updated = tiny(tied=tied), sq.pack(*OBSERVED), sq.pack(*UPDATED)
    weights = torch.tensor([0.5, -2.0], dtype=F64)
    change = sq.predicted_change(model, observed, updated, lr=0.3, reduction=reduction, weights=weights)

    def rows(batch_rows):
        """Jacobians of the logits before each response token, one backward pass for each entry."""
        for prompt, response in batch_rows:
            logits = model(torch.tensor([prompt + response]))[0]
            for place in range(len(prompt) - 1, len(prompt) + len(response) - 1):
                parts = [
                    torch.autograd.grad(entry, list(model.parameters()), retain_graph=True, materialize_grads=True)
                    for entry in logits[place]
                ]
                flat = torch.stack([torch.cat([p.reshape(-1) for p in part]) for part in parts])
                yield flat, logits[place].detach().softmax(-1)

    learned = list(rows(zip(*UPDATED, strict=True)))
    scale = [w / (len(r) if reduction == "mean" else 1) for w, r in zip(weights, UPDATED[1], strict=True) for _ in r]
    targets = [token for response in UPDATED[1] for token in response]
    step = 0
    for (jacobian, p), factor, target in zip(learned, scale, targets, strict=True):
        G = factor * (p - nn.functional.one_hot(torch.tensor(target), V))
        step = step - 0.3 * jacobian.T @ G
    expected = torch.stack(
        [(torch.eye(V, dtype=F64) - p) @ jacobian @ step for jacobian, p in rows(zip(*OBSERVED, strict=True))]
    )
    torch.testing.assert_close(change.rows, expected, rtol=1e-11, atol=1e-13)
    blocks = sq.token_akg(model, observed, updated, reduction=reduction, weights=weights)
    assert blocks.A.shape == (6, V, V) and blocks.K.shape == (6, 5, V, V) and blocks.G.shape == (5, V)
    torch.testing.assert_close(blocks.predict(0.3), expected, rtol=1e-11, atol=1e-13)
    along = sq.predicted_change_along(model, observed, step, reduction=reduction)
    for one, other in zip(along, change, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(change.tokens, expected.gather(1, observed.targets[:, None])[:, 0])
    torch.testing.assert_close(change.sequences, observed.reduce(change.tokens, reduction=reduction))


def test_near_misses_of_the_decomposition_are_seen():
    model, observed, updated = tiny(), sq.pack(*OBSERVED), sq.pack(*UPDATED)
    right, blocks = sq.predicted_change(model, observed, updated, lr=1.0).rows, sq.token_akg(model, observed, updated)
    last = blocks.K[:, -1:]
    wrong = {
        "the last token's block for all": torch.einsum("mij,mljk,lk->mi", blocks.A, last.expand_as(blocks.K), blocks.G),
        "no A": torch.einsum("mljk,lk->mj", blocks.K, blocks.G),
        "one A for all places": torch.einsum("ij,mljk,lk->mi", blocks.A[0], blocks.K, blocks.G),
        "the mean for the sum": right / 5,
        "the sign": -right,
    }
    for what, value in wrong.items():
        near = value if what in ("the mean for the sum", "the sign") else -value
        assert (near - right).abs().max() > 1e-2 * right.abs().max(), what


def test_each_place_changes_by_its_linear_part_less_its_divergence():
    model, observed = tiny(), sq.pack(*OBSERVED)
    other = moved(model, 0.4 * torch.randn(len(flat_parameters(model)), generator=torch.manual_seed(0), dtype=F64))
    old, new = sq.response_logits(model, observed), sq.response_logits(other, observed)
    parts = exact_change(old, new)
    torch.testing.assert_close(parts.total, new.log_softmax(-1) - old.log_softmax(-1), rtol=1e-11, atol=1e-12)
    tokens = parts.total.gather(1, observed.targets[:, None])[:, 0]
    difference = sq.sequence_log_probs(other, observed) - sq.sequence_log_probs(model, observed)
    torch.testing.assert_close(observed.reduce(tokens), difference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_the_residual_is_of_second_order(tied):
    model, observed, updated = tiny(tied=tied), sq.pack(*OBSERVED), sq.pack(*UPDATED)
    step, rates = sq.log_prob_gradient(model, updated), [1e-3, 1e-4, 1e-5]
    before = sq.response_logits(model, observed).log_softmax(-1)
    rows, sums = [], []
    for rate in rates:
        other = moved(model, rate * step)
        change = sq.predicted_change(model, observed, updated, lr=rate)
        rows.append((sq.response_logits(other, observed).log_softmax(-1) - before - change.rows).abs().max())
        measured = sq.sequence_log_probs(other, observed) - sq.sequence_log_probs(model, observed)
        sums.append((measured - change.sequences).abs().max())
    assert slope(rows, rates) == pytest.approx(2, abs=0.05)
    assert slope(sums, rates) == pytest.approx(2, abs=0.05)


def test_an_optimiser_takes_the_step_that_is_predicted():
    model, observed, updated = tiny(), sq.pack(*OBSERVED), sq.pack(*UPDATED)
    before, errors, rates = sq.sequence_log_probs(model, observed), [], [1e-3, 1e-4, 1e-5]
    for rate in rates:
        other = moved(model, torch.zeros_like(flat_parameters(model)))
        optimizer = torch.optim.AdamW(other.parameters(), lr=rate, weight_decay=0.1)
        predicted = sq.predicted_change(other, observed, updated, optimizer=optimizer).sequences
        table = other(updated.tokens)[:, :-1].log_softmax(-1)
        chosen = table.gather(-1, updated.tokens[:, 1:, None]).squeeze(-1)[updated.response[:, 1:]]
        (-chosen.sum()).backward()
        optimizer.step()
        errors.append((sq.sequence_log_probs(other, observed) - before - predicted).abs().max())
    assert slope(errors, rates) == pytest.approx(2, abs=0.05)


def test_what_comes_later_changes_nothing_exactly():
    model, updated = tiny(), sq.pack([[1, 3]], [[0, 6]])
    one, other = sq.pack([[1, 2]], [[4, 5, 6]]), sq.pack([[1, 2]], [[4, 3, 0]])
    rows = [sq.predicted_change(model, batch, updated, lr=0.1).rows for batch in (one, other)]
    assert torch.equal(rows[0][:2], rows[1][:2])  # the second row reads the first response token only
    assert (rows[0][2] - rows[1][2]).abs().max() > 1e-3
    shorter = sq.pack([[1, 2]], [[4]])
    torch.testing.assert_close(
        sq.response_logits(model, shorter), sq.response_logits(model, one)[:1], rtol=1e-14, atol=1e-14
    )
    hidden = model.embed(one.tokens).detach().requires_grad_()
    hook = model.embed.register_forward_hook(lambda *_: hidden)
    logits = model(one.tokens)[0]
    hook.remove()
    for place in range(5):
        (slopes,) = torch.autograd.grad(logits[place].sum(), hidden, retain_graph=True)
        assert slopes[0, place + 1 :].abs().sum() == 0.0 and slopes[0, place].abs().sum() > 0


def test_the_chain_rule_of_the_divergence_by_writing_out_every_response():
    model = tiny(seed=3)
    other = moved(model, 0.3 * torch.randn(len(flat_parameters(model)), generator=torch.manual_seed(1), dtype=F64))
    every = list(itertools.product(range(V), repeat=3))
    batch = sq.pack([[2, 5]] * len(every), every)
    old, new = sq.sequence_log_probs(model, batch), sq.sequence_log_probs(other, batch)
    whole = (old.exp() * (old - new)).sum()
    each = categorical_kl(sq.response_logits(model, batch), sq.response_logits(other, batch))
    chained = (old.exp() * batch.reduce(each)).sum()
    torch.testing.assert_close(chained, whole, rtol=1e-11, atol=1e-13)
    wrong = (new.exp() * batch.reduce(each)).sum()
    assert (wrong - whole).abs() > 1e-3 * whole


# --- the scalar sequence kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_kernel_is_the_inner_product_of_gradients(tied, reduction):
    model, first, second = tiny(tied=tied), sq.pack(*OBSERVED), sq.pack(*UPDATED)
    left, right = (
        torch.stack([gradient(model, *row, mean=reduction == "mean") for row in zip(*rows, strict=True)])
        for rows in (OBSERVED, UPDATED)
    )
    for found, expected in (
        (sq.sequence_kernel(model, first, second, reduction=reduction), left @ right.T),
        (sq.sequence_kernel(model, second, first, reduction=reduction), right @ left.T),
        (sq.sequence_kernel(model, first, reduction=reduction), left @ left.T),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    own = sq.sequence_kernel(model, first, reduction=reduction)
    assert torch.equal(own, own.T) and torch.linalg.eigvalsh(own).min() > -1e-10


def test_the_kernel_is_the_response_to_a_step():
    model, observed, updated = tiny(), sq.pack(*OBSERVED), sq.pack(UPDATED[0][:1], UPDATED[1][:1])
    kernel = sq.sequence_kernel(model, observed, updated)
    torch.testing.assert_close(0.2 * kernel[:, 0], sq.predicted_change(model, observed, updated, lr=0.2).sequences)
    tokens = sq.token_akg(model, observed, updated)
    picked = torch.eye(V, dtype=F64)[observed.targets]
    single = torch.einsum("mi,mij,mljk,lk->m", picked, tokens.A, tokens.K, tokens.G)
    torch.testing.assert_close(-observed.reduce(single), kernel[:, 0])
