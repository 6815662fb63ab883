"""Mutual losses: by hand on two samples and three classes, against loops in Python, limits, who
teaches whom."""

import functools
import math

import pytest
import torch
from helpers import reference as naive

from kd_plugins import (
    AT,
    CE,
    KD,
    MKD,
    SMKD,
    BootHard,
    BootSoft,
    ConfidencePenalty,
    LabelSmoothing,
    Loss,
    LowEntropy,
    Mutual,
    MyLC,
    ProSelfLC,
    SelectAll,
    SelectNone,
    Selector,
)
from kd_plugins.losses.functional import Prediction

INF = math.inf
LN2, LN3, LN5 = math.log(2), math.log(3), math.log(5)


def logits_of(*peers):
    return tuple(torch.tensor(p, dtype=torch.float64).log().requires_grad_() for p in peers)


def gradients(loss, zs):
    return torch.autograd.grad(loss, zs)


def own_loop(kind, zs, consts, targets, live, **how):
    """Σ_k mean_i H(q~_ki, p_ki); the list ``g`` in ``how``, one per peer, is MyLC's or
    ProSelfLC's clock."""
    total = 0.0
    for k, rows in enumerate(zs):
        for i, row in enumerate(rows):
            p, c = naive.softmax(row), naive.softmax(consts[k][i])
            total += naive.cross_entropy(
                label(kind, targets[i], p if live else c, c, k, how), p
            ) / len(rows)
    return total


def taught_loop(kind, zs, consts, targets, chi, normalize, **how):
    """Σ_k Σ_{j≠k} (1/n_j) Σ_{i: H(p_ji) < chi} H(q~_ji, p_ki), and the counts n_j."""
    total, counts = (
        0.0,
        [sum(naive.entropy(naive.softmax(row)) < chi for row in rows) for rows in consts],
    )
    for k in range(len(zs)):
        for j in range(len(zs)):
            for i, row in enumerate(zs[k]):
                c = naive.softmax(consts[j][i])
                if j != k and naive.entropy(c) < chi:
                    n = counts[j] if normalize == "selected" else len(zs[k])
                    total += (
                        naive.cross_entropy(
                            label(kind, targets[i], c, c, j, how), naive.softmax(row)
                        )
                        / n
                    )
    return total, counts


def label(kind, q, p, const, peer, how):
    return naive.refined(
        kind, q, p, const, **{key: v[peer] if key == "g" else v for key, v in how.items()}
    )


# ------------------------------------------------------------------------------------------ by hand


