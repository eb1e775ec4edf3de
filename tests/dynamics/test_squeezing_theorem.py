"""The one-step theorem of squeezing, all nine parts: every point of a rational grid, random points, and near misses."""

import itertools
import math

import pytest
import torch

from ldyn.dynamics import squeezing as sq

F64 = torch.float64
SIZES = torch.tensor([1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0], dtype=F64)
GRIDS = {2: 40, 3: 24, 4: 16, 5: 14}


def one_hot(y, classes):
    return torch.nn.functional.one_hot(y, classes).to(F64)


def by_logits(p, y, s):
    """The step in logits, with PyTorch's softmax: the route that knows no closed form. s < 0 raises y instead."""
    return torch.softmax(p.log() + s[..., None] * (p - one_hot(y, p.shape[-1])), -1)


def pick(values, y):
    return values.gather(-1, y[..., None])[..., 0]


def without(values, y, filler):
    """The entries of the other labels; the label's own is replaced by a filler that loses every comparison."""
    return torch.where(one_hot(y, values.shape[-1]).bool(), torch.full_like(values, filler), values)


def grid(classes, parts):
    """Every point of the open simplex whose coordinates are multiples of 1/parts, with every label, as integers."""
    cuts = itertools.combinations(range(1, parts), classes - 1)
    counts = torch.tensor([[b - a for a, b in itertools.pairwise((0, *cut, parts))] for cut in cuts])
    points, labels = len(counts), torch.arange(classes)
    return counts.repeat_interleave(classes, 0), labels.repeat(points)


def random_points(classes, count, seed):
    draw = torch.Generator().manual_seed(seed)
    spread = 10 ** (2 * torch.rand(count, 1, generator=draw, dtype=F64) - 1)
    p = (spread * 3 * torch.randn(count, classes, generator=draw, dtype=F64)).softmax(-1).clamp(min=1e-12)
    p = p / p.sum(-1, keepdim=True)
    y = torch.randint(classes, (count,), generator=draw)
    s = 10 ** (math.log10(3e4) * torch.rand(count, generator=draw, dtype=F64) - 3)
    return p, y, s


def violations(p, y, s, *, slack=0.0):
    """For each part that a single step size decides, the cases (...) of p (..., V), y (...) and s (...) that break it.

    On the grid nothing is ever equal and the slack is zero; at random points s (p_j - tau) may be within rounding.
    """
    classes, after, tau = p.shape[-1], by_logits(p, y, s), sq.squeezing_threshold(p, y, s)
    near = slack / s
    limit = p.square().sum(-1) - pick(p, y)
    other = without(p, y, -1.0)
    peak, star = other.max(-1)
    second = other.scatter(-1, star[..., None], -1.0).amax(-1)
    rises = without(after - p, y, -1.0) > 0
    above = other > tau[..., None]
    decided = (other - tau[..., None]).abs() >= near[..., None]
    log_ratio = after.log() - p.log()
    excess = log_ratio - s[..., None] * p
    ranked = without(after, y, -1.0).gather(-1, torch.argsort(other, stable=True))[..., 1:]
    alone = (peak >= sq.critical_peak(pick(p, y)) + slack) & (classes > 2)
    push, push_after = (x - one_hot(y, classes) for x in (p, after))
    return {
        "1 the label falls": pick(log_ratio, y) >= slack,
        "2 the peak rises": pick(log_ratio, star) <= -slack,
        "3 a label rises if it is above the threshold": ((rises != above) & decided).any(-1),
        "3 the threshold lies between its limits": (tau <= limit - near) | (tau >= peak + near),
        "3 labels below the first limit fall": (rises & (other <= (limit - near)[..., None])).any(-1),
        "4 ratios differ by s times the difference": without(excess, y, -math.inf).amax(-1)
        > without(excess, y, math.inf).amin(-1) + 1e-9,
        "4 the peak has the largest ratio": without(log_ratio, y, -math.inf).amax(-1) > pick(log_ratio, star) + 1e-13,
        "4 the peak has the largest gain": without(after - p, y, -2.0).amax(-1) > pick(after - p, star) + 1e-15,
        "4 the order stays": (ranked.diff(dim=-1) < -1e-15).any(-1),
        "5 few rise": (tau > 0) & (above.sum(-1) * tau >= 1 - pick(p, y) + slack),
        "6 only the peak rises": alone & (((rises & decided).sum(-1) > 1) | (second >= tau + near)),
        "7 all others rise at first": (pick(p, y) >= p.square().sum(-1) + slack)
        & (without(p, y, 2.0) <= limit[..., None]).any(-1),
        "9 the energy grows": push_after.norm(dim=-1) <= push.norm(dim=-1) - slack,
    }


