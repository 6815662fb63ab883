"""bfloat16, float16 with a gradient scaler, accumulation: as in float32, within stated bounds.

Bounds are in units of u, half a step of the dtype at 1: 2^-8 for bfloat16, 2^-11 for float16.
Errors are of many roundings, so they are medians over seeds, in networks without kinks: behind a
ReLU one rounding can switch a gradient off.
"""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from helpers.contract import make
from helpers.tiny import CLASSES, ROWS, Net, difference, state, trainer, view

from kd_plugins import (
    CE,
    KD,
    SMKD,
    MutualTrainingArguments,
    MyLC,
    ProSelfLC,
    create_loss,
    list_losses,
)
from kd_plugins.losses import validate
from kd_plugins.models import PeerModule

U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SCALE = 2.0**10  # of the gradients in float16: no overflow in these networks
STEPS, SEEDS = 12, range(5)
dtypes = pytest.mark.parametrize("dtype", list(U), ids=["bfloat16", "float16"])
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                torch.cuda.device_count() != 1, reason="needs one accelerator"
            ),
        ),
    ],
)


EXACT = {"cpu": 0.0, "cuda": 1e-4}  # where sums are not always taken in the same order


class Smooth(Net):
    def __init__(self, seed):
        super().__init__(seed, scale=0.25)

    def forward(self, pixels):
        x = F.adaptive_avg_pool2d(F.gelu(self.norm(self.conv(pixels))), 2)
        return self.fc(x.flatten(1))


def pair(seed):
    return (
        [Smooth(2 * seed), Smooth(2 * seed + 1)],
        SMKD(MyLC(window=ROWS), eta=1.5, b2=-4, normalize="batch"),
        [],
    )


def alone(loss, teachers=0):
    return lambda seed: ([Smooth(seed)], loss(), [Smooth(100 + seed + t) for t in range(teachers)])


FAMILIES = {  # seed -> networks, loss, teachers
    "smkd and mylc": pair,
    "ce": alone(CE),
    "mylc": alone(lambda: MyLC(window=ROWS)),
    "kd": alone(lambda: 0.1 * CE() + 0.9 * KD(temperature=4), 2),
    "camkd": alone(lambda: create_loss("camkd"), 2),
    "joint": alone(lambda: create_loss("joint", num_samples=ROWS, num_classes=CLASSES)),
}


def train(host, data, device="cpu", dtype=None, steps=STEPS, scaler=None, skip=()):
    """A plain loop of SGD on batches of eight; the loss at each step. At the steps in ``skip``
    nothing is learned."""
    optimizer = torch.optim.SGD(host.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    scaler = scaler or torch.amp.GradScaler(
        device, init_scale=SCALE, enabled=dtype == torch.float16
    )
    batches, curve = list(torch.utils.data.DataLoader(data, 8)), []
    for step in range(steps):
        host.criterion.set_progress(step / steps)
        batch = {name: value.to(device) for name, value in batches[step % len(batches)].items()}
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = host(**batch)["loss"]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step not in skip:
            scaler.step(optimizer)
            scaler.update()
        curve.append(loss.item())
    return curve


def norm(values):
    return math.sqrt(sum(v.double().square().sum().item() for v in values))


def parts(tensors):
    """The networks, and what the loss remembers (its counts are the same in any precision)."""
    weights = {k: v for k, v in tensors.items() if k.startswith("peers.")}
    own = {
        k: v
        for k, v in tensors.items()
        if k.startswith("criterion.") and not k.endswith(("progress.value", "count"))
    }
    return weights, {k: v for k, v in own.items() if v.is_floating_point()}


def error(low, full, start):
    """|low - full| / |full - start|, 2-norms over all tensors: a share of how far training went."""
    return norm([low[k] - full[k] for k in full]) / norm([full[k] - start[k] for k in full])


@devices
@dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_agrees_with_float32(family, dtype, device):
    """Twelve steps. Of the way that the weights went 4 u, of the losses 3 u, of r and tables 2 u;
    some part of u at least.

    Measured over seven sets of five seeds on a CPU, at most: weights 1.4 u, losses 0.9 u, r and
    tables 0.5 u.
    """
    errors = []
    for seed in SEEDS:
        ends, curves = [], []
        for precision in (None, dtype):
            networks, loss, teachers = FAMILIES[family](seed)
            host = PeerModule(networks, loss, teachers).to(device).train()
            start, own = parts(state(host))
            curves.append(train(host, view(seed=seed, clean=False), device, precision))
            ends.append(parts(state(host)))
        (full, full_own), (low, low_own) = ends
        assert {v.dtype for v in (*low.values(), *low_own.values())} == {torch.float32}
        of_state = error(low_own, full_own, own) if own else 0.0
        of_curve = math.dist(*curves) / math.hypot(*curves[0])
        errors.append([error(low, full, start), of_curve, of_state])
    weights, curve, own = (statistics.median(e) / U[dtype] for e in zip(*errors, strict=True))
    assert 0.05 < weights < 4
    assert 0.01 < curve < 3
    assert own < 2


# -------------------------------------------------------------------------- gradients that overflow

STATEFUL = [
    n for n in list_losses() if make(n).state_dict() and "features" not in make(n).required_inputs
]


def stateful(name, device):
    loss = make(name, CLASSES)
    networks = [Smooth(k) for k in range(2 if loss.num_peers > 1 else 1)]
    return PeerModule(networks, loss).to(device).train()


def overflowing(device):
    """2^40 is too much for float16; after one overflow SCALE."""
    return torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=SCALE / 2.0**40)


