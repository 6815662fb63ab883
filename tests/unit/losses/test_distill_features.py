"""Terms on features: values by hand, a second derivation in loops, limits, what learns and what
stays frozen, CRD's banks."""

import copy
import math
import pickle

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks
from torch import nn

from kd_plugins import AT, CE, CRD, VID, CAMKDFeatures, FitNet

B, C, S, DIMS = 2, 3, 2, (3, 2)
Y = torch.tensor([2, 0])
Z = torch.zeros(B, C, dtype=torch.float64)


def inputs(seed=0, student=(2, 2), teachers=((4, 4), (2, 2)), b=B):
    """A student's map of 2 channels, maps of 3 and of 2 channels of two teachers."""
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(b, S, *student, generator=g, dtype=torch.float64).requires_grad_()
    return f, [
        torch.randn(b, d, *s, generator=g, dtype=torch.float64)
        for d, s in zip(DIMS, teachers, strict=True)
    ]


def call(loss, f, ts, **extra):
    b = len(f) if isinstance(f, torch.Tensor) else B
    return loss(Z[:1].expand(b, C), Y.repeat(b)[:b], features=f, teacher_features=ts, **extra)


# ----------------------------------------------- a second derivation: nested lists [D][h][w], loops


def pool(m, h, w):
    """Means over the blocks of a map whose sides are multiples."""
    a, b = len(m[0]) // h, len(m[0][0]) // w
    return [
        [
            [
                sum(rows[i * a + u][j * b + v] for u in range(a) for v in range(b)) / (a * b)
                for j in range(w)
            ]
            for i in range(h)
        ]
        for rows in m
    ]


def met(s, t):
    h, w = min(len(s[0]), len(t[0])), min(len(s[0][0]), len(t[0][0]))
    return pool(s, h, w), pool(t, h, w)


def conv(m, layer):
    weight, bias = (
        layer.weight[:, :, 0, 0].tolist(),
        ([0.0] * len(layer.weight) if layer.bias is None else layer.bias.tolist()),
    )
    return [
        [
            [sum(k * m[c][i][j] for c, k in enumerate(row)) + b for j in range(len(m[0][0]))]
            for i in range(len(m[0]))
        ]
        for row, b in zip(weight, bias, strict=True)
    ]


def flat(m):
    return [x for rows in m for row in rows for x in row]


def gap(m):
    return [sum(flat([rows])) / len(flat([rows])) for rows in m]


def relu(m):
    return [[[max(x, 0.0) for x in row] for row in rows] for rows in m]


def mean(xs):
    return sum(xs) / len(xs)


def square(s, t):
    return [(a - b) ** 2 for a, b in zip(flat(s), flat(t), strict=True)]


def fitnet(loss, s, ts):
    return mean(
        [
            mean(square(conv(met(s, t)[0], r), met(s, t)[1]))
            for r, t in zip(loss.regressors, ts, strict=True)
        ]
    )


def attention(m):
    a = [
        mean([m[c][i][j] ** 2 for c in range(len(m))])
        for i in range(len(m[0]))
        for j in range(len(m[0][0]))
    ]
    return [x / math.sqrt(sum(v * v for v in a)) for x in a]


def at(loss, s, ts):
    pairs = [[attention(m) for m in met(s, t)] for t in ts]
    return mean([mean([(a - b) ** 2 for a, b in zip(q, r, strict=True)]) for q, r in pairs])


def vid(loss, s, ts):
    total = 0.0
    for net, alpha, t in zip(loss.means, loss.alphas, ts, strict=True):
        small, goal = met(s, t)
        mu = conv(relu(conv(relu(conv(small, net[0])), net[2])), net[4])
        terms = []
        for c, a in enumerate(alpha.tolist()):
            var = math.log(1 + math.exp(a)) + 1e-5
            terms += [0.5 * (e / var + math.log(var)) for e in square([mu[c]], [goal[c]])]
        total += mean(terms)
    return total / len(ts)


