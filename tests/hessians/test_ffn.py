"""The feed-forward network's Hessian: every block against double backpropagation, its zeros, and its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian
from torch.nn import functional

from ldyn.foundations.jacobians import kronecker
from ldyn.hessians import _ffn_products
from ldyn.hessians.ffn import VARIABLES, ffn, ffn_loss_hessian
from ldyn.hessians.losses import cross_entropy, squared_error

F64 = torch.float64
PYTORCH = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "silu": functional.silu,
}
activations = st.sampled_from(list(PYTORCH))
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(tokens, inputs, units, outputs, seed=0, dtype=F64):
    shapes = ((units, inputs), (units,), (outputs, units), (outputs,), (tokens, inputs))
    return {
        name: normal(*shape, seed=seed + number, dtype=dtype)
        for number, (name, shape) in enumerate(zip(VARIABLES, shapes, strict=True))
    }


def by_pytorch(variables, activation):
    h = functional.linear(variables["x"], variables["W1"], variables["b1"])
    return functional.linear(PYTORCH[activation](h), variables["W2"], variables["b2"])


def unflatten(flat, variables):
    parts = flat.split([v.numel() for v in variables.values()])
    return {name: part.reshape(v.shape) for part, (name, v) in zip(parts, variables.items(), strict=True)}


def flatten(variables):
    return torch.cat([v.reshape(-1) for v in variables.values()])


def by_autograd(loss, variables, activation):
    """The Hessian of the loss of PyTorch's own layers, differentiated twice."""
    return hessian(lambda flat: loss(by_pytorch(unflatten(flat, variables), activation)))(flatten(variables))


def gauss_newton_by_autograd(S, variables, activation):
    """Expand the loss to second order at the outputs; the linear network then has the Gauss–Newton part only."""
    here = flatten(variables)

    def outputs(flat):
        return by_pytorch(unflatten(flat, variables), activation).reshape(-1)

    J = torch.func.jacrev(outputs)(here)
    return J.T @ S @ J


def losses_of(tokens, outputs, seed):
    """Losses of (L, o) outputs: two that add up over tokens, and one that lets tokens interact."""
    targets, labels = normal(tokens, outputs, seed=seed), torch.arange(tokens) % outputs
    mixing = normal(tokens * outputs, tokens * outputs, seed=seed + 1)

    def coupled(z):
        flat = z.reshape(-1)
        return (mixing @ flat).square().sum() / 2 + (flat.sum() ** 3) / 10

    return {
        "squared error": lambda z: (z - targets).square().mean(),
        "cross-entropy": lambda z: functional.cross_entropy(z, labels),
        "coupled": coupled,
    }


def close(got, expected, rtol=1e-12):
    scale = max(float(expected.abs().max()), 1e-300)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= rtol * scale


# --- against automatic differentiation -------------------------------------------------------------------------


@settings(max_examples=40)
@given(sizes, activations, st.sampled_from(["squared error", "cross-entropy", "coupled"]))
def test_all_blocks_of_both_parts_equal_automatic_differentiation(shape, activation, kind):
    tokens, inputs, units, outputs, seed = shape
    variables = network(tokens, inputs, units, outputs, seed=seed)
    loss = losses_of(tokens, outputs, seed)[kind]
    z = by_pytorch(variables, activation)
    r, S = grad(loss)(z), hessian(loss)(z)
    H = ffn_loss_hessian(**variables, r=r, S=S, activation=activation)
    assert H.names == VARIABLES
    expected = by_autograd(loss, variables, activation)
    close(H.matrix(), expected)
    flat = S.reshape(z.numel(), z.numel())
    close(H.matrix(part="gauss_newton"), gauss_newton_by_autograd(flat, variables, activation))


