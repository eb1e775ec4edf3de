"""Objectives: extreme margins, near misses, shapes and dtypes, and what they refuse by name."""

import dataclasses
import math

import mpmath
import pytest
import torch
from torch.func import grad, vmap

from ldyn.dynamics import objectives as ob

F64 = torch.float64
EVERY_PAIR = [ob.DPO(), ob.SPIN(), ob.CDPO(), ob.IPO(), ob.IPO(average_log_prob=True), ob.SLiC(), ob.SPPO(), ob.SimPO()]
WITH_REFERENCE = [ob.DPO(), ob.SPIN(), ob.CDPO(), ob.IPO(), ob.SPPO()]


def log_probs(*shape, seed=0, scale=4.0):
    return -scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).abs()


def context(shape=(), seed=3):
    return dict(ref_pos=log_probs(*shape, seed=seed), ref_neg=log_probs(*shape, seed=seed + 1), len_pos=3, len_neg=4)


# --- extreme margins --------------------------------------------------------------------------------------------

SCALED = [-1e4, -800.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 800.0, 1e4]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (F64, 1e-12)])
@pytest.mark.parametrize("scaled", SCALED)
def test_sigmoids_keep_their_relative_accuracy_at_any_margin(scaled, dtype, rtol):
    beta = 0.5  # a power of two, and margins that float32 holds, so that rounding of the input is not in question
    h = torch.tensor(scaled / beta, dtype=dtype)
    floor = -4 * max(abs(scaled), 1.0) * torch.ones((), dtype=dtype)
    lp, ref = (floor + h.clamp(min=0), floor), (floor - h.clamp(max=0), floor)
    exact_h = float(lp[0]) - float(ref[0])
    m = mpmath.mpf(beta * exact_h)
    tiny = float(torch.finfo(dtype).tiny)

    def close(got, expected):
        assert torch.isfinite(got).all() and got.dtype == dtype
        assert abs(float(got) - float(expected)) <= rtol * abs(float(expected)) + tiny

    given = dict(ref_pos=ref[0], ref_neg=ref[1])
    fall = 1 / (1 + mpmath.exp(m))  # σ(−m)
    close(ob.DPO(beta).loss(*lp, **given), mpmath.log1p(mpmath.exp(-m)))
    close(ob.DPO(beta).coefficients(*lp, **given).c_pos, beta * fall)
    close(ob.CDPO(beta, 0.0).coefficients(*lp, **given).c_neg, -beta * fall)
    close(ob.NPO(beta).loss(lp[0], ref=ref[0]), 2 / beta * mpmath.log1p(mpmath.exp(m)))
    close(ob.NPO(beta).coefficients(lp[0], ref=ref[0]), -2 / (1 + mpmath.exp(-m)))
    close(ob.KTO(beta).loss(lp[0], ref=ref[0], desirable=True), fall)
    close(ob.KTO(beta).coefficients(lp[0], ref=ref[0], desirable=True), beta * fall / (1 + mpmath.exp(-m)))
    close(ob.SimPO(beta, 0.0).coefficients(lp[0], ref[0], len_pos=1, len_neg=1).c_pos, beta * fall)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("objective", EVERY_PAIR, ids=repr)
def test_losses_and_their_gradients_are_finite_at_any_margin(objective, dtype):
    low, high = torch.tensor([-1e5, -1e5, -1.0], dtype=dtype), torch.tensor([-1.0, -1e5, -1e5], dtype=dtype)
    leaves = low.requires_grad_(), high.requires_grad_()
    middle = torch.full_like(low, -5e4).detach()
    options = dict(ref_pos=middle, ref_neg=middle, len_pos=2, len_neg=2)
    value = objective.loss(*leaves, **options)
    slopes = torch.autograd.grad(value.sum(), leaves)
    for slope, c in zip(slopes, objective.coefficients(*leaves, **options), strict=True):
        assert torch.isfinite(slope).all()
        torch.testing.assert_close(-slope, c, rtol=1e-5, atol=1e-30)


# --- near misses ------------------------------------------------------------------------------------------------


def slopes_of(loss, r_pos, r_neg):
    """The coefficients that belong to a loss of the two log-ratios, by automatic differentiation."""
    leaves = r_pos.clone().requires_grad_(), r_neg.clone().requires_grad_()
    return [-slope for slope in torch.autograd.grad(loss(*leaves).sum(), leaves)]


