"""Objectives: every coefficient against automatic differentiation through a real softmax, and what tells them apart."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldyn.dynamics import objectives as ob

F64 = torch.float64
EXACT = dict(rtol=1e-12, atol=1e-12)

PAIRWISE = [
    ob.DPO(beta=0.3),
    ob.SPIN(beta=0.7),
    ob.CDPO(beta=0.5, label_smoothing=0.2),
    ob.IPO(beta=0.25),
    ob.IPO(beta=0.25, average_log_prob=True),
    ob.SLiC(delta=2.0),
    ob.SPPO(beta=0.2),
    ob.SimPO(beta=2.5, gamma=0.8),
]
NAMES = [type(o).__name__ + ("-mean" if getattr(o, "average_log_prob", False) else "") for o in PAIRWISE]


def normal(*shape, seed=0, scale=1.0, dtype=F64):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def log_probs(*shape, seed=0, scale=4.0, dtype=F64):
    return -normal(*shape, seed=seed, scale=scale, dtype=dtype).abs()


def response(length, vocabulary, seed, batch=()):
    """Logits of a response's tokens, and the tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*batch, length, vocabulary, generator=generator, dtype=F64)
    return logits.requires_grad_(), torch.randint(vocabulary, (*batch, length), generator=generator)


def log_prob(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)


def by_autograd(objective, lp_pos, lp_neg, **options):
    leaves = lp_pos.clone().requires_grad_(), lp_neg.clone().requires_grad_()
    value = objective.loss(*leaves, **options).sum()
    return [-grad for grad in torch.autograd.grad(value, leaves)]


sizes = st.integers(1, 5)
seeds = st.integers(0, 10_000)


# --- the lemma: through a softmax -------------------------------------------------------------------------------


@settings(max_examples=25)
@given(sizes, sizes, st.integers(2, 6), seeds)
@pytest.mark.parametrize("objective", PAIRWISE, ids=NAMES)
def test_gradients_in_the_logits_are_coefficients_times_residuals(objective, long, short, vocabulary, seed):
    pos, y_pos = response(long, vocabulary, seed)
    neg, y_neg = response(short, vocabulary, seed + 1)
    lp_pos, lp_neg = log_prob(pos, y_pos), log_prob(neg, y_neg)
    options = dict(ref_pos=log_probs(seed=seed), ref_neg=log_probs(seed=seed + 2), len_pos=long, len_neg=short)
    grads = torch.autograd.grad(objective.loss(lp_pos, lp_neg, **options), (pos, neg))
    c = objective.coefficients(lp_pos.detach(), lp_neg.detach(), **options)
    torch.testing.assert_close(grads[0], c.c_pos * ob.residual(pos.detach(), y_pos), **EXACT)
    torch.testing.assert_close(grads[1], c.c_neg * ob.residual(neg.detach(), y_neg), **EXACT)


@settings(max_examples=25)
@given(sizes, st.integers(2, 6), seeds, st.booleans())
def test_objectives_of_one_response_are_coefficients_times_residuals(length, vocabulary, seed, desirable):
    logits, tokens = response(length, vocabulary, seed, batch=(3,))
    lp, ref, gain = log_prob(logits, tokens), log_probs(3, seed=seed), normal(3, seed=seed)
    residual = ob.residual(logits.detach(), tokens)
    for objective, options in (
        (ob.SFT(), {}),
        (ob.NPO(beta=0.4), dict(ref=ref)),
        (ob.KTO(beta=0.6, desirable_weight=1.5, undesirable_weight=0.5), dict(ref=ref, desirable=desirable, z0=0.7)),
        (ob.Reinforce(), dict(advantages=gain)),
    ):
        (grad,) = torch.autograd.grad(objective.loss(lp, **options).sum(), logits, retain_graph=True)
        c = objective.coefficients(lp.detach(), **options)
        torch.testing.assert_close(grad, c[:, None, None] * residual, **EXACT)


@settings(max_examples=40)
@given(st.integers(1, 4), sizes, st.integers(2, 5), seeds, st.sampled_from([0.0, 0.3]), st.booleans())
@pytest.mark.parametrize("normalization", ["response", "token", "constant"])
def test_grpo_is_coefficients_times_residuals(normalization, group, length, vocabulary, seed, beta, uneven):
    logits, tokens = response(length, vocabulary, seed, batch=(group,))
    lp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    mask = torch.arange(length) < torch.arange(group).remainder(length)[:, None] + 1 if uneven else None
    options = dict(
        old_lp=(lp + normal(group, length, seed=seed, scale=0.3)).detach().clamp(max=0),
        ref_lp=log_probs(group, length, seed=seed),
        advantages=normal(group, seed=seed + 1),
        mask=mask,
    )
    limit = 9 if normalization == "constant" else None
    objective = ob.GRPO(epsilon=0.1, epsilon_high=0.25, beta=beta, normalization=normalization, max_length=limit)
    (grad,) = torch.autograd.grad(objective.loss(lp, **options), logits)
    c = objective.coefficients(lp.detach(), **options)
    torch.testing.assert_close(grad, c[..., None] * ob.residual(logits.detach(), tokens), **EXACT)


