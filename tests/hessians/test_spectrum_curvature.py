"""Curvature operators of models against dense second derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional

from ldyn._linearize import differentiable
from ldyn.foundations.kl import fisher_matrix
from ldyn.hessians.spectrum import SymmetricOperator, curvature_operator, spectral_density, top_eigenvalues
from ldyn.models import causal_transformer, evaluate, flat_parameters, mlp

F64 = torch.float64
KINDS = ("hessian", "gauss_newton", "functional")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


class Encoder(nn.Module):
    """PyTorch's own Transformer layer, with affine normalisation and its fused attention."""

    def __init__(self, width=4, classes=3, norm_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 2, 6, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first, dtype=F64
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes, dtype=F64)
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=place) / 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Twice(nn.Module):
    """One layer called twice, with its weight used once more as a bare tensor; a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.layer = mlp((3, 3), seed=1)
        self.idle = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x))) + x @ self.layer[0].weight


class Keywords(nn.Module):
    """Takes keyword arguments, returns a dictionary-like output."""

    def __init__(self):
        super().__init__()
        self.inner = mlp((3, 4, 2), seed=2)

    def forward(self, *, pixels, shift=0.0):
        return {"logits": self.inner(pixels + shift)}


def tables(model, loss, reduction):
    """Hessian, Gauss–Newton part and functional part, written out by reverse mode over a flat vector."""

    def outputs(w, x):
        with differentiable():
            return evaluate(model, x, w).reshape(-1, model_classes(model, x))

    def value(z, y):
        if loss == "cross_entropy":
            return functional.cross_entropy(z, y.reshape(-1), reduction=reduction)
        return functional.mse_loss(z, y.reshape(z.shape), reduction=reduction)

    def compute(x, y):
        w = flat_parameters(model)
        with differentiable():
            hessian = jacrev(grad(lambda w: value(outputs(w, x), y)))(w)
            z = outputs(w, x)
            J = jacrev(lambda w: outputs(w, x).reshape(-1))(w)
            S = jacrev(grad(lambda flat: value(flat.view(z.shape), y)))(z.reshape(-1).detach())
        part = J.T @ S @ J
        return {"hessian": hessian, "gauss_newton": part, "functional": hessian - part}

    return compute


def model_classes(model, x):
    with torch.no_grad():
        return model(x).shape[-1]


def cases():
    labels = torch.tensor([0, 2, 1, 1, 0])
    return {
        "mlp": (mlp((3, 4, 3), activation="gelu", seed=3), normal(5, 3), labels),
        "encoder": (Encoder().eval(), normal(5, 3, 4), labels),
        "post-norm encoder": (Encoder(norm_first=False).eval(), normal(5, 3, 4), labels),
        "twice": (Twice(), normal(5, 3), labels),
        "tied language model": (
            causal_transformer(5, width=4, tied=True),
            torch.tensor([[0, 1, 2], [4, 4, 3]]),
            torch.tensor([[1, 2, 3], [4, 3, 0]]),
        ),
    }


# --- curvature_operator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("name", list(cases()))
def test_products_equal_the_dense_second_derivative(name, loss):
    model, x, y = cases()[name]
    if loss == "squared_error":
        y = normal(*y.shape, model_classes(model, x), seed=9)
    reduction = "mean" if name != "twice" else "sum"
    expected = tables(model, loss, reduction)(x, y)
    for kind in KINDS:
        operator = curvature_operator(model, x, y, kind=kind, loss=loss, reduction=reduction)
        table = expected[kind]
        scale = float(expected["hessian"].abs().max())
        assert operator.shape == tuple(table.shape)
        assert float((operator.dense() - table).abs().max()) < 1e-12 * scale
        v = normal(operator.size, seed=4)
        assert torch.allclose(operator @ v, table @ v, rtol=1e-11, atol=1e-12 * scale)
        in_parts = curvature_operator(model, x, y, kind=kind, loss=loss, reduction=reduction, batch_size=2)
        assert torch.allclose(in_parts @ v, table @ v, rtol=1e-11, atol=1e-12 * scale)


def test_several_columns_are_several_products():
    model, x, y = cases()["encoder"]
    for kind in KINDS:
        operator = curvature_operator(model, x, y, kind=kind)
        columns = normal(operator.size, 3, seed=5)
        each = torch.stack([operator @ column for column in columns.T], dim=1)
        assert torch.allclose(operator @ columns, each, atol=1e-13)


def test_the_weight_of_a_layer_norm_is_right_to_second_order():
    """Forward mode over a backward pass is wrong here in PyTorch 2.13, and so is torch.func.hessian."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.LayerNorm(4, dtype=F64))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=place))
    x, y = normal(6, 4, seed=7), normal(6, 4, seed=8)

    def by_hand(w):
        A, b, gain, shift = w.split([16, 4, 4, 4])
        h = x @ A.view(4, 4).T + b
        m = h - h.mean(-1, keepdim=True)
        return ((m / (m.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift - y) ** 2).mean()

    expected = torch.func.hessian(by_hand)(flat_parameters(model))
    operator = curvature_operator(model, x, y, loss="squared_error")
    assert torch.allclose(operator.dense(), expected, atol=1e-13)


def test_fisher_is_the_gauss_newton_part_and_needs_no_labels():
    for name in ("encoder", "tied language model"):
        model, x, y = cases()[name]
        table = fisher_matrix(model, x)
        fisher = curvature_operator(model, x, kind="fisher")
        assert torch.allclose(fisher.dense(), table, atol=1e-14)
        assert torch.allclose(curvature_operator(model, x, y, kind="gauss_newton").dense(), table, atol=1e-14)


def test_linear_regression_in_closed_form():
    """Mean squared error of x ↦ W x + b: 2/(N o) times the Gram matrix of x, for each output; no functional part."""
    x, y = normal(30, 4), normal(30, 3, seed=1)
    model = mlp((4, 3), activation="identity")
    gram = 2 / 90 * x.T @ x
    operator = curvature_operator(model, x, y, loss="squared_error")
    matrix = operator.dense()
    assert torch.allclose(matrix[:12, :12], torch.kron(torch.eye(3, dtype=F64), gram), atol=1e-14)
    assert torch.allclose(matrix[12:, 12:], 2 / 3 * torch.eye(3, dtype=F64), atol=1e-14)
    rest = curvature_operator(model, x, y, kind="functional", loss="squared_error")
    assert torch.equal(rest.dense(), torch.zeros(15, 15, dtype=F64))
    assert torch.equal(rest @ torch.ones(15, dtype=F64), torch.zeros(15, dtype=F64))


def test_double_precision_under_a_single_precision_default_and_back():
    model, x, y = cases()["mlp"]
    exact = tables(model, "cross_entropy", "mean")(x, y)["hessian"]
    assert torch.get_default_dtype() == torch.float32
    operator = curvature_operator(model, x, y)
    assert operator.dtype == F64 and operator.dense().dtype == F64
    assert float((operator.dense() - exact).abs().max()) < 1e-14
    single = curvature_operator(copy.deepcopy(model).float(), x.float(), y)
    pairs = top_eigenvalues(single, 2)
    assert single.dtype == pairs.values.dtype == pairs.vectors.dtype == torch.float32
    assert torch.allclose(single.dense().double(), exact, atol=1e-6)


def test_mapping_inputs_and_outputs():
    model, pixels, y = Keywords(), normal(4, 3), torch.tensor([0, 1, 1, 0])
    direct = curvature_operator(model.inner, pixels + 0.5, y)
    for batch_size in (None, 3):
        wrapped = curvature_operator(model, {"pixels": pixels, "shift": 0.5}, y, batch_size=batch_size)
        assert torch.allclose(wrapped.dense(), direct.dense(), atol=1e-14)


def test_a_recurrent_layer_which_has_no_forward_mode():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3, batch_first=True, dtype=F64)
            self.head = nn.Linear(3, 2, dtype=F64)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model, x, y = Reader(), normal(3, 4, 2), torch.tensor([0, 1, 1])
    operator = curvature_operator(model, x, y)
    v = normal(operator.size, seed=3)

    def slope(t):
        w = flat_parameters(model) + t * v
        return grad_of(model, x, y, w)

    h = 1e-3
    numeric = (8 * (slope(h) - slope(-h)) - (slope(2 * h) - slope(-2 * h))) / (12 * h)
    assert torch.allclose(operator @ v, numeric, atol=1e-8)