def test_printed_forms_that_are_wrong_are_not_what_the_library_computes():
    lp_pos, lp_neg, given = log_probs(9), log_probs(9, seed=1), context((9,))
    r_pos, r_neg = lp_pos - given["ref_pos"], lp_neg - given["ref_neg"]
    h, beta = r_pos - r_neg, 0.3
    target = 1 / (2 * beta)

    def c(objective):
        return torch.stack(objective.coefficients(lp_pos, lp_neg, **given))

    a = h - target
    wrong = {
        "DPO without its minus": (
            ob.DPO(beta),
            slopes_of(lambda x, y: torch.log((beta * (x - y)).sigmoid()), r_pos, r_neg),
        ),
        "DPO, rejected response with the sign of the preferred": (ob.DPO(beta), [c(ob.DPO(beta))[0]] * 2),
        "cDPO with the target ε": (ob.CDPO(beta, 0.2), [s * beta * (0.2 - (beta * h).sigmoid()) for s in (1, -1)]),
        "IPO with a leading minus": (ob.IPO(beta), slopes_of(lambda x, y: -((x - y - target) ** 2), r_pos, r_neg)),
        "IPO with DPO's scalar": (ob.IPO(beta), [beta * (1 - a), -beta * (1 - a)]),
        "IPO without the two": (ob.IPO(beta), [target - h, h - target]),
        "SPPO with a leading minus": (
            ob.SPPO(beta),
            slopes_of(lambda x, y: -((x - target) ** 2) - (y + target) ** 2, r_pos, r_neg),
        ),
        "SPPO with two positive parts": (ob.SPPO(beta), [2 * (target - r_pos), 2 * (r_neg + target)]),
        "SLiC times DPO's residual": (ob.SLiC(1.0), c(ob.SLiC(1.0)) * c(ob.DPO(beta)).abs()),
        "SimPO with one length": (ob.SimPO(2.0), torch.stack((c(ob.SimPO(2.0))[0], -c(ob.SimPO(2.0))[0]))),
    }
    for what, (objective, printed) in wrong.items():
        printed = torch.stack(list(printed))
        right = torch.stack(slopes_of(lambda x, y, o=objective: o.loss(x, y, **given), lp_pos, lp_neg))
        torch.testing.assert_close(c(objective), right, rtol=1e-12, atol=1e-13)
        assert (right - printed).abs().max() > 1e-2, what


def test_grpo_near_misses():
    lp, gain = log_probs(4, 5, scale=0.5), torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=F64)
    old, ref = log_probs(4, 5, seed=1, scale=0.5), log_probs(4, 5, seed=2, scale=0.5)
    objective = ob.GRPO(epsilon=0.2, beta=0.3)
    leaf = lp.clone().requires_grad_()
    value = objective.loss(leaf, old_lp=old, ref_lp=ref, advantages=gain)
    right = -torch.autograd.grad(value, leaf)[0]
    ratio, weight = (lp - old).exp(), 1 / 20
    inside = ((ratio - 1).abs() <= 0.2).to(F64)
    active = ~((gain[:, None] > 0) & (ratio > 1.2)) & ~((gain[:, None] < 0) & (ratio < 0.8))
    penalty = 0.3 * (1 - (ref - lp).exp())
    torch.testing.assert_close(weight * (ratio * gain[:, None] * active - penalty), right, rtol=1e-12, atol=1e-14)
    wrong = {
        "both corners inactive": weight * (ratio * gain[:, None] * inside - penalty),
        "the penalty's sign": weight * (ratio * gain[:, None] * active + penalty),
        "the penalty with log ratio": weight * (ratio * gain[:, None] * active - 0.3 * (lp - ref)),
        "no ratio": weight * (gain[:, None] * active - penalty),
    }
    for what, form in wrong.items():
        assert (form - right).abs().max() > 1e-3, what


