"""Label modification: q~ by hand, value and gradient against loops in Python, limits, what
carries a gradient."""

import math

import pytest
import torch
from helpers import reference as naive

from kd_plugins import CE, BootHard, BootSoft, ConfidencePenalty, LabelSmoothing, MyLC, ProSelfLC
from kd_plugins.losses.functional import Prediction
from kd_plugins.losses.self_trust import calibrated_certainty

LN3 = math.log(3)
P = [[0.95, 0.01, 0.04], [0.2, 0.5, 0.3]]  # two samples, three classes
Y = [2, 0]
H = [
    -(0.95 * math.log(0.95) + 0.01 * math.log(0.01) + 0.04 * math.log(0.04)),
    -(0.2 * math.log(0.2) + 0.5 * math.log(0.5) + 0.3 * math.log(0.3)),
]
L = [1 - H[0] / LN3, 1 - H[1] / LN3]  # 0.7965, 0.0628


def at(loss, progress=None):
    if progress is not None:
        loss.set_progress(progress)
    return loss


def case(rows=P, labels=Y):
    z = torch.tensor(rows, dtype=torch.float64).log().requires_grad_()
    return z, torch.tensor(labels)


def q_of(loss, rows=P, labels=Y):
    z, y = case(rows, labels)
    return loss.refine(Prediction.of(z), torch.nn.functional.one_hot(y, 3).double()).tolist()


def rows(*expected, tol=1e-7):
    return [pytest.approx(row, abs=tol) for row in expected]


# ------------------------------------------------------------------------------------------ by hand


def test_ce_by_hand():
    z, y = case()
    assert CE()(z, y).item() == pytest.approx((-math.log(0.04) - math.log(0.2)) / 2)
    assert q_of(CE()) == rows([0, 0, 1], [1, 0, 0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LabelSmoothing(eps=0.3), [[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]),
        (
            ConfidencePenalty(eps=0.2),
            [[-0.19, -0.002, 0.792], [0.76, -0.1, -0.06]],
        ),  # 0.8 q - 0.2 p
        (
            BootSoft(eps=0.8),
            [[0.76, 0.008, 0.232], [0.36, 0.4, 0.24]],
        ),  # the first is ProSelfLC's worked example
        (BootHard(eps=0.2), [[0.2, 0, 0.8], [0.8, 0.2, 0]]),
    ],
)
def test_refined_label_by_hand(loss, expected):
    assert q_of(loss) == rows(*expected)
    z, y = case()
    value = (
        sum(
            -q * math.log(p)
            for qs, ps in zip(expected, P, strict=True)
            for q, p in zip(qs, ps, strict=True)
        )
        / 2
    )
    assert loss(z, y).item() == pytest.approx(value)


def test_entropies_of_the_example():
    """The numbers the next tests stand on, once to four digits."""
    assert [*H, *L] == pytest.approx([0.2235, 1.0297, 0.7965, 0.0628], abs=5e-5)


@pytest.mark.parametrize(
    ("b1", "shift", "progress", "g"),
    [
        (10.0, 0.5, 0.5, 0.5),
        (10.0, 0.5, 0.0, 0.00669285),
        (10.0, 0.5, 1.0, 0.99330715),
        (8.0, 0.25, 0.5, 0.88079708),
        (0.0, 0.5, 0.9, 0.5),
        (1e4, 0.5, 1.0, 1.0),
    ],
)
def test_proselflc_by_hand(b1, shift, progress, g):
    """g = 1/(1 + exp(-b1 (t - shift))): exp(5) = 148.41, exp(2) = 7.389."""
    loss = at(ProSelfLC(b1=b1, shift=shift), progress)
    e0, e1 = g * L[0], g * L[1]
    assert q_of(loss) == rows(
        [e0 * 0.95, e0 * 0.01, 1 - e0 * 0.96], [1 - e1 * 0.8, e1 * 0.5, e1 * 0.3]
    )
    assert loss.stats["eps"].item() == pytest.approx((e0 + e1) / 2, abs=1e-6)