def test_smkd_by_hand():
    """Two samples, three classes, label smoothing 0.3, chi = ln 3 / 2 = 0.549.

    H(a) = [0.5 ln 2 + 0.5 ln 4 = 1.040, 0.9 ln(10/9) + 0.1 ln 20 = 0.394]: a teaches sample 1 only;
    H(b) = [0.394, 0.394]: b teaches both.
    """
    a, b = [[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], [[0.05, 0.9, 0.05], [0.05, 0.05, 0.9]]
    y = torch.tensor([0, 2])  # q~ = [.8, .1, .1] and [.1, .1, .8]
    big, small = -math.log(0.9), -math.log(0.05)
    h_a = [0.8 * LN2 + 0.2 * 2 * LN2, 0.1 * big + 0.9 * small]  # H(q~_i, a_i)
    h_b = [0.1 * big + 0.9 * small, 0.8 * big + 0.2 * small]  # H(q~_i, b_i)
    own = sum(h_a) / 2 + sum(h_b) / 2
    teach_a, teach_b = sum(h_a) / 2, h_b[1] / 1  # b's two samples to a, a's one sample to b
    loss = SMKD(LabelSmoothing(eps=0.3), eta=2, b2=0, normalize="selected")
    assert loss(logits_of(a, b), y).item() == pytest.approx(own + teach_a + teach_b, abs=1e-12)
    assert loss.stats["selected_a"].item() == 0.5 and loss.stats["selected_b"].item() == 1.0
    expected = {
        "own_a": sum(h_a) / 2,
        "own_b": sum(h_b) / 2,
        "taught_a": teach_a,
        "taught_b": teach_b,
        "threshold": LN3 / 2,
    }
    assert {k: loss.stats[k].item() for k in expected} == pytest.approx(expected)


def test_each_direction_divides_by_its_own_count():
    """a is sure of 1 sample in 4, b of 3: neither Algorithm 1's swapped counts nor the batch
    size give this number."""
    unsure, sure = [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]
    a, b = [sure, unsure, unsure, unsure], [unsure, sure, sure, sure]
    y = torch.zeros(4, dtype=torch.long)
    low, high = -math.log(0.9), LN3  # H(q, p) of a sure and of an unsure row
    to_a, to_b = (
        3 * high,
        1 * high,
    )  # b teaches a samples 1, 2, 3 (unsure there), a teaches b sample 0 (unsure there)
    own = (low + 3 * high) / 4 + (3 * low + high) / 4
    zs = logits_of(a, b)
    ours = {
        n: SMKD(CE(), eta=2, b2=0, normalize=n)(zs, y).item() - own for n in ("selected", "batch")
    }
    assert ours["selected"] == pytest.approx(to_a / 3 + to_b / 1)
    assert ours["batch"] == pytest.approx(to_a / 4 + to_b / 4)
    assert to_a / 1 + to_b / 3 != pytest.approx(ours["selected"])  # the swap


def test_mkd_by_hand():
    """eps = 0.25; KL(b||a) = 0.8 ln(8/5) + 0.2 ln(2/5), KL(a||b) = 0.5 ln(5/8) + 0.5 ln(5/2);
    the second rows agree."""
    a, b = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]], [[0.8, 0.1, 0.1], [0.2, 0.4, 0.4]]
    ce_a, ce_b = (LN2 + LN5) / 2, (LN5 - 2 * LN2 + LN5) / 2
    kl_ba, kl_ab = (
        0.8 * (3 * LN2 - LN5) + 0.2 * (LN2 - LN5),
        0.5 * (LN5 - 3 * LN2) + 0.5 * (LN5 - LN2),
    )
    loss = MKD(eps=0.25)
    value = loss(logits_of(a, b), torch.tensor([0, 0])).item()
    assert value == pytest.approx(0.75 * (ce_a + ce_b) + 0.25 * (kl_ba + kl_ab) / 2)
    assert loss.stats["taught_a"].item() == pytest.approx(kl_ba / 2)
    assert loss.stats["taught_b"].item() == pytest.approx(kl_ab / 2)


# ------------------------------------------------------------------------------------ against loops

REFINE = {  # kind, how, the loss, is its own target differentiated
    "ls": ("ls", {"eps": 0.3}, lambda: LabelSmoothing(eps=0.3), False),
    "cp": ("cp", {"eps": 0.3}, lambda: ConfidencePenalty(eps=0.3), True),
    "boot_soft": ("boot_soft", {"eps": 0.3}, lambda: BootSoft(eps=0.3), True),
    "boot_hard": ("boot_hard", {"eps": 0.3}, lambda: BootHard(eps=0.3), False),
    "proselflc": ("trust", {"g": "clock"}, lambda: ProSelfLC(b1=8), False),
    "mylc": ("trust", {"g": "r"}, lambda: MyLC(b1=8, rho=0.4), False),
    "mylc_attached": ("trust", {"g": "r"}, lambda: MyLC(b1=8, rho=0.4, detach=False), True),
}


@functools.lru_cache
def peers_batch(num_peers):
    """Logits of growing sharpness, so that each peer is sure of another number of samples."""
    generator = torch.Generator().manual_seed(num_peers)
    scale = torch.tensor([0.2, 0.5, 2.0, 4.0, 8.0], dtype=torch.float64)[:, None]
    zs = [
        torch.randn(5, 4, generator=generator, dtype=torch.float64) * scale.roll(k, 0) * (1 + k) / 2
        for k in range(num_peers)
    ]
    return zs, torch.tensor([0, 3, 1, 2, 2])


