"""Influence: scores by hand, by autograd, and by retraining without each sample; the mask."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import reference as naive
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from kd_plugins.audit import influence as selection
from kd_plugins.audit import influence_scores, select_lowest


class Net(nn.Module):
    """timm's interface on vectors. Dropout and batch norm reveal a missing ``eval()``."""

    def __init__(self, dim=4, classes=3, bias=True):
        super().__init__()
        self.norm, self.drop, self.head = (
            nn.BatchNorm1d(dim),
            nn.Dropout(0.5),
            nn.Linear(dim, classes, bias=bias),
        )

    def forward_features(self, x):
        return self.norm(x)

    def forward_head(self, x, pre_logits=False):
        x = self.drop(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Linear(Net):
    """Softmax regression: logits = W x + b, in float64."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.drop = nn.Identity(), nn.Identity()
        self.double()


class Rows(Dataset):
    """Items like those of ``ImageView``."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": int(self.y[i]), "index": i}


def batches(x, y, size=7):
    return list(zip(x.split(size), y.split(size), strict=True))


def draw(n=25, dim=4, classes=3, dtype=torch.float64):
    return torch.randn(n, dim, dtype=dtype), torch.randint(classes, (n,))


def by_autograd(model, train, val, damping=None):
    """-g_valᵀ (H + damping)⁻¹ g_i by autograd, sample by sample."""
    model, params = (
        model.eval(),
        [p for p in model.get_classifier().parameters() if p.requires_grad],
    )

    def gradient(x, y, **how):
        return torch.autograd.grad(F.cross_entropy(model(x), y), params, **how)

    def flat(parts):
        return torch.cat([part.flatten() for part in parts])

    direction = flat(gradient(*val))
    if damping is not None:
        first = flat(gradient(*train, create_graph=True))
        rows = [flat(torch.autograd.grad(g, params, retain_graph=True)) for g in first]
        direction = torch.linalg.solve(
            torch.stack(rows) + damping * torch.eye(len(rows)).to(first), direction
        )
    return torch.stack(
        [-direction @ flat(gradient(x[None], y[None])) for x, y in zip(*train, strict=True)]
    ).detach()


# ------------------------------------------------------------------------------------------- scores


def test_by_hand():
    """W = 0, so p = 1/3, and p - y is (-2, 1, 1)/3 for class 0 and (1, -2, 1)/3 for class 1.

    The held-out sample has h = 1, y = 0, so

    g_val · g_i = (p - y)_val · (p - y)_i (h_val h_i + 1) is 6/9 (2 + 1) = 2 for the first sample,
    which helps, and -3/9 (3 + 1) = -4/3 for the second.
    """
    model = Linear(1)
    nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)
    val = [(torch.tensor([[1.0]]).double(), torch.tensor([0]))]
    train = [(torch.tensor([[2.0], [3.0]]).double(), torch.tensor([0, 1]))]
    assert influence_scores(model, train, val).tolist() == pytest.approx([-2.0, 4 / 3], abs=1e-12)