def slope(f, x, h=1e-5):
    """Central differences of f at a tensor, at every element."""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.detach().clone(), x.detach().clone()
        up.view(-1)[i] += h
        down.view(-1)[i] -= h
        grad.view(-1)[i] = (f(up) - f(down)) / (2 * h)
    return grad


@pytest.mark.parametrize(
    "sizes",
    [((2, 2), ((4, 4), (2, 2))), ((4, 4), ((2, 2), (4, 4))), ((2, 4), ((4, 2), (1, 1)))],
    ids=str,
)
@pytest.mark.parametrize(
    ("make", "by_loops"), [(lambda: FitNet(S, DIMS), fitnet), (AT, at), (lambda: VID(S, DIMS), vid)]
)
def test_by_loops(make, by_loops, sizes):
    """Each sample's value, and the gradient of the mean, with maps larger, smaller and neither."""
    loss = make().double()
    for p in loss.parameters():
        nn.init.normal_(p)
    loss.reduction = "none"
    f, ts = inputs(1, *sizes)
    values = call(loss, f, ts)
    expected = [by_loops(loss, f[i].tolist(), [t[i].tolist() for t in ts]) for i in range(B)]
    assert values.tolist() == pytest.approx(expected, rel=1e-9)
    values.mean().backward()
    far = slope(
        lambda x: mean(
            [by_loops(loss, x[i].tolist(), [t[i].tolist() for t in ts]) for i in range(B)]
        ),
        f,
    )
    torch.testing.assert_close(f.grad, far, atol=1e-8, rtol=1e-5)


def heads(dims=DIMS):
    return [nn.Linear(max(d, 1), C) for d in dims]


LEARNING = [
    lambda d: FitNet(S, d),
    lambda d: VID(S, d),
    lambda d: CRD(9, S, d, feat_dim=4),
    lambda d: CAMKDFeatures(S, d, heads(d)),
]


@pytest.mark.parametrize("make", LEARNING)
def test_all_that_learns_has_a_gradient(make):
    """FitNet-MKD's public code makes a new tensor of the list of hints: nothing behind it ever
    learns."""
    loss = make(DIMS).double()
    f, ts = inputs(2)
    extra = {"index": torch.tensor([4, 7])} if "index" in loss.required_inputs else {}
    call(loss, f, ts, **extra).backward()
    assert f.grad.abs().max() > 0
    parameters = list(loss.parameters())
    assert len(parameters) >= 4 and all(
        p.grad is not None and p.grad.abs().max() > 0 for p in parameters
    )


@pytest.mark.parametrize("make", [*LEARNING, lambda d: AT()])
def test_order_of_teachers_is_irrelevant(make):
    """Each starts from the student's map as it came. CA-MKD's code pools what it left for the
    last one: 4 -> 1 -> 2, not 4 -> 2."""
    one = make(DIMS).double()
    other = copy.deepcopy(one)
    other.teacher_dims = DIMS[::-1]
    for name, part in one.named_children():  # the parts of the teachers, in the other order
        setattr(other, name, type(part)(reversed(list(copy.deepcopy(part)))))
    f, ts = inputs(3, (4, 4), ((1, 1), (2, 2)), b=4)
    extra = {"index": torch.arange(4)} if "index" in one.required_inputs else {}
    torch.manual_seed(1)
    value = call(one, f, ts, **extra)
    torch.manual_seed(1)
    torch.testing.assert_close(call(other, f, ts[::-1], **extra), value)


