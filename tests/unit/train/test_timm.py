"""timm's training loop with our tasks: checkpoints, resume, EMA, evaluation, optimizer."""

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.processes import on_ranks
from helpers.tiny import CLASSES, Net, difference, state
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad
from torch import nn

from kd_plugins import (
    CE,
    FFL,
    KD,
    PCL,
    SMKD,
    Joint,
    Loss,
    MutualDistillationTask,
    MyLC,
    StatefulClassificationTask,
    TRevision,
)
from kd_plugins.losses.state import Progress
from kd_plugins.models import export

T = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.0, 0.3, 0.7]]


def batches(epoch, n=3, size=6):
    """Random batches, the same in every run of an epoch."""
    g = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(size, 3, 8, 8, generator=g), torch.randint(CLASSES, (size,), generator=g))
        for _ in range(n)
    ]


def timm_net(name="test_resnet", **kwargs):
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def smkd():
    return SMKD(MyLC(window=30), eta=1.2, b2=-4, normalize="batch")


def train(
    task,
    folder=None,
    epochs=3,
    *,
    start=0,
    resume=None,
    ema=False,
    compiled=None,
    mixup=None,
    accumulate=1,
    clip=None,
    mode="norm",
    lr=0.1,
    batch=lambda x: x,
    amp=None,
):
    """The steps of timm's train.py, in its order."""
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt="sgd", lr=lr, momentum=0.9, weight_decay=1e-2
    )
    eval_model = task.get_eval_model()
    if resume:
        start = resume_task_checkpoint(task, resume, optimizer, log_info=False)
    if ema:
        task.setup_ema(decay=0.5)
        if resume:
            load_task_ema_checkpoint(task, resume)
    if compiled:
        task.compile(backend=compiled, fullgraph=True)
        eval_model = task.get_eval_model()
    saver = folder and CheckpointSaver(
        task.get_trainable_module(),
        optimizer,
        args=SimpleNamespace(model="x"),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        task=task,
    )
    if saver:
        saver.args = None
    accuracy = []
    for epoch in range(start, epochs):
        task.get_trainable_module().train()
        data = batches(epoch)
        updates = epoch * -(-len(data) // accumulate)
        optimizer.zero_grad()
        for i, (x, y) in enumerate(data):
            x, y = mixup(x, y) if mixup else (x, y)
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(amp)):
                result = task(batch(x), y)
                loss = result["loss"]
            loss /= accumulate
            loss.backward()
            if (i + 1) % accumulate and i + 1 < len(data):
                continue
            if clip:
                dispatch_clip_grad(
                    task.get_clip_parameters(exclude_head="agc" in mode), value=clip, mode=mode
                )
            optimizer.step()
            updates += 1
            optimizer.zero_grad()
            task.update_ema(step=updates)
        eval_model.eval()
        accuracy.append(top1(task, eval_model, batches(99)))
        if saver:
            saver.save_checkpoint(epoch, metric=epoch)
    return optimizer, accuracy


@torch.inference_mode()
def top1(task, eval_model, data):
    """In percent; as timm's script counts it, from 1.0.31 on with the task's evaluator."""
    outputs = [(eval_model(x), y) for x, y in data]
    right = torch.cat([output.argmax(-1) == y for output, y in outputs])
    found = 100 * right.double().mean().item()
    if hasattr(task, "create_evaluator"):
        evaluator = task.create_evaluator()
        for output, y in outputs:
            evaluator.update(output, y)
        assert evaluator.compute()["top1"] == pytest.approx(found)
    return found


class Watching(Loss):
    """Cross-entropy that records the progress it is told."""

    def __init__(self):
        super().__init__()
        self.progress, self.told = Progress(), []

    def per_sample(self, logits, target):
        self.told.append(round(self.progress.get(self).item(), 6))
        return -(target * logits.log_softmax(-1)).sum(-1)


def one(loss, net=lambda: Net(1, bn=True), **kwargs):
    return lambda: StatefulClassificationTask(
        net(), loss(), total_updates=12, verbose=False, **kwargs
    )


def pair(loss, a=lambda: Net(1, bn=True), b=lambda: Net(2)):
    return lambda: MutualDistillationTask([a(), b()], loss(), total_updates=12, verbose=False)


# -------------------------------------------------------------------------------- saved and resumed

