"""The Fisher matrix and the quadratic value of a step, each against a route that shares no code."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldyn.foundations import kl
from ldyn.models import flat_parameters, mlp, moved
from tests.callers_model import same, seeded, snapshot

TINY = 2.0**-52


def plain_fisher(model, x):
    """Sum over classes of p_k times the outer square of the gradient of log p_k, one backward pass each."""
    parameters = list(model.parameters())
    log_p = model(x.clone()).log_softmax(-1)
    log_p = log_p.reshape(-1, log_p.shape[-1])
    total = 0
    for row in log_p:
        for entry in row:
            parts = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            score = torch.cat([part.reshape(-1) for part in parts])
            total = total + entry.detach().exp() * torch.outer(score, score)
    return total / len(log_p)


def mean_kl(model, x, delta, *, reverse=False):
    """Mean divergence between the model and the model at parameters + delta, as a differentiable function."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]
    sizes = [shape.numel() for shape in shapes]
    pieces = (flat_parameters(model) + delta).split(sizes)
    changed = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
    old = model(x).detach().log_softmax(-1)
    new = torch.func.functional_call(model, changed, (x,)).log_softmax(-1)
    first, second = (new, old) if reverse else (old, new)
    return (first.exp() * (first - second)).sum(-1).mean()


# --- the Fisher matrix --------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Calls the same layer twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Tied(nn.Module):
    """Shares the embedding with the head, and predicts at every position."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).cumsum(-2)))


class Attending(nn.Module):
    """One causal attention layer through PyTorch's fused function."""

    def __init__(self):
        super().__init__()
        self.embed, self.project, self.head = nn.Embedding(5, 4), nn.Linear(4, 12), nn.Linear(4, 5)

    def forward(self, tokens):
        q, k, v = self.project(self.embed(tokens)).unsqueeze(-3).chunk(3, -1)
        return self.head(functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(-3))


class Wrapped(nn.Module):
    """Returns what the wrapped function makes of a linear layer's logits; takes keyword arguments too."""

    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(3, 4), wrap

    def forward(self, x, *, shift=None):
        return self.wrap(self.layer(x if shift is None else x + shift))


class Output(dict):
    """What Hugging Face models return: a mapping with attributes."""

    @property
    def logits(self):
        return self["logits"]


def inputs(*shape, seed=7):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape):
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "mlp": lambda: (mlp((3, 5, 4)), inputs(6, 3)),
    "few parameters, many contexts": lambda: (mlp((2, 2, 3)), inputs(40, 2)),
    "one example": lambda: (mlp((3, 5, 4)), inputs(3)),
    "a layer called twice": lambda: (seeded(Twice), inputs(5, 3)),
    "tied weights, sequences": lambda: (seeded(Tied), tokens(3, 4)),
    "attention": lambda: (seeded(Attending), tokens(2, 4)),
    "evaluation-mode batch norm": lambda: (
        seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))),
        inputs(6, 3),
    ),
    "layer norm in training mode": lambda: (
        seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3))).train(),
        inputs(6, 3),
    ),
    "in-place first layer": lambda: (
        seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4))),
        inputs(6, 3),
    ),
    "convolution": lambda: (
        seeded(lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))),
        inputs(3, 1, 4),
    ),
    "a parameter out of use": lambda: (seeded(lambda: WithSpare()), inputs(4, 3)),
    "frozen parameters": lambda: (mlp((3, 5, 4)).requires_grad_(False), inputs(4, 3)),
}


