"""Peers that teach each other through features: values by hand, a second derivation, who gets a
gradient, the hosting."""

import math

import pytest
import timm
import torch
from helpers import reference as naive
from helpers.tiny import difference, state, to_tensor, trainer, view
from torch import nn

from kd_plugins import AFD, CE, FFL, PCL
from kd_plugins.models import PeerModule, feature_dims, with_features

DIMS, C, B = (3, 2), 3, 2


def inputs(seed=0, b=B, sizes=((4, 4), (2, 2))):
    g = torch.Generator().manual_seed(seed)
    zs = tuple(torch.randn(b, C, generator=g, dtype=torch.float64).requires_grad_() for _ in DIMS)
    fs = tuple(
        torch.randn(b, d, *size, generator=g, dtype=torch.float64).requires_grad_()
        for d, size in zip(DIMS, sizes, strict=True)
    )
    return zs, torch.arange(b) % C, fs


def soft_kl(a, b, t):
    """T² KL of one sample from logits in Python floats."""
    p, q = naive.softmax([x / t for x in a]), naive.softmax([x / t for x in b])
    return t * t * sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True))


def ce(z, y):
    return -math.log(naive.softmax(z)[y])


def heads(x, layer):
    return [
        [
            sum(w * v for w, v in zip(row, r, strict=True)) + b
            for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        ]
        for r in x
    ]


def test_ffl_by_loops():
    """Half way up the ramp, in Python floats from the fused logits on."""
    loss = FFL(DIMS, C, temperature=3.0, ramp=0.5).double()
    loss.set_progress(0.25)
    zs, y, fs = inputs()
    value = loss(zs, y, features=fs)
    small = nn.functional.adaptive_avg_pool2d(fs[0], (2, 2))
    x = torch.cat([small, fs[1]], dim=1)
    depth = torch.stack(
        [
            nn.functional.conv2d(x[:, c : c + 1], loss.fuse[0].weight[c : c + 1], padding=1)[:, 0]
            for c in range(5)
        ],
        dim=1,
    )

    def standardised(m):
        mean, var = m.mean((0, 2, 3), keepdim=True), m.var((0, 2, 3), unbiased=False, keepdim=True)
        return (m - mean) / (var + 1e-5).sqrt()

    point = torch.einsum("oc,bchw->bohw", loss.fuse[2].weight[:, :, 0, 0], standardised(depth))
    fused = heads(standardised(point).mean((2, 3)).tolist(), loss.head)
    w, total = math.exp(-5 * 0.25), 0.0
    for i in range(B):
        rows = [z[i].tolist() for z in zs]
        mean = [sum(v) / 2 for v in zip(*rows, strict=True)]
        total += ce(fused[i], y[i]) + w * soft_kl(mean, fused[i], 3.0)
        total += sum(ce(row, y[i]) + w * soft_kl(fused[i], row, 3.0) for row in rows)
    assert value.item() == pytest.approx(total / B, rel=1e-7)


def test_pcl_by_loops():
    loss = PCL(DIMS, C, temperature=3.0, ramp=0.0).double()
    loss.set_progress(0.25)
    zs, y, fs = inputs(1)
    teacher = torch.randn(2, B, C, dtype=torch.float64)
    value = loss(zs, y, features=fs, teacher=teacher)
    ensemble = heads(torch.cat([f.mean((2, 3)) for f in fs], 1).tolist(), loss.head)
    total = 0.0
    for i in range(B):
        total += ce(ensemble[i], y[i])
        for k, z in enumerate(zs):
            row = z[i].tolist()
            total += (
                ce(row, y[i])
                + soft_kl(ensemble[i], row, 3.0)
                + soft_kl(teacher[1 - k, i].tolist(), row, 3.0)
            )
    assert value.item() == pytest.approx(total / B, rel=1e-9)


def test_the_ramp_is_one_at_its_end():
    """The public port of PCL divides by one epoch: its weight is 1 from the second epoch on."""
    loss = PCL(DIMS, C, ramp=0.5)
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        loss.set_progress(progress)
        seen.append(loss.ramp_weight().item())
    assert seen == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])


def test_the_ensemble_learns_from_labels_only():
    """Its head gets the gradient of CE_e, whatever the peers are taught."""
    loss = PCL(DIMS, C, ramp=0.0).double()
    loss.set_progress(0.5)
    zs, y, fs = inputs(2)
    loss(zs, y, features=fs, teacher=torch.randn(2, B, C, dtype=torch.float64)).backward()
    ours = loss.head.weight.grad.clone()
    alone = nn.functional.cross_entropy(
        loss.head(torch.cat([f.detach().mean((2, 3)) for f in fs], 1)), y
    )
    torch.testing.assert_close(ours, torch.autograd.grad(alone, loss.head.weight)[0])