def test_every_point_of_the_grid():
    cases, closest = 0, math.inf
    for classes, parts in GRIDS.items():
        counts, y = grid(classes, parts)
        p, s = (counts.to(F64) / parts)[:, None], SIZES[None]
        labels = y[:, None].expand(-1, len(SIZES))
        cases += labels.numel()
        p = p.expand(-1, len(SIZES), -1)
        for part, broken in violations(p, labels, s.expand(len(y), -1)).items():
            assert not broken.any(), (part, classes, p[broken][:1], labels[broken][:1])
        distance = without(p, labels, 2.0) - sq.squeezing_threshold(p, labels, s)[..., None]
        closest = min(closest, distance.abs().min().item())
        after, tau = by_logits(p, labels, s), sq.squeezing_threshold(p, labels, s)
        other = without(p, labels, -1.0)
        star = other.argmax(-1)
        # 3 and 8, along the step sizes: the threshold and the peak grow, the label falls, a riser may stop once
        assert (tau.diff(dim=1) > 0).all()
        assert (pick(after, star).diff(dim=1) > 0).all()
        assert (pick(after, labels).diff(dim=1) < 0).all()
        rises = (without(after - p, labels, -1.0) > 0).int()
        assert (rises.diff(dim=1) <= 0).all()
        # in the end the peak rises alone; ties share it
        last = sq.squeezing_threshold(p[:, 0], y, 1e6)[:, None]
        assert ((other[:, 0] > last) == (other[:, 0] == other[:, 0].amax(-1, keepdim=True))).all()
    assert cases >= 40_000
    assert closest > 1e-7, "no label sits on the threshold within rounding, so that every comparison counts"


def test_limits_at_zero_in_exact_arithmetic():
    """Infinitesimal statements hold in integers: n²(p_j − m) = n k_j − Σk² + n k_y."""
    seen = 0
    for classes, parts in GRIDS.items():
        counts, y = grid(classes, parts)
        own = torch.nn.functional.one_hot(y, classes).bool()
        k_y, squares = pick(counts, y), counts.square().sum(-1)
        margin = parts * counts - (squares - parts * k_y)[:, None]
        velocity = sq.negative_flow(counts.to(F64) / parts, y)
        decided = ~own & (margin != 0)
        assert ((velocity > 0) == (margin > 0))[decided].all()
        assert (velocity[own] < 0).all()
        m = sq.squeezing_threshold(counts.to(F64) / parts, y, 0.0) * parts**2
        torch.testing.assert_close(m, (squares - parts * k_y).to(F64), rtol=1e-12, atol=1e-12)
        # a label with p_j <= m, equality included, falls for every step size
        fallers = ~own & (margin <= 0)
        for s in SIZES:
            after = by_logits(counts.to(F64) / parts, y, s.expand(len(y)))
            assert (after < counts / parts)[fallers].all()
        opposite = parts * k_y >= squares
        assert (margin > 0)[opposite][~own[opposite]].all()
        seen += int(opposite.sum())
    assert seen > 300


def test_random_points():
    count = 0
    for seed, (classes, size) in enumerate(
        ((2, 50_000), (3, 50_000), (4, 50_000), (6, 25_000), (10, 20_000), (50, 5000))
    ):
        p, y, s = random_points(classes, size, seed)
        count += size
        for part, broken in violations(p, y, s, slack=1e-14).items():
            assert not broken.any(), (part, classes, p[broken][:1], y[broken][:1], s[broken][:1])
    assert count >= 200_000