def grad_of(model, x, y, w):
    names = [name for name, _ in model.named_parameters()]
    pieces = w.split([parameter.numel() for parameter in model.parameters()])
    own = {n: p.view_as(q).requires_grad_() for n, p, q in zip(names, pieces, model.parameters(), strict=True)}
    parts = torch.autograd.grad(functional.cross_entropy(functional_call(model, own, (x,)), y), list(own.values()))
    return torch.cat([part.reshape(-1) for part in parts])


def test_the_operator_outlives_training_and_changed_data():
    model, x, y = cases()["encoder"]
    for batch_size in (None, 2):
        mine, data, labels = copy.deepcopy(model), x.clone(), y.clone()
        operator = curvature_operator(mine, data, labels, batch_size=batch_size)
        v = normal(operator.size, seed=6)
        before = operator @ v
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.add_(1)
            data.zero_(), labels.zero_()
        assert torch.equal(operator @ v, before)


def test_nothing_of_the_callers_changes():
    model, x, y = cases()["encoder"]
    model.train()
    model.encoder.layers[0].requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.eval()
    state = copy.deepcopy(model.state_dict())
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    training = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    data = x.clone()
    with torch.no_grad():
        operator = curvature_operator(model, x, y)
        result = operator @ torch.ones(operator.size, dtype=F64)
        top_eigenvalues(operator, 2)
        spectral_density(operator, steps=5, probes=2)
    assert not result.requires_grad and not operator.dense().requires_grad
    with pytest.raises(ValueError):
        curvature_operator(model, x, y + 7)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(data, x)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == training
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # frozen parameters count, so the table is that of the same model with none frozen
    assert torch.allclose(operator.dense(), curvature_operator(cases()["encoder"][0], x, y).dense(), atol=1e-14)