# --- shapes, dtypes, transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_and_dtypes(shape, dtype):
    lp, other = log_probs(*shape).to(dtype), log_probs(*shape, seed=1).to(dtype)
    options = dict(ref_pos=other, ref_neg=lp, len_pos=torch.full(shape, 2), len_neg=5)
    for objective in EVERY_PAIR:
        results = (objective.loss(lp, other, **options), *objective.coefficients(lp, other, **options))
        assert all(x.shape == shape and x.dtype == dtype for x in results)
    for objective, given in (
        (ob.SFT(), {}),
        (ob.NPO(), dict(ref=other)),
        (ob.KTO(), dict(ref=other, desirable=torch.ones(shape, dtype=torch.bool), z0=lp.abs().sum())),
        (ob.Reinforce(), dict(advantages=other)),
    ):
        results = (objective.loss(lp, **given), objective.coefficients(lp, **given))
        assert all(x.shape == shape and x.dtype == dtype for x in results)
    logits, labels = log_probs(*shape, 4).to(dtype), torch.zeros(shape, dtype=torch.int64)
    smooth = ob.LabelSmoothing()
    assert smooth.loss(logits, labels).shape == shape and smooth.residual(logits, labels).dtype == dtype
    tokens = log_probs(*shape, 2, 5).to(dtype)
    given = dict(old_lp=tokens, ref_lp=tokens, advantages=tokens[..., 0])
    for objective in (ob.GRPO(beta=0.1), ob.GRPO(normalization="constant", max_length=7)):
        assert objective.loss(tokens, **given).shape == shape and objective.loss(tokens, **given).dtype == dtype
        assert objective.coefficients(tokens, **given).shape == tokens.shape
        assert objective.coefficients(tokens, **given).dtype == dtype
    assert ob.group_advantages(tokens).shape == tokens.shape and ob.group_advantages(tokens).dtype == dtype


def test_another_device_is_kept():
    """The meta device has shapes but no values: whatever is made on the default device would not fit."""
    lp, tokens = log_probs(3).to("meta"), log_probs(2, 4, 5).to("meta")
    lengths = torch.ones(3, dtype=torch.int64, device="meta")
    results = []
    for objective in EVERY_PAIR:
        options = dict(ref_pos=lp, ref_neg=lp, len_pos=lengths, len_neg=2)
        results += [objective.loss(lp, lp, **options), *objective.coefficients(lp, lp, **options)]
    for objective, options in (
        (ob.SFT(), {}),
        (ob.NPO(), dict(ref=lp)),
        (ob.KTO(), dict(ref=lp, desirable=True)),
        (ob.Reinforce(), dict(advantages=lp)),
    ):
        results += [objective.loss(lp, **options), objective.coefficients(lp, **options)]
    labels = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    results += [ob.LabelSmoothing().loss(tokens, labels), ob.residual(tokens, labels), ob.group_advantages(lp)]
    given = dict(old_lp=tokens, ref_lp=tokens, advantages=tokens[..., 0], mask=torch.ones_like(tokens).bool())
    results += [ob.GRPO(beta=0.1).loss(tokens, **given), ob.GRPO(beta=0.1).coefficients(tokens, **given)]
    assert {result.device.type for result in results} == {"meta"}


@pytest.mark.parametrize("objective", EVERY_PAIR, ids=repr)
def test_pair_objectives_can_be_mapped_and_differentiated(objective):
    lp_pos, lp_neg, given = log_probs(4), log_probs(4, seed=1), context()

    def loss(x, y):
        return objective.loss(x, y, **given)

    whole = {**given, "ref_pos": given["ref_pos"].expand(4), "ref_neg": given["ref_neg"].expand(4)}
    c = objective.coefficients(lp_pos, lp_neg, **whole)
    torch.testing.assert_close(vmap(loss)(lp_pos, lp_neg), objective.loss(lp_pos, lp_neg, **whole))
    slopes = vmap(grad(loss, argnums=(0, 1)))(lp_pos, lp_neg)
    for slope, coefficient in zip(slopes, c, strict=True):
        torch.testing.assert_close(-slope, coefficient, rtol=1e-12, atol=1e-13)


def test_nothing_of_the_callers_is_changed():
    lp_pos, lp_neg, given = log_probs(4), log_probs(4, seed=1), context((4,))
    before, state, default = lp_pos.clone(), torch.get_rng_state(), torch.get_default_dtype()
    for objective in EVERY_PAIR:
        objective.loss(lp_pos, lp_neg, **given)
        with pytest.raises(dataclasses.FrozenInstanceError):
            objective.beta = 3.0
    with pytest.raises(ValueError, match="lp_pos"):
        ob.DPO().loss(lp_pos / 0, lp_neg, **given)
    mask = torch.tensor([[True, False], [True, True]])
    tokens = log_probs(2, 2)
    kept = tokens.clone()
    ob.GRPO().loss(tokens, old_lp=tokens, advantages=tokens[:, 0], mask=mask)
    assert torch.equal(lp_pos, before) and torch.equal(tokens, kept)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is default


# --- refusals ---------------------------------------------------------------------------------------------------

