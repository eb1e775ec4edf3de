"""Jacobians against routes that do not share their code: hand formulas and differences."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldyn.foundations.jacobians import (
    Linearisation,
    area_factor,
    finite_difference_jacobian,
    jacobian,
    jvp,
    kronecker,
    linearise,
    unvec,
    vec,
    vjp,
)

SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 10_000)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def textbook(v):
    x, y = v[..., 0], v[..., 1]
    return torch.stack((x**4 + 3 * y**2 * x, 5 * y**2 - 2 * x * y + 1), dim=-1)


def network(seed, n, hidden, m):
    first, second = randn(hidden, n, seed=seed), randn(m, hidden, seed=seed + 1)

    def by_hand(x):
        return second @ torch.diag(1 - torch.tanh(first @ x) ** 2) @ first

    return lambda x: second @ torch.tanh(first @ x), by_hand


def refused(pattern, function, *args, **kwargs):
    with pytest.raises(ValueError, match=pattern):
        function(*args, **kwargs)


# vec and unvec


@given(SIZES, SIZES, st.lists(st.integers(1, 3), max_size=2))
def test_vec_is_row_major_and_unvec_undoes_it(rows, columns, batch):
    matrix = randn(*batch, rows, columns)
    flat = vec(matrix)
    assert flat.shape == (*batch, rows * columns)
    for i in range(rows):
        for j in range(columns):
            assert torch.equal(flat[..., i * columns + j], matrix[..., i, j])
    assert torch.equal(unvec(flat, rows, columns), matrix)


@given(SIZES, SIZES, SIZES, SIZES, SEEDS)
def test_vec_of_a_product_is_a_kronecker_product(p, q, r, s, seed):
    a, x, b = randn(p, q, seed=seed), randn(q, r, seed=seed + 1), randn(r, s, seed=seed + 2)
    torch.testing.assert_close(kronecker(a, b.T) @ vec(x), vec(a @ x @ b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian(lambda t: a @ t @ b, x), kronecker(a, b.T), rtol=1e-13, atol=0)


def test_the_column_major_product_is_another_matrix():
    a, x, b = randn(3, 3, seed=1), randn(3, 3, seed=2), randn(3, 3, seed=3)
    assert (kronecker(b.T, a) @ vec(x) - vec(a @ x @ b)).abs().max() > 0.1
    assert (kronecker(a, b) @ vec(x) - vec(a @ x @ b)).abs().max() > 0.1


@given(SIZES, SIZES, SIZES, SIZES, st.lists(st.integers(1, 3), max_size=2), SEEDS)
def test_kronecker_agrees_with_numpy_also_for_views_and_batches(p, q, s, r, batch, seed):
    left, right = randn(*batch, q, p, seed=seed).mT, randn(r, s, seed=seed + 1).mT
    found = kronecker(left, right)
    assert found.shape == (*batch, p * s, q * r)
    for place in np.ndindex(*batch):
        assert np.array_equal(found[place].numpy(), np.kron(left[place].numpy(), right.numpy()))


def test_kronecker_refuses():
    refused(r"^left: expected a tensor with at least 2", kronecker, randn(3), randn(3, 3))
    refused(r"^right: expected a torch.Tensor", kronecker, randn(3, 3), 2.0)
    refused(r"^right: expected the dtype of left", kronecker, randn(3, 3), randn(3, 3).float())


def test_vec_and_unvec_refuse():
    refused(r"^matrix: expected a tensor with at least 2", vec, torch.ones(3))
    refused(r"^matrix: expected a torch.Tensor", vec, [[1.0]])
    refused(r"^vector: expected shape \(\.\.\., 6\), got .*\(5,\)", unvec, torch.ones(5), 2, 3)
    refused(r"^rows: expected an integer >= 1, got 0", unvec, torch.ones(0), 0, 3)
    refused(r"^columns: expected an integer", unvec, torch.ones(6), 2, 3.0)


# jacobian


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_worked_example(mode):
    point = torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([[16.0, 12.0], [-4.0, 18.0]], dtype=torch.float64)
    assert torch.equal(jacobian(textbook, point, mode=mode), expected)
    assert area_factor(expected) == pytest.approx(336, rel=1e-14)


@given(SEEDS, SIZES, SIZES, SIZES)
def test_jacobian_of_a_network_by_hand_and_by_differences(seed, n, hidden, m):
    f, by_hand = network(seed, n, hidden, m)
    x = randn(n, seed=seed + 2)
    for mode in ("reverse", "forward"):
        torch.testing.assert_close(jacobian(f, x, mode=mode), by_hand(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(finite_difference_jacobian(f, x), by_hand(x), rtol=1e-7, atol=1e-8)


@given(
    st.lists(SIZES, max_size=3),
    st.lists(SIZES, max_size=3),
    SEEDS,
    st.sampled_from(["reverse", "forward"]),
)
def test_layout_for_tensors_of_any_shape(inputs, outputs, seed, mode):
    n, m = math.prod(inputs), math.prod(outputs)
    matrix = randn(m, n, seed=seed)

    def f(t):
        return (matrix @ t.reshape(-1)).reshape(outputs)

    x = randn(*inputs, seed=seed)
    torch.testing.assert_close(jacobian(f, x, mode=mode), matrix, rtol=0, atol=0)
    torch.testing.assert_close(finite_difference_jacobian(f, x), matrix, rtol=1e-8, atol=1e-8)


def test_a_transposed_matrix_would_be_noticed():
    matrix = randn(3, 3)
    found = jacobian(lambda t: matrix @ t, torch.ones(3, dtype=torch.float64))
    assert not torch.allclose(found, matrix.T)


def test_a_map_that_ignores_its_input_has_the_zero_jacobian():
    assert torch.equal(jacobian(lambda t: torch.ones(2), torch.ones(3)), torch.zeros(2, 3))


def test_jacobian_can_be_differentiated_again_and_mapped():
    def cube(t):
        return t**3

    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    second = jacobian(lambda t: jacobian(cube, t), x)
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    expected[0, 0, 0], expected[1, 1, 1] = 6.0, -12.0
    torch.testing.assert_close(second, expected.reshape(4, 2))
    batch = randn(7, 2)
    mapped = torch.func.vmap(lambda t: jacobian(cube, t))(batch)
    torch.testing.assert_close(mapped, torch.diag_embed(3 * batch**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_preserved_whatever_the_default(dtype):
    x = randn(2, dtype=dtype)
    line = linearise(textbook, x)
    results = (
        jacobian(textbook, x),
        finite_difference_jacobian(textbook, x),
        jvp(textbook, x, x),
        vjp(textbook, x, x),
        line(x),
        area_factor(line.jacobian),
        vec(x[None]),
    )
    assert all(result.dtype == dtype for result in results)


# products


@given(SEEDS, SIZES, SIZES, SIZES)
def test_products_are_products_with_the_jacobian(seed, n, hidden, m):
    f, by_hand = network(seed, n, hidden, m)
    x, v, u = randn(n, seed=seed + 2), randn(n, seed=seed + 3), randn(m, seed=seed + 4)
    torch.testing.assert_close(jvp(f, x, v), by_hand(x) @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vjp(f, x, u), by_hand(x).T @ u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u @ jvp(f, x, v), vjp(f, x, u) @ v, rtol=1e-11, atol=1e-12)


def test_products_keep_the_shapes_of_tensors():
    def f(t):
        return (t.T @ t)[None]

    x, v, u = randn(2, 3), randn(2, 3, seed=1), randn(1, 3, 3, seed=2)
    assert jvp(f, x, v).shape == (1, 3, 3)
    assert vjp(f, x, u).shape == (2, 3)
    torch.testing.assert_close(jvp(f, x, v).reshape(-1), jacobian(f, x) @ vec(v))
    torch.testing.assert_close(vec(vjp(f, x, u)), jacobian(f, x).T @ u.reshape(-1))


def test_products_refuse_other_shapes_and_dtypes():
    x = randn(2)
    refused(r"^v: expected shape \(2\), got .*\(3,\)", jvp, textbook, x, randn(3))
    refused(r"^v: expected the dtype of x \(torch\.float64\), got torch\.float32", jvp, textbook, x, x.float())
    refused(r"^v: expected finite", jvp, textbook, x, x * math.nan)
    refused(r"^u: expected shape \(2\), got .*\(2, 1\)", vjp, textbook, x, randn(2, 1))
    refused(r"^u: expected the dtype of f\(x\)", vjp, textbook, x, x.float())
    refused(r"^u: expected a torch.Tensor, got 1.0", vjp, textbook, x, 1.0)


# finite differences


def test_finite_differences_have_second_order():
    f, by_hand = network(3, 3, 4, 2)
    x = randn(3)
    errors = [float((finite_difference_jacobian(f, x, step=h) - by_hand(x)).abs().max()) for h in (1e-2, 1e-3)]
    assert 90 < errors[0] / errors[1] < 110


def test_finite_differences_of_large_inputs_use_larger_steps():
    x = torch.tensor([1e6, -1e6, 1e-9], dtype=torch.float64)
    found = finite_difference_jacobian(lambda t: t**2, x)
    torch.testing.assert_close(found, torch.diag(2 * x), rtol=1e-9, atol=1e-4)


def test_a_step_that_moves_nothing_is_refused():
    refused(r"^step: expected a number > 0", finite_difference_jacobian, textbook, randn(2), step=-1.0)
    refused(r"^step: expected a finite", finite_difference_jacobian, textbook, randn(2), step=math.nan)
    big = torch.tensor([1e9, 0.0])
    refused(r"^step: .*move x in torch.float32, got 1e-05", finite_difference_jacobian, textbook, big, step=1e-5)


# linearisation


@given(SEEDS, SIZES, SIZES)
def test_linearisation_is_affine_exact_at_the_point_and_batched(seed, n, m):
    f, by_hand = network(seed, n, 3, m)
    a, points = randn(n, seed=seed + 2), randn(4, 2, n, seed=seed + 3)
    line = linearise(f, a)
    assert torch.equal(line(a), f(a))
    expected = f(a) + (points - a) @ by_hand(a).T
    torch.testing.assert_close(line(points), expected, rtol=1e-12, atol=1e-12)


def test_linearisation_of_a_map_of_matrices():
    def f(t):
        return t.T @ t

    a, h = randn(2, 3), 1e-5 * randn(2, 3, seed=1)
    line = linearise(f, a)
    assert isinstance(line, Linearisation)
    torch.testing.assert_close(line(a + h), f(a) + h.T @ a + a.T @ h, rtol=0, atol=1e-14)
    assert line(torch.stack((a, a + h))).shape == (2, 3, 3)


def test_linearisation_does_not_follow_the_caller_s_tensor():
    a = randn(2)
    line, before = linearise(textbook, a), a.clone()
    a += 1
    assert torch.equal(line.point, before)


def test_linearisation_refuses_what_does_not_end_in_its_shape():
    line = linearise(textbook, randn(2))
    refused(r"^x: expected shape \(\.\.\., 2\), got .*\(2, 3\)", line, randn(2, 3))
    refused(r"^x: expected the dtype of the point", line, randn(2).float())


# area factor


@given(SEEDS, st.integers(1, 6), st.lists(st.integers(1, 3), max_size=2))
def test_area_factor_is_the_product_of_singular_values(seed, n, batch):
    matrix = randn(*batch, n, n, seed=seed)
    factor = area_factor(matrix)
    assert factor.shape == tuple(batch)
    torch.testing.assert_close(factor, torch.linalg.svdvals(matrix).prod(-1), rtol=1e-10, atol=1e-13)


def test_area_factor_of_reflections_and_of_singular_matrices():
    assert area_factor(torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 1
    assert area_factor(torch.ones(2, 2)) == 0


def test_area_factor_needs_a_square_matrix():
    refused(r"^matrix: expected shape \(\.\.\., n, n\), got .*\(3, 2\)", area_factor, torch.ones(3, 2))
    refused(r"^matrix: expected a tensor with at least 2", area_factor, torch.ones(3))
    refused(r"^matrix: expected finite", area_factor, torch.full((2, 2), math.inf))
    refused(r"^matrix: expected at least one", area_factor, torch.ones(0, 0))
    refused(r"^matrix: expected a real floating", area_factor, torch.eye(2, dtype=torch.int64))


# bad maps and points, and what stays as it was


@pytest.mark.parametrize("function", [jacobian, finite_difference_jacobian, linearise])
def test_bad_points_and_maps_are_refused(function):
    refused(r"^x: expected a torch.Tensor, got", function, textbook, [1.0, 2.0])
    refused(r"^x: expected a real floating-point dtype", function, textbook, torch.tensor([1, 2]))
    refused(r"^x: expected a real floating-point dtype", function, textbook, torch.ones(2) * 1j)
    refused(r"^x: expected at least one element", function, textbook, torch.ones(0))
    refused(r"^x: expected finite values", function, textbook, torch.tensor([1.0, math.nan]))
    refused(r"^f: expected a function of one tensor, got 3", function, 3, torch.ones(2))
    refused(r"^f\(x\): expected a torch.Tensor, got", function, lambda t: (t, t), torch.ones(2))
    refused(r"^f\(x\): expected a real floating", function, lambda t: t > 0, torch.ones(2))
    refused(r"^f\(x\): expected finite", function, torch.log, torch.zeros(2))
    refused(r"^f\(x\): expected at least one", function, lambda t: t[:0], torch.ones(2))


def test_unknown_mode_is_refused():
    refused(
        r"^mode: expected 'reverse' or 'forward', got 'backward'",
        jacobian,
        textbook,
        randn(2),
        mode="backward",
    )


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(2)])
def test_training_mode_is_refused_where_it_matters(layer):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    refused(r"^f: expected evaluation mode", jacobian, model, torch.ones(2))
    refused(r"^f: expected evaluation mode", jvp, model, torch.ones(2), torch.ones(2))
    refused(r"^f: expected evaluation mode", vjp, model, torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_caller_s_is_changed(fails):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        if fails and len(calls) > 1:
            raise RuntimeError("the caller's own error")

    handle = model.register_forward_hook(hook)
    state, x = copy.deepcopy(model.state_dict()), torch.ones(3, requires_grad=True)
    seed, default = torch.get_rng_state(), torch.get_default_dtype()
    for function, extra in (
        (jacobian, ()),
        (finite_difference_jacobian, ()),
        (linearise, ()),
        (jvp, (torch.ones(3),)),
        (vjp, (torch.ones(2),)),
    ):
        if fails:
            calls.append(1)
            with pytest.raises(RuntimeError, match="the caller's own error"):
                function(model, x, *extra)
        else:
            function(model, x, *extra)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training and x.grad is None and x.requires_grad and torch.equal(x, torch.ones(3))
    assert len(model._forward_hooks) == 1 and model[0]._forward_hooks == {}
    assert torch.equal(torch.get_rng_state(), seed) and torch.get_default_dtype() == default
    assert torch.is_grad_enabled()
    handle.remove()
