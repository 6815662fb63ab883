"""CDR: the mask by hand and by loops, what it leaves alone, loss scaling; in the Trainers, on
one process and on two."""

import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers.processes import launch, leave
from helpers.tiny import ROWS, Net, difference, plain, state, trainer
from torch import nn
from transformers import TrainerCallback

from kd_plugins import CE, SMKD, CDRCallback, LabelSmoothing, MyLC
from kd_plugins.losses.gradients import mask_noncritical_

WORLD, TAU = 2, 0.4


def parameter(values, grad, dtype=torch.float32):
    w = nn.Parameter(torch.tensor(values, dtype=dtype))
    w.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return w


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)
    )
    nn.functional.cross_entropy(net(torch.randn(6, 3, 8, 8)), torch.arange(6) % 4).backward()
    return net


def grads(net):
    return [p.grad.clone() for p in net.parameters()]


# ------------------------------------------------------------------------------------------ by hand


def test_by_hand_over_all_layers_together():
    """s = 6, 2, 1, 1, 8, 3, .5, 4 over a [2, 2] and a [4, 1, 1, 1]: of eight, tau = 1/4 keeps
    the six of 1 and more."""
    a = parameter([[2.0, -1.0], [0.5, 1.0]], [[3.0, 2.0], [-2.0, 1.0]])
    b = parameter(
        [[[[4.0]]], [[[3.0]]], [[[0.1]]], [[[-4.0]]]], [[[[2.0]]], [[[-1.0]]], [[[5.0]]], [[[1.0]]]]
    )
    mask_noncritical_([a, b], 0.5)
    # the four largest: 6, 8, 3, 4; two layers masked apart would keep s = 2 of the first
    torch.testing.assert_close(a.grad, torch.tensor([[1.5, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(b.grad.flatten(), torch.tensor([1.0, -0.5, 0.0, 0.5]))


def test_what_ties_with_the_last_is_kept():
    w = parameter([[2.0, -1.0], [0.5, 1.0]], [[3.0, 2.0], [-2.0, 1.0]])  # s = 6, 2, 1, 1
    mask_noncritical_([w], 0.25)
    torch.testing.assert_close(w.grad, torch.tensor([[2.25, 1.5], [-1.5, 0.75]]))


def test_the_score_is_weight_times_gradient():
    """Neither the largest gradient (5 on a weight of .1) nor the largest weight (9, gradient
    .01) is critical."""
    w = parameter([[0.1, 9.0, 1.0]], [[5.0, 0.01, 1.0]])
    mask_noncritical_([w], 0.6)
    torch.testing.assert_close(w.grad, torch.tensor([[0.0, 0.0, 0.4]]))


@pytest.mark.parametrize("tau", ["0.1", "0.2", "0.45", "0.8", "0.99"])
def test_against_loops(tau):
    net, count = network(), 0
    before = [(p, p.flatten().tolist(), p.grad.flatten().tolist()) for p in net.parameters()]
    scores = sorted(
        abs(w * g) for p, ws, gs in before if p.dim() in (2, 4) for w, g in zip(ws, gs, strict=True)
    )
    last = scores[-int((1 - Fraction(tau)) * len(scores))]
    mask_noncritical_(net.parameters(), float(tau))
    for p, ws, gs in before:
        if p.dim() == 1:
            expected = gs
        else:
            critical = [abs(w * g) >= last for w, g in zip(ws, gs, strict=True)]
            count += sum(critical)
            expected = [
                (1 - float(tau)) * g if c else 0.0 for c, g in zip(critical, gs, strict=True)
            ]
        assert p.grad.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert count == int((1 - Fraction(tau)) * len(scores))


@pytest.mark.parametrize(
    ("n", "tau", "kept"),
    [
        (10, 0.9, 1),
        (10, 0.8, 2),
        (10, 0.7, 3),
        (5, 0.4, 3),
        (7, 0.5, 3),
        (3, 0.9, 1),
        (100, 0.29, 71),
    ],
)
def test_how_many_are_critical(n, tau, kept):
    """int((1 - .9) · 10) is 0 in floats, as is 1 - .8 short of .2; one weight learns in any
    case."""
    w = parameter([[float(k + 1) for k in range(n)]], [[1.0] * n])
    mask_noncritical_([w], tau)
    assert (w.grad != 0).sum() == kept and (w.grad[0, n - kept :] != 0).all()


# ----------------------------------------------------------------------------- what it leaves alone


def test_biases_norms_and_other_shapes_learn_as_usual():
    net = network()
    odd = parameter([[[1.0, 1e-9]]], [[[1.0, 1e-9]]])  # three dimensions
    before = grads(net)
    mask_noncritical_([*net.parameters(), odd], 0.9)
    for p, g in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.grad, g) == (p.dim() == 1)
    assert odd.grad.flatten().tolist() == pytest.approx([1.0, 1e-9])


def test_without_noise_nothing_changes():
    net = network()
    before = grads(net)
    mask_noncritical_(net.parameters(), 0.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_parameters_without_gradient_are_skipped_and_not_counted():
    a, frozen = parameter([[1.0, 2.0, 3.0, 4.0]], [[1.0] * 4]), parameter([[9.0] * 100], None)
    mask_noncritical_([frozen, a], 0.5)
    assert a.grad.tolist() == [[0.0, 0.0, 0.5, 0.5]] and frozen.grad is None
    bias = parameter([1.0], [2.0])
    mask_noncritical_([bias], 0.5)
    assert bias.grad.tolist() == [2.0]


def test_weights_stay_and_the_rest_of_them_decay():
    """The mask is no freeze: the optimizer's weight decay shrinks what is not critical."""
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    mask_noncritical_(net.parameters(), 0.8)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    masked = net[4].weight.grad == 0
    torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01).step()
    torch.testing.assert_close(net[4].weight[masked], before[4][masked] * 0.999)


@pytest.mark.parametrize("tau", [1.0, 40, -0.1, math.nan])
def test_refuses(tau):
    for call in (lambda: mask_noncritical_(network().parameters(), tau), lambda: CDRCallback(tau)):
        with pytest.raises(ValueError, match=f"noise_rate={tau}"):
            call()


def test_a_call_after_zero_grad_is_refused():
    net = network()
    net.zero_grad()
    with pytest.raises(ValueError, match="after backward"):
        mask_noncritical_(net.parameters(), 0.5)


# ---------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_taken_in_single_precision_at_least(dtype):
    """In float16 the products 1e-8 would be 0 and tie, 1e5 would be infinite and tie."""
    for size in (1e-4, 300.0):
        w = parameter([[size * k for k in (1, 2, 3, 4)]], [[size] * 4], dtype)
        expected = w.grad * torch.tensor([0, 0, 0.5, 0.5])
        mask_noncritical_([w], 0.5)
        assert w.grad.dtype == dtype
        torch.testing.assert_close(w.grad, expected.to(dtype))


def test_parameters_of_several_precisions_share_a_threshold():
    a, b = (
        parameter([[1.0, 4.0]], [[1.0, 1.0]]),
        parameter([[2.0, 3.0]], [[1.0, 1.0]], torch.float16),
    )
    mask_noncritical_([a, b], 0.5)
    assert a.grad.tolist() == [[0.0, 0.5]] and b.grad.tolist() == [[0.0, 0.5]]


def test_the_scale_of_the_loss_does_not_matter():
    before, after = network(), network()
    for p in before.parameters():
        p.grad.mul_(2.0**10)
    for net in (before, after):
        mask_noncritical_(net.parameters(), TAU)
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad * 2.0**10)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("weight", [0.0, 1e-3, 50.0])
def test_an_overflow_still_reaches_the_scaler(bad, weight):
    """Where a mask by torch.where puts 0 it would be hidden, and the step taken."""
    net = network()
    with torch.no_grad():
        net[4].weight[0, 0] = weight
    net[4].weight.grad[0, 0] = bad
    before = [p.detach().clone() for p in net.parameters()]
    scaler, optimizer = (
        torch.amp.GradScaler("cpu", init_scale=8.0),
        torch.optim.SGD(net.parameters(), lr=0.1),
    )
    scaler.scale(torch.ones(()))
    mask_noncritical_(net.parameters(), TAU)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------- in a Trainer


class Watch(TrainerCallback):
    """The gradients of each network before CDR or after it, step by step."""

    def __init__(self, networks):
        self.networks, self.seen = networks, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append([grads(network) for network in self.networks])


def mutual(folder, rows=8, tau=TAU, callbacks=None, models=None, **kwargs):
    """Two networks, one large and one small in its gradients; weight decay, and clipped."""
    loss = SMKD(
        MyLC(b1=0.0, window=ROWS), eta=1.5, b2=-4, normalize="batch"
    )  # b1 = 0: eps does not depend on the batch
    models = models or [Net(1), Net(2, scale=3.0)]
    callbacks = [CDRCallback(tau)] if callbacks is None else callbacks
    settings = {"per_device_train_batch_size": rows, "max_grad_norm": 1.0}
    return trainer(folder, models, loss, hf={"callbacks": callbacks}, **settings | kwargs)


def masked(gradients, net, tau=TAU):
    """What the mask makes of these gradients, by numpy's sort."""
    weights = [
        (p, g) for p, g in zip(net.parameters(), gradients, strict=True) if p.dim() in (2, 4)
    ]
    scores = torch.cat([(p * g).abs().flatten() for p, g in weights]).sort(descending=True).values
    last = scores[int((1 - tau) * len(scores)) - 1]
    return [
        g * ((p * g).abs() >= last) * (1 - tau) if p.dim() in (2, 4) else g
        for p, g in zip(net.parameters(), gradients, strict=True)
    ]


def test_each_network_is_masked_by_itself_after_clipping(tmp_path):
    models = [Net(1), Net(2, scale=3.0)]
    first, last = Watch(models), Watch(models)
    mutual(
        tmp_path,
        models=models,
        callbacks=[first, CDRCallback(TAU), last],
        max_steps=1,
        learning_rate=0.0,
    ).train()
    shares = []
    for net, before, after in zip(models, first.seen[0], last.seen[0], strict=True):
        assert torch.stack([g.norm() for g in before]).norm() <= 1.0 + 1e-5  # clipped already
        torch.testing.assert_close(after, masked(before, net))
        weights = torch.cat(
            [g.flatten() for p, g in zip(net.parameters(), after, strict=True) if p.dim() > 1]
        )
        shares.append((weights != 0).float().mean().item())
    assert shares == pytest.approx(
        [1 - TAU] * 2, abs=0.01
    )  # pooled over both, the large one would have more


def test_accumulation(tmp_path):
    """2 x 4 rows are 1 x 8: the mask is that of the whole gradient, once a step."""
    watch = Watch([])
    runs = [
        mutual(tmp_path, 8, models=[Net(1), Net(2)]),
        mutual(
            tmp_path,
            4,
            models=[Net(1), Net(2)],
            callbacks=[CDRCallback(TAU), watch],
            gradient_accumulation_steps=2,
        ),
        mutual(tmp_path, 8, models=[Net(1), Net(2)], callbacks=[]),
    ]
    for run in runs:
        run.train()
    whole, parts, without = (state(run.model.peers) for run in runs)
    assert len(watch.seen) == runs[0].state.global_step == 12
    assert difference(whole, parts) < 1e-5
    assert difference(whole, without) > 1e-2


class Named(nn.Module):
    """Pixels by name, logits in a dictionary: what the stock Trainer hands over and takes. Keeps
    what it is given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.given = net, []

    def forward(self, pixel_values, labels=None, index=None):
        self.given.append((pixel_values, index))
        return {"logits": self.net(pixel_values)}


def test_a_plain_trainer_is_a_plain_loop(tmp_path):
    model, net = Named(Net(3)), Net(3)
    run = plain(tmp_path, CE(), model, callbacks=[CDRCallback(TAU)], max_steps=4)
    run.train()
    labels = torch.tensor(run.train_dataset.labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for pixels, index in model.given:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(pixels), labels[index]).backward()
        mask_noncritical_(net.parameters(), TAU)
        optimizer.step()
    assert len(model.given) == 4
    assert difference(state(model.net), state(net)) < 1e-6 < difference(state(net), state(Net(3)))


# ------------------------------------------------------------------------------------ two processes


def both(folder, world):
    """Both Trainers; 8 rows a step however many processes share them."""
    run = mutual(folder / "mutual", 8 // world)
    settings = {"per_device_train_batch_size": 8 // world, "num_train_epochs": 2}
    stock = plain(folder / "stock", LabelSmoothing(0.2), callbacks=[CDRCallback(TAU)], **settings)
    for each in (run, stock):
        each.train()
        assert each.args.world_size == world
    return {"mutual": state(run.model), "stock": state(stock.model)}


def rank_main(folder):
    torch.set_num_threads(1)
    out = both(folder, WORLD)
    torch.save(out, folder / f"rank{os.environ['RANK']}.pt")
    leave()


def test_two_processes_are_one(tmp_path):
    """The mask is that of the reduced gradient: bit-equal on both, and one process on the same
    global batch."""
    launch(__file__, tmp_path, WORLD)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    alone = both(tmp_path / "alone", 1)
    for name, one in alone.items():
        assert difference(ranks[0][name], ranks[1][name]) == 0
        assert difference(ranks[0][name], one) < 1e-5, name


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