RUNS = {
    "MyLC": one(lambda: MyLC(window=30)),
    "T-revision, which learns": one(lambda: TRevision(T)),
    "a sum": one(lambda: 0.5 * MyLC(window=30) + TRevision(T)),
    "SMKD-P": pair(smkd),
    "FFL, which learns and reads features": pair(
        lambda: FFL([96, 96], CLASSES), timm_net, timm_net
    ),
    "PCL, which averages its peers": pair(
        lambda: PCL([96, 96], CLASSES, ema=0.5), timm_net, timm_net
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    """Weights, state of the loss, momentum and EMA are equal to the last bit after timm's saver."""

    def make():
        torch.manual_seed(3)
        return RUNS[kind]()

    whole = make()
    optimizer, _ = train(whole, epochs=4, ema=True)
    first = make()
    started = state(first.get_trainable_module())
    train(first, tmp_path, epochs=2, ema=True)
    again = make()
    resumed, _ = train(again, epochs=4, ema=True, resume=str(tmp_path / "last.pth.tar"))
    assert difference(state(whole.get_trainable_module()), state(again.get_trainable_module())) == 0
    assert (
        difference(
            state(whole.get_trainable_module(ema=True)), state(again.get_trainable_module(ema=True))
        )
        == 0
    )
    pairs = zip(optimizer.state.values(), resumed.state.values(), strict=True)
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in pairs)
    assert whole.updates == again.updates == 12
    moved = state(whole.get_trainable_module())
    assert all(
        difference({k: moved[k]}, {k: started[k]}) > 0
        for k in started
        if k.startswith(("criterion", "averages")) and "transition" not in k
    )


def test_checkpoint_is_timms_with_the_loss_beside_it(tmp_path):
    """timm loads the checkpoint of one network. Several networks are saved under peers.k."""
    single = one(lambda: MyLC(window=30), timm_net)()
    train(single, tmp_path, epochs=1)
    plain = timm_net(checkpoint_path=str(tmp_path / "last.pth.tar"))
    assert difference(state(plain), state(single.peers[0])) == 0

    both = pair(smkd)()
    train(both, tmp_path, epochs=1, ema=True)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert (
        {k.split(".", 2)[0] for k in saved["state_dict"]}
        == {k.split(".", 2)[0] for k in saved["state_dict_ema"]}
        == {"peers"}
    )
    assert saved["task_state"]["updates"] == 3
    assert all(k.startswith("criterion.refine.") for k in saved["task_state"]["loss"])
    assert "task_state_ema" not in saved

    export(both.peers[1], tmp_path / "b")  # as torch: a module of one's own
    assert (tmp_path / "b" / "model.safetensors").exists()


def test_checkpoint_without_the_loss_is_refused(tmp_path):
    torch.manual_seed(0)
    plain = ClassificationTask(Net(1, bn=True), nn.CrossEntropyLoss(), verbose=False)
    saved = plain.get_checkpoint_state()
    task = one(lambda: MyLC(window=30))()
    with pytest.raises(
        ValueError, match=r"no state of this loss, MyLC.*it has \[\].*--initial-checkpoint"
    ):
        task.load_checkpoint_state(saved["state_dict"], saved.get("task_state"))
    task.load_checkpoint_state(saved["state_dict"], None, strict=False)
    other = one(lambda: TRevision(T))()
    with pytest.raises(ValueError, match=r"no state of this loss, TRevision"):
        other.load_checkpoint_state(saved["state_dict"], task.get_checkpoint_state()["task_state"])
    one(CE)().load_checkpoint_state(saved["state_dict"], None)  # has no state to miss


# ----------------------------------------------------------------------------------------- progress


def test_the_loss_hears_how_far_training_is(tmp_path):
    """Progress is step / total, also after a resume, and stays 1 in timm's cool-down epochs."""
    whole = StatefulClassificationTask(Net(1), Watching(), total_updates=9, verbose=False)
    train(whole, tmp_path, epochs=1)
    again = StatefulClassificationTask(Net(1), Watching(), total_updates=9, verbose=False)
    train(again, epochs=4, resume=str(tmp_path / "last.pth.tar"))
    told = whole.criterion.told + again.criterion.told
    assert told == [round(min(step / 9, 1), 6) for step in range(12)]

    accumulated = StatefulClassificationTask(Net(1), Watching(), total_updates=4, verbose=False)
    train(accumulated, epochs=2, accumulate=2)  # three batches an epoch: two updates
    assert accumulated.criterion.told == [0, 0, 0.25, 0.5, 0.5, 0.75]


def test_progress_by_hand():
    """Without total_updates the caller sets it; update_ema() without a step counts by itself."""
    task = MutualDistillationTask([Net(1), Net(2)], smkd(), verbose=False)
    (x, y), *_ = batches(0)
    with pytest.raises(RuntimeError, match="set_progress"):
        task(x, y)
    task.criterion.set_progress(0.5)
    assert task(x, y)["threshold"].item() == pytest.approx(torch.tensor(3.0).log().item() / 1.2)
    own = StatefulClassificationTask(Net(1), Watching(), total_updates=2, verbose=False)
    for _ in range(2):
        own(x, y)
        own.update_ema()
    assert own.criterion.told == [0, 0.5]


# ------------------------------------------------------------------------------ one step, by itself


def test_step_of_a_pair_is_that_of_the_loss():
    """Loss and gradient equal a step by hand; the output is the log of the mean probability."""
    (x, y), *_ = batches(0)
    task = pair(smkd, a=lambda: Net(1))()
    result = task(x, y)
    result["loss"].backward()
    a, b, loss = Net(1), Net(2), smkd()
    loss.set_progress(0)
    expected = loss((a(x), b(x)), y)
    expected.backward()
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    for own, hand in zip(task.peers, (a, b), strict=True):
        assert all(
            torch.allclose(p.grad, q.grad, atol=1e-6)
            for p, q in zip(own.parameters(), hand.parameters(), strict=True)
        )
    mean = (a(x).softmax(-1) + b(x).softmax(-1)).detach() / 2
    torch.testing.assert_close(result["output"].exp(), mean)
    assert not result["output"].requires_grad
    assert {"own_a", "taught_b", "threshold"} <= result.keys()
    torch.testing.assert_close(task.get_eval_model()(x).exp(), mean)
    r = task.criterion.state_dict()
    evaluated = task.eval()(x, y)
    torch.testing.assert_close(evaluated["loss"], F.nll_loss(mean.log(), y))
    torch.testing.assert_close(evaluated["output"].exp(), mean)
    assert all(torch.equal(v, task.criterion.state_dict()[k]) for k, v in r.items())
    soft = task(x, F.one_hot(y, CLASSES).float())
    torch.testing.assert_close(soft["loss"], evaluated["loss"])


def test_accuracy_is_the_ensembles():
    task = pair(smkd)()
    _, accuracy = train(task, epochs=2)
    right = [
        (sum(m(x).softmax(-1) for m in task.peers).argmax(-1) == y).float().mean().item()
        for x, y in batches(99)
    ]
    assert accuracy[-1] == pytest.approx(100 * sum(right) / 3)
    alone = one(lambda: MyLC(window=30))()
    assert alone.get_eval_model() is alone.peers[0]


def test_peers_with_other_normalisation_and_size():
    """The second network gets pixels in its own normalisation and size, in both modes."""
    a, b = Net(1), timm.create_model("test_vit", num_classes=CLASSES, img_size=16, patch_size=8)
    a.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    task = pair(CEpair, lambda: a, lambda: b)()
    x = torch.randn(4, 3, 16, 16)
    mean, std, own_mean, own_std = (
        torch.tensor(t).view(3, 1, 1) for t in (*a.pretrained_cfg.values(), *stats(b))
    )
    raw = ((x * std + mean) - own_mean) / own_std
    task.eval()
    expected = (a(x).softmax(-1) + b(raw).softmax(-1)) / 2
    torch.testing.assert_close(task.get_eval_model()(x).exp(), expected, rtol=1e-4, atol=1e-5)
    task.train()
    torch.testing.assert_close(
        task(x, torch.arange(4) % 3)["output"].exp(), expected, rtol=1e-4, atol=1e-5
    )


def CEpair():
    return SMKD(CE(), eta=-1, b2=0)


def stats(model):
    return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def test_mixup_accumulation_clipping_and_bf16():
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)
    for make in (one(lambda: MyLC(window=30)), one(lambda: TRevision(T)), pair(smkd)):
        for options in (
            {"mixup": mixup, "accumulate": 2, "clip": 1.0},
            {"clip": 0.01, "mode": "agc", "amp": True},
        ):
            task = make()
            before = state(task.get_trainable_module())
            train(task, epochs=1, **options)
            after = state(task.get_trainable_module())
            assert all(torch.isfinite(v).all() for v in after.values())
            assert all(
                difference({k: before[k]}, {k: after[k]}) > 0
                for k in before
                if k.endswith("conv.weight")
            )