class WithSpare(nn.Module):
    """Owns a parameter that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.spare, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("name", MODELS)
def test_fisher_agrees_with_outer_products_of_scores(name):
    model, x = MODELS[name]()
    before = snapshot(model, x)
    got = kl.fisher_matrix(model, x)
    vector = inputs(len(got), seed=5)
    product, quadratic = kl.fisher_vector_product(model, x, vector), kl.quadratic_kl(model, x, vector)
    assert same(before, snapshot(model, x))
    want = plain_fisher(copy.deepcopy(model).requires_grad_(True), x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(product, want @ vector, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(quadratic, vector @ want @ vector / 2, rtol=1e-10, atol=1e-13)
    assert torch.equal(got, got.T)
    assert torch.linalg.eigvalsh(got).min() > -1e-12 * torch.linalg.eigvalsh(got).max()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["mlp", "a layer called twice"])
def test_fisher_is_the_hessian_of_the_divergence_in_both_directions(name, reverse):
    model, x = MODELS[name]()
    zero = torch.zeros_like(flat_parameters(model))
    gradient = torch.func.grad(lambda delta: mean_kl(model, x, delta, reverse=reverse))(zero)
    assert gradient.abs().max() < 1e-14
    hessian = torch.func.hessian(lambda delta: mean_kl(model, x, delta, reverse=reverse))(zero)
    torch.testing.assert_close(hessian, kl.fisher_matrix(model, x), rtol=1e-9, atol=1e-13)


def test_quadratic_has_its_half_and_a_third_order_error():
    model, x = MODELS["mlp"]()
    direction = inputs(len(flat_parameters(model)), seed=2)
    direction = direction / direction.norm()
    errors = []
    for size in (4e-2, 2e-2, 1e-2):
        measured = mean_kl(model, x, size * direction)
        predicted = kl.quadratic_kl(model, x, size * direction)
        assert measured.item() == pytest.approx(predicted.item(), rel=0.2)  # without the half: off by 1/2
        errors.append(abs(measured - predicted).item())
    slopes = [math.log2(errors[place] / errors[place + 1]) for place in range(2)]
    assert min(slopes) > 2.8


def test_quadratic_matches_the_measured_step():
    model, x = mlp((3, 6, 4), seed=2), inputs(9, 3)
    delta = 1e-4 * inputs(len(flat_parameters(model)), seed=1)
    measured = kl.categorical_kl(model(x), moved(model, delta)(x)).mean()
    assert measured.item() == pytest.approx(kl.quadratic_kl(model, x, delta).item(), rel=1e-3)


@pytest.mark.parametrize(
    "wrap",
    [lambda z: (z, None), lambda z: [z], lambda z: Output(logits=z), lambda z: Output(logits=z, loss=z.sum())],
)
def test_outputs_that_hold_logits(wrap):
    model, x = seeded(lambda: Wrapped(wrap)), inputs(5, 3)
    want = plain_fisher(model.layer, x)
    torch.testing.assert_close(kl.fisher_matrix(model, x), want, rtol=1e-10, atol=1e-13)


def test_keyword_inputs():
    model, x = seeded(lambda: Wrapped(lambda z: z)), inputs(5, 3)
    want = plain_fisher(model.layer, x + 1)
    got = kl.fisher_matrix(model, {"x": x, "shift": torch.ones_like(x)})
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_float64_model_keeps_its_digits_under_a_float32_default():
    assert torch.get_default_dtype() == torch.float32
    model, x = MODELS["mlp"]()
    got = kl.fisher_matrix(model, x)
    assert got.dtype == torch.float64
    assert (got - plain_fisher(model, x)).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["mlp", "few parameters, many contexts", "tied weights, sequences"])
def test_float32_in_float32_out(name):
    model, x = MODELS[name]()
    want = plain_fisher(model, x)
    narrow, x = model.float(), x.float() if x.is_floating_point() else x
    vector = inputs(len(want), seed=5).float()
    results = (
        kl.fisher_matrix(narrow, x),
        kl.fisher_vector_product(narrow, x, vector),
        kl.quadratic_kl(narrow, x, vector),
    )
    assert all(result.dtype == torch.float32 for result in results)
    torch.testing.assert_close(results[0].double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(guard):
    model, x = MODELS["attention"]()
    want = kl.fisher_matrix(model, x)
    with guard():
        got = kl.fisher_matrix(model, x.clone())
        vector = torch.ones(len(want), dtype=torch.float64)
        product = kl.fisher_vector_product(model, x.clone(), vector)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(product, want.sum(1))


def test_fisher_does_not_depend_on_the_labels_but_the_empirical_one_does():
    # a near miss: gradients at labels from data instead of the model's own
    model, x = MODELS["mlp"]()
    labels = torch.zeros(len(x), dtype=torch.int64)
    scores = torch.stack(
        [
            torch.cat(
                [
                    g.reshape(-1)
                    for g in torch.autograd.grad(functional.cross_entropy(model(row), y), model.parameters())
                ]
            )
            for row, y in zip(x, labels, strict=True)
        ]
    )
    empirical = scores.T @ scores / len(x)
    assert (empirical - kl.fisher_matrix(model, x)).abs().max() > 0.05