@settings(max_examples=25)
@given(sizes, st.integers(1, 6), seeds)
def test_targets_of_tokens_are_mixtures_of_residuals(length, vocabulary, seed):
    logits, tokens = response(length, vocabulary, seed)
    soft = normal(length, vocabulary, seed=seed).softmax(-1)
    each = logits.detach().softmax(-1)[:, None, :] - torch.eye(vocabulary, dtype=F64)  # the residual of every label
    for objective, target in ((ob.SoftTargets(), soft), (ob.LabelSmoothing(0.3), tokens)):
        (grad,) = torch.autograd.grad(objective.loss(logits, target).sum(), logits)
        mixture = (objective.coefficients(logits.detach(), target)[..., None] * each).sum(-2)
        torch.testing.assert_close(grad, mixture, **EXACT)
        torch.testing.assert_close(grad, objective.residual(logits.detach(), target), **EXACT)
    reference = torch.nn.functional.cross_entropy(logits, tokens, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(ob.LabelSmoothing(0.3).loss(logits, tokens), reference, **EXACT)
    torch.testing.assert_close(ob.LabelSmoothing(0.0).residual(logits, tokens), ob.residual(logits, tokens), **EXACT)
    torch.testing.assert_close(
        ob.SoftTargets().loss(logits, soft), torch.nn.functional.cross_entropy(logits, soft, reduction="none"), **EXACT
    )


# --- losses as their papers define them, written out without the library ----------------------------------------


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


@settings(max_examples=30)
@given(seeds)
def test_losses_are_their_definitions(seed):
    lp_pos, lp_neg, ref_pos, ref_neg = log_probs(4, seed=seed)
    given_ = dict(ref_pos=ref_pos, ref_neg=ref_neg, len_pos=3, len_neg=5)
    r_pos, r_neg = (lp_pos - ref_pos).item(), (lp_neg - ref_neg).item()
    h = r_pos - r_neg
    definitions = {
        ob.DPO(0.3): -mpmath.log(sigma(0.3 * h)),
        ob.SPIN(0.3): -mpmath.log(sigma(0.3 * h)),
        ob.CDPO(0.3, 0.2): -0.8 * mpmath.log(sigma(0.3 * h)) - 0.2 * mpmath.log(sigma(-0.3 * h)),
        ob.IPO(0.3): (h - 1 / 0.6) ** 2,
        ob.IPO(0.3, average_log_prob=True): (r_pos / 3 - r_neg / 5 - 1 / 0.6) ** 2,
        ob.SLiC(1.5): max(0.0, 1.5 - lp_pos.item() + lp_neg.item()),
        ob.SPPO(0.3): (r_pos - 1 / 0.6) ** 2 + (r_neg + 1 / 0.6) ** 2,
        ob.SimPO(2.0, 0.4): -mpmath.log(sigma(2 * lp_pos.item() / 3 - 2 * lp_neg.item() / 5 - 0.4)),
    }
    for objective, value in definitions.items():
        assert objective.loss(lp_pos, lp_neg, **given_).item() == pytest.approx(float(value), rel=1e-12, abs=1e-14)
    npo = ob.NPO(0.3).loss(lp_neg, ref=ref_neg).item()
    assert npo == pytest.approx(float(2 / 0.3 * mpmath.log(1 + mpmath.exp(0.3 * r_neg))), rel=1e-12)
    kto = ob.KTO(0.3, 1.2, 0.9)
    good, bad = (kto.loss(lp_pos, ref=ref_pos, desirable=flag, z0=0.5).item() for flag in (True, False))
    assert good == pytest.approx(float(1.2 * (1 - sigma(0.3 * (r_pos - 0.5)))), rel=1e-12)
    assert bad == pytest.approx(float(0.9 * (1 - sigma(0.3 * (0.5 - r_pos)))), rel=1e-12)


def test_slic_adds_supervised_learning_on_a_third_sequence():
    lp_pos, lp_neg = log_probs(2, 6)
    lp_sft = log_probs(6, seed=5).requires_grad_()
    objective = ob.SLiC(delta=1.0, regularization=0.4)
    value = objective.loss(lp_pos, lp_neg, lp_sft=lp_sft)
    torch.testing.assert_close(value, ob.SLiC(delta=1.0).loss(lp_pos, lp_neg) - 0.4 * lp_sft, **EXACT)
    (grad,) = torch.autograd.grad(value.sum(), lp_sft)
    torch.testing.assert_close(-grad, objective.sft_coefficients(lp_sft), **EXACT)
    plain = ob.SLiC(delta=1.0).coefficients(lp_pos, lp_neg)
    assert torch.equal(torch.stack(objective.coefficients(lp_pos, lp_neg)), torch.stack(plain))


# --- what tells them apart --------------------------------------------------------------------------------------


def at_margin(objective, *margins):
    """Coefficients where the model is the reference but for the margin, carried half by each response."""
    h = torch.tensor(margins, dtype=F64)
    start = torch.full_like(h, -50.0)
    lengths = dict(len_pos=1, len_neg=1)
    return objective.coefficients(start + h / 2, start - h / 2, ref_pos=start, ref_neg=start, **lengths)


def test_dpo_and_spin_fade_and_never_reverse():
    for objective in (ob.DPO(0.1), ob.SPIN(0.1)):
        c = at_margin(objective, -80.0, 0.0, 10.0, 80.0).c_pos
        assert (c > 0).all() and (c.diff() < 0).all()
        assert c[1].item() == 0.05
        assert torch.equal(at_margin(objective, 3.0).c_neg, -at_margin(objective, 3.0).c_pos)


def test_conservative_dpo_ipo_and_sppo_reverse_where_they_should_and_slic_stops():
    turn = math.log(0.8 / 0.2) / 0.1
    for objective, place in ((ob.CDPO(0.1, 0.2), turn), (ob.IPO(0.1), 5.0), (ob.SPPO(0.1), 10.0)):
        c = at_margin(objective, place - 1e-6, place, place + 1e-6).c_pos
        assert c[0] > 0 > c[2] and c[1].abs() < 1e-14
        assert torch.equal(at_margin(objective, place + 1).c_neg > 0, torch.tensor([True]))
    assert at_margin(ob.SLiC(1.0), 0.5, 1.0, 1.5).c_pos.tolist() == [1.0, 0.0, 0.0]


def test_npo_starts_as_gradient_ascent_and_fades_and_reinforce_does_not():
    ref = torch.full((3,), -5.0, dtype=F64)
    c = ob.NPO(0.5).coefficients(ref - torch.tensor([0.0, 10.0, 100.0]), ref=ref)
    assert c[0] == -1 and c[1] > -0.02 and -1e-20 < c[2] < 0
    lp = torch.tensor([-1.0, -1e4], dtype=F64)
    assert ob.Reinforce().coefficients(lp, advantages=-torch.ones(2, dtype=F64)).tolist() == [-1.0, -1.0]


def test_kto_gives_up_on_both_ends():
    lp = torch.tensor([-200.0, -100.0, -0.0], dtype=F64)
    ref = torch.full_like(lp, -100.0)
    good, bad = (ob.KTO(0.5).coefficients(lp, ref=ref, desirable=flag) for flag in (True, False))
    assert good[1] == 0.125 == -bad[1]
    assert (good[[0, 2]].abs() < 1e-20).all() and (bad[[0, 2]].abs() < 1e-20).all()
    mixed = ob.KTO(0.5).coefficients(lp, ref=ref, desirable=torch.tensor([True, False, True]))
    assert mixed.tolist() == [good[0], bad[1], good[2]]


def test_no_gradient_flows_into_constants():
    lp = log_probs(3).requires_grad_()
    twice = ob.KTO(0.5).loss(lp, ref=lp - 1, desirable=True, z0=lp.exp().sum())
    (grad,) = torch.autograd.grad(twice.sum(), lp)
    c = ob.KTO(0.5).coefficients(lp, ref=lp - 1, desirable=True, z0=lp.exp().sum())
    torch.testing.assert_close(-grad, c, **EXACT)
    (grad,) = torch.autograd.grad(ob.DPO().loss(lp, lp - 1, ref_pos=lp, ref_neg=lp).sum(), lp)
    assert grad.abs().max() < 1e-15  # the pulls of the two responses cancel; the references add nothing
    (grad,) = torch.autograd.grad(ob.Reinforce().loss(lp, advantages=lp).sum(), lp)
    torch.testing.assert_close(-grad, lp.detach(), **EXACT)


# --- GRPO -------------------------------------------------------------------------------------------------------


def ppo(lp, old, ref, gain, objective):
    """PPO's loss of one token with the minimum written out, and the k3 penalty."""
    ratio, high = math.exp(lp - old), objective.epsilon_high
    clipped = min(max(ratio, 1 - objective.epsilon), 1 + (objective.epsilon if high is None else high))
    gap = ref - lp
    return -min(ratio * gain, clipped * gain) + objective.beta * (math.exp(gap) - gap - 1)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), seeds, st.booleans())