def test_dividing_the_loss_in_place_is_harmless():
    """timm's loop divides when it accumulates. Gradient and diagnostics must not change with it."""

    class Root(Loss):
        def per_sample(self, logits, target):
            return (target * logits).square().sum().sqrt()  # its backward reads its own value

    (x, y), *_ = batches(0)
    task = one(Root, Net)()
    result = task(x, y)
    shown = result["loss"].item()
    result["loss"] /= 2
    result["loss"].backward()
    assert task.get_trainable_module().stats["loss"].item() == pytest.approx(shown)
    assert task.peers[0].fc.weight.grad.abs().sum() > 0


def test_clipping_leaves_out_the_heads_for_agc():
    task = pair(lambda: FFL([96, 96], CLASSES), timm_net, timm_net)()
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    for peer in task.peers:
        assert [id(p) in clipped for p in peer.parameters()].count(False) == 2
        assert not {id(p) for p in peer.get_classifier().parameters()} & clipped
    everything = {id(p) for p in task.get_trainable_module().parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == everything
    assert {id(p) for p in task.criterion.parameters()} <= clipped


# ---------------------------------------------------------------------------------------- optimizer


def test_optimizer_holds_every_peer_and_the_loss():
    task = pair(
        lambda: FFL([96, 64], CLASSES), timm_net, lambda: timm_net("test_vit", img_size=16)
    )()
    vit_name = "peers.1.pos_embed"
    assert vit_name in task.get_trainable_module().no_weight_decay()
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.1
    )
    held = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(task.get_trainable_module().named_parameters())
    assert held.keys() == {id(p) for p in named.values()}
    assert sum(p.numel() for m in (*task.peers, task.criterion) for p in m.parameters()) == sum(
        p.numel() for p in named.values()
    )
    assert held[id(named[vit_name])] == 0
    assert held[id(named["peers.1.blocks.0.attn.qkv.weight"])] == 0.1