GOOD = torch.tensor([-1.0, -2.0])
BAD_LOG_PROBS = [
    ([-1.0, -2.0], r"expected a torch\.Tensor, got an object of type list"),
    (torch.tensor([-1, -2]), "expected a real floating-point dtype, got a int64"),
    (torch.zeros(0), "expected at least one element"),
    (torch.tensor([-1.0, math.nan]), "expected finite values"),
    (torch.tensor([-1.0, -math.inf]), "expected finite values"),
    (torch.tensor([-1.0, 0.5]), "expected log-probabilities, which are <= 0, got the entry 0.5"),
]
MISMATCHED = [
    (torch.tensor([-1.0]), r"expected the shape of lp\w* \(2,\), got \(1,\)"),
    (GOOD.double(), r"expected the dtype of lp\w* \(torch\.float32\), got torch\.float64"),
    (GOOD.to("meta"), r"expected the device of lp\w* \(cpu\), got meta"),
]


@pytest.mark.parametrize("method", ["loss", "coefficients"])
@pytest.mark.parametrize("objective", EVERY_PAIR, ids=repr)
def test_bad_log_probabilities_of_pairs_are_refused_by_name(objective, method):
    call = getattr(objective, method)
    given = dict(ref_pos=GOOD, ref_neg=GOOD, len_pos=2, len_neg=2)
    for bad, message in BAD_LOG_PROBS:
        with pytest.raises(ValueError, match="^lp_pos: " + message):
            call(bad, GOOD, **given)
    for bad, message in BAD_LOG_PROBS + MISMATCHED:
        with pytest.raises(ValueError, match="^lp_neg: " + message):
            call(GOOD, bad, **given)
    if objective._against_reference:
        for name in ("ref_pos", "ref_neg"):
            for bad, message in BAD_LOG_PROBS + MISMATCHED:
                with pytest.raises(ValueError, match=f"^{name}: " + message):
                    call(GOOD, GOOD, **{**given, name: bad})
            why = f"^{name}: expected .* reference model, because {type(objective).__name__} compares .* got None"
            with pytest.raises(ValueError, match=why):
                call(GOOD, GOOD, **{**given, name: None})


def test_every_objective_that_needs_a_reference_says_so_and_the_others_do_not_need_it():
    assert [type(o) for o in EVERY_PAIR if o._against_reference and o != ob.IPO(average_log_prob=True)] == [
        type(o) for o in WITH_REFERENCE
    ]
    ob.SLiC().loss(GOOD, GOOD)
    ob.SimPO().loss(GOOD, GOOD, len_pos=1, len_neg=2)
    for objective, options in ((ob.NPO(), {}), (ob.KTO(), dict(desirable=True))):
        with pytest.raises(ValueError, match=r"^ref: expected .* reference model, because .* got None"):
            objective.loss(GOOD, **options)
    with pytest.raises(ValueError, match=r"^old_lp: .* because the ratio is taken to it, got None"):
        ob.GRPO().loss(GOOD[None], old_lp=None, advantages=GOOD[:1])
    with pytest.raises(ValueError, match=r"^ref_lp: .* because beta is 0\.1, got None"):
        ob.GRPO(beta=0.1).loss(GOOD[None], old_lp=GOOD[None], advantages=GOOD[:1])
    with pytest.raises(ValueError, match=r"^lp_sft: expected log-probabilities, because regularization is 0\.5"):
        ob.SLiC(regularization=0.5).loss(GOOD, GOOD)


