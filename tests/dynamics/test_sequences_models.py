"""Hugging Face models, padding on either side, refusals, and that nothing of the caller's is changed."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from ldyn.dynamics import sequences as sq
from ldyn.models import causal_transformer, double_precision, flat_parameters, moved
from tests.language_models import small

F64 = torch.float64
OBSERVED = ([[1, 2], [3], [5, 0, 2]], [[4, 5, 6], [2, 2], [10]])
UPDATED = ([[1, 3, 4], [6]], [[0, 6, 1], [2, 3]])


TIED = ["Llama tied", "GPT2 tied"]


@pytest.fixture(scope="module", params=[*TIED, "Llama", "GPT2"])
def model(request):
    family, *tied = request.param.split()
    return double_precision(small(family, tied=bool(tied)))


def log_prob(model, prompt, response):
    table = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return torch.stack([table[len(prompt) + place - 1, token] for place, token in enumerate(response)])


def gradients(model, rows):
    for prompt, response in zip(*rows, strict=True):
        parts = torch.autograd.grad(
            log_prob(model, prompt, response).sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
        )
        yield torch.cat([part.reshape(-1) for part in parts])


# --- Hugging Face models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_gives_what_single_rows_give(model, side):
    batch = sq.pack(*OBSERVED, side=side, pad_token=7)
    single = torch.cat([log_prob(model, *row) for row in zip(*OBSERVED, strict=True)]).detach()
    torch.testing.assert_close(sq.token_log_probs(model, batch), single, rtol=1e-11, atol=1e-12)


def test_kernel_and_prediction_equal_the_inner_products_of_gradients(model):
    observed, updated = sq.pack(*OBSERVED, side="left"), sq.pack(*UPDATED)
    left, right = torch.stack(list(gradients(model, OBSERVED))), torch.stack(list(gradients(model, UPDATED)))
    torch.testing.assert_close(sq.sequence_kernel(model, observed, updated), left @ right.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sq.log_prob_gradient(model, updated), right.sum(0), rtol=1e-11, atol=1e-11)
    change = sq.predicted_change(model, observed, updated, lr=0.01)
    torch.testing.assert_close(change.sequences, 0.01 * left @ right.sum(0), rtol=1e-10, atol=1e-10)
    blocks = sq.token_akg(model, observed, updated).predict(0.01)
    torch.testing.assert_close(change.rows, blocks, rtol=1e-10, atol=1e-11)


def test_the_residual_is_of_second_order(model):
    observed, updated = sq.pack(*OBSERVED), sq.pack(*UPDATED)
    step, errors, rates = sq.log_prob_gradient(model, updated), [], torch.tensor([1e-5, 1e-6], dtype=F64)
    before = sq.sequence_log_probs(model, observed)
    for rate in rates:
        change = sq.predicted_change_along(model, observed, rate * step)
        errors.append((sq.sequence_log_probs(moved(model, rate * step), observed) - before - change.sequences).norm())
    assert torch.log10(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("model", TIED, indirect=True)
def test_tied_weights_need_both_of_their_uses(model):
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    batch = sq.pack(*UPDATED)
    tied, apart = sq.sequence_kernel(model, batch), sq.sequence_kernel(untied, batch)
    assert len(flat_parameters(untied)) - len(flat_parameters(model)) == 88
    # with one matrix the two gradients add up before they are multiplied, and cross terms appear
    assert (tied - apart).abs().max() > 1e-3 * tied.abs().max()


def test_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match="updated: expected token numbers below 11, got 12"):
        sq.predicted_change(model, sq.pack([[1]], [[2]]), sq.pack([[1]], [[12]]), lr=1.0)


def test_a_model_in_single_precision_stays_in_it(model):
    single = copy.deepcopy(model).float()
    batch = sq.pack(*UPDATED)
    assert sq.token_log_probs(single, batch).dtype == torch.float32
    change = sq.predicted_change(single, batch, batch, lr=1e-3)
    assert all(part.dtype == torch.float32 for part in change)
    torch.testing.assert_close(
        change.rows.double(), sq.predicted_change(model, batch, batch, lr=1e-3).rows, rtol=1e-3, atol=1e-4
    )


# --- nothing of the caller's is changed --------------------------------------------------------------------------


class Failing(nn.Module):
    """Fails in the middle of its forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        raise ArithmeticError(str(self.model(tokens).shape))