def test_layer_decay_goes_through_each_peer_by_itself():
    """With peers of different depth, all heads and the loss have the full learning rate."""
    make = pair(lambda: FFL([96, 64], CLASSES), timm_net, lambda: timm_net("test_vit", img_size=16))
    hosted = make().get_trainable_module()
    scale = {}
    for group in create_optimizer_v2(hosted, opt="sgd", lr=0.1, layer_decay=0.5).param_groups:
        scale |= {id(p): group["lr_scale"] for p in group["params"]}
    for k, peer in enumerate(make().peers):
        own = {}
        for group in create_optimizer_v2(peer, opt="sgd", lr=0.1, layer_decay=0.5).param_groups:
            own |= {id(p): group["lr_scale"] for p in group["params"]}
        alone = {name: own[id(p)] for name, p in peer.named_parameters()}
        assert {name: scale[id(p)] for name, p in hosted.peers[k].named_parameters()} == alone
        assert len(set(alone.values())) > 3
    assert {scale[id(p)] for p in hosted.criterion.parameters()} == {1.0}


# -------------------------------------------------------------------------- EMA, compile, processes


@pytest.mark.parametrize("make", [one(lambda: MyLC(window=30)), pair(smkd)], ids=["one", "pair"])
def test_ema_averages_the_networks(make):
    """The average is 0.5 avg + 0.5 now after each update; timm's first two are copies."""
    task = make()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
    expected = None
    for step, (x, y) in enumerate(batches(0) + batches(1), start=1):
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()
        task.update_ema(step=step)
        now = task.get_eval_model().state_dict()
        if step == 1:
            expected = {k: v.clone() for k, v in now.items()}
        expected = {
            k: v.clone() if not v.is_floating_point() else expected[k].lerp(v, 0.5)
            for k, v in now.items()
        }
    ema = task.get_eval_model(ema=True)
    assert difference(expected, ema.module.state_dict()) < 1e-6
    assert not [k for k in ema.state_dict() if "criterion" in k]
    assert type(ema.module) is type(task.get_eval_model())
    assert ema(x).shape == (6, CLASSES)