@settings(max_examples=40)
@given(sizes, activations, st.sampled_from(["mse", "ce"]))
def test_losses_given_per_token_equal_automatic_differentiation(shape, activation, kind):
    tokens, inputs, units, outputs, seed = shape
    variables = network(tokens, inputs, units, outputs, seed=seed)
    z = ffn(**variables, activation=activation)
    labels, targets = torch.arange(tokens) % outputs, normal(tokens, outputs, seed=seed)
    if kind == "ce":
        curvature, loss = cross_entropy(z, labels), lambda y: functional.cross_entropy(y, labels)
    else:
        curvature, loss = squared_error(z, targets), lambda y: functional.mse_loss(y, targets)
    H = ffn_loss_hessian(**variables, r=curvature.gradient, S=curvature.hessian, activation=activation)
    close(H.matrix(), by_autograd(loss, variables, activation))


def test_a_sum_that_needs_several_chunks_is_still_exact(monkeypatch):
    variables = network(3, 4, 5, 2)
    r, S = normal(3, 2), normal(3, 2, 2, seed=1)
    S = S + S.mT
    full = torch.zeros(3, 2, 3, 2, dtype=F64)
    full[range(3), :, range(3)] = S
    whole = [ffn_loss_hessian(**variables, r=r, S=form).matrix() for form in (S, full)]
    monkeypatch.setattr(_ffn_products, "CHUNK", 100)
    pieces = [ffn_loss_hessian(**variables, r=r, S=form).matrix() for form in (S, full)]
    for matrix in (*whole, *pieces):
        close(matrix, whole[0], rtol=1e-14)


def test_forward_equals_pytorch():
    for activation in PYTORCH:
        variables = network(4, 3, 6, 2)
        close(ffn(**variables, activation=activation), by_pytorch(variables, activation), rtol=1e-14)


def test_one_token_may_come_without_its_dimension():
    variables = network(1, 3, 4, 2)
    single = {**variables, "x": variables["x"][0]}
    r, S = normal(2), torch.eye(2, dtype=F64)
    close(ffn(**single), ffn(**variables)[0], rtol=1e-15)
    H, reference = ffn_loss_hessian(**single, r=r, S=S), ffn_loss_hessian(**variables, r=r[None], S=S[None])
    assert torch.equal(H.matrix(), reference.matrix())
    assert H.shapes["x"] == (3,)
    assert reference.shapes["x"] == (1, 3)


def test_float32_stays_float32():
    exact, single = network(5, 4, 6, 3), {k: v.float() for k, v in network(5, 4, 6, 3).items()}
    curvature = cross_entropy(ffn(**exact), torch.arange(5) % 3)
    for activation in PYTORCH:
        H = ffn_loss_hessian(**exact, r=curvature.gradient, S=curvature.hessian, activation=activation)
        rounded = ffn_loss_hessian(
            **single, r=curvature.gradient.float(), S=curvature.hessian.float(), activation=activation
        )
        for pair in H.functional:
            assert rounded.gauss_newton[pair].dtype == rounded.functional[pair].dtype == torch.float32
        close(rounded.matrix().double(), H.matrix(), rtol=1e-4)


@pytest.mark.parametrize("chunk", [1 << 19, 30])
def test_the_result_can_be_differentiated(chunk, monkeypatch):
    """The third derivative of the loss: the curvature of all blocks along a direction in the weights."""
    monkeypatch.setattr(_ffn_products, "CHUNK", chunk)
    variables = network(2, 2, 3, 2)
    r, S = normal(2, 2), torch.eye(2, dtype=F64).expand(2, -1, -1)
    W2, direction = variables.pop("W2"), normal(2, 3, seed=9)

    def curvature(t):
        return ffn_loss_hessian(**variables, W2=W2 + t * direction, r=r, S=S).matrix().square().sum()

    slope = torch.func.grad(curvature)(torch.zeros((), dtype=F64))
    ahead, behind = (curvature(torch.tensor(t, dtype=F64)) for t in (1e-5, -1e-5))
    assert float(slope) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-8)


# --- structure ---------------------------------------------------------------------------------------------------