@pytest.mark.parametrize("make", LEARNING)
def test_what_does_not_fit_is_named(make):
    for dims in ((), (3, 0)):
        with pytest.raises(ValueError, match=r"student_dim=2, teacher_dims=\("):
            make(dims)
    loss = make(DIMS).double()
    f, ts = inputs()
    extra = {"index": torch.tensor([4, 7])} if "index" in loss.required_inputs else {}
    for teachers, found in (
        (ts[::-1], r"\(2, 3\)"),
        (ts[:1], r"\(3,\)"),
        ([*ts, ts[0]], r"\(3, 2, 3\)"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"student_dim=2 and teacher_dims=\(3, 2\), got maps with 2 and {found} channels",
        ):
            call(loss, f, teachers, **extra)
    with pytest.raises(ValueError, match=r"student_dim=2 .*got maps with 3"):
        call(loss, ts[0], ts, **extra)
    for wrong, found in ((f.mean((2, 3)), r"\[2, 2\]"), (inputs(b=3)[0], r"\[3, 2, 2, 2\]")):
        with pytest.raises(
            ValueError, match=rf"expected a map \[2, D, h, w\] at layer -\d, got {found}"
        ):
            loss(Z, Y, features=wrong, teacher_features=ts, **extra)


# ---------------------------------------------------------------------------------- FitNet, AT, VID


def row(*xs):
    """One sample, one channel, a map of one row."""
    return torch.tensor([[[xs]]], dtype=torch.float64)


def test_fitnet_by_hand():
    """r(F) = 2 F + 1: of (1, 2) it is (3, 5), against (3, 3); a second teacher (5, 5) after r =
    F + 4."""
    loss = FitNet(1, (1, 1)).double()
    for r, (w, b) in zip(loss.regressors, ((2.0, 1.0), (1.0, 4.0)), strict=True):
        nn.init.constant_(r.weight, w), nn.init.constant_(r.bias, b)
    value = call(loss, row(1.0, 2.0), [row(3.0, 3.0), row(5.0, 5.0)])
    assert value.item() == ((0 + 4) / 2 + (0 + 1) / 2) / 2
    assert [loss.stats[f"teacher_{k}"].item() for k in range(2)] == [2.0, 0.5]


def test_a_teacher_that_is_matched_costs_nothing():
    """One teacher, given as a number of channels; its map is what the regressor makes of the
    student's."""
    loss = FitNet(S, 3).double()
    f, _ = inputs()
    assert call(loss, f, [loss.regressors[0](f).detach()]) == 0.0


@pytest.mark.parametrize(("layer", "read"), [(-2, 1), (-1, 2), (0, 0)])
def test_the_layer_is_read_of_all(layer, read):
    loss = FitNet(S, DIMS, layer=layer).double()
    maps = [inputs(seed) for seed in range(3)]
    by_layer = call(loss, [f for f, _ in maps], [[ts[k] for _, ts in maps] for k in range(2)])
    assert by_layer == call(loss, *maps[read])
    assert by_layer != call(loss, *maps[read - 1])


def test_a_layer_that_is_not_there():
    f, ts = inputs()
    for loss in (
        FitNet(S, DIMS, layer=-4).double(),
        FitNet(S, DIMS, layer=3).double(),
        AT(layers=(-4,)),
    ):
        with pytest.raises(ValueError, match=r"reads layer (-4|3), got the maps of 3 layers"):
            call(loss, [f] * 3, [[t] * 3 for t in ts])
    with pytest.raises(ValueError, match=r"layers=\(\)"):
        AT(layers=())
    with pytest.raises(ValueError, match="at least one teacher"):
        call(AT(), f, [])


def test_at_sums_layers_and_counts_one_map_once():
    maps = [inputs(seed) for seed in range(4)]
    several = call(AT(), [f for f, _ in maps], [[ts[k] for _, ts in maps] for k in range(2)])
    torch.testing.assert_close(several, sum(call(AT(), *m) for m in maps[1:]))
    last = call(AT(), *maps[3])
    torch.testing.assert_close(
        call(AT(), maps[3][0], [[ts[k] for _, ts in maps] for k in range(2)]), last
    )
    torch.testing.assert_close(call(AT(), [f for f, _ in maps], maps[3][1]), last)


def test_at_sees_where_and_not_how_much():
    f, ts = inputs()
    torch.testing.assert_close(call(AT(), 1e3 * f, [1e-3 * t for t in ts]), call(AT(), f, ts))
    torch.testing.assert_close(
        call(AT(), f, [-7.0 * f.detach()] * 2), torch.zeros((), dtype=torch.float64)
    )


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_on_empty_maps(scale, dtype):
    f, ts = inputs()
    f, ts = (scale * f).detach().to(dtype).requires_grad_(), [t.to(dtype) for t in ts]
    value = call(AT(), f, [ts[0], 0 * ts[1]])
    value.backward()
    assert value.isfinite() and f.grad.isfinite().all()


def test_vid_with_one_fixed_variance_is_a_scaled_hint():
    hint, loss = FitNet(S, DIMS).double(), VID(S, DIMS, variance=4.0).double()
    loss.means = hint.regressors
    f, ts = inputs(5)
    value = call(loss, f, ts)
    assert value.item() == pytest.approx(call(hint, f, ts).item() / 8 + math.log(4) / 2, rel=1e-6)
    assert loss.stats["variance_1"].item() == pytest.approx(4)


def test_the_best_variance_of_a_channel_is_its_mean_squared_error():
    loss = VID(S, DIMS).double()
    f, ts = inputs(6)
    for k, (s, t) in enumerate(loss.pairs(Z, [f], [[t] for t in ts])):
        error = ((loss.means[k](s) - t) ** 2).mean((0, 2, 3)).detach()
        loss.alphas[k].data = torch.log(torch.expm1(error - loss.floor))
    best = call(loss, f, ts)
    best.backward()
    assert all(alpha.grad.abs().max() < 1e-12 for alpha in loss.alphas)
    loss.alphas[1].data[0] += 0.1
    assert call(loss, f, ts) > best


@pytest.mark.parametrize("variance", [1e-3, 5.0, 1e3])
def test_vid_starts_at_the_variance(variance):
    assert VID(S, DIMS, variance=variance).alphas[0].dtype == torch.float32
    loss = VID(S, DIMS, variance=variance)
    call(loss.double(), *inputs())
    assert loss.stats["variance_0"].item() == pytest.approx(variance, rel=1e-5)


def test_bad_variance():
    with pytest.raises(ValueError, match=r"variance=0\.0"):
        VID(S, DIMS, variance=0.0)


# ---------------------------------------------------------------------------------------------- CRD


def unit(v):
    return [x / math.sqrt(sum(a * a for a in v)) for x in v]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def nce(banks, anchors, index, negatives, n, tau, z, momentum):
    """The loss of each sample, Z, and the banks after it. Everything is a pair: of the student,
    of the teacher."""
    powers = [
        [
            [math.exp(dot(v, banks[1 - a][j]) / tau) for j in (i, *negatives)]
            for v, i in zip(anchors[a], index, strict=True)
        ]
        for a in range(2)
    ]
    z = z or [n * mean([x for line in p for x in line]) for p in powers]
    noise, losses = len(negatives) / n, []
    for b in range(len(index)):
        total = 0.0
        for a in range(2):
            p = [x / z[a] for x in powers[a][b]]
            total -= math.log(p[0] / (p[0] + noise)) + sum(
                math.log(noise / (x + noise)) for x in p[1:]
            )
        losses.append(total)
    banks = copy.deepcopy(banks)
    for a in range(2):
        for v, i in zip(anchors[a], index, strict=True):
            banks[a][i] = unit(
                [momentum * m + (1 - momentum) * x for m, x in zip(banks[a][i], v, strict=True)]
            )
    return losses, z, banks


def test_crd_by_loops():
    """Two steps with one teacher each for two: the second one reads what the first one wrote,
    and its Z."""
    n, tau, momentum = 9, 0.3, 0.25
    loss = CRD(
        n, S, DIMS, feat_dim=4, negatives=5, tau=tau, momentum=momentum, reduction="none"
    ).double()
    zs, banks = [None, None], [[bank.rows.tolist() for bank in c.banks] for c in loss.contrasts]
    for step, index in enumerate(([4, 7], [7, 0])):
        f, ts = inputs(step, (2, 4), ((4, 4), (1, 3)))
        torch.manual_seed(step)
        negatives = torch.randint(n, (5,)).tolist()
        torch.manual_seed(step)
        values = call(loss, f, ts, index=torch.tensor(index))
        expected = []
        for k, c in enumerate(loss.contrasts):
            anchors = [
                [
                    unit(
                        [
                            dot(w, gap(m)) + b
                            for w, b in zip(e.weight.tolist(), e.bias.tolist(), strict=True)
                        ]
                    )
                    for m in maps.tolist()
                ]
                for e, maps in zip(c.embeds, (f, ts[k]), strict=True)
            ]
            losses, zs[k], banks[k] = nce(
                banks[k], anchors, index, negatives, n, tau, zs[k], momentum
            )
            expected.append(losses)
            assert c.z.tolist() == pytest.approx(zs[k], rel=1e-6)
            for bank, rows in zip(c.banks, banks[k], strict=True):
                torch.testing.assert_close(bank.rows, torch.tensor(rows))
        assert values.tolist() == pytest.approx(
            [mean(v) for v in zip(*expected, strict=True)], rel=1e-6
        )


def test_a_bank_is_read_before_it_is_written():
    """And the student is compared with the teacher's bank: its own would make a perfect match of
    every sample."""
    loss = CRD(9, S, 3, feat_dim=4, negatives=5, momentum=0.0).double()
    contrast = loss.contrasts[0]
    f, ts = inputs()
    index = torch.tensor([1, 2])
    before = [bank.rows.clone() for bank in contrast.banks]
    call(loss, f, ts[:1], index=index)
    for bank, old, embed, m in zip(
        contrast.banks, before, contrast.embeds, (f, ts[0]), strict=True
    ):
        changed = (bank.rows != old).any(1).nonzero().flatten().tolist()
        assert changed == [1, 2]
        torch.testing.assert_close(
            bank.rows[index], nn.functional.normalize(embed(m.mean((2, 3))), dim=1).detach().float()
        )


def test_banks_begin_equal_everywhere():
    """DDP does not send them: processes with seeds of their own must not begin with banks of
    their own."""
    torch.manual_seed(1)
    one = CRD(9, S, DIMS, feat_dim=64)
    torch.manual_seed(2)
    other = CRD(9, S, DIMS, feat_dim=64)
    rows = [[bank.rows for c in loss.contrasts for bank in c.banks] for loss in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert not torch.equal(one.contrasts[0].embeds[0].weight, other.contrasts[0].embeds[0].weight)
    assert len({tuple(r[0].tolist()) for r in rows[0]}) == 4  # no two banks alike
    assert torch.stack(rows[0]).square().sum(-1).mean().item() == pytest.approx(1, abs=0.1)


def test_z_is_of_the_first_batch():
    loss = CRD(9, S, 3, feat_dim=4)
    f, ts = inputs()
    spoiled = f.detach().clone()
    spoiled[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        call(loss.double(), spoiled, ts[:1], index=torch.tensor([1, 2]))
    assert loss.contrasts[0].z[0] == 0  # what is not a number is not kept
    loss.contrasts[0].z.zero_()
    call(loss.eval(), 9 * f, ts[:1], index=torch.tensor([1, 2]))
    assert torch.equal(loss.train().contrasts[0].z, torch.zeros(2))
    call(loss, f, ts[:1], index=torch.tensor([1, 2]))
    z = loss.contrasts[0].z.clone()
    call(loss, 9 * f, ts[:1], index=torch.tensor([1, 5]))
    assert (z > 0).all() and torch.equal(loss.contrasts[0].z, z)


def test_negatives_are_no_more_than_there_are():
    assert [CRD(9, S, 3, negatives=k).negatives for k in (3, 8, 9, 16384)] == [3, 8, 8, 8]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_samples": 1}, "num_samples=1"),
        ({"negatives": 0}, "negatives=0"),
        ({"tau": 0.0}, r"tau=0\.0"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"momentum": -0.1}, r"momentum=-0\.1"),
    ],
)
def test_bad_values_of_crd(kwargs, match):
    with pytest.raises(ValueError, match=match):
        CRD(**{"num_samples": 9, "student_dim": S, "teacher_dims": 3} | kwargs)