def test_peaky_condition_is_exact_for_three_labels():
    """In integers: only the peak rises, for all s, if and only if 2q² − (1 − 2ε)q − 2ε(1 − ε) >= 0."""
    parts = 60
    counts, y = grid(3, parts)
    k_y = pick(counts, y)
    others = without(counts.double(), y, -1.0).sort(-1).values.long()
    second, peak = others[:, 1], others[:, 2]
    condition = 2 * peak**2 - (parts - 2 * k_y) * peak - 2 * k_y * (parts - k_y) >= 0
    falls = parts * second <= counts.square().sum(-1) - parts * k_y  # p_j <= m: falls however small the step
    assert torch.equal(condition, falls)
    assert 0.2 < condition.float().mean() < 0.8
    critical = sq.critical_peak(k_y / parts)
    assert torch.equal(condition, peak / parts >= critical - 1e-9)
    # the near miss: one half for q_c is not enough
    assert (~falls & (2 * peak >= parts)).any()


def test_the_critical_peak_and_its_maximum():
    low = torch.linspace(0, 1, 10_001, dtype=F64)
    q = sq.critical_peak(low)
    assert q[0] == 0.5 and q[-1] == 0 and q[5000] == 0.5
    assert q.max().item() == pytest.approx(1 / math.sqrt(3), rel=1e-8)
    assert low[q.argmax()].item() == pytest.approx((1 - 1 / math.sqrt(3)) / 2, abs=1e-4)
    assert (q[low > 0.5] > 1 - low[low > 0.5]).sum() == (low > 0.5).sum() - 1  # equal at p_y = 1
    torch.testing.assert_close(2 * q**2 - (1 - 2 * low) * q - 2 * low * (1 - low), torch.zeros_like(q))


# --- statements that are too strong ---


def test_almost_all_labels_fall_is_false():
    p = torch.tensor([0.6, 0.2, 0.15, 0.05], dtype=F64)
    change = sq.negative_step(p, 0, 0.5) - p
    torch.testing.assert_close(change[1:], torch.tensor([0.039, 0.025, 0.005], dtype=F64), rtol=0, atol=5e-4)
    two = torch.tensor([0.45, 0.44, 0.105, 0.005], dtype=F64)
    assert ((sq.negative_step(two, 3, 0.5) - two) > 0).tolist() == [True, True, False, False]


def test_the_mass_comes_from_the_bystanders():
    p = torch.tensor([0.7, 0.2, 0.095, 0.005], dtype=F64)
    change = sq.negative_step(p, 3, 0.5) - p
    assert change[0].item() == pytest.approx(0.0542, abs=5e-5)
    assert change[3].item() == pytest.approx(-0.0027, abs=5e-5)
    assert -change[1:3].sum() / change[0] > 0.94


def test_a_smaller_label_lets_the_peak_gain_less():
    r, gains, shares = torch.tensor([0.6, 0.3, 0.1], dtype=F64), [], []
    for low in (1e-4, 0.01, 0.1):
        p = torch.cat([r * (1 - low), torch.tensor([low], dtype=F64)])
        after = sq.negative_step(p, 3, 1.0)
        gains.append(float(after[0] - p[0]))
        shares.append(float(after[0] / (1 - after[3]) - r[0]))
    assert gains == pytest.approx([0.0796, 0.0832, 0.1128], abs=5e-5)
    assert shares == pytest.approx([0.0796, 0.0788, 0.0721], abs=5e-5)


def test_a_bystander_need_not_be_monotone():
    p = torch.tensor([0.36, 0.34, 0.3], dtype=F64)
    sizes = torch.logspace(-2, 2.5, 200, dtype=F64)
    path = sq.negative_step(p, 2, sizes)[:, 1]
    turn = int(path.argmax())
    assert path[turn] > 0.45 and path[-1] < 0.1
    assert (path[: turn + 1].diff() > 0).all() and (path[turn:].diff() < 0).all()


def test_with_another_kernel_the_peak_can_fall_and_the_label_cannot_rise():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
    u = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    push = p - one_hot(torch.tensor(2), 3)
    kernel = 0.1 * torch.eye(3, dtype=F64) + torch.outer(u, u)
    after = (p.log() + 0.5 * kernel @ push).softmax(-1)
    torch.testing.assert_close(after, torch.tensor([0.579, 0.331, 0.090], dtype=F64), rtol=0, atol=5e-4)
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        root = torch.randn(4, 4, generator=draw, dtype=F64)
        p = (2 * torch.randn(4, generator=draw, dtype=F64)).softmax(-1)
        s, push = 10 ** float(3 * torch.rand((), generator=draw) - 2), p - one_hot(torch.tensor(0), 4)
        after = (p.log() + s * root @ root.T @ push).log_softmax(-1)
        assert after[0] <= p[0].log() - s * (root.T @ push).square().sum() + 1e-12


