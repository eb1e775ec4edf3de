"""A, K, G and their product, against Jacobians written out row by row and against steps that are really taken."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ldyn.dynamics import akg as dyn
from ldyn.models import mlp


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(count, classes, seed=0):
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def rows(model, x):
    """(V, P) Jacobian of the logits of one example, one backward pass for each class."""
    parameters = list(model.parameters())
    logits = model(x.unsqueeze(0))[0]
    parts = (torch.autograd.grad(z, parameters, retain_graph=True, materialize_grads=True) for z in logits)
    return torch.stack([torch.cat([piece.reshape(-1) for piece in part]) for part in parts])


def stepped(model, loss, lr):
    """A copy of the model after one step of plain gradient descent, taken by PyTorch."""
    other = copy.deepcopy(model)
    loss(other).backward()
    torch.optim.SGD(other.parameters(), lr=lr).step()
    return other


def measured(model, other, x):
    with torch.no_grad():
        return other(x).log_softmax(-1) - model(x).log_softmax(-1)


def slope(steps, errors):
    """Least-squares slope of log error in log step."""
    logs = torch.tensor([[math.log(h), math.log(e)] for h, e in zip(steps, errors, strict=True)], dtype=torch.float64)
    centred = logs - logs.mean(0)
    return float((centred[:, 0] @ centred[:, 1]) / (centred[:, 0] @ centred[:, 0]))


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    reduction=st.sampled_from(["mean", "sum", None]),
    seed=st.integers(0, 99),
)
def test_factors_are_what_their_names_say(sizes, counts, reduction, seed):
    model = mlp(sizes, seed=seed)
    x_o, x_u = normal(counts[0], sizes[0], seed=seed), normal(counts[1], sizes[0], seed=seed + 1)
    y = labels(counts[1], sizes[-1], seed)
    factors = dyn.akg(model, x_o, x_u, y, reduction=reduction)
    with torch.no_grad():
        p_o, p_u = model(x_o).softmax(-1), model(x_u).softmax(-1)
    share = 1.0 if reduction == "sum" else 1 / counts[1]
    K = torch.stack([torch.stack([rows(model, a) @ rows(model, b).T for b in x_u]) for a in x_o])
    G = share * (p_u - functional.one_hot(y, sizes[-1]))
    A = torch.eye(sizes[-1], dtype=torch.float64) - p_o.unsqueeze(-2)
    torch.testing.assert_close(factors.A, A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors.K, K, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(factors.G, G, rtol=1e-12, atol=1e-14)
    by_hand = sum(-0.3 * A @ K[:, u] @ G[u] for u in range(counts[1]))
    torch.testing.assert_close(factors.predict(0.3), by_hand, rtol=1e-11, atol=1e-12)
    parts = factors.contributions(0.3)
    assert parts.shape == (counts[0], counts[1], sizes[-1])
    torch.testing.assert_close(parts[:, 0], -0.3 * (A @ K[:, 0] @ G[0]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_two_products_equal_the_three_factors(reduction, soft):
    model, x_o, x_u = mlp((5, 7, 4)), normal(6, 5), normal(3, 5, seed=1)
    y = normal(3, 4, seed=2).softmax(-1) if soft else labels(3, 4)
    product = dyn.akg(model, x_o, x_u, y, reduction=reduction).predict(0.2)
    direct = dyn.predicted_change(model, x_o, x_u, y, lr=0.2, reduction=reduction)
    torch.testing.assert_close(direct, product, rtol=1e-12, atol=1e-14)
    assert (direct.abs().amax() > 1e-3).item()


def test_mean_and_sum_differ_by_the_number_of_contexts():
    model, x_o, x_u, y = mlp((5, 7, 4)), normal(2, 5), normal(3, 5, seed=1), labels(3, 4)
    mean, total = (dyn.predicted_change(model, x_o, x_u, y, lr=1.0, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(3 * mean, total, rtol=1e-12, atol=1e-14)
    single = sum(dyn.predicted_change(model, x_o, x_u[i : i + 1], y[i : i + 1], lr=1.0) for i in range(3))
    torch.testing.assert_close(total, single, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dyn.predicted_change(model, x_o, x_u, y, lr=1.0), mean, rtol=0, atol=0)


LOSSES = {
    "cross-entropy": "cross_entropy",
    "half a square": lambda z, y: ((z - functional.one_hot(y, z.shape[-1])) ** 2).sum() / 2,
    "label smoothing": lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.1),
    "negated": lambda z, y: -functional.cross_entropy(z, y),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
def test_what_is_left_over_is_of_second_order(name, activation):
    model, x_o, x_u = mlp((5, 8, 6, 4), activation=activation), normal(3, 5), normal(2, 5, seed=1)
    y, loss = labels(2, 4), LOSSES[name]
    objective = functional.cross_entropy if loss == "cross_entropy" else loss
    rates = [0.1 / 2**k for k in range(6)]
    errors = []
    for rate in rates:
        true = measured(model, stepped(model, lambda m: objective(m(x_u), y), rate), x_o)
        errors.append(float((true - dyn.predicted_change(model, x_o, x_u, y, lr=rate, loss=loss)).abs().max()))
    assert slope(rates, errors) == pytest.approx(2, abs=0.1)


def test_the_transposed_kernel_leaves_an_error_of_first_order():
    """Two hidden layers: with one, every block K(x_o, x_u) happens to be symmetric."""
    model, x_o, x_u, y = mlp((5, 8, 6, 4)), normal(3, 5), normal(2, 5, seed=1), labels(2, 4)
    factors = dyn.akg(model, x_o, x_u, y)
    rates, errors = [0.01 / 2**k for k in range(6)], {"K": [], "Kᵀ": []}
    for rate in rates:
        true = measured(model, stepped(model, lambda m: functional.cross_entropy(m(x_u), y), rate), x_o)
        for name, kernel in (("K", factors.K), ("Kᵀ", factors.K.mT)):
            wrong = true - dyn.AKG(factors.A, kernel, factors.G).predict(rate)
            errors[name].append(float(wrong.abs().max()))
    assert slope(rates, errors["K"]) == pytest.approx(2, abs=0.05)
    assert slope(rates, errors["Kᵀ"]) == pytest.approx(1, abs=0.1)


def test_at_a_relu_kink_the_remainder_is_of_first_order():
    """A hidden unit whose input is exactly zero has derivative 0 for autograd; the step pushes it to one side."""
    model = mlp((1, 1, 2), activation="relu")
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x_o, x_u, y = torch.ones(1, 1).double(), torch.tensor([[2.0]]).double(), torch.tensor([0])
    rates = [0.1 / 2**k for k in range(6)]
    errors = []
    for rate in rates:
        true = measured(model, stepped(model, lambda m: functional.cross_entropy(m(x_u), y), rate), x_o)
        errors.append(float((true - dyn.predicted_change(model, x_o, x_u, y, lr=rate)).abs().max()))
    assert slope(rates, errors) == pytest.approx(1, abs=0.1)


def test_sign_depends_on_the_kernel_not_on_its_size():
    """With x_o = −x_u in a linear model K is −|x|² I, and learning y on x_u makes y less likely on x_o."""
    model, x, y = mlp((3, 3), bias=False), normal(1, 3), torch.tensor([1])
    factors = dyn.akg(model, -x, x, y)
    torch.testing.assert_close(factors.K[0, 0], -(x @ x.T) * torch.eye(3, dtype=torch.float64))
    assert factors.predict(0.1)[0, 1] < 0 < dyn.akg(model, x, x, y).predict(0.1)[0, 1]


def test_transposition_exchanges_the_examples():
    model, a, b, y = mlp((5, 8, 6, 4)), normal(2, 5), normal(3, 5, seed=1), labels(3, 4)
    forth, back = dyn.akg(model, a, b, y).K, dyn.akg(model, b, a, y[:2]).K
    torch.testing.assert_close(forth, back.permute(1, 0, 3, 2), rtol=1e-12, atol=1e-13)
    assert (forth[0, 0] - forth[0, 0].T).abs().max() > 1e-3


@given(classes=st.integers(1, 6), seed=st.integers(0, 999))
def test_gauge_part_of_a_kernel_is_felt_by_no_prediction(classes, seed):
    z, K = normal(classes, seed=seed), normal(1, 1, classes, classes, seed=seed + 1)
    a, b = normal(2, classes, seed=seed + 2)
    A = (torch.eye(classes, dtype=torch.float64) - z.softmax(-1)).unsqueeze(0)
    G = dyn.energy(z.unsqueeze(0), labels(1, classes, seed))
    shifted = K + a + b.unsqueeze(-1)  # 1 aᵀ + b 1ᵀ
    plain = dyn.AKG(A, K, G).predict(1.0)
    torch.testing.assert_close(dyn.AKG(A, shifted, G).predict(1.0), plain, rtol=1e-10, atol=1e-12)
    centred = dyn.centred_kernel(shifted)
    torch.testing.assert_close(dyn.AKG(A, centred, G).predict(1.0), plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(centred, dyn.centred_kernel(K), rtol=1e-10, atol=1e-12)
    if classes > 1:
        other = K + torch.diag(a)  # not of that form: felt
        assert (dyn.AKG(A, other, G).predict(1.0) - plain).abs().max() > 1e-9


# --- G --------------------------------------------------------------------------------------------------------


def zoo(z, y, t):
    """Closed forms of G; (loss, targets, gradient)."""
    p, e = z.softmax(-1), functional.one_hot(y, z.shape[-1]).double()
    n, V = z.shape
    brier_slope = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    tau = 3.0
    return {
        "labels": ("cross_entropy", y, (p - e) / n),
        "soft targets": ("cross_entropy", t, (p - t) / n),
        "label smoothing": (
            lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.2, reduction="sum"),
            y,
            p - 0.8 * e - 0.2 / V,
        ),
        "half a square": (lambda z, y: ((z - t) ** 2).sum() / 2, y, z - t),
        "a whole square": (lambda z, y: ((z - t) ** 2).sum(), y, 2 * (z - t)),
        "Brier": (
            lambda z, y: ((z.softmax(-1) - e) ** 2).sum(),
            y,
            2 * (brier_slope @ (p - e).unsqueeze(-1)).squeeze(-1),
        ),
        "distillation": (
            lambda z, t: -(tau**2) * (t * (z / tau).log_softmax(-1)).sum(),
            t,
            tau * ((z / tau).softmax(-1) - t),
        ),
    }


@pytest.mark.parametrize("name", zoo(normal(3, 4), labels(3, 4), normal(3, 4).softmax(-1)))
def test_energy_has_the_closed_forms(name):
    z, y, t = 2 * normal(3, 4), labels(3, 4), normal(3, 4, seed=1).softmax(-1)
    loss, targets, expected = zoo(z, y, t)[name]
    torch.testing.assert_close(dyn.energy(z, targets, loss=loss), expected, rtol=1e-12, atol=1e-14)


@given(classes=st.integers(1, 8), scale=st.floats(0, 40), seed=st.integers(0, 999))
def test_energy_points_from_target_to_prediction_and_is_bounded(classes, scale, seed):
    z, y = scale * normal(1, classes, seed=seed), labels(1, classes, seed)
    G = dyn.energy(z, y)
    assert float(G.norm()) <= math.sqrt(2) + 1e-12 and abs(float(G.sum())) < 1e-12
    assert G[0, y[0]] <= 0 <= float(torch.cat([G[0, : y[0]], G[0, y[0] + 1 :], G.new_zeros(1)]).min())


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_dtype(kind):
    z, y = normal(3, 4), labels(3, 4)
    assert torch.equal(dyn.energy(z, y.to(kind)), dyn.energy(z, y))


BAD_LOSSES = [
    ({"targets": torch.tensor([0, 1, 4])}, "targets: expected labels from 0 to 3, got 0 to 4"),
    ({"targets": torch.tensor([0, -100, 2])}, "targets: expected labels from 0 to 3, got -100 to 2"),
    ({"targets": torch.tensor([0, 1])}, r"targets, as labels: expected shape \(3\)"),
    ({"targets": torch.ones(3, dtype=torch.bool)}, "targets: expected integer labels"),
    ({"targets": [0, 1, 2]}, "targets: expected a torch.Tensor"),
    ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "targets: expected the device"),
    ({"targets": torch.ones(3, 5).double() / 5}, r"targets, as probabilities: expected shape \(3, 4\)"),
    ({"targets": torch.ones(3, 4).double()}, "targets: expected probabilities that sum to 1"),
    ({"targets": torch.ones(3, 4) / 4}, "targets, as probabilities: expected the dtype"),
    ({"loss": "mse"}, "loss: expected 'cross_entropy' or a function, got 'mse'"),
    ({"reduction": "none"}, "reduction: expected 'mean' or 'sum'"),
    ({"loss": lambda z, y: z.sum(), "reduction": "mean"}, "reduction: expected none for a loss"),
    ({"loss": lambda z, y: z.sum(-1)}, "loss: expected a function that returns a scalar"),
    ({"loss": lambda z, y: 1.0}, "loss: expected a function that returns a scalar"),
    ({"loss": lambda z, y: z.detach().sum()}, "loss: expected a number that depends on the logits"),
    ({"loss": lambda z, y: z.sum() * math.inf}, "loss, its value: expected finite"),
]


@pytest.mark.parametrize(("change", "words"), BAD_LOSSES)
def test_bad_losses_and_targets_are_refused(change, words):
    arguments = {"targets": labels(3, 4), **change}
    targets = arguments.pop("targets")
    with pytest.raises(ValueError, match=words):
        dyn.energy(normal(3, 4), targets, **arguments)
    model = mlp((5, 4))
    for function in (dyn.akg, lambda *a, **k: dyn.predicted_change(*a, lr=0.1, **k)):
        with pytest.raises(ValueError, match=words.replace("targets", "y_u")):
            function(model, normal(2, 5), normal(3, 5), targets, **arguments)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (torch.ones(3), "at least 2"),
        (torch.ones(3, 4), "expected shape"),
        (torch.ones(2, 2, dtype=torch.int64), "floating"),
        (torch.full((2, 2), math.nan), "finite"),
    ],
)
def test_bad_kernels_are_refused(kernel, words):
    with pytest.raises(ValueError, match=r"^kernel: expected") as caught:
        dyn.centred_kernel(kernel)
    assert words in str(caught.value)


def test_akg_wants_one_row_of_logits_for_each_example():
    table = nn.Embedding(5, 4).double()
    tokens = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="predicted_change"):
        dyn.akg(table, tokens, tokens, tokens)


@pytest.mark.parametrize("lr", [math.nan, math.inf, "0.1", None, True])
def test_bad_learning_rates_are_refused(lr):
    model, x, y = mlp((5, 4)), normal(2, 5), labels(2, 4)
    with pytest.raises(ValueError, match=r"^lr: expected"):
        dyn.akg(model, x, x, y).predict(lr)
    with pytest.raises(ValueError, match=r"^lr: expected"):
        dyn.predicted_change(model, x, x, y, lr=lr)