def test_a_position_outside_the_banks():
    f, ts = inputs()
    with pytest.raises(ValueError, match="index 9 is outside the table of num_samples=9"):
        call(CRD(9, S, DIMS).double(), f, ts, index=torch.tensor([0, 9]))


SIZES = [(3, 1), (2, 4), (2, 2)]  # samples of rank 0 and of rank 1 in each step
WORKER = """
from kd_plugins import CRD
torch.manual_seed(0)
loss = CRD(12, 2, (3, 2), feat_dim=4, negatives=6, tau=0.5)
for k, step in enumerate(steps):
    index, f, *ts = (mine(parts) for parts in step)
    loss.train()
    torch.manual_seed(k)  # the same negatives on both, so that one process can be compared
    z, y = torch.zeros(len(f), 3), torch.zeros(len(f), dtype=torch.long)
    value = loss(z, y, features=f.requires_grad_(), teacher_features=ts, index=index)
    if rank == 0:  # evaluation on one process only: it must not wait for the others
        loss.eval()(z, y, features=f, teacher_features=ts, index=index)
    tables = {n: t for n, t in loss.state_dict().items() if n.endswith((".rows", ".z"))}
    state = {n: t.flatten().tolist() for n, t in tables.items()}
    seen.append([value.item() * len(f), state])
"""