def test_blocks_are_kronecker_products_for_one_token():
    W1, b1, W2, _, x = network(1, 3, 5, 4).values()
    variables = network(1, 3, 5, 4)
    r, S = normal(1, 4), normal(1, 4, 4, seed=2)
    S = S @ S.mT
    H = ffn_loss_hessian(**variables, r=r, S=S, activation="silu")
    h = (x @ W1.T + b1)[0]
    a, s = functional.silu(h), torch.sigmoid(h)
    D = torch.diag(s + h * s * (1 - s))
    close(H.gauss_newton["W1", "W1"], kronecker(D @ W2.T @ S[0] @ W2 @ D, x.T @ x))
    close(H.gauss_newton["W2", "W1"], kronecker(S[0] @ W2 @ D, torch.outer(a, x[0])))
    close(H.gauss_newton["W2", "W2"], kronecker(S[0], torch.outer(a, a)))
    close(H.functional["W2", "W1"], kronecker(r.T, kronecker(D, x)))


ALWAYS_ZERO = [("W2", "W2"), ("W2", "b2"), ("b2", "b2"), ("W1", "b2"), ("b1", "b2"), ("b2", "x")]
ZERO_FOR_RELU = [("W1", "W1"), ("W1", "b1"), ("b1", "b1"), ("b1", "x"), ("x", "x")]
NEVER_ZERO = [("W1", "W2"), ("b1", "W2"), ("W1", "x"), ("W2", "x")]


def test_which_functional_blocks_vanish():
    variables = network(3, 2, 4, 3)
    r, S = normal(3, 3), torch.eye(3, dtype=F64).expand(3, -1, -1)
    assert len(ALWAYS_ZERO + ZERO_FOR_RELU + NEVER_ZERO) == 15
    for activation in PYTORCH:
        functional_part = ffn_loss_hessian(**variables, r=r, S=S, activation=activation).functional
        zero = ALWAYS_ZERO + (ZERO_FOR_RELU if activation == "relu" else [])
        for pair in ALWAYS_ZERO + ZERO_FOR_RELU + NEVER_ZERO:
            for block in (functional_part[pair], functional_part[pair[::-1]]):
                assert bool((block == 0).all()) == (pair in zero), (activation, pair)


def test_different_tokens_meet_in_no_block_of_the_inputs():
    variables = network(3, 2, 4, 2)
    r, S = normal(3, 2), torch.eye(2, dtype=F64).expand(3, -1, -1)
    H = ffn_loss_hessian(**variables, r=r, S=S)
    for part in (H.gauss_newton, H.functional):
        squares = part["x", "x"].reshape(3, 2, 3, 2)
        for one in range(3):
            for other in range(3):
                assert bool((squares[one, :, other] != 0).any()) == (one == other)


def test_a_positive_loss_has_a_positive_gauss_newton_part_and_relu_an_indefinite_rest():
    variables = network(4, 3, 5, 3)
    curvature = cross_entropy(ffn(**variables, activation="relu"), torch.tensor([0, 1, 2, 0]))
    H = ffn_loss_hessian(**variables, r=curvature.gradient, S=curvature.hessian, activation="relu")
    eigenvalues = torch.linalg.eigvalsh(H.matrix(part="gauss_newton"))
    assert float(eigenvalues[0]) > -1e-14
    weights = ("W1", "b1", "W2", "b2")
    mirrored = torch.linalg.eigvalsh(H.matrix(weights, part="functional"))
    close(mirrored, -mirrored.flip(0), rtol=1e-13)
    assert float(torch.linalg.eigvalsh(H.matrix(weights))[0]) < -1e-3


@settings(max_examples=25)
@given(st.lists(st.sampled_from(VARIABLES), min_size=1, max_size=5, unique=True), st.booleans())
def test_a_choice_of_variables_gives_the_same_blocks_in_the_order_asked_for(names, coupled):
    variables = network(3, 2, 4, 3)
    r, S = normal(3, 3), normal(3, 3, 3, seed=4)
    S = S + S.mT
    if coupled:
        S = normal(9, 9, seed=5)
        S = (S + S.T).reshape(3, 3, 3, 3)
    everything = ffn_loss_hessian(**variables, r=r, S=S)
    chosen = ffn_loss_hessian(**variables, r=r, S=S, wrt=names)
    assert chosen.names == tuple(names)
    for part in ("gauss_newton", "functional"):
        close(chosen.matrix(part=part), everything.matrix(names, part=part), rtol=1e-13)