def test_the_fused_head_learns_from_labels_and_peers_only():
    """Not from how well the peers follow it; and the peers not from how well it follows them."""
    loss = FFL(DIMS, C, ramp=0.0).double()
    loss.set_progress(0.5)
    zs, y, fs = inputs(4)
    loss(zs, y, features=fs).backward()
    small = nn.functional.adaptive_avg_pool2d(fs[0], (2, 2))
    fused = loss.head(loss.fuse(torch.cat([small, fs[1]], 1)).mean((2, 3)))
    mean = (sum(zs).detach() / 2 / 3).softmax(1)
    alone = nn.functional.cross_entropy(fused, y) + 9 * nn.functional.kl_div(
        (fused / 3).log_softmax(1), mean, reduction="batchmean"
    )
    torch.testing.assert_close(
        loss.head.weight.grad, torch.autograd.grad(alone, loss.head.weight, retain_graph=True)[0]
    )
    taught = nn.functional.cross_entropy(zs[0], y) + 9 * nn.functional.kl_div(
        (zs[0] / 3).log_softmax(1), (fused.detach() / 3).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(zs[0].grad, torch.autograd.grad(taught, zs[0])[0])


def test_pcl_wants_one_average_per_peer():
    loss = PCL(DIMS, C)
    loss.set_progress(0.5)
    zs, y, fs = inputs()
    with pytest.raises(ValueError, match=r"2 averaged peers.*\[3, 2, 3\]"):
        loss(zs, y, features=fs, teacher=torch.zeros(3, B, C))


def score(adversary, x):
    return adversary.last(nn.functional.leaky_relu(adversary.first(x), 0.2).mean((2, 3))).squeeze(1)


def test_afd_is_two_games():
    """The networks get the gradient of fooling, the adversaries that of telling; as two losses
    with two backwards."""
    loss = AFD(DIMS, adversarial=0.7).double()
    zs, y, fs = inputs(3)
    value = loss(zs, y, features=fs)
    value.backward()
    logits = sum(nn.functional.cross_entropy(z, y) for z in zs)
    for a, b in (zs, zs[::-1]):
        target = (b.detach() / 3).softmax(1)
        logits = logits + 9 * nn.functional.kl_div(
            (a / 3).log_softmax(1), target, reduction="batchmean"
        )
    fool = tell = 0.0
    for k, (r, d) in enumerate(zip(loss.transfer, loss.adversaries, strict=True)):
        real = fs[1 - k].detach()
        real = nn.functional.adaptive_avg_pool2d(real, (2, 2))
        fake = nn.functional.adaptive_avg_pool2d(r(fs[k]), (2, 2))
        fool = fool + ((1 - score(d, fake)) ** 2).mean()
        tell = tell + ((1 - score(d, real)) ** 2 + score(d, fake.detach()) ** 2).mean()
    assert value.item() == pytest.approx((logits + 0.7 * fool + tell).item(), rel=1e-9)
    learned = [*fs, *loss.transfer.parameters()]
    for ours, grad in zip(
        learned, torch.autograd.grad(0.7 * fool, learned, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(ours.grad, grad)
    theirs = list(loss.adversaries.parameters())
    for ours, grad in zip(theirs, torch.autograd.grad(tell, theirs), strict=True):
        torch.testing.assert_close(ours.grad, grad)


@pytest.mark.parametrize("make", [lambda d: FFL(d, C), lambda d: PCL(d, C), AFD])
def test_what_does_not_fit_is_named(make):
    with pytest.raises(ValueError, match=r"feature_dims=\(3,\)"):
        make((3,))
    loss = make((3, 5))
    loss.set_progress(0.5)
    zs, y, fs = inputs()
    extra = {"teacher": torch.zeros(2, B, C)} if "teacher" in loss.required_inputs else {}
    with pytest.raises(ValueError, match=r"feature_dims=\(3, 5\).*\(3, 2\) channels"):
        loss(zs, y, features=fs, **extra)
    with pytest.raises(ValueError, match=r"feature_dims=\(3, 5\).*\(3,\) channels"):
        loss(zs, y, features=fs[:1], **extra)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FFL(DIMS, C, ramp=1.1),
        lambda: PCL(DIMS, C, temperature=0.0),
        lambda: PCL(DIMS, C, ema=1.0),
    ],
)
def test_bad_values(build):
    with pytest.raises(ValueError, match=r"ramp=1\.1|temperature=0\.0|ema=1\.0"):
        build()


# ------------------------------------------------------------------------------------------ hosting

SMALL = [
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_vit",
    "test_vit2",
    "test_byobnet",
]
OTHERS = ["mobilenetv3_small_050", "swin_tiny_patch4_window7_224", "inception_resnet_v2"]


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_logits_with_features_are_the_networks(name):
    depth = (
        {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2)}
        if "swin" in name
        else {}
    )
    model = timm.create_model(name, num_classes=C, **depth).eval()
    if not hasattr(model, "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} reads no feature maps of {name}")
    x = torch.randn(
        2, 3, *(model.patch_embed.img_size if hasattr(model, "patch_embed") else (96, 96))
    )
    with torch.no_grad():
        for deep in (False, True):
            logits, maps = with_features(model, x, deep)
            assert torch.equal(logits, model(x))
            assert all(m.dim() == 4 and len(m) == 2 for m in maps)
            assert [m.shape[1] for m in maps] == (
                feature_dims(model) if deep else [model.num_features]
            )
            sizes = [m.shape[-1] for m in maps]
            assert sizes == sorted(sizes, reverse=True)