def state(model):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [(value.requires_grad, value.grad, id(value)) for value in model.parameters()]
    return flat_parameters(model), hooks, flags, [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_model_generators_and_defaults_stay_as_they_are(fails):
    inner = causal_transformer(7, width=4)
    inner.embed.weight.requires_grad_(False)
    inner.train()
    model = Failing(inner) if fails else inner
    before, generator = state(model), torch.get_rng_state()
    one, other = sq.pack([[1], [2, 3]], [[4, 5], [6]]), sq.pack([[3]], [[1, 1]])
    tokens = one.tokens.clone()
    calls = [
        lambda: sq.token_log_probs(model, one),
        lambda: sq.log_prob_gradient(model, one),
        lambda: sq.predicted_change(model, one, other, lr=0.1),
        lambda: sq.sequence_kernel(model, one, other),
        lambda: sq.token_akg(model, one, other),
    ]
    for call in calls:
        if fails:
            with pytest.raises(ArithmeticError):
                call()
        else:
            call()
    after = state(model)
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and torch.equal(tokens, one.tokens)
    assert torch.equal(generator, torch.get_rng_state()) and torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


def test_frozen_parameters_count_and_no_grad_does_not_matter():
    model, frozen = causal_transformer(7, width=4), causal_transformer(7, width=4).requires_grad_(False)
    one, other = sq.pack([[1], [2, 3]], [[4, 5], [6]]), sq.pack([[3]], [[1, 1]])
    with torch.no_grad():
        rows = sq.predicted_change(frozen, one, other, lr=0.1).rows
    assert torch.equal(rows, sq.predicted_change(model, one, other, lr=0.1).rows)
    with torch.inference_mode():
        assert torch.equal(rows, sq.predicted_change(frozen, one, other, lr=0.1).rows)


def test_importing_loads_no_transformers():
    code = "import sys, ldyn.dynamics.sequences, ldyn.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- batches -----------------------------------------------------------------------------------------------------


def test_pack_lays_rows_out_on_either_side():
    right, left = (
        sq.pack([[1, 2], torch.tensor([3])], [[4], (5,)], pad_token=9, side=side) for side in ("right", "left")
    )
    assert right.tokens.tolist() == [[1, 2, 4], [3, 5, 9]] and left.tokens.tolist() == [[1, 2, 4], [9, 3, 5]]
    assert right.real.tolist() == [[True] * 3, [True, True, False]]
    assert left.response.tolist() == [[False, False, True]] * 2
    assert len(right) == 2 and right.targets.tolist() == [4, 5] and right.owners.tolist() == [0, 1]
    assert right.counts.tolist() == [1, 1] and right[1].tokens.tolist() == [[3, 5, 9]]
    assert right[[1, 0]].targets.tolist() == [5, 4] and right[:1].targets.tolist() == [4]
    assert left.to("cpu").real.tolist() == left.real.tolist()


def test_reduce_and_split_follow_the_responses():
    batch = sq.pack([[1], [1]], [[2, 3, 4], [5]])
    values = torch.tensor([1.0, 2.0, 6.0, -float("inf")])
    assert batch.reduce(values).tolist() == [9.0, -float("inf")]
    assert batch.reduce(values, reduction="mean").tolist() == [3.0, -float("inf")]
    assert [part.tolist() for part in batch.split(values)] == [[1.0, 2.0, 6.0], [-float("inf")]]
    assert batch.reduce(values[:, None].expand(4, 2)).shape == (2, 2)
    for call in (batch.reduce, batch.split):
        with pytest.raises(
            ValueError, match="values: expected one for each of 4 response tokens, got a float32 tensor"
        ):
            call(values[:3])
    with pytest.raises(ValueError, match="reduction: expected 'sum' or 'mean', got 'token'"):
        batch.reduce(values, reduction="token")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, "responses: expected as many as prompts and at least one"),
        (([[1]], [[1], [2]]), {}, "responses: expected as many as prompts"),
        (([[]], [[1]]), {}, r"prompts\[0\]: expected at least one token"),
        (([[1]], [[]]), {}, r"responses\[0\]: expected at least one token"),
        (([[1.5]], [[1]]), {}, r"prompts\[0\]\[0\]: expected an integer >= 0, got 1.5"),
        (([[1]], [[2, -3]]), {}, r"responses\[0\]\[1\]: expected an integer >= 0, got -3"),
        (([[1]], ["ab"]), {}, r"responses\[0\]: expected at least one token number in a row, got 'ab'"),
        (([[1]], [torch.ones(1, 1)]), {}, r"responses\[0\]: expected at least one token number in a row"),
        (([[1]], [[2]]), {"side": "middle"}, "side: expected 'right' or 'left', got 'middle'"),
        (([[1]], [[2]]), {"pad_token": -100}, "pad_token: expected an integer >= 0, got -100"),
    ],
)
def test_pack_refuses_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sq.pack(*arguments, **options)