def test_proselflc_at_a_trust_of_four_fifths():
    """The worked example's eps through the clock, g = .8 / l(p); its own p, of l(p) = .7965,
    would need g > 1."""
    p = [[0.96, 0.01, 0.03]]
    g = 0.8 / naive.sure(p[0])
    loss = at(ProSelfLC(b1=2 * math.log(g / (1 - g))), 1.0)  # h(0.5, 2 logit(g)) = g
    assert q_of(loss, p, [2]) == rows([0.768, 0.008, 0.224])


def test_mylc_by_hand():
    """r is the mean of l(p) with this batch counted first; g = h(r - rho, b1)."""
    loss = MyLC(b1=4.0, rho=0.25)
    r = (L[0] + L[1]) / 2  # 0.4296
    g = 1 / (1 + math.exp(-4 * (r - 0.25)))
    e0, e1 = g * L[0], g * L[1]
    assert q_of(loss) == rows(
        [e0 * 0.95, e0 * 0.01, 1 - e0 * 0.96], [1 - e1 * 0.8, e1 * 0.5, e1 * 0.3]
    )
    assert loss.r.item() == pytest.approx(r, abs=1e-7) and loss.stats[
        "mean_certainty"
    ].item() == pytest.approx(r, abs=1e-7)


def test_mylc_r_runs_over_batches_and_stands_still_eval_mode():
    loss = MyLC(window=100)
    z, y = case()
    loss(z[:1], y[:1])
    assert loss.r.item() == pytest.approx(L[0], abs=1e-7)
    loss.eval()(z[1:], y[1:])
    assert loss.r.item() == pytest.approx(L[0], abs=1e-7)
    g = naive.sigmoid(10 * (L[0] - 0.5))  # eval reads the r of training
    assert loss.stats["eps"].item() == pytest.approx(g * L[1], abs=1e-7)
    loss.train()(z[1:], y[1:])
    assert loss.r.item() == pytest.approx((L[0] + L[1]) / 2, abs=1e-7)