@pytest.mark.parametrize("progress", [None, 0.2, 0.7], ids=["static", "early", "late"])
@pytest.mark.parametrize("normalize", ["selected", "batch"])
@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("name", REFINE)
def test_smkd_against_loops(name, num_peers, normalize, progress):
    """Value always; gradients by differences of the loops with everything handed over held
    constant."""
    kind, how, make, live = REFINE[name]
    zs, y = peers_batch(num_peers)
    zs = [z.clone().requires_grad_() for z in zs]
    eta, b2 = 1.5, -6.0 if progress is not None else 0.0
    loss = SMKD(make(), eta=eta, b2=b2, normalize=normalize, num_peers=num_peers)
    t = 0.45 if progress is None else progress
    loss.set_progress(t)
    chi = math.log(4) / eta * (2 * naive.sigmoid(b2 * (t - 0.5)))
    consts, targets = [z.tolist() for z in zs], [naive.onehot(i, 4) for i in y.tolist()]
    if how.get("g") == "clock":
        how = {"g": [naive.sigmoid(8 * (t - 0.5))] * num_peers}
    elif how.get("g") == "r":  # each peer has its own r
        rs = [sum(naive.sure(naive.softmax(row)) for row in rows) / 5 for rows in consts]
        how = {"g": [naive.sigmoid(8 * (r - 0.4)) for r in rs]}

    def expected(zs):
        own = own_loop(kind, zs, consts, targets, live, **how)
        return own + taught_loop(kind, zs, consts, targets, chi, normalize, **how)[0]

    value = loss(zs, y)
    assert value.item() == pytest.approx(expected(consts), abs=2e-6)
    counts = taught_loop(kind, consts, consts, targets, chi, normalize, **how)[1]
    assert [
        round(loss.stats[f"selected_{'abc'[k]}"].item() * 5) for k in range(num_peers)
    ] == counts
    if progress != 0.2:
        assert (
            len(set(counts)) > 1 and 0 < sum(counts) < 5 * num_peers
        )  # or the test would see no difference
    for grad, slope in zip(gradients(value, zs), naive.slope(expected, consts), strict=True):
        torch.testing.assert_close(grad, torch.tensor(slope).double(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_peers", [2, 3])
def test_mkd_against_loops(num_peers, eps):
    zs, y = peers_batch(num_peers)
    zs = [z.clone().requires_grad_() for z in zs]
    consts = [z.tolist() for z in zs]

    def expected(zs):
        total = 0.0
        for k, rows in enumerate(zs):
            for i, row in enumerate(rows):
                p = naive.softmax(row)
                teachers = [naive.softmax(consts[j][i]) for j in range(num_peers) if j != k]
                kl = sum(naive.cross_entropy(t, p) - naive.entropy(t) for t in teachers) / len(
                    teachers
                )
                total += ((1 - eps) * -math.log(p[y[i]]) + eps * kl) / len(rows)
        return total

    value = MKD(eps=eps, num_peers=num_peers)(zs, y)
    assert value.item() == pytest.approx(expected(consts), abs=1e-9)
    for grad, slope in zip(gradients(value, zs), naive.slope(expected, consts), strict=True):
        torch.testing.assert_close(grad, torch.tensor(slope).double(), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- limits


@pytest.fixture
def pair():
    zs, y = peers_batch(2)
    return [z.clone().requires_grad_() for z in zs], y


@pytest.mark.parametrize("name", REFINE)
@pytest.mark.parametrize(("eta", "b2"), [(INF, 0), (INF, -6), (-1.0, 0), (-2.0, -6), (INF, 6)])
def test_zero_knowledge_is_independent_training(pair, name, eta, b2):
    """Value and gradients, with a peer that is certain (H = 0 exactly) among the samples."""
    zs, y = pair
    with torch.no_grad():
        zs[0][2] = torch.tensor([0.0, 1e4, 0, 0])
    make = REFINE[name][2]
    smkd, alone = SMKD(make(), eta=eta, b2=b2), [make(), make()]
    for loss in (smkd, *alone):
        loss.set_progress(0.3)
    together, sum_alone = smkd(zs, y), alone[0](zs[0], y) + alone[1](zs[1], y)
    torch.testing.assert_close(together, sum_alone)
    torch.testing.assert_close(gradients(together, zs), gradients(sum_alone, zs))
    assert smkd.stats["selected_a"] == smkd.stats["selected_b"] == 0


def test_certain_rows_are_not_selected_at_chi_zero():
    certain = torch.eye(3) * 1e4
    pred = Prediction.of(certain)
    assert not LowEntropy(eta=INF, b2=0)(pred, certain).any()
    assert LowEntropy(eta=1e6, b2=0)(pred, certain).all()  # and are at any chi above


@pytest.mark.parametrize("name", REFINE)
def test_small_eta_is_all_knowledge(pair, name):
    zs, y = pair
    make = REFINE[name][2]
    some, everything = SMKD(make(), eta=0.5, b2=0), Mutual(make(), SelectAll())
    for loss in (some, everything):
        loss.set_progress(0.3)
    ours, theirs = some(zs, y), everything(zs, y)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, zs), gradients(theirs, zs))
    assert everything.stats["selected_a"] == 1


def test_zero_knowledge_of_the_grid_is_independent_training(pair):
    zs, y = pair
    torch.testing.assert_close(Mutual(CE(), SelectNone())(zs, y), CE()(zs[0], y) + CE()(zs[1], y))


@pytest.mark.parametrize(
    ("b2", "first", "last"), [(-6.0, 1.905, 0.095), (-10.0, 1.987, 0.0134), (6.0, 0.095, 1.905)]
)
def test_progressive_threshold(b2, first, last):
    select = LowEntropy(eta=2, b2=b2)
    for t, factor in [(0.0, first), (1.0, last)]:
        select.progress.set(t)
        assert select.threshold(100).item() / (math.log(100) / 2) == pytest.approx(factor, abs=5e-4)
    select.progress.set(0.5)
    assert (
        select.threshold(100).item() == torch.tensor(LowEntropy(eta=2, b2=0).threshold(100)).item()
    )


def test_selection_is_strict_and_follows_progress():
    z = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [4.0, 0.0, 0.0], [12.0, 0.0, 0.0]])
    h = [naive.entropy(naive.softmax(row)) for row in z.tolist()]  # 1.0986, 0.665, 0.178, 0.00016
    select = LowEntropy(eta=2, b2=-6)
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        select.progress.set(t)
        chi = LN3 / 2 * 2 * naive.sigmoid(-6 * (t - 0.5))
        assert select(Prediction.of(z), z).tolist() == [x < chi for x in h]
        assert select.stats["threshold"].item() == pytest.approx(chi)
    edge = LowEntropy(eta=4, b2=0)
    edge.threshold = lambda classes: torch.tensor(LN2)
    uniform_of_two = torch.tensor([[0.0, 0.0], [0.1, 0.0]])
    assert edge(Prediction.of(uniform_of_two), uniform_of_two).tolist() == [False, True]