def test_against_loops():
    """The bias is a feature of 1. The held-out gradient is a mean over samples; labels are soft."""
    model, (x, y), (u, _) = Linear(), draw(6), draw(5)
    soft = torch.rand(5, 3, dtype=torch.float64).softmax(1)

    def parts(x, q):
        p = naive.softmax(model(x).tolist())
        return [(a - b) * h for a, b in zip(p, q, strict=True) for h in [*x.tolist(), 1.0]]

    g_val = [
        sum(column) / 5
        for column in zip(
            *(parts(a, q) for a, q in zip(u, soft.tolist(), strict=True)), strict=True
        )
    ]
    expected = [
        -sum(s * t for s, t in zip(g_val, parts(a, naive.onehot(int(c), 3)), strict=True))
        for a, c in zip(x, y, strict=True)
    ]
    got = influence_scores(model, batches(x, y, 4), batches(u, soft, 4))
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [None, 0.01, 1.0])
def test_against_autograd(bias, damping):
    model, train, val = Linear(bias=bias), draw(25), draw(11)
    how = {} if damping is None else {"exact": True, "damping": damping}
    got = influence_scores(model, batches(*train), batches(*val), **how)
    torch.testing.assert_close(got, by_autograd(model, train, val, damping), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_networks_against_autograd(name):
    model = timm.create_model(name, num_classes=3, drop_rate=0.5)
    size = model.default_cfg["input_size"][1:]
    train, val = ((torch.randn(n, 3, *size), torch.arange(n) % 3) for n in (6, 4))
    got = influence_scores(model, batches(*train, 4), batches(*val, 3))
    expected = by_autograd(model, train, val)
    assert got.dtype == torch.float32 and got.std() > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_much_damping_is_the_first_order():
    model, train, val = Linear(), draw(), draw()
    loaders = batches(*train), batches(*val)
    exact = influence_scores(model, *loaders, exact=True, damping=1e6)
    torch.testing.assert_close(exact * 1e6, influence_scores(model, *loaders), rtol=1e-5, atol=1e-8)


# -------------------------------------------------------------------------- leave one out, for real

DECAY = 0.03


def newton(x, y, weight, steps=12):
    """Minimise Σ_i w_i H(y_i, softmax(W [x_i, 1])) + decay/2 ‖W‖².

    For each row w of ``weight`` [R, N]; returns W [R, C, D + 1].
    """
    one = F.pad(x, (0, 1), value=1.0)
    classes, dim = 3, one.shape[1]

    def objective(flat, w):
        losses = F.cross_entropy(one @ flat.view(classes, dim).T, y, reduction="none")
        return (w * losses).sum() + DECAY / 2 * flat.square().sum()

    grad = torch.func.grad(objective)
    slope, bend = torch.func.vmap(grad), torch.func.vmap(torch.func.jacrev(grad))
    flat = torch.zeros(len(weight), classes * dim, dtype=x.dtype)
    for _ in range(steps):
        flat = flat - torch.linalg.solve(bend(flat, weight), slope(flat, weight))
    assert slope(flat, weight).abs().max() < 1e-12  # converged
    return flat.view(-1, classes, dim)


@pytest.fixture(scope="module", params=range(4))
def left_out(request):
    """A model of 60 samples, a fifth mislabelled, and the held-out loss without each of them."""
    g = torch.Generator().manual_seed(request.param)
    centres = 1.5 * torch.randn(3, 4, generator=g, dtype=torch.float64)

    def sample(n):
        y = torch.arange(n) % 3
        return centres[y] + torch.randn(n, 4, generator=g, dtype=torch.float64), y

    (x, clean), (u, v) = sample(60), sample(300)
    wrong = torch.arange(60) % 5 == 0
    y = torch.where(wrong, (clean + 1) % 3, clean)
    weights = torch.cat([torch.ones(1, 60).double(), 1.0 - torch.eye(60).double()])
    fitted = newton(x, y, weights / weights.sum(1, keepdim=True))
    held_out = [F.cross_entropy(F.pad(u, (0, 1), value=1.0) @ w.T, v).item() for w in fitted]
    change = torch.tensor(held_out[1:]) - held_out[0]
    model = Linear()
    with torch.no_grad():
        model.head.weight.copy_(fitted[0, :, :-1]), model.head.bias.copy_(fitted[0, :, -1])
    return model, batches(x, y), batches(u, v), change.double(), wrong


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_scores_say_what_leaving_a_sample_out_does(left_out):
    model, train, val, change, _ = left_out
    exact = influence_scores(model, train, val, exact=True, damping=DECAY)
    first = influence_scores(model, train, val)
    figures = correlation(-exact, change), correlation(-first, change)
    print("leave-one-out correlation: exact {:.3f}, first order {:.3f}".format(*figures))
    assert figures[0] > 0.95 and figures[1] > 0.8
    slope = (-exact / 60 * change).sum() / change.square().sum()  # the size, not only the order
    assert slope.item() == pytest.approx(
        1.0, abs=0.2
    )  # below 1: a refit moves further than its first order


@pytest.mark.parametrize("exact", [True, False])
def test_wrong_labels_score_higher(left_out, exact):
    model, train, val, _, wrong = left_out
    scores = influence_scores(model, train, val, exact=exact, damping=DECAY)
    assert scores[wrong].mean() > 0 > scores[~wrong].mean()
    kept = select_lowest(scores, 0.8)
    assert (kept & wrong).sum() <= 6  # of 12; a random mask keeps 9 or 10


# --------------------------------------------------------------------------------- rows and loaders


@pytest.mark.parametrize("exact", [True, False])
def test_the_index_puts_each_score_in_its_row(exact):
    model, train, val = Linear(), draw(), draw()
    expected = influence_scores(model, batches(*train), batches(*val), exact=exact)
    loaders = [
        DataLoader(Rows(*data), batch_size=6, shuffle=shuffle)
        for data, shuffle in ((train, True), (val, False))
    ]
    torch.testing.assert_close(influence_scores(model, *loaders, exact=exact), expected)


def test_rows_that_never_came_up_are_inf_and_said_so():
    model, train, val = Linear(), draw(), batches(*draw())
    whole = influence_scores(model, batches(*train), val)
    for loader in (
        DataLoader(list(zip(*train, strict=True)), batch_size=6, drop_last=True),
        DataLoader(Subset(Rows(*train), range(24)), batch_size=6),
    ):
        if isinstance(loader.dataset, Subset):
            loader.dataset.indices = [*range(23), 24]
            rows = [23]
        else:
            rows = [24]
        with pytest.warns(UserWarning, match="1 of 25 samples never came up"):
            scores = influence_scores(model, loader, val)
        expected = whole.clone()
        expected[rows] = math.inf
        torch.testing.assert_close(scores, expected)
        assert not select_lowest(scores, 0.95)[rows].any()


@pytest.mark.parametrize("how", ["shuffled", "dealt out"])
def test_a_shuffled_loader_without_index_is_refused(how):
    data = list(zip(*draw(), strict=True))
    sampler = (
        torch.utils.data.DistributedSampler(data, 2, 0, shuffle=False)
        if how == "dealt out"
        else None
    )
    loader = DataLoader(data, batch_size=5, shuffle=sampler is None, sampler=sampler)
    with pytest.raises(ValueError, match="no score could be assigned to its sample"):
        influence_scores(Linear(), loader, batches(*draw()))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training):
    """It runs in eval mode; modes, weights and statistics are restored, also after an error."""
    model, train, val = Net().train(training), draw(dtype=torch.float32), draw(dtype=torch.float32)
    model.norm.eval()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    scores = influence_scores(model, batches(*train), batches(*val))
    assert torch.equal(
        scores, influence_scores(model, batches(*train), batches(*val))
    )  # no dropout
    with pytest.raises(KeyError):
        influence_scores(model, [{"images": train[0]}], batches(*val))
    assert [m.training for m in (model, model.norm, model.drop, model.head)] == [
        training,
        False,
        training,
        training,
    ]
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not scores.requires_grad and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(scores, by_autograd(model, train, val))