def test_two_processes_hold_one_bank(tmp_path):
    """Equal to the last bit on both, and what one process has on the joined batch, with batches
    of unequal size."""
    steps = []
    for sizes in SIZES:
        order = torch.randperm(12)
        maps = [[torch.randn(n, d, 2, 2) for n in sizes] for d in (2, 3, 2)]
        steps.append([[order[: sizes[0]], order[sizes[0] : sum(sizes)]], *maps])
    results = on_ranks(WORKER, steps, tmp_path)
    for (a, first), (b, second), (whole, single) in zip(*results, strict=True):
        assert first == second and len(single) == 6
        for key, values in single.items():
            assert first[key] == pytest.approx(values, rel=1e-5, abs=1e-6), key
        assert a + b == pytest.approx(whole, rel=1e-5)
    assert results[0][0][1] != results[0][-1][1]


# ---------------------------------------------------------------------------- CA-MKD's feature term


def camkd(loss, head_weights, f, ts, target, scale):
    """Values of all samples, for a batch is normalised by its own statistics; and the weights
    [K][B]."""
    count, losses, distances = len(ts), [], []
    for (conv1, norm, _), (w, b), t in zip(loss.embeds, head_weights, ts, strict=True):
        pairs = [met(s, goal) for s, goal in zip(f.tolist(), t.tolist(), strict=True)]
        maps = [conv(s, conv1) for s, _ in pairs]
        for c in range(len(maps[0])):
            values = [x for m in maps for x in flat([m[c]])]
            mu, var = mean(values), mean([(x - mean(values)) ** 2 for x in values])
            g, beta = norm.weight[c].item(), norm.bias[c].item()
            for m in maps:
                m[c] = [
                    [g * (x - mu) / math.sqrt(var + 1e-5) + beta for x in line] for line in m[c]
                ]
        maps = [relu(m) for m in maps]
        logits = [[dot(line, gap(m)) + bias for line, bias in zip(w, b, strict=True)] for m in maps]
        losses.append(
            [naive.cross_entropy(q, naive.softmax(z)) for q, z in zip(target, logits, strict=True)]
        )
        squares = [square(m, goal) for m, (_, goal) in zip(maps, pairs, strict=True)]
        distances.append([mean(x) / count if scale == "code" else sum(x) for x in squares])
    weights = [
        [
            (1 - math.exp(losses[k][i]) / sum(math.exp(other[i]) for other in losses)) / (count - 1)
            for i in range(len(target))
        ]
        for k in range(count)
    ]
    return [
        sum(weights[k][i] * distances[k][i] for k in range(count)) for i in range(len(target))
    ], weights