def test_mylc_r_is_one_for_a_certain_model_and_zero_for_a_blank_one():
    sure, blank = MyLC(), MyLC()
    sure(torch.eye(3) * 1e4, torch.tensor([0, 1, 2]))
    blank(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    assert (sure.r.item(), blank.r.item()) == (1.0, pytest.approx(0.0, abs=1e-6))
    assert blank.stats["eps"].item() == pytest.approx(0.0, abs=1e-6)


def test_mylc_r_leaves_out_what_is_not_a_number():
    """A NaN row is neither certain nor uncertain: r is the mean over the others, 1 and 0."""
    loss = MyLC()
    z = torch.tensor([[1e4, 0.0, 0.0], [0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"NaN for samples \[1\]"):
        loss(z, torch.tensor([0, 0, 0]))
    assert loss.r.item() == 0.5


def test_r_is_a_reading_and_not_the_state_itself():
    loss = MyLC()
    z, y = case()
    loss(z, y)
    before = loss.r
    kept = before.item()
    loss(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
    assert before.item() == kept != loss.r.item()


# ---------------------------------------------------------------------- value and gradient by loops

CASES = [
    ("ce", {}, lambda: CE(), False),
    ("ls", {"eps": 0.3}, lambda: LabelSmoothing(eps=0.3), False),
    ("cp", {"eps": 0.3}, lambda: ConfidencePenalty(eps=0.3), True),
    ("boot_soft", {"eps": 0.3}, lambda: BootSoft(eps=0.3), True),
    ("boot_soft", {"eps": 0.3}, lambda: BootSoft(eps=0.3, detach=True), False),
    ("boot_hard", {"eps": 0.3}, lambda: BootHard(eps=0.3), False),
    (
        "trust",
        {"g": naive.sigmoid(8 * (0.7 - 0.4))},
        lambda: at(ProSelfLC(b1=8, shift=0.4), 0.7),
        False,
    ),
    (
        "trust",
        {"g": naive.sigmoid(8 * (0.7 - 0.4))},
        lambda: at(ProSelfLC(b1=8, shift=0.4, detach=False), 0.7),
        True,
    ),
    ("trust", {"g": None}, lambda: MyLC(b1=6, rho=0.4), False),
    ("trust", {"g": None}, lambda: MyLC(b1=6, rho=0.4, detach=False), True),
]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize(("kind", "how", "make", "live"), CASES)
def test_value_and_gradient_against_loops(kind, how, make, live, soft):
    """``live``: the gradient also runs through the prediction inside q~ (never through the trust
    eps)."""
    z = (
        torch.randn(5, 4, dtype=torch.float64) * torch.tensor([[0.3], [1], [2], [4], [8]])
    ).requires_grad_()
    y = torch.rand(5, 4, dtype=torch.float64).softmax(-1) if soft else torch.tensor([0, 3, 1, 2, 2])
    qs = y.tolist() if soft else [naive.onehot(i, 4) for i in y.tolist()]
    const = [naive.softmax(row) for row in z.tolist()]
    if how.get("g", 0) is None:
        how = {"g": naive.sigmoid(6 * (sum(map(naive.sure, const)) / 5 - 0.4))}

    def expected(zs):
        total = 0.0
        for row, q, c in zip(zs[0], qs, const, strict=True):
            p = naive.softmax(row)
            total += naive.cross_entropy(naive.refined(kind, q, p if live else c, c, **how), p) / 5
        return total

    loss = make()(z, y)
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected([z.tolist()]), abs=1e-6)
    (slope,) = naive.slope(expected, [z.tolist()])
    torch.testing.assert_close(z.grad, torch.tensor(slope).double(), atol=2e-6, rtol=1e-5)


def formula_parts(eps):
    z, y = case()
    p, q = torch.tensor(P, dtype=torch.float64), torch.nn.functional.one_hot(y, 3).double()
    h = -(p * p.log()).sum(-1, keepdim=True)
    return (
        z,
        y,
        p,
        (1 - eps) * (p - q) / 2,
        eps * p * (p.log() + h) / 2,
    )  # d mean H(q, p) / dz, -d mean H(p) / dz


@pytest.mark.parametrize("eps", [0.2, 0.7])
def test_gradients_by_formula(eps):
    """dH(q, p)/dz = p - q and dH(p)/dz = -p (ln p + H): its term counts in CP and in attached
    Boot-soft only."""
    z, y, p, label, entropy = formula_parts(eps)
    onehot = torch.nn.functional.one_hot(torch.tensor([0, 1]), 3)  # argmax of P
    for loss, expected in [
        (BootSoft(eps=eps, detach=False), label - entropy),
        (BootSoft(eps=eps, detach=True), label),  # p - q~ = (1 - eps)(p - q)
        (BootHard(eps=eps), label + eps * (p - onehot) / 2),
        (ConfidencePenalty(eps=eps), label + entropy),
    ]:
        (grad,) = torch.autograd.grad(loss(z, y), z)
        torch.testing.assert_close(grad, expected, msg=lambda m, loss=loss: f"{loss}: {m}")


def test_hard_target_carries_no_gradient():
    z, y = case()
    assert (
        not BootHard(eps=0.5)
        .refine(Prediction.of(z), torch.nn.functional.one_hot(y, 3).double())
        .requires_grad
    )


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("cls", [LabelSmoothing, ConfidencePenalty, BootSoft, BootHard])
def test_without_epsilon_all_are_cross_entropy(cls):
    z, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    ours, ce = cls(eps=0.0)(z, y), torch.nn.functional.cross_entropy(z, y)
    torch.testing.assert_close(ours, ce)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(ce, z))


def test_ce_and_label_smoothing_are_torchs():
    z, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    for eps in (0.0, 0.1, 1.0):
        expected = torch.nn.functional.cross_entropy(z, y, label_smoothing=eps)
        torch.testing.assert_close(LabelSmoothing(eps=eps)(z, y), expected)


def test_mylc_without_steepness_trusts_by_half():
    z, y = case()
    loss = MyLC(b1=0.0)
    loss(z, y)
    assert loss.stats["eps"].item() == pytest.approx((L[0] + L[1]) / 4, abs=1e-7)


def test_proselflc_trusts_more_with_time_and_mylc_with_certainty():
    z, y = case()
    early, late = (at(ProSelfLC(), t) for t in (0.1, 0.9))
    early(z, y), late(z, y)
    assert early.stats["eps"] < late.stats["eps"]
    few, many = MyLC(), MyLC()
    (
        few(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)),
        many(torch.eye(3) * 50, torch.tensor([0, 1, 2])),
    )
    few(z, y), many(z, y)
    assert few.stats["eps"] < many.stats["eps"]


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cls", [LabelSmoothing, ConfidencePenalty, BootSoft, BootHard])
@pytest.mark.parametrize("eps", [-0.1, 1.1, float("nan")])
def test_epsilon_is_a_share(cls, eps):
    """Except for label smoothing below 0, which is negative label smoothing."""
    if cls is LabelSmoothing and eps < 0:
        assert cls(eps=eps).eps == eps
        return
    with pytest.raises(ValueError, match=f"eps={eps}"):
        cls(eps=eps)


@pytest.mark.parametrize("eps", [-0.4, -6.0])
def test_negative_label_smoothing_is_the_published_sum(eps):
    """(1 - r) CE + r mean_c (-ln p_c); the row of a sure and right network falls without end."""
    ps = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]
    z, y = torch.tensor(ps, dtype=torch.float64).log(), torch.tensor([0, 2])
    expected = [
        (1 - eps) * -math.log(p[k]) + eps * sum(-math.log(x) for x in p) / 3
        for p, k in zip(ps, y.tolist(), strict=True)
    ]
    loss = LabelSmoothing(eps=eps, reduction="none")
    assert loss(z, y).tolist() == pytest.approx(expected)
    sure = [loss(torch.tensor([[s, 0.0, 0.0]]), y[:1]).item() for s in (10.0, 100.0)]
    assert sure[1] < sure[0] < 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rho": 1.5}, "rho=1.5"),
        ({"window": 0}, "window=0"),
        ({"rho": "auto", "noise_rate": 1.0}, "noise_rate=1.0"),
        ({"noise_rate": 0.4}, "noise_rate=0.4 is for rho='auto'"),
    ],
)
def test_mylc_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MyLC(**kwargs)