def test_bad_models_and_data_are_named():
    model, x, y = cases()["mlp"]
    drop = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Dropout(0.5))
    target = normal(5, 3)
    several = {"pixels": x, "shift": normal(3, 3)}
    bad = [
        ("kind", lambda: curvature_operator(model, x, y, kind="ggn")),
        ("kind", lambda: curvature_operator(model, x, target, kind="fisher", loss="squared_error")),
        ("loss", lambda: curvature_operator(model, x, y, loss="mse")),
        ("reduction", lambda: curvature_operator(model, x, y, reduction="none")),
        ("batch_size", lambda: curvature_operator(model, x, y, batch_size=0)),
        ("model", lambda: curvature_operator(drop, x, y)),
        ("model", lambda: curvature_operator(nn.Flatten(), x, y)),
        ("model", lambda: curvature_operator(copy.deepcopy(model).half(), x.half(), y)),
        ("model", lambda: curvature_operator(nn.Sequential(model, nn.Flatten(0), nn.Unflatten(0, (1, 15))), x, y)),
        ("x", lambda: curvature_operator(model, x[:0], y[:0])),
        ("x", lambda: curvature_operator(model, x.float(), y)),
        ("x", lambda: curvature_operator(model, x / 0, y)),
        ("x", lambda: curvature_operator(Keywords(), several, y)),
        ("y", lambda: curvature_operator(model, x)),
        ("y", lambda: curvature_operator(model, x, kind="functional")),
        ("y", lambda: curvature_operator(model, x, y[:4])),
        ("y", lambda: curvature_operator(model, x, y + 1)),
        ("y", lambda: curvature_operator(model, x, y - 1)),
        ("y", lambda: curvature_operator(model, x, y.double())),
        ("y", lambda: curvature_operator(model, x, y.tolist())),
        ("y", lambda: curvature_operator(model, x, target[:, :2], loss="squared_error")),
        ("y", lambda: curvature_operator(model, x, target.float(), loss="squared_error")),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=f"^{name}.*: expected"):
            call()


def test_vectors_that_do_not_fit_are_named():
    model, x, y = cases()["mlp"]
    operator = curvature_operator(model, x, y)
    size = operator.size
    for other in (normal(size + 1), normal(size).float(), normal(size, 2, 2), normal(size) / 0, None):
        with pytest.raises(ValueError, match=r"^other: expected"):
            operator @ other
    with pytest.raises(ValueError, match=r"^other: expected"):
        operator - SymmetricOperator(2, F64, torch.device("cpu"), lambda rows: rows)


def test_the_difference_of_two_operators():
    model, x, y = cases()["mlp"]
    whole, half = curvature_operator(model, x, y), curvature_operator(model, x[:2], y[:2])
    assert torch.allclose((whole - half).dense(), whole.dense() - half.dense(), atol=1e-15)