@devices
@pytest.mark.parametrize("name", STATEFUL)
def test_a_step_that_overflows_is_skipped_and_seen_once(name, device):
    """As a run whose first step learns nothing and whose state has seen the batch once;
    bit-equal, here and to the end."""
    data = view(16, clean=False)
    for steps in (1, 4):
        host, other, scaler = stateful(name, device), stateful(name, device), overflowing(device)
        start = parts(state(host))[0]
        torch.manual_seed(0)
        train(host, data, device, torch.float16, steps, scaler)
        torch.manual_seed(0)  # what a loss draws
        train(other, data, device, torch.float16, steps, skip={0})
        assert scaler.get_scale() == SCALE
        assert difference(state(host), state(other)) <= EXACT[device]
        assert (difference(parts(state(host))[0], start) > 1e-3) == (steps > 1)
        for key, value in host.criterion.state_dict().items():
            assert value.isfinite().all(), key
            if key.endswith("count"):
                assert value == min(8 * steps, 16)  # the window: rows of the data


@devices
@pytest.mark.parametrize("name", STATEFUL)
def test_logits_that_overflow(name, device, monkeypatch):
    """A CPU refuses them; an accelerator does not look, and the scaler skips the step. Either
    way no state is lost by it."""
    data = view(16, clean=False)
    for refuses in (True, False) if device == "cpu" else (False,):
        if not refuses:
            monkeypatch.setattr(validate, "refuse_nan", lambda *_: None)
        host, scaler = stateful(name, device), torch.amp.GradScaler(device, init_scale=SCALE)
        train(host, data, device, torch.float16, 1, scaler)
        before, kept = parts(state(host))[0], state(host.criterion)
        too_much = torch.ones(8, 1, device=device).index_fill(
            0, torch.tensor(2, device=device), math.inf
        )
        handle = host.peers[0].register_forward_hook(
            lambda _, args, z, m=too_much: z * m.to(z.dtype)
        )
        if refuses:
            with pytest.raises(ValueError, match="NaN"):
                train(host, data, device, torch.float16, 1, scaler)
        else:
            assert math.isnan(train(host, data, device, torch.float16, 1, scaler)[0])
            assert scaler.get_scale() == SCALE / 2
        handle.remove()
        assert difference(parts(state(host))[0], before) == 0.0
        for key, value in host.criterion.state_dict().items():
            assert value.isfinite().all(), key
            # of the bad sample; the others may go on, as may averages over time, which are sound
            if key.endswith(".rows") and host.averages is None:
                assert torch.equal(value[2], kept[key][2]), key
        if name == "mylc":  # seven samples of the bad batch count
            assert host.criterion.running.count == 15
        assert all(
            math.isfinite(value) for value in train(host, data, device, torch.float16, 2, scaler)
        )
        assert difference(parts(state(host))[0], before) > 1e-3


# ----------------------------------------------------------------------------------- in the Trainer