@pytest.mark.parametrize("objective", [ob.SimPO(), ob.IPO(average_log_prob=True)], ids=repr)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "expected numbers of tokens, because this .* divides by them, got None"),
        (0, "expected an integer >= 1, got 0"),
        (2.0, "expected an integer >= 1, got 2.0"),
        (torch.tensor([2.0, 2.0]), "expected integers, got a float32"),
        (torch.tensor([2]), r"expected the shape and device of lp_\w+ \(\(2,\), cpu\)"),
        (torch.tensor([2, 0]), "expected at least one token in each response, got 0"),
    ],
)
def test_bad_lengths_are_refused_by_name(objective, bad, message):
    for name in ("len_pos", "len_neg"):
        given = {"ref_pos": GOOD, "ref_neg": GOOD, "len_pos": 2, "len_neg": 2, name: bad}
        with pytest.raises(ValueError, match=f"^{name}: " + message):
            objective.loss(GOOD, GOOD, **given)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (ob.DPO, "beta", [0, -0.1, math.nan, math.inf, "1", None, True]),
        (ob.SPIN, "beta", [0]),
        (ob.CDPO, "beta", [-1]),
        (ob.CDPO, "label_smoothing", [0.5, -0.1, 1, math.nan, "a"]),
        (ob.IPO, "beta", [0]),
        (ob.IPO, "average_log_prob", [1, None, "yes"]),
        (ob.SLiC, "delta", [0, -1]),
        (ob.SLiC, "regularization", [-0.1]),
        (ob.SPPO, "beta", [0]),
        (ob.SimPO, "beta", [0]),
        (ob.SimPO, "gamma", [-1]),
        (ob.NPO, "beta", [0]),
        (ob.KTO, "beta", [0]),
        (ob.KTO, "desirable_weight", [0]),
        (ob.KTO, "undesirable_weight", [-1]),
        (ob.LabelSmoothing, "epsilon", [-0.1, 1.0]),
        (ob.GRPO, "epsilon", [-0.1, 1.0]),
        (ob.GRPO, "epsilon_high", [-0.1]),
        (ob.GRPO, "beta", [-0.1]),
        (ob.GRPO, "normalization", ["mean", None]),
        (ob.GRPO, "max_length", [5]),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*"):
            kind(**{name: value})
    with pytest.raises(ValueError, match=r"^max_length: expected an integer >= 1"):
        ob.GRPO(normalization="constant")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ob.SFT().loss(GOOD + 3), "^lp: expected log-probabilities"),
        (lambda: ob.NPO().loss(GOOD, ref=GOOD[:1]), "^ref: expected the shape of lp"),
        (lambda: ob.KTO().loss(GOOD, ref=GOOD, desirable=GOOD), "^desirable: expected booleans"),
        (lambda: ob.KTO().loss(GOOD, ref=GOOD, desirable=1), "^desirable: expected booleans"),
        (
            lambda: ob.KTO().loss(GOOD, ref=GOOD, desirable=torch.ones(3, dtype=torch.bool)),
            r"^desirable: expected the shape of lp \(2,\), got \(3,\)",
        ),
        (lambda: ob.KTO().loss(GOOD, ref=GOOD, desirable=True, z0=-1.0), "^z0: expected a number >= 0"),
        (lambda: ob.KTO().loss(GOOD, ref=GOOD, desirable=True, z0=GOOD), "^z0: expected a finite real number"),
        (lambda: ob.Reinforce().loss(GOOD, advantages=GOOD[:1]), "^advantages: expected the shape of lp"),
        (lambda: ob.Reinforce().loss(GOOD, advantages=GOOD / 0), "^advantages: expected finite values"),
        (lambda: ob.GRPO().loss(GOOD, old_lp=GOOD, advantages=GOOD), "^lp: expected a tensor with at least 2"),
        (lambda: ob.GRPO().loss(GOOD[None], old_lp=GOOD, advantages=GOOD[:1]), "^old_lp: expected the shape of lp"),
        (lambda: ob.GRPO().loss(GOOD[None], old_lp=GOOD[None].int(), advantages=GOOD[:1]), "^old_lp: expected a real"),
        (lambda: ob.GRPO().loss(GOOD[None], old_lp=GOOD[None], advantages=GOOD), r"^advantages: expected shape \(1\)"),
        (
            lambda: ob.GRPO().loss(
                GOOD[None], old_lp=GOOD[None], advantages=GOOD[:1], mask=torch.zeros(1, 2, dtype=torch.bool)
            ),
            "^mask: expected at least one token in each response",
        ),
        (
            lambda: ob.GRPO().loss(GOOD[None], old_lp=GOOD[None], advantages=GOOD[:1], mask=GOOD[None]),
            "^mask: expected dtype torch.bool",
        ),
        (lambda: ob.group_advantages(GOOD, ddof=2), "^ddof: expected 0 or 1, got 2"),
        (lambda: ob.group_advantages(GOOD, eps=-1), "^eps: expected a number >= 0"),
        (lambda: ob.group_advantages(GOOD[:1], ddof=1), r"^rewards: expected more than 1 response\(s\)"),
        (lambda: ob.residual(GOOD, torch.tensor(2)), "^labels: expected 0 to 1, got 2 to 2"),
        (lambda: ob.residual(GOOD, torch.tensor(0.0)), "^labels: expected integers"),
        (lambda: ob.residual(GOOD, torch.tensor([0])), r"^labels: expected shape \(\)"),
        (lambda: ob.SoftTargets().loss(GOOD, GOOD), "^targets: expected probabilities, got the negative"),
        (lambda: ob.SoftTargets().loss(GOOD, torch.ones(1)), "^targets: expected the shape of logits"),
        (lambda: ob.LabelSmoothing().loss(GOOD / 0, torch.tensor(0)), "^logits: expected finite"),
    ],
)
def test_other_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