def test_nothing_of_the_callers_is_changed():
    variables = network(3, 2, 4, 3)
    r, S = normal(3, 3), torch.eye(3, dtype=F64).expand(3, -1, -1)
    before = {name: v.clone() for name, v in variables.items()}
    state = torch.get_rng_state()
    ffn_loss_hessian(**variables, r=r, S=S)
    with pytest.raises(ValueError, match="activation"):
        ffn_loss_hessian(**variables, r=r, S=S, activation="sine")
    assert all(torch.equal(variables[name], before[name]) for name in variables)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


# --- bad input ---------------------------------------------------------------------------------------------------


def bad(**changes):
    return {**network(3, 2, 4, 5), "r": normal(3, 5), "S": torch.eye(5, dtype=F64).repeat(3, 1, 1), **changes}


SKEW = torch.eye(5, dtype=F64).repeat(3, 1, 1) + torch.ones(5, 5, dtype=F64).triu(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(activation="tanh"), "activation: expected one of 'relu', 'gelu', 'gelu_tanh', 'silu', got 'tanh'"),
        (dict(activation=torch.relu), "activation: expected one of"),
        (dict(x=[1.0, 2.0]), "x: expected a torch.Tensor"),
        (dict(x=normal(3, 3)), "W1: expected shape"),
        (dict(x=normal(2, 3, 2)), r"x: expected a tensor of shape \(L, d\) or \(d,\)"),
        (dict(x=normal(3, 2).float()), "b1: expected the dtype of x"),
        (dict(x=torch.full((3, 2), torch.nan, dtype=F64)), "x: expected finite values"),
        (dict(x=normal(0, 2)), "x: expected at least one element"),
        (dict(W1=normal(4, 3)), "W1: expected shape"),
        (dict(W1=normal(4, 2).float()), "W1: expected the dtype of x"),
        (dict(b1=normal(5)), r"b1: expected shape \(4\)"),
        (dict(W2=normal(5, 3)), "W2: expected shape"),
        (dict(W2=normal(4, 5)), "W2: expected shape"),
        (dict(b2=normal(4)), r"b2: expected shape \(5\)"),
        (dict(r=normal(5)), r"r: expected shape \(3, 5\)"),
        (dict(r=normal(3, 5).float()), "r: expected the dtype"),
        (dict(S=torch.eye(5, dtype=F64)), r"S: expected shape \(3, 5, 5\) or \(3, 5, 3, 5\)"),
        (dict(S=SKEW), "S: expected a symmetric Hessian"),
        (dict(S=torch.eye(5).repeat(3, 1, 1)), "S: expected the dtype"),
        (dict(x=normal(2), r=normal(1, 5), S=torch.eye(5, dtype=F64)), r"r: expected a tensor with 1 dimension"),
        (dict(x=normal(2), r=normal(5), S=torch.eye(5, dtype=F64)[None]), r"S: expected a tensor with 2 dimension"),
        (dict(wrt=()), "wrt: expected distinct names among W1, b1, W2, b2, x"),
        (dict(wrt=("W1", "W1")), "wrt: expected distinct names"),
        (dict(wrt=("W1", "W3")), "wrt: expected distinct names"),
        (dict(wrt="W1"), "wrt: expected distinct names"),
    ],
)
def test_bad_input_is_refused_with_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ffn_loss_hessian(**bad(**changes))


def test_the_forward_pass_refuses_what_the_hessian_refuses():
    with pytest.raises(ValueError, match="activation"):
        ffn(**network(3, 2, 4, 5), activation="Gelu")
    with pytest.raises(ValueError, match="b2: expected shape"):
        ffn(**{**network(3, 2, 4, 5), "b2": normal(1)})


def test_zero_blocks_take_no_memory():
    H = ffn_loss_hessian(**bad(), activation="relu")
    assert H.functional["W2", "W2"].untyped_storage().nbytes() == 8
    assert H.functional["W1", "W1"].untyped_storage().nbytes() == 8