def trained(
    folder, seed, device, dtype=None, loss=None, rows=ROWS, scaler=None, resume=None, **kwargs
):
    """Two networks in the Trainer; (start, end, Trainer). The scaler of a CPU is put where
    accelerate has that of a GPU."""
    networks, smkd, _ = pair(seed)
    names = {torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}, None: {}}[dtype]
    run = trainer(
        folder,
        networks,
        loss or smkd,
        view(rows, seed=seed, clean=False),
        learning_rate=0.02,
        use_cpu=device == "cpu",
        **names | kwargs,
    )
    if dtype == torch.float16:
        run.accelerator.native_amp = True
        run.accelerator.scaler = scaler or torch.amp.GradScaler(device, init_scale=SCALE)
    run.model.to(device)
    start = parts(state(run.model))[0]
    run.train(resume)
    return start, parts(state(run.model))[0], run


@devices
@dtypes
def test_clipped_in_the_trainer(tmp_path, dtype, device):
    """Each network's gradient is clipped as it is, not as the scaler made it: else it would
    hardly move. 4 u; measured 0.6."""
    errors, unclipped = [], []
    for seed in SEEDS[:3]:
        start, full, _ = trained(tmp_path, seed, device, max_grad_norm=0.1)
        _, low, _ = trained(tmp_path, seed, device, dtype, max_grad_norm=0.1)
        _, free, _ = trained(tmp_path, seed, device)
        errors.append(error(low, full, start))
        unclipped.append(error(free, full, start))
    assert 0.05 < statistics.median(errors) / U[dtype] < 4
    assert min(unclipped) > 0.2


@devices
def test_an_overflow_in_the_trainer(tmp_path, device):
    """The step is skipped, the batch seen, and the run goes on; its checkpoint has the scale,
    and it resumes bit-equal."""
    settings = {"max_grad_norm": 0.1, "save_strategy": "steps", "save_steps": 6, "logging_steps": 1}
    start, end, run = trained(
        tmp_path, 0, device, torch.float16, scaler=overflowing(device), **settings
    )
    assert run.accelerator.scaler.get_scale() == SCALE
    assert run.state.global_step == STEPS
    assert all(math.isfinite(log["loss"]) for log in run.state.log_history if "loss" in log)
    assert run.model.criterion.refine[0].running.count == ROWS
    assert difference(end, start) > 1e-3
    _, first, run = trained(
        tmp_path / "first", 0, device, torch.float16, scaler=overflowing(device), max_steps=1
    )
    assert difference(first, start) == 0.0
    assert run.model.criterion.refine[0].running.count == 8
    settings |= {"scaler": overflowing(device), "resume": str(tmp_path / "checkpoint-6")}
    _, resumed, _ = trained(tmp_path, 0, device, torch.float16, **settings)
    assert difference(resumed, end) <= EXACT[device]


@pytest.mark.parametrize(("cpu", "slow"), [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_cpu_that_has_no_instructions_for_it_says_so(
    cpu, slow, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    MutualTrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    assert ("bfloat16 takes many times as long" in caplog.text) == slow


def test_fp16_on_a_cpu_is_float32_and_says_so(tmp_path, caplog):
    """accelerate leaves it out there; tested, so that it is seen when that changes."""
    runs = [
        trainer(tmp_path, [Smooth(0), Smooth(1)], max_steps=2, **kwargs)
        for kwargs in ({}, {"fp16": True})
    ]
    for run in runs:
        run.train()
    assert difference(*(state(run.model) for run in runs)) == 0.0
    assert "trains in float32 all the same" in caplog.text


@devices
@dtypes
def test_accumulation_in_half_precision(tmp_path, dtype, device):
    """1 x 8 = 4 x 2 in the same dtype, and as float32 in one; 44 rows: the last window is a
    short one. 4 u; measured 1.1."""
    errors = []
    for seed in SEEDS[:3]:
        ends = []
        for precision, size in ((None, 8), (dtype, 8), (dtype, 2)):
            loss = SMKD(ProSelfLC(b1=4.0), eta=1.5, b2=-4, normalize="batch")
            settings = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 8 // size,
            }
            start, end, run = trained(tmp_path, seed, device, precision, loss, 44, **settings)
            assert run.state.global_step == 12
            ends.append(end)
        full, whole, cut = ends
        errors.append([error(cut, whole, start), error(cut, full, start)])
    of_whole, of_full = (statistics.median(e) / U[dtype] for e in zip(*errors, strict=True))
    assert of_whole < 4
    assert 0.05 < of_full < 4