def larger(picture):
    return nn.functional.interpolate(to_tensor(picture)[None], (32, 32))[0]


def peers(seed=0):
    torch.manual_seed(seed)
    return [timm.create_model(n, num_classes=C) for n in ("test_resnet", "test_convnext")]


def losses():
    dims = [m.num_features for m in peers()]
    return {"ffl": FFL(dims, C), "pcl": PCL(dims, C, ema=0.5), "afd": AFD(dims)}


@pytest.mark.parametrize("name", ["ffl", "pcl", "afd"])
def test_trained_and_resumed(name, tmp_path):
    """What the loss learns moves and is in the checkpoint: half way, then to the end, is
    bit-equal to one run."""
    settings = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.01}
    whole = trainer(tmp_path / "run", peers(), losses()[name], view(transform=larger), **settings)
    before = state(whole.model.criterion)
    whole.train()
    learned = [k for k, _ in whole.model.criterion.named_parameters()]
    assert learned and all(
        not torch.equal(before[k], state(whole.model.criterion)[k]) for k in learned
    )
    again = trainer(
        tmp_path / "again", peers(1), losses()[name], view(transform=larger), **settings
    )
    again.train(str(tmp_path / "run" / "checkpoint-6"))
    assert difference(state(whole.model), state(again.model)) == 0


def test_averages_over_time():
    """avg <- d avg + (1 - d) now with d = min(1 - 1/(n+1), ema); statistics too; read as
    teacher, in eval mode, no gradient."""
    a, b = peers()
    hosted = PeerModule([a, b], PCL([a.num_features, b.num_features], C, ema=0.6)).train()
    name, weight = "averages.0.module.fc.weight", a.fc.weight
    expected, now = None, []
    for n in range(4):
        with torch.no_grad():
            weight += torch.randn_like(weight)
        now.append(weight.detach().clone())
        hosted.average()
        d = min(1 - 1 / (n + 1), 0.6)
        expected = now[0] if expected is None else d * expected + (1 - d) * now[-1]
    torch.testing.assert_close(hosted.state_dict()[name], expected)
    assert not any(m.training for average in hosted.averages for m in average.modules())
    assert not any(p.requires_grad for p in hosted.averages.parameters())
    hosted.criterion.set_progress(1.0)
    seen = {}
    hosted.criterion.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    x = torch.randn(4, 3, 32, 32)
    hosted(x, torch.tensor([0, 1, 2, 0]))["loss"].backward()
    with torch.no_grad():
        torch.testing.assert_close(seen["teacher"], torch.stack([m(x) for m in hosted.averages]))
    assert a.fc.weight.grad is not None and hosted.averages[0].module.fc.weight.grad is None


def test_averages_move_once_a_step(tmp_path):
    """Not once a micro-batch: two accumulated batches are one step."""
    run = trainer(
        tmp_path,
        peers(),
        losses()["pcl"],
        view(transform=larger),
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    run.train()
    assert [m.n_averaged.item() for m in run.model.averages] == [3, 3]


def test_a_loss_without_averages_holds_none(tmp_path):
    hosted = PeerModule(peers(), FFL([m.num_features for m in peers()], C))
    assert hosted.averages is None and not any("averages" in k for k in hosted.state_dict())
    hosted.average()
    one = PeerModule([timm.create_model("test_resnet", num_classes=C)], CE())
    one.average()
    assert trainer(tmp_path, peers(), losses()["ffl"], train=view()).model.averages is None