def test_compiled_run_is_the_same(tmp_path):
    """One graph over the whole schedule. The checkpoint is the same with and without compiler."""
    plain, compiled = pair(smkd, lambda: Net(1))(), pair(smkd, lambda: Net(1))()
    train(plain, epochs=2)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, tmp_path, epochs=2, compiled="eager", ema=True)
    assert hasattr(compiled.get_eval_model(), "_orig_mod") and hasattr(
        compiled.get_trainable_module(), "_orig_mod"
    )
    compiled.compile_ema(backend="eager")
    assert compiled.get_eval_model(ema=True)(batches(0)[0][0]).shape == (6, CLASSES)
    assert (
        difference(state(plain.get_eval_model()), state(compiled.get_eval_model()._orig_mod)) < 1e-6
    )
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert not [
        k for part in ("state_dict", "state_dict_ema") for k in saved[part] if "_orig_mod" in k
    ]
    assert not [k for k in saved["task_state"]["loss"] if "_orig_mod" in k]
    again = pair(smkd, lambda: Net(1))()
    resume_task_checkpoint(again, str(tmp_path / "last.pth.tar"), log_info=False)
    assert difference(state(plain.get_eval_model()), state(again.get_eval_model())) < 1e-6
    assert len(compiled.peers) == 2


RANKED = """
from helpers.tiny import Net
from kd_plugins import SMKD, MyLC, MutualDistillationTask
torch.manual_seed(0)
loss = SMKD(MyLC(window=30), eta=1.2, b2=-4, normalize="batch")
nets = [Net(1 + rank), Net(2 + rank)]  # the ranks start with different weights
task = MutualDistillationTask(nets, loss, total_updates=3, verbose=False)
task.setup_ema(decay=0.5)
if world > 1:
    task.prepare_distributed()
optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
for step, (x, y) in enumerate(steps, start=1):
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    parts = [halves[rank]] if world > 1 else [(x, y)]
    if step == 2 and world > 1:  # accumulate, talking once
        first, last = [(parts[0][0][:2], parts[0][1][:2]), (parts[0][0][2:], parts[0][1][2:])]
        with task.no_sync():
            (task(*first)["loss"] / 2).backward()
        (task(*last)["loss"] / 2).backward()
    elif step == 2:
        for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
            (task(x[rows], y[rows])["loss"] / 2).backward()
    else:
        task(*parts[0])["loss"].backward()
    optimizer.step(); optimizer.zero_grad(); task.update_ema(step=step)
seen = [v.double().sum().item() for v in task.get_eval_model().state_dict().values()]
seen += [v.item() for v in task.get_task_state()["loss"].values()]
"""


def test_two_processes_are_one(tmp_path):
    """DDP with accumulation under no_sync: both ranks have the weights and state of one process."""
    g = torch.Generator().manual_seed(1)
    steps = [
        (torch.randn(8, 3, 8, 8, generator=g), torch.randint(CLASSES, (8,), generator=g))
        for _ in range(3)
    ]
    first, second, alone = on_ranks(RANKED, steps, tmp_path)
    assert first == second
    assert first == pytest.approx(alone, abs=1e-5)


# ------------------------------------------------------------------- what timm's script does before


def test_a_name_is_made_like_the_first():
    first = timm_net("resnet10t").to(memory_format=torch.channels_last)
    first.set_grad_checkpointing(True)
    first = timm.layers.convert_sync_batchnorm(first)
    task = MutualDistillationTask(
        [first, "test_vit", "resnet10t"], CEpair3(), dtype=torch.bfloat16, verbose=False
    )
    _, vit_peer, twin = task.peers
    assert vit_peer.num_classes == twin.num_classes == CLASSES
    assert vit_peer.grad_checkpointing and twin.grad_checkpointing
    assert any(isinstance(m, nn.SyncBatchNorm) for m in twin.modules())
    assert (
        twin.conv1[0].weight.stride()
        == first.conv1[0].weight.stride()
        != timm_net("resnet10t").conv1[0].weight.stride()
    )
    assert not torch.equal(twin.fc.weight, first.fc.weight)
    assert {p.dtype for peer in task.peers for p in peer.parameters()} == {torch.bfloat16}

    output = task.get_eval_model().eval()(
        torch.randn(2, 3, 32, 32)
    )  # pixels too are cast to what each network computes in
    assert output.dtype == torch.float32

    plain = MutualDistillationTask(
        [timm_net("resnet10t"), "resnet10t"], CEpair(), verbose=False
    ).peers[1]
    assert not plain.grad_checkpointing and plain.conv1[0].weight.is_contiguous()
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())


def CEpair3():
    return SMKD(CE(), eta=-1, b2=0, num_peers=3)