def test_grpo_is_its_definition_token_by_token(group, length, seed, two_sided):
    lp, old, ref = log_probs(3, group, length, seed=seed, scale=0.4)
    gain, counts = normal(group, seed=seed), torch.arange(group).remainder(length) + 1
    high, limit = (0.3, 11) if two_sided else (None, 7)
    expected = {"response": 0.0, "token": 0.0, "constant": 0.0}
    for i in range(group):
        for t in range(int(counts[i])):
            each = ppo(*(x[i, t].item() for x in (lp, old, ref)), gain[i].item(), ob.GRPO(0.2, high, 0.3))
            expected["response"] += each / (group * int(counts[i]))
            expected["token"] += each / int(counts.sum())
            expected["constant"] += each / (group * limit)
    mask = torch.arange(length) < counts[:, None]
    for name, value in expected.items():
        objective = ob.GRPO(0.2, high, 0.3, name, limit if name == "constant" else None)
        got = objective.loss(lp, old_lp=old, ref_lp=ref, advantages=gain, mask=mask)
        assert got.item() == pytest.approx(value, rel=1e-12, abs=1e-14)


def test_one_corner_is_inactive_for_each_sign_of_the_advantage():
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=F64)
    old = torch.full((1, 7), -3.0, dtype=F64)
    lp = old + ratio.log()
    up, down = (
        ob.GRPO(0.2, normalization="constant", max_length=1).coefficients(lp, old_lp=old, advantages=a)[0]
        for a in (torch.ones(1, dtype=F64), -torch.ones(1, dtype=F64))
    )
    torch.testing.assert_close(up, torch.where(ratio > 1.2, 0.0, ratio), **EXACT)
    torch.testing.assert_close(down, torch.where(ratio < 0.8, 0.0, -ratio), **EXACT)