class Pair(Net):
    def get_classifier(self):
        return self.head, self.head


class Scaled(Net):
    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else 2.0 * self.head(x)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Linear(4, 3), "Linear: .*timm's forward_features.*it lacks them"),
        (Pair(), "Pair: .*its classifier is tuple"),
        (
            Scaled(),
            r"Scaled: expected logits that are its classifier applied to its features \[7, 4\]",
        ),
    ],
)
def test_networks_without_one_linear_classifier_are_refused(model, match):
    data = batches(*draw(dtype=torch.float32))
    with pytest.raises(TypeError, match=match):
        influence_scores(model, data, data)


def test_what_cannot_be_computed_is_refused(monkeypatch):
    model, data = Linear(), batches(*draw())
    with pytest.raises(ValueError, match=r"damping=0\.0: .*no inverse"):
        influence_scores(model, data, data, exact=True, damping=0.0)
    with pytest.raises(ValueError, match="val_loader gave no batch"):
        influence_scores(model, data, [])
    for exact in (True, False):
        with pytest.raises(ValueError, match="train_loader gave no batch"):
            influence_scores(model, [], data, exact=exact)
    monkeypatch.setattr(selection, "LARGEST", 14)
    influence_scores(model, data, data)
    with pytest.raises(ValueError, match=r"last layer has 15 parameters.*at most 14"):
        influence_scores(model, data, data, exact=True)


# --------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize("n", [1, 7, 10, 1000])
@pytest.mark.parametrize("fraction", [0.6, 0.7, 0.9, 1.0])
def test_as_many_as_asked_and_the_lowest(n, fraction):
    scores = torch.randint(-4, 4, (n,)) / 2  # many ties
    mask = select_lowest(scores, fraction)
    expected = sorted(range(n), key=lambda i: (scores[i].item(), i))[: round(fraction * n)]
    assert mask.dtype == torch.bool and mask.shape == (n,)
    assert mask.nonzero().flatten().tolist() == sorted(expected)


def test_scores_may_come_from_anywhere():
    for scores in (
        [3, 1, 2],
        torch.tensor([3.0, 1.0, 2.0], requires_grad=True),
        torch.tensor([3, 1, 2]).numpy(),
        [math.inf, -math.inf, 0.0],
    ):
        assert select_lowest(scores, 0.67).tolist() == [False, True, True]


def test_what_has_no_order_is_refused():
    nan = math.nan
    with pytest.raises(ValueError, match="2 of 4 scores are NaN, the first at position 1"):
        select_lowest([0.0, nan, 1.0, nan], 0.5)
    for fraction in (0.0, -0.1, 1.01, 80, nan):
        with pytest.raises(ValueError, match=f"fraction={fraction}"):
            select_lowest([0.0, 1.0], fraction)
    with pytest.raises(ValueError, match=r"fraction=0\.1 of 4 samples is none"):
        select_lowest([0.0] * 4, 0.1)
    for scores in ([], [[0.0, 1.0]]):
        with pytest.raises(ValueError, match=r"one number for each sample"):
            select_lowest(scores, 0.5)