def test_channels_last_and_checkpointing_train():
    first = timm_net("test_resnet").to(memory_format=torch.channels_last)
    first.set_grad_checkpointing(True)
    task = MutualDistillationTask([first, "test_resnet"], smkd(), total_updates=3, verbose=False)
    before = state(task.peers[1])
    train(task, epochs=1, batch=lambda x: x.contiguous(memory_format=torch.channels_last))
    assert difference(before, state(task.peers[1])) > 0


def test_state_and_teachers_follow_the_task():
    teacher = Net(5)
    task = StatefulClassificationTask(
        Net(1), 0.5 * MyLC(window=9) + 0.5 * KD(), teachers=[teacher], verbose=False
    )
    (x, y), *_ = batches(0)
    hand = 0.5 * MyLC(window=9) + 0.5 * KD()
    assert task(x, y)["loss"].item() == pytest.approx(
        hand(Net(1)(x), y, teacher=teacher(x)).item(), rel=1e-6
    )
    task.to("meta")
    assert all(b.device.type == "meta" for b in (*task.criterion.buffers(), *teacher.parameters()))


def test_the_loss_gets_its_sizes():
    """Sizes of data and networks are not in the constructor of the loss."""
    options = {"total_updates": 3, "num_samples": 77, "verbose": False}
    fused = MutualDistillationTask([timm_net(), timm_net()], FFL(), **options).criterion
    assert (fused.num_classes, fused.feature_dims) == (CLASSES, (96, 96))
    with pytest.raises(ValueError, match=r"feature_dims=\(96, 64\)"):
        MutualDistillationTask([timm_net(), timm_net()], FFL([96, 64]), **options)


def test_the_loss_is_left_alone():
    """The task leaves no hook and no attribute on the loss."""
    loss = smkd()
    before = set(vars(loss))
    task = MutualDistillationTask([Net(1), Net(2)], loss, total_updates=2, verbose=False)
    (x, y), *_ = batches(0)
    task(x, y)
    assert set(vars(loss)) == before and not loss._forward_pre_hooks
    assert len(task.hosted.last["logits"]) == 2


# ------------------------------------------------------------------------------------------ refused

BAD = {
    "index": (
        ValueError,
        r"Joint reads index.*MutualDistillationTrainer",
        lambda: one(lambda: Joint(9, CLASSES)),
    ),
    "teachers missing": (
        ValueError,
        "KD reads teacher, and there are no teachers",
        lambda: one(KD),
    ),
    "peers": (ValueError, "SMKD teaches peers and there is one network", lambda: one(smkd)),
    "one loss, two networks": (
        ValueError,
        "MyLC is a loss for one network and there are 2",
        lambda: pair(lambda: MyLC(window=9)),
    ),
    "no loss of ours": (
        TypeError,
        "must be a kd_plugins loss, got CrossEntropyLoss",
        lambda: one(nn.CrossEntropyLoss),
    ),
    "classes": (
        ValueError,
        "different numbers of classes",
        lambda: pair(smkd, b=lambda: Net(classes=4)),
    ),
    "total_updates": (
        ValueError,
        r"total_updates=0: expected an integer of at least 1; it counts the optimizer steps",
        lambda: lambda: StatefulClassificationTask(Net(), CE(), total_updates=0),
    ),
    "a name first": (
        ValueError,
        "number of classes is not known",
        lambda: lambda: MutualDistillationTask(["test_resnet", Net()], smkd()),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_at_construction(case):
    error, message, make = BAD[case]
    with pytest.raises(error, match=message):
        make()()


def test_old_timm_is_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.task", None)
    monkeypatch.delitem(sys.modules, "kd_plugins.train.timm")
    installed = (
        rf"timm {timm.__version__} is installed \({re.escape(timm.__file__)}\): .*timm\.task"
    )
    with pytest.raises(ImportError, match=rf"train\.timm needs .*: timm >= 1\.0\.27\. {installed}"):
        importlib.import_module("kd_plugins.train.timm")


def test_a_newer_timm_without_the_function_is_named(monkeypatch):
    """The version alone does not say what is missing."""
    monkeypatch.delattr("timm.task.resume_task_checkpoint")
    monkeypatch.setattr("timm.__version__", "9.9")
    monkeypatch.delitem(sys.modules, "kd_plugins.train.timm")
    with pytest.raises(ImportError, match=r"timm 9\.9 is installed.*'resume_task_checkpoint'"):
        importlib.import_module("kd_plugins.train.timm")