@pytest.mark.parametrize(
    ("tokens", "real", "response", "message"),
    [
        ([1, 2], [[1, 1]], [[0, 1]], "tokens: expected a tensor with 2 dimension"),
        ([[1.0, 2.0]], [[1, 1]], [[0, 1]], "tokens: expected dtype torch.int64"),
        ([[1, 2]], [[1, 1, 1]], [[0, 1]], r"real: expected shape \(1, 2\)"),
        ([[1, 2, 3]], [[1, 0, 1]], [[0, 0, 1]], "real: expected one unbroken run"),
        ([[1, 2]], [[0, 0]], [[0, 0]], "real: expected one unbroken run"),
        ([[1, 2]], [[1, 0]], [[0, 1]], "response: expected response tokens only where real is True"),
        ([[1, 2]], [[1, 1]], [[1, 1]], "response: expected a token before the first response token"),
        ([[1, 2]], [[1, 1]], [[0, 0]], "response: expected at least one response token in each row"),
    ],
)
def test_batches_refuse_by_name(tokens, real, response, message):
    with pytest.raises(ValueError, match=message):
        sq.Responses(torch.tensor(tokens), torch.tensor(real) > 0, torch.tensor(response) > 0)


def test_masks_must_be_boolean():
    with pytest.raises(ValueError, match=r"real: expected dtype torch\.bool on cpu, got a int64 tensor"):
        sq.Responses(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2) > 0)


# --- refusals ----------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Returns logits of the wrong shape."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)

    def forward(self, tokens):
        return self.embed(tokens)[:, 0]


def test_models_and_batches_are_refused_by_name():
    model, batch = causal_transformer(7, width=4), sq.pack([[1], [2, 3]], [[4, 5], [6]])
    left, drop = sq.pack([[1], [2, 3]], [[4], [6]], side="left"), nn.Sequential(nn.Embedding(7, 7), nn.Dropout(0.1))
    cases = [
        (lambda: sq.token_log_probs(model, left), "batch: expected padding on the right"),
        (lambda: sq.token_log_probs(model, batch.tokens), "batch: expected Responses"),
        (lambda: sq.token_log_probs(Flat(), batch), r"model: expected logits of shape \(2, 3, V\), got a float32"),
        (lambda: sq.token_log_probs(drop, batch), "model: expected evaluation mode"),
        (lambda: sq.token_log_probs("gpt", batch), "model: expected a torch.nn.Module, got 'gpt'"),
        (lambda: sq.token_log_probs(nn.Identity(), batch), "model: expected a module with parameters"),
        (lambda: sq.token_log_probs(model, batch.to("meta")), "batch: expected the model's device cpu, got meta"),
        (lambda: sq.predicted_change(model, left, batch, lr=1.0), "observed: expected padding on the right"),
        (lambda: sq.predicted_change(model, batch, left, lr=1.0), "updated: expected padding on the right"),
        (lambda: sq.predicted_change(model, batch, batch), "lr: expected either lr or optimizer"),
        (lambda: sq.predicted_change(model, batch, batch, lr=float("nan")), "lr: expected a finite real number"),
        (lambda: sq.predicted_change(model, batch, batch, lr=1.0, reduction="token"), "reduction: expected 'sum'"),
        (lambda: sq.sequence_kernel(model, batch, reduction="none"), "reduction: expected 'sum' or 'mean'"),
        (lambda: sq.log_prob_gradient(model, batch, weights=torch.ones(3)), r"weights: expected shape \(2\)"),
        (lambda: sq.log_prob_gradient(model, batch, weights=torch.ones(2)), "weights: expected the dtype of"),
        (lambda: sq.predicted_change_along(model, batch, torch.ones(3, dtype=F64)), r"delta: expected shape \(\d+\)"),
        (lambda: sq.predicted_change_along(model, batch, flat_parameters(model).float()), "delta: expected the dtype"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