def test_what_stands_at_padding_is_not_read():
    lp, old = log_probs(2, 2, 3)
    gain, mask = normal(2), torch.tensor([[True, True, False], [True, False, False]])
    clean = ob.GRPO(beta=0.1).coefficients(lp, old_lp=old, ref_lp=old, advantages=gain, mask=mask)
    for rubbish in (-math.inf, math.nan, 1e30):
        dirty = [x.masked_fill(~mask, rubbish).requires_grad_() for x in (lp, old)]
        options = dict(old_lp=dirty[1], ref_lp=dirty[1], advantages=gain, mask=mask)
        assert torch.equal(ob.GRPO(beta=0.1).coefficients(dirty[0], **options), clean)
        (grad,) = torch.autograd.grad(ob.GRPO(beta=0.1).loss(dirty[0], **options), dirty[0])
        torch.testing.assert_close(-grad, clean, **EXACT)


def test_an_inactive_ratio_beyond_the_dtype_does_no_harm():
    lp = torch.tensor([[-1.0, -2.0]]).requires_grad_()
    old, gain = torch.tensor([[-500.0, -2.0]]), torch.ones(1)
    value = ob.GRPO().loss(lp, old_lp=old, advantages=gain)
    (grad,) = torch.autograd.grad(value, lp)
    assert value.item() == pytest.approx(-1.1) and grad.tolist() == [[0.0, -0.5]]


@settings(max_examples=40)
@given(st.integers(2, 16), st.data())
def test_advantages_of_binary_rewards(size, data):
    wins = data.draw(st.integers(0, size))
    rewards = torch.tensor([1.0] * wins + [0.0] * (size - wins), dtype=F64)
    advantages, p = ob.group_advantages(rewards), wins / size
    if wins in (0, size):
        assert not advantages.any()
        return
    torch.testing.assert_close(advantages[0].item(), math.sqrt((1 - p) / p), **EXACT)
    torch.testing.assert_close(advantages[-1].item(), -math.sqrt(p / (1 - p)), **EXACT)
    torch.testing.assert_close(advantages[:wins].sum().item(), size * math.sqrt(p * (1 - p)), **EXACT)
    bessel = ob.group_advantages(rewards, ddof=1, eps=1e-4)
    torch.testing.assert_close(bessel, (rewards - p) / (rewards.std() + 1e-4), **EXACT)
    torch.testing.assert_close(ob.group_advantages(rewards, scale=False), rewards - p, **EXACT)


def test_equal_rewards_give_zero_whatever_their_rounding():
    for dtype in (torch.float32, F64):
        rewards = torch.full((4, 7), 0.1, dtype=dtype)
        assert not ob.group_advantages(rewards).any() and not ob.group_advantages(rewards, ddof=1, eps=1e-4).any()
    rows = torch.stack([torch.full((3,), 0.3, dtype=F64), torch.tensor([0.0, 0.5, 1.0], dtype=F64)]).requires_grad_()
    (grad,) = torch.autograd.grad(ob.group_advantages(rows)[1, 0], rows)
    assert grad.isfinite().all()