@pytest.mark.parametrize("scale", ["code", "paper"])
def test_camkd_features_by_loops(scale):
    """With a soft label, and the gradient through the weights."""
    linear = heads()
    loss = CAMKDFeatures(S, DIMS, linear, scale=scale, reduction="none").double()
    for embed in loss.embeds:
        nn.init.normal_(embed[1].weight), nn.init.normal_(embed[1].bias)
    known = [(h.weight.tolist(), h.bias.tolist()) for h in linear]
    f, ts = inputs(7)
    target = [[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]
    values = loss(Z, torch.tensor(target), features=f, teacher_features=ts)
    expected, weights = camkd(loss, known, f, ts, target, scale)
    assert values.tolist() == pytest.approx(expected, rel=1e-6)
    assert [loss.stats[f"weight_{k}"].item() for k in range(2)] == pytest.approx(
        [mean(w) for w in weights], rel=1e-6
    )
    values.mean().backward()
    far = slope(lambda x: mean(camkd(loss, known, x, ts, target, scale)[0]), f)
    torch.testing.assert_close(f.grad, far, atol=1e-6, rtol=1e-4)


def gradient(loss, seed=8):
    f, ts = inputs(seed)
    return torch.autograd.grad(call(loss, f, ts), f)[0]


def test_weights_as_constants():
    """The same value, another gradient: that of Σ_k w_k d_k with w held."""
    loss = CAMKDFeatures(S, DIMS, [nn.Linear(3, C), nn.Linear(2, C)]).double()
    held = copy.deepcopy(loss)
    held.detach_weights = True
    f, ts = inputs(8)
    assert call(loss, f, ts) == call(held, f, ts)
    assert (gradient(loss) - gradient(held)).abs().max() > 1e-5
    total = 0.0
    ours = [
        embed(s)
        for embed, (s, _) in zip(held.embeds, held.pairs(Z, [f], [[t] for t in ts]), strict=True)
    ]
    doubt = torch.stack(
        [
            nn.functional.cross_entropy(h(s), Y, reduction="none")
            for h, s in zip(held.heads, ours, strict=True)
        ]
    )
    for w, s, (_, t) in zip(
        1 - doubt.softmax(0), ours, held.pairs(Z, [f], [[t] for t in ts]), strict=True
    ):
        total = total + (w.detach() * (s - t).square().flatten(1).mean(1) / 2).mean()
    torch.testing.assert_close(gradient(held), torch.autograd.grad(total, f)[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_teachers_weigh_the_same(count):
    """1/K each: the mean of equal distances. One teacher is no special case: in public code its
    weight is 0 / 0."""
    loss = CAMKDFeatures(S, [3] * count, [nn.Linear(3, C)] * count, scale="paper").double()
    for embed in loss.embeds:
        embed.load_state_dict(loss.embeds[0].state_dict())
    f, ts = inputs(9)
    value = call(loss, f, ts[:1] * count)
    small, goal = loss.pairs(Z, [f], [ts[:1]] * count)[0]
    torch.testing.assert_close(
        value, (loss.embeds[0](small) - goal).square().flatten(1).sum(1).mean()
    )
    assert [w.item() for w in loss.stats.values()] == pytest.approx([1 / count] * count)


def test_the_teacher_that_reads_the_label_weighs_more():
    sure, lost = nn.Linear(3, C), nn.Linear(3, C)
    for head, towards in ((sure, 0), (lost, 1)):
        nn.init.zeros_(head.weight)
        head.bias.data = 5.0 * nn.functional.one_hot(torch.tensor(towards), C).float()
    loss = CAMKDFeatures(S, (3, 3), [sure, lost]).double()
    f, ts = inputs(9)
    loss(Z, torch.zeros(B, dtype=torch.long), features=f, teacher_features=[ts[0], ts[0]])
    assert loss.stats["weight_0"].item() == pytest.approx(1 - 1 / (1 + math.exp(5)))


def test_scales():
    """One teacher of 3 channels, 2 x 2 positions: the sum is 12 times the mean; two of them: and
    twice again."""
    for count in (1, 2):
        code = CAMKDFeatures(S, [3] * count, [nn.Linear(3, C) for _ in range(count)]).double()
        paper = copy.deepcopy(code)
        paper.scale = "paper"
        f, ts = inputs(9)
        torch.testing.assert_close(
            call(paper, f, ts[:1] * count), 12 * count * call(code, f, ts[:1] * count)
        )


class Deep(nn.Module):
    """A classifier that is not a linear layer; it pools by itself, and dropout would show it in
    training mode."""

    def __init__(self, linear):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), linear

    def forward(self, x):
        return self.linear(self.drop(x.mean((2, 3))))


@pytest.mark.parametrize("kind", ["linear", "no bias", "module", "function"])
def test_heads_stay_frozen(kind):
    """Not trained, not in the checkpoint, copied as they stand; with the loss on its way to a
    dtype, a pickle, a copy."""
    linear = [nn.Linear(d, C, bias=kind != "no bias") for d in DIMS]
    given = [Deep(h) for h in linear] if kind in ("module", "function") else linear
    loss = (
        CAMKDFeatures(
            S, DIMS, [g.double().eval().forward for g in given] if kind == "function" else given
        )
        .double()
        .train()
    )
    plain = CAMKDFeatures(S, DIMS, linear).double()
    plain.load_state_dict(loss.state_dict())
    f, ts = inputs(10)
    value = call(loss, f, ts)
    torch.testing.assert_close(value, call(plain, f, ts), rtol=1e-6, atol=0)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert call(other, f, ts) == value
    value.backward()
    assert (
        all(key.startswith("embeds.") for key in loss.state_dict())
        and len(list(loss.parameters())) == 6
    )
    assert all(
        p.requires_grad for h in linear for p in h.parameters()
    )  # the teacher's own are as they were
    assert all(p.grad is None for h in linear for p in h.parameters())
    if kind != "function":  # a function is used as it is
        assert not any(
            p.requires_grad for h in loss.heads for own in h.hidden for p in own.parameters()
        )
        with torch.no_grad():
            linear[0].weight += 1.0
        assert call(loss, f, ts) == value


def test_heads_that_do_not_fit():
    for wrong, match in (
        ([nn.Linear(3, C)], "2 of teacher_dims, 1 of heads"),
        ([nn.Linear(2, C), nn.Linear(3, C)], "from 3 features to 3 classes"),
        ([nn.Linear(3, C), nn.Linear(2, 7)], "from 2 features to 3 classes"),
    ):
        with pytest.raises(ValueError, match=match):
            CAMKDFeatures(S, DIMS, wrong)
    with pytest.raises(ValueError, match="scale='codes'"):
        CAMKDFeatures(S, DIMS, heads(), scale="codes")
    f, ts = inputs()
    with pytest.raises(ValueError, match=r"num_classes=7, got logits \[2, 3\]"):
        call(CAMKDFeatures(S, DIMS, [nn.Linear(d, 7) for d in DIMS]), f, ts)


def test_a_full_objective_is_a_sum():
    f, ts = inputs(11)
    term = CAMKDFeatures(S, DIMS, heads()).double()
    z = torch.randn(B, C, dtype=torch.float64)
    total = (CE() + 50 * term)(z, Y, features=f, teacher_features=ts)
    torch.testing.assert_close(total, CE()(z, Y) + 50 * call(term, f, ts))