def test_a_positive_step_is_the_mirror_image_to_first_order_alone():
    p = torch.tensor([0.6, 0.2, 0.15, 0.05], dtype=F64)
    y, s = torch.tensor(0), torch.tensor(0.01, dtype=F64)
    assert ((by_logits(p, y, -s) - p) > 0).tolist() == [True, False, False, False]
    counts, labels = grid(4, 16)
    p = counts.to(F64) / 16
    change = by_logits(p, labels, torch.full((len(p),), -0.5, dtype=F64)) - p
    assert (pick(change, labels) > 0).all()
    assert (without(change, labels, -1.0) > 0).any(-1).sum() > 100, "raising a label raises others too"


# --- accumulation ---


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_steps_add_up_to_more_than_one_step_of_their_sum(classes):
    p, y, s = random_points(classes, 150, 7 + classes)
    s = s.clamp(1e-2, 3.0)
    path = sq.negative_path(p, y, s, steps=60)
    star = without(p, y, -1.0).argmax(-1)
    peak = pick(path, star.expand(61, -1))
    times = torch.arange(61, dtype=F64)[:, None] * s
    bound = pick(sq.negative_step(p, y, times), star.expand(61, -1))
    assert (peak >= bound - 1e-12).all()
    assert (peak.diff(dim=0) >= -1e-15).all()
    assert torch.equal(without(path, y.expand(61, -1), -1.0).argmax(-1), star.expand(61, -1))
    # the bound in its long form: gaps of the logits grow at least linearly
    gaps = pick(p, star)[:, None] - p + one_hot(y, classes)
    long_form = 1 / (p / pick(p, star)[:, None] * torch.exp(-times[..., None] * gaps)).sum(-1)
    torch.testing.assert_close(bound, long_form, rtol=1e-10, atol=0)
    assert (peak[20:] > bound[20:] + 1e-6).any(), "strictly more"


def test_the_limit_is_one_on_the_peak_and_ties_share_it():
    p = torch.tensor([0.3, 0.25, 0.25, 0.2], dtype=F64)
    torch.testing.assert_close(sq.negative_path(p, 3, 2.0, steps=400)[-1], torch.eye(4, dtype=F64)[0])
    end = sq.negative_path(p, 0, 2.0, steps=400)[-1]
    torch.testing.assert_close(end, torch.tensor([0, 0.5, 0.5, 0], dtype=F64))


def test_energy_grows_under_negative_and_shrinks_under_short_positive_steps():
    for classes in (2, 3, 5, 9):
        p, y, _ = random_points(classes, 4000, 90 + classes)
        energy = (p - one_hot(y, classes)).norm(dim=-1)
        for s in (0.5, 4.0):
            after = by_logits(p, y, torch.full((len(p),), -s, dtype=F64))
            assert ((after - one_hot(y, classes)).norm(dim=-1) <= energy + 1e-14).all()
    # a long positive step can also overshoot: it flattens the others until a rare one is most of what is left
    rare = torch.tensor([0.6, 0.39, 0.01, 1e-30], dtype=F64)
    long = by_logits(rare, torch.tensor(3), torch.tensor(-40.0, dtype=F64))
    assert (long - torch.eye(4, dtype=F64)[3]).norm() > (rare - torch.eye(4, dtype=F64)[3]).norm() + 0.1


def test_preference_steps_in_one_context_do_not_squeeze():
    p, _, s = random_points(6, 500, 3)
    push = torch.zeros_like(p)
    push[:, 0], push[:, 1] = s, -s
    after = torch.softmax(p.log() + push, -1)
    normaliser = 1 + p[:, 0] * torch.expm1(s) + p[:, 1] * torch.expm1(-s)
    torch.testing.assert_close(after[:, 2:], p[:, 2:] / normaliser[:, None], rtol=1e-10, atol=0)
    decided = (normaliser - 1).abs() > 1e-12
    falls = p[:, 0].log() + s > p[:, 1].log()
    assert torch.equal((after[:, 2] < p[:, 2])[decided], falls[decided])
    assert 50 < falls.sum() < 450 and decided.sum() > 450
    assert (after[:, 0] > p[:, 0]).all()