def test_smkd_without_schedule_asks_for_no_progress(pair):
    zs, y = pair
    assert SMKD(CE(), b2=0)(zs, y).isfinite()
    with pytest.raises(RuntimeError, match=r"LowEntropy.*set_progress"):
        SMKD(CE())(zs, y)


@pytest.mark.parametrize("num_peers", [2, 3])
def test_equal_peers_have_nothing_to_teach_in_mkd(num_peers):
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = (1 - 0.4) * torch.nn.functional.cross_entropy(z, y) * num_peers
    torch.testing.assert_close(
        MKD(eps=0.4, num_peers=num_peers)([z.clone() for _ in range(num_peers)], y), expected
    )


# --------------------------------------------------------------------------------- who teaches whom


@pytest.mark.parametrize("normalize", ["selected", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_selected_is_a_zero_in_the_graph(pair, normalize, reduction):
    """A rank with nothing to learn still has to give every parameter a gradient."""
    zs, y = pair
    loss = Mutual(BootSoft(), SelectNone(), own=0.0, normalize=normalize, reduction=reduction)(
        zs, y
    )
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(z.grad, torch.zeros_like(z)) for z in zs)


def lesson_of_b_only(refine, own=0.0):
    """a is blank and unselected, b is sure: the loss is H(q~_b, p_a) alone."""
    a = torch.randn(4, 3, dtype=torch.float64) * 0.1
    b = torch.tensor([[8.0, 0, 0], [0, 8, 0], [0, 0, 8], [8, 0, 0]], dtype=torch.float64)
    zs, y = [a.requires_grad_(), b.requires_grad_()], torch.tensor([0, 1, 0, 1])
    return Mutual(refine, LowEntropy(eta=4, b2=0), own=own), zs, y


@pytest.mark.parametrize(
    "refine", [BootSoft(), ConfidencePenalty(eps=0.3), BootHard(), MyLC(detach=False)], ids=repr
)
def test_knowledge_is_a_constant_for_who_hands_it_over(refine):
    loss, zs, y = lesson_of_b_only(refine)
    grad_a, grad_b = gradients(loss(zs, y), zs)
    assert (loss.stats["selected_a"].item(), loss.stats["selected_b"].item()) == (0, 1)
    assert grad_a.abs().max() > 0.01
    assert torch.equal(grad_b, torch.zeros_like(grad_b))


def test_the_teachers_entropy_selects_and_its_label_is_what_is_taught():
    """Were the receiver's entropy asked, a would learn nothing here; were p_b taught and not
    q~_b, another number."""
    loss, zs, y = lesson_of_b_only(BootHard(eps=0.5))
    p_a = [naive.softmax(row) for row in zs[0].tolist()]
    taught = [
        (naive.onehot(t, 3), naive.onehot(g, 3))
        for t, g in zip([0, 1, 2, 0], y.tolist(), strict=True)
    ]
    q = [[0.5 * u + 0.5 * v for u, v in zip(*pair, strict=True)] for pair in taught]
    expected = sum(map(naive.cross_entropy, q, p_a)) / 4
    assert loss(zs, y).item() == pytest.approx(expected)
    assert (
        loss.stats["taught_a"].item() == pytest.approx(expected)
        and loss.stats["taught_b"].item() == 0
    )


def test_own_weighs_the_own_loss(pair):
    zs, y = pair
    none, half, one = (Mutual(CE(), SelectAll(), own=own)(zs, y) for own in (0.0, 0.5, 1.0))
    alone = CE()(zs[0], y) + CE()(zs[1], y)
    torch.testing.assert_close(half - none, 0.5 * alone)
    torch.testing.assert_close(one - none, alone)


def test_batch_normalisation_does_not_depend_on_how_a_batch_is_cut():
    zs, y = peers_batch(2)
    zs, y = [torch.cat([z, z.flip(0)[:3] * 3]) for z in zs], torch.cat([y, y[:3]])
    whole, cut = {}, {}
    for n in ("batch", "selected"):
        loss = SMKD(BootSoft(), eta=1.5, b2=0, normalize=n)
        whole[n] = loss(zs, y)
        cut[n] = (loss([z[:4] for z in zs], y[:4]) + loss([z[4:] for z in zs], y[4:])) / 2
    torch.testing.assert_close(whole["batch"], cut["batch"])
    assert (
        whole["selected"] - cut["selected"]
    ).abs() > 1e-3  # the test's batch does tell them apart


def test_reductions_agree(pair):
    zs, y = pair
    none, mean, total = (
        SMKD(CE(), eta=1.5, b2=0, reduction=r)(zs, y) for r in ("none", "mean", "sum")
    )
    assert none.shape == (5,)
    torch.testing.assert_close([none.mean(), none.sum()], [mean, total])


def test_a_selectors_booleans_decide_sample_by_sample(pair):
    class Even(Selector):
        def forward(self, pred, target):
            assert not pred.log_p.requires_grad  # a selector is never differentiated
            return torch.arange(target.shape[0]) % 2 == 0

    zs, y = pair
    loss = Mutual(CE(), Even(), own=0.0, normalize="selected")(zs, y)
    even = [0, 2, 4]
    expected = CE()(zs[0][even], y[even]) + CE()(zs[1][even], y[even])
    torch.testing.assert_close(loss, expected)
    grads = gradients(loss, zs)
    assert all((g[1::2] == 0).all() and (g[0::2] != 0).any() for g in grads)


class Linear(Loss):
    """A loss that is no label modification: 1 - p_y, counting its calls."""

    def __init__(self, **base):
        super().__init__(**base)
        self.register_buffer("calls", torch.zeros(()))

    def per_sample(self, logits, target):
        self.calls += 1
        return 1 - (logits.softmax(-1) * target).sum(-1)


@pytest.mark.parametrize("num_peers", [2, 3])
def test_a_loss_that_does_not_refine_hands_over_samples_with_their_labels(num_peers):
    zs, y = peers_batch(num_peers)
    select = LowEntropy(eta=1.5, b2=0)
    loss = Mutual(Linear(), select, num_peers=num_peers, normalize="selected")
    errors = [
        [1 - naive.softmax(row)[t] for row, t in zip(z.tolist(), y.tolist(), strict=True)]
        for z in zs
    ]
    sure = [
        [naive.entropy(naive.softmax(row)) < math.log(4) / 1.5 for row in z.tolist()] for z in zs
    ]
    expected = sum(sum(e) / 5 for e in errors)
    for k in range(num_peers):
        for j in range(num_peers):
            if j != k:
                expected += sum(e for e, s in zip(errors[k], sure[j], strict=True) if s) / sum(
                    sure[j]
                )
    assert loss(zs, y).item() == pytest.approx(expected)


def test_a_step_counts_once_in_the_state_of_each_peer():
    """Also of a loss with state that does not refine: it is not evaluated again for what it is
    taught."""
    zs, y = peers_batch(3)
    loss = Mutual(Linear(), SelectAll(), num_peers=3)
    loss(zs, y)
    assert [refine.calls.item() for refine in loss.refine] == [1, 1, 1]
    mixed = Mutual(0.5 * MyLC() + 0.5 * CE(), SelectAll(), num_peers=3)
    mixed(zs, y)
    assert [refine.terms[0].running.count.item() for refine in mixed.refine] == [5, 5, 5]


def test_peers_do_not_share_state(pair):
    zs, y = pair
    loss = SMKD(MyLC(), b2=0)
    loss(zs, y)
    for refine, z, name in zip(loss.refine, zs, "ab", strict=True):
        expected = sum(naive.sure(naive.softmax(row)) for row in z.tolist()) / 5
        assert refine.r.item() == pytest.approx(expected, abs=1e-6)
        assert loss.stats[f"mean_certainty_{name}"].item() == pytest.approx(expected, abs=1e-6)


def test_what_was_passed_in_stays_as_it_was(pair):
    zs, y = pair
    refine, select = MyLC(), LowEntropy(b2=0)
    first = Mutual(refine, select)
    first(zs, y)
    assert first.refine[0].r > 0 and refine.r == 0 and refine.class_weights is None
    second = Mutual(refine, select, weight=torch.ones(zs[0].shape[1]))
    assert [float(peer.r) for peer in second.refine] == [0, 0]
    assert refine.class_weights is None and Mutual(refine, select).class_weights is None


# --------------------------------------------------------------------------- diagnostics and errors


def test_stats_of_every_peer():
    zs, y = peers_batch(3)
    loss = SMKD(MyLC(), eta=2, b2=0, num_peers=3)
    loss(zs, y)
    names = ("own", "selected", "taught", "mean_certainty", "eps")
    assert set(loss.stats) == {f"{n}_{peer}" for n in names for peer in "abc"} | {"threshold"}
    assert loss.stats["threshold"].item() == pytest.approx(math.log(4) / 2)
    mkd = MKD(num_peers=3)
    mkd(zs, y)
    assert set(mkd.stats) == {f"{n}_{peer}" for n in ("own", "taught") for peer in "abc"}


def test_the_last_selection_is_left(pair):
    zs, y = pair
    loss = SMKD(LabelSmoothing(), eta=1.5, b2=0)
    assert loss.selection is None
    for _ in range(2):
        loss(zs, y)
    assert len(loss.selection) == 2
    for (mask, taught), z, name in zip(loss.selection, zs, "ab", strict=True):
        assert (
            mask.dtype == torch.bool and mask.to(z.dtype).mean() == loss.stats[f"selected_{name}"]
        )
        assert mask.tolist() == [
            naive.entropy(naive.softmax(row)) < math.log(4) / 1.5 for row in z.tolist()
        ]
        assert taught.shape == z.shape and not taught.requires_grad
        assert torch.equal(taught.argmax(-1), y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LowEntropy(eta=0), ValueError, "eta=0"),
        (lambda: SMKD(eta=float("nan")), ValueError, "eta=nan"),
        (lambda: SMKD(normalize="select"), ValueError, "normalize='select'.*'batch', 'selected'"),
        (lambda: SMKD(num_peers=1), ValueError, "num_peers=1"),
        (lambda: Mutual(MKD(), SelectAll()), TypeError, "refine must be"),
        (lambda: Mutual(CE, SelectAll()), TypeError, "refine must be"),
        (lambda: MKD(eps=1.5), ValueError, "eps=1.5"),
        (lambda: MKD(eps=-0.5), ValueError, "eps=-0.5"),
        (lambda: Mutual(CE(), SelectAll()).prime([], []), TypeError, "CE, which has none"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "loss", [SMKD(CE(), b2=0, num_peers=3), MKD(num_peers=3)], ids=["smkd", "mkd"]
)
def test_wrong_number_of_peers(pair, loss):
    zs, y = pair
    with pytest.raises(ValueError, match=r"num_peers=3.*got 2"):
        loss(zs, y)


def test_teachers_teach_each_peer_and_peers_each_other():
    """What the peers' own loss reads reaches each of them: teachers whole, of the features its
    own."""
    zs = tuple(torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    y, t = torch.tensor([0, 1, 2, 0]), torch.randn(2, 4, 3, dtype=torch.float64)
    maps = [torch.randn(4, d, 2, 2, dtype=torch.float64) for d in (5, 6)]
    taught = [torch.randn(4, 7, 2, 2, dtype=torch.float64)] * 2
    loss = CE() + 0.5 * KD(temperature=2) + 3 * AT(layers=(-1,))
    extra = {"teacher": t, "teacher_features": taught}
    alone = [loss(z, y, features=m, **extra) for z, m in zip(zs, maps, strict=True)]
    side = Mutual(loss, SelectNone())
    assert side.required_inputs == {"teacher", "features", "teacher_features"}
    torch.testing.assert_close(side(zs, y, features=maps, **extra), sum(alone))
    both = Mutual(loss, SelectAll())
    torch.testing.assert_close(both(zs, y, features=maps, **extra), 2 * sum(alone))


def test_peers_of_different_precision():
    """Each gets its gradient in its own dtype: the one of float32 logits of the same values."""
    zs = [
        torch.randn(6, 5, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(2)
    ]
    mixed = [zs[0].clone().requires_grad_(), zs[1].float().requires_grad_()]
    full = [z.float().requires_grad_() for z in zs]
    for peers in (mixed, full):
        SMKD(eta=0.5, b2=0)(peers, torch.arange(6) % 5).backward()
    assert [z.grad.dtype for z in mixed] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(mixed[1].grad, full[1].grad)
    torch.testing.assert_close(mixed[0].grad.float(), full[0].grad, rtol=2**-8, atol=1e-6)


def test_prime_refuses_networks_that_expect_other_pixels():
    """Only one of them could be measured on what it will see."""
    networks = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]
    for network, mean in zip(networks, ((0.5,) * 3, (0.4,) * 3), strict=True):
        network.pretrained_cfg = {"mean": mean, "std": (0.2,) * 3}
    loss, loader = SMKD(MyLC(window=4)), [(torch.randn(4, 4), torch.zeros(4))]
    with pytest.raises(ValueError, match="expect different normalisations"):
        loss.prime(networks, loader)
    networks[1].pretrained_cfg["mean"] = [0.5] * 3  # as JSON has it
    assert len(loss.prime(networks, loader)) == 2
