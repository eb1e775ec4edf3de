"""Objectives against TRL's own code, where TRL computes the same loss; skipped unless TRL is installed.

TRL's trainers compute their losses inside a method of an object that owns a model, data and an accelerator. Here each
method is called with a stand-in that has just what the method reads, and with a model that is a table of logits. What
is compared is the gradient in these logits: TRL's by automatic differentiation, ours as coefficient times residual.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from ldyn.dynamics import objectives as ob

trl = pytest.importorskip("trl", minversion="1.16")
cpo = pytest.importorskip("trl.experimental.cpo")
utils = pytest.importorskip("trl.trainer.utils")

F64 = torch.float64
EXACT = dict(rtol=1e-12, atol=1e-13)
V, LENGTH = 5, 7


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Table(torch.nn.Module):
    """A language model without a network: one table of logits for each row of the batch."""

    def __init__(self, rows, seed):
        super().__init__()
        self.logits = torch.nn.Parameter(normal(rows, LENGTH, V, seed=seed, scale=2.0))

    def forward(self, input_ids, labels, **_):
        table, targets = self.logits[:, :-1], labels[:, 1:]
        picked = table.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        scores = torch.where(targets == -100, 0.0, picked)
        blank = torch.zeros_like(scores)
        return SimpleNamespace(log_probs=scores, entropy=blank, mean_logits=blank, is_top1=blank.bool())


class Accelerator(SimpleNamespace):
    """One process: what is gathered from all of them is what there is."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather

    def reduce(self, value, reduction):
        return value


def trainer(**fields):
    common = dict(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        label_smoothing=0.0,
    )
    return SimpleNamespace(**{**common, **fields})


def batch(rows, seed=0):
    """Token numbers, and a mask of responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(2, LENGTH - 1, (rows, 1), generator=generator)
    tokens = torch.randint(V, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) >= starts).long()
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), completion_mask=mask)


def log_probs_and_residuals(model, inputs):
    """Sums over the response's tokens, residuals at the places that predict them, and the numbers of tokens."""
    logits, targets = model.logits.detach()[:, :-1], inputs["input_ids"][:, 1:]
    real = inputs["completion_mask"][:, 1:].bool()
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    residual = torch.where(real[..., None], ob.residual(logits, targets), 0.0)
    return torch.where(real, picked, 0.0).sum(1), residual, real.sum(1)


def padded(residual):
    """Zero for the last place, which predicts nothing."""
    return torch.nn.functional.pad(residual, (0, 0, 0, 1))


PAIRS = 3
BETA = 0.4


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("sigmoid", ob.DPO(BETA)),
        ("sigmoid", ob.SPIN(BETA)),
        ("ipo", ob.IPO(BETA, average_log_prob=True)),
        ("sppo_hard", ob.SPPO(BETA)),
    ],
)
def test_dpo_trainer(loss_type, objective):
    model, inputs = Table(2 * PAIRS, seed=1), batch(2 * PAIRS)
    lp, residual, counts = log_probs_and_residuals(model, inputs)
    ref = (lp + normal(2 * PAIRS, seed=2)).clamp(max=0)
    theirs = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
    )
    given = dict(ref_chosen_logps=ref[:PAIRS], ref_rejected_logps=ref[PAIRS:])
    value = trl.DPOTrainer._compute_loss(theirs, model, {**inputs, **given}, False)
    (slope,) = torch.autograd.grad(value, model.logits)
    pair = lp[:PAIRS], lp[PAIRS:]
    options = dict(ref_pos=ref[:PAIRS], ref_neg=ref[PAIRS:], len_pos=counts[:PAIRS], len_neg=counts[PAIRS:])
    torch.testing.assert_close(value.detach(), objective.loss(*pair, **options).mean(), **EXACT)
    c = torch.cat(objective.coefficients(*pair, **options))[:, None, None]
    torch.testing.assert_close(slope, padded(c * residual) / PAIRS, **EXACT)


def test_dpo_trainer_hinge_is_slic_of_the_log_ratios():
    model, inputs = Table(2 * PAIRS, seed=1), batch(2 * PAIRS)
    lp, residual, _ = log_probs_and_residuals(model, inputs)
    theirs = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["hinge"],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
    )
    zero = torch.zeros(PAIRS, dtype=F64)
    given = dict(ref_chosen_logps=zero, ref_rejected_logps=zero)
    value = trl.DPOTrainer._compute_loss(theirs, model, {**inputs, **given}, False)
    (slope,) = torch.autograd.grad(value, model.logits)
    ours = ob.SLiC(delta=1 / BETA)
    torch.testing.assert_close(value.detach(), BETA * ours.loss(lp[:PAIRS], lp[PAIRS:]).mean(), **EXACT)
    c = torch.cat(ours.coefficients(lp[:PAIRS], lp[PAIRS:]))[:, None, None]
    assert len(set(c.flatten().tolist())) > 2  # some pairs are active, and some are not
    torch.testing.assert_close(slope, BETA * padded(c * residual) / PAIRS, **EXACT)