def test_mylc_auto_asks_for_the_noise_rate():
    with pytest.raises((TypeError, ValueError), match="noise_rate=None"):
        MyLC(rho="auto")


def test_calibrated_certainty_is_that_of_the_distribution_which_it_describes():
    for t, classes in ((0.4, 10), (0.2, 100), (0.5, 2), (0.0, 5)):
        p = torch.full((classes,), t / (classes - 1), dtype=torch.float64)
        p[0] = 1 - t
        certain = Prediction(p.log()).certainty
        assert calibrated_certainty(t, classes) == pytest.approx(float(certain), abs=1e-12)
    assert calibrated_certainty(0.9, 10) == pytest.approx(0.0, abs=1e-12)  # labels say nothing


def test_mylc_auto_trusts_by_half_where_the_model_is_calibrated_to_the_noise():
    t, classes = 0.4, 10
    log_p = torch.full((1, classes), t / (classes - 1)).log()
    log_p[0, 0] = torch.tensor(1 - t).log()
    auto = MyLC(rho="auto", noise_rate=t)
    auto(log_p, torch.tensor([1]))
    r = calibrated_certainty(t, classes)
    assert float(auto.stats["eps"]) == pytest.approx(0.5 * r, abs=1e-5)
    same = MyLC(rho=r)
    torch.testing.assert_close(same(log_p, torch.tensor([1])), auto(log_p, torch.tensor([1])))
    assert "rho=auto" in repr(auto) and "noise_rate=0.4" in repr(auto)