def test_dpo_trainer_robust_is_another_function_than_conservative_dpo():
    """TRL's `aot` with one pair is cDPO; its `robust` subtracts the second term and divides by 1 − 2ε."""
    model, inputs = Table(2, seed=3), batch(2)
    lp, residual, _ = log_probs_and_residuals(model, inputs)
    ref = lp + 0.5 * normal(2, seed=4).abs() * torch.tensor([-1.0, -2.0])
    found = {}
    for loss_type in ("aot", "robust"):
        theirs = trainer(
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=BETA,
            use_weighting=False,
            label_smoothing=0.2,
        )
        given = dict(ref_chosen_logps=ref[:1], ref_rejected_logps=ref[1:])
        value = trl.DPOTrainer._compute_loss(theirs, model, {**inputs, **given}, False)
        (found[loss_type],) = torch.autograd.grad(value, model.logits)
    options = dict(ref_pos=ref[:1], ref_neg=ref[1:])
    c = torch.cat(ob.CDPO(BETA, 0.2).coefficients(lp[:1], lp[1:], **options))[:, None, None]
    torch.testing.assert_close(found["aot"], padded(c * residual), **EXACT)
    assert (found["robust"] - found["aot"]).abs().max() > 1e-2
    plain = torch.cat(ob.DPO(BETA).coefficients(lp[:1], lp[1:], **options))[:, None, None]
    turned = torch.tensor([1.0, -1.0], dtype=F64)[:, None, None] * (BETA * 0.2)
    torch.testing.assert_close(found["robust"], padded((0.6 * plain + turned) * residual) / 0.6, **EXACT)


def test_cpo_trainer_simpo_and_label_smoothing():
    lp_pos, lp_neg = (-normal(6, seed=seed, scale=5.0).abs() for seed in (0, 1))
    len_pos, len_neg = torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([8, 2, 9, 1, 4, 4])
    fields = dict(alpha=0.0, beta=2.5, simpo_gamma=0.7, accelerator=Accelerator())
    theirs = SimpleNamespace(loss_type="simpo", label_smoothing=0.0, **fields)
    leaves = lp_pos.clone().requires_grad_(), lp_neg.clone().requires_grad_()
    value = cpo.CPOTrainer.cpo_loss(theirs, leaves[0] / len_pos, leaves[1] / len_neg)[0]
    slopes = torch.autograd.grad(value.sum(), leaves)
    options = dict(len_pos=len_pos, len_neg=len_neg)
    torch.testing.assert_close(value.detach(), ob.SimPO(2.5, 0.7).loss(lp_pos, lp_neg, **options), **EXACT)
    for slope, c in zip(slopes, ob.SimPO(2.5, 0.7).coefficients(lp_pos, lp_neg, **options), strict=True):
        torch.testing.assert_close(-slope, c, **EXACT)
    theirs = SimpleNamespace(loss_type="sigmoid", label_smoothing=0.15, **fields)
    value = cpo.CPOTrainer.cpo_loss(theirs, *leaves)[0]
    zero = torch.zeros_like(lp_pos)
    torch.testing.assert_close(
        value.detach(), ob.CDPO(2.5, 0.15).loss(lp_pos, lp_neg, ref_pos=zero, ref_neg=zero), **EXACT
    )


@pytest.mark.parametrize("shift", [1.3, -2.0])
def test_kto_trainer(shift):
    rows = 5
    model, inputs = Table(rows, seed=5), batch(rows, seed=6)
    lp, residual, _ = log_probs_and_residuals(model, inputs)
    ref, labels = (lp + normal(rows, seed=7)).clamp(max=0), torch.tensor([True, False, False, True, True])
    other = -normal(rows, seed=8).abs()
    theirs = trainer(
        calculate_KL=True,
        beta=BETA,
        loss_type="kto",
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: other,
    )
    given = dict(label=labels, ref_logps=ref, ref_KL_logps=other - shift)
    value = trl.KTOTrainer._compute_loss(theirs, model, {**inputs, **given}, False)
    (slope,) = torch.autograd.grad(value, model.logits)
    ours, options = ob.KTO(BETA, 1.2, 0.8), dict(ref=ref, desirable=labels, z0=max(shift, 0.0))
    torch.testing.assert_close(value.detach(), ours.loss(lp, **options).mean(), **EXACT)
    c = ours.coefficients(lp, **options)[:, None, None]
    torch.testing.assert_close(slope, padded(c * residual) / rows, **EXACT)


@pytest.mark.parametrize(
    ("loss_type", "normalization", "limit"),
    [("grpo", "response", None), ("bnpo", "token", None), ("dapo", "token", None), ("dr_grpo", "constant", 9)],
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_trainer(loss_type, normalization, limit, beta):
    group, length = 4, 6
    lp, old, ref = (-normal(group, length, seed=seed, scale=0.5).abs() for seed in (0, 1, 2))
    mask = (torch.arange(length) < torch.tensor([[6], [2], [4], [1]])).long()
    gain = normal(group, seed=3)
    lp.requires_grad_()
    theirs = trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.15,
        epsilon_high=0.25,
        max_completion_length=limit,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (lp, torch.zeros_like(lp), None),
    )
    theirs.accelerator.num_processes = 1
    zeros = torch.zeros(group, 2, dtype=torch.int64)
    inputs = dict(
        prompt_ids=zeros,
        prompt_mask=torch.ones_like(zeros),
        completion_ids=torch.zeros(group, length, dtype=torch.int64),
        completion_mask=mask,
        advantages=gain,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        num_items_in_batch=mask.sum(),
    )
    value = trl.GRPOTrainer._compute_loss(theirs, None, inputs)
    (slope,) = torch.autograd.grad(value, lp)
    ours = ob.GRPO(0.15, 0.25, beta, normalization, limit)
    options = dict(old_lp=old, ref_lp=ref, advantages=gain, mask=mask.bool())
    torch.testing.assert_close(value.detach(), ours.loss(lp.detach(), **options), **EXACT)
    torch.testing.assert_close(-slope, ours.coefficients(lp.detach(), **options), **EXACT)


def test_grpo_trainer_standard_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.4, 0.0]], dtype=F64)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (utils.nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(ob.group_advantages(rewards, ddof=1, eps=1e-4), theirs, **EXACT)
