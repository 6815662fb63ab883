"""DivideMix and ELR+: by hand, against loops, limits, ranks; in the hosted module; resume."""

import copy
import math

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks
from helpers.tiny import CLASSES, ROWS, Net, StopAt, difference, jitter, rows, state, trainer

from kd_plugins import CE, ELR, DivideMix, DynamicsCallback, ELRPlus, clean_probability
from kd_plugins.audit import read_dynamics
from kd_plugins.data import ImageView
from kd_plugins.losses.mixing import Mixed
from kd_plugins.models import PeerModule

ALONE = torch.tensor(1.0)  # the share of a picture that is not mixed


def batch(b=6, c=3, share=0.75):
    """Logits of two networks, labels, and a guess that finds the last two labels wrong."""
    zs = [(2 * torch.randn(b, c, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    y = torch.arange(b) % c
    sure = torch.nn.functional.one_hot(y, c).double() * 4
    sure[-2:] = sure[-2:].roll(1, 1)
    guess = torch.stack([sure, 0.7 * sure]).add(torch.randn(2, b, c) / 10).softmax(-1)
    return zs, y, Mixed(guess, torch.arange(b).roll(2), torch.tensor(share).double())


def divide_mix(n=6, progress=0.12, **kwargs):
    loss = DivideMix(n, **kwargs)
    loss.set_progress(progress)
    return loss


# --------------------------------------------------------------------------------------- DivideMix


def sharpen(p, temperature):
    powers = [x ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


def divide_mix_loop(zs, y, mixed, clean, lam, temperature=0.5, threshold=0.5):
    """In Python; ``clean`` [K][B] are the probabilities that the labels are right."""
    guess, partner, share = mixed.guess.tolist(), mixed.partner.tolist(), mixed.share.item()
    total, rows, classes = 0.0, range(len(y)), range(len(zs[0][0]))
    for k in range(2):
        labels, kept = [], []
        for i in rows:
            w, q = clean[1 - k][i], naive.onehot(y[i], len(classes))
            if w > threshold:
                p = [w * a + (1 - w) * b for a, b in zip(q, guess[k][i], strict=True)]
            else:
                p = [(a + b) / 2 for a, b in zip(guess[0][i], guess[1][i], strict=True)]
            labels.append(sharpen(p, temperature))
            kept.append(w > threshold)
        ps = [naive.softmax(z) for z in zs[k]]
        own, guessed = [], []
        for i in rows:
            other = labels[partner[i]]
            q = [share * a + (1 - share) * b for a, b in zip(labels[i], other, strict=True)]
            squares = sum((a - b) ** 2 for a, b in zip(q, ps[i], strict=True)) / len(classes)
            (own if kept[i] else guessed).append(
                naive.cross_entropy(q, ps[i]) if kept[i] else squares
            )
        mean = [sum(p[c] for p in ps) / len(ps) for c in classes]
        total += sum(own) / len(own) + lam * sum(guessed) / len(guessed)
        total += sum(math.log(1 / len(classes) / m) / len(classes) for m in mean)
    return total


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_divide_mix_against_loops(share):
    """Value and gradient, a quarter up the ramp; the division is that of clean_probability."""
    zs, y, mixed = batch(share=share)
    loss = divide_mix(start=0.1, ramp=0.08)
    value = loss(zs, y, index=torch.arange(6), mixed=mixed)
    own = -mixed.guess.gather(2, y.expand(2, 6)[..., None]).squeeze(2).log()  # [K, B]
    clean = clean_probability(own.T).T.tolist()
    assert [w > 0.5 for w in clean[0]] == [True] * 4 + [False] * 2

    def expected(zs):
        return divide_mix_loop(zs, y.tolist(), mixed, clean, 25 * 0.25)

    logits = [z.tolist() for z in zs]
    assert value.item() == pytest.approx(expected(logits), abs=1e-4)
    for grad, slope in zip(
        torch.autograd.grad(value, zs), naive.slope(expected, logits), strict=True
    ):
        torch.testing.assert_close(grad, torch.tensor(slope).double(), atol=1e-4, rtol=1e-4)
    assert loss.stats["noise_rate"].item() == pytest.approx(1 / 3, abs=0.01)
    assert loss.selection[0][0].tolist() == [True] * 4 + [False] * 2


def test_the_warm_up_is_cross_entropy_on_unmixed_pictures():
    zs, y, mixed = batch(share=1.0)
    loss = divide_mix(progress=0.09)
    assert loss.draw(mixed.guess).share == 1
    expected = sum(CE()(z, y) for z in zs)
    torch.testing.assert_close(loss(zs, y, index=torch.arange(6), mixed=mixed), expected)
    loss.set_progress(0.1)
    assert 0.5 <= loss.draw(mixed.guess).share < 1


def test_each_network_learns_by_the_other_ones_division():
    """Only b's losses show the two wrong labels; a gives them up, and b keeps all."""
    zs, y, mixed = batch(share=1.0)
    right = torch.nn.functional.one_hot(y, 3).double() * 0.9 + 1 / 30
    mixed = mixed._replace(guess=torch.stack([right, mixed.guess[1]]))
    loss = divide_mix()
    loss(zs, y, index=torch.arange(6), mixed=mixed)
    labelled, _ = loss._lessons(mixed.guess, right.round(), torch.arange(6))
    assert [mask.sum().item() for mask in labelled] == [4, 6]
    assert [mask.sum().item() for mask, _ in loss.selection] == [6, 4]  # what each one teaches


# -------------------------------------------------------------------------------------------- ELR+


def test_elr_plus_by_hand():
    """t of each network is half of what the other says; then pictures, labels and t are mixed."""
    zs, y, mixed = batch(b=2, c=2)
    loss = ELRPlus(4, 2, lambda_=3.0, beta=0.5, ramp=0.0, reduction="none")
    value = loss(
        zs, y, index=torch.tensor([3, 1]), mixed=mixed._replace(partner=torch.tensor([1, 0]))
    )
    expected = [0.0, 0.0]
    for k in range(2):
        t = (mixed.guess[1 - k] / 2).tolist()
        for i in range(2):
            p = naive.softmax(zs[k][i].tolist())
            mixed_t = [0.75 * a + 0.25 * b for a, b in zip(t[i], t[1 - i], strict=True)]
            q = [0.75, 0.25] if y[i] == 0 else [0.25, 0.75]
            agreement = sum(a * b for a, b in zip(mixed_t, p, strict=True))
            expected[i] += naive.cross_entropy(q, p) + 3 * math.log(1 - agreement)
    assert value.tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(loss.averages.rows[3, 0], (mixed.guess[1, 0] / 2).float())


def test_elr_plus_of_unmixed_pictures_is_elr_of_both():
    """If each network's guess is the other one's prediction. Without the regulariser it is CE."""
    zs, y, mixed = batch()
    own = torch.stack([z.detach().softmax(-1) for z in zs])
    mixed = mixed._replace(guess=own.flip(0), share=ALONE)
    plus = ELRPlus(6, 3, lambda_=2.0, beta=0.6, ramp=0.0)  # tables are in float32
    alone = [ELR(6, 3, lambda_=2.0, beta=0.6) for _ in range(2)]
    for _ in range(3):
        value = plus(zs, y, index=torch.arange(6), mixed=mixed)
        expected = sum(e(z, y, index=torch.arange(6)) for e, z in zip(alone, zs, strict=True))
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    plain = ELRPlus(6, 3, lambda_=0.0, ramp=0.0)(zs, y, index=torch.arange(6), mixed=mixed)
    torch.testing.assert_close(plain, sum(CE()(z, y) for z in zs))


@pytest.mark.parametrize(
    ("progress", "risen"), [(0.0, math.exp(-5)), (0.2, math.exp(-1.25)), (0.5, 1)]
)
def test_the_regulariser_of_elr_plus_rises(progress, risen):
    zs, y, mixed = batch()
    loss = ELRPlus(6, 3, lambda_=2.0, ramp=0.4)
    loss.set_progress(progress)
    value = loss(zs, y, index=torch.arange(6), mixed=mixed).item()
    own = sum(loss.stats[f"own_{k}"].item() for k in "ab")
    regulariser = sum(loss.stats[f"regulariser_{k}"].item() for k in "ab")
    assert value == pytest.approx(own + 2 * risen * regulariser)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DivideMix(4, alpha=0), "alpha=0"),
        (lambda: DivideMix(4, lambda_u=-1), "lambda_u=-1"),
        (lambda: DivideMix(4, temperature=0), "temperature=0"),
        (lambda: DivideMix(4, start=30), "start=30"),
        (lambda: ELRPlus(4, 3, ema_decay=1.0), r"ema_decay=1\.0"),
        (lambda: ELRPlus(4, 3, ramp=40000), "ramp=40000"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------- the hosted module


def test_the_networks_see_mixtures_of_all_views():
    """Bytes are normalised first, for each network; guesses, in eval mode, are means over views."""
    first, second = (torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8) for _ in range(2))
    y, index = torch.tensor([0, 1, 2, 0]), torch.tensor([5, 2, 0, 3])
    peers = [Net(1, bn=True), Net(2)]
    host = PeerModule(
        peers, divide_mix(8, progress=0.5), normalization=((0.5,) * 3, (0.5,) * 3)
    ).train()
    before, seen, given = copy.deepcopy(peers[0]).eval(), [], []
    host.peers[0].register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0])))
    keep = host.criterion.register_forward_pre_hook
    keep(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    host(first, y, index, y, second_view=second)["loss"].backward()
    ((_, target), extra), mixed = given[0], given[0][1]["mixed"]
    scaled = host.inputs[0](torch.cat([first, second]))
    assert [mode for mode, _ in seen] == [False, False, True] and host.peers[0].training
    torch.testing.assert_close(seen[2][1], mixed.blend(scaled))
    assert target.tolist() == y.tolist() * 2 and extra["index"].tolist() == index.tolist() * 2
    with torch.no_grad():
        says = torch.stack([before(host.inputs[0](v)).softmax(-1) for v in (first, second)])
    torch.testing.assert_close(mixed.guess[0], says.mean(0).repeat(2, 1))
    torch.testing.assert_close(host.last["logits"][0].softmax(-1), says.mean(0))
    assert len(host.criterion.selection[0][0]) == 4 and "selected_right_a" in host.stats


def test_other_inputs_cannot_be_mixed():
    host = PeerModule([Net(1), Net(2)], divide_mix()).train()
    with pytest.raises(ValueError, match=r"DivideMix mixes pictures.*\['input_ids'\]"):
        host(labels=torch.tensor([0]), input_ids=torch.ones(1, 3))


WORKER = """
from kd_plugins import DivideMix, ELRPlus
from kd_plugins.losses.mixing import Mixed
for loss in (DivideMix(9), ELRPlus(9, 3)):
    for s, step in enumerate(steps):
        z, y, i = (mine(parts) for parts in step)
        loss.set_progress(s / len(steps))
        guess = torch.stack([z, 2 * z]).softmax(-1)
        mixed = Mixed(guess, torch.arange(len(i)).roll(1), torch.tensor(0.75))
        loss((z.requires_grad_(), z * 1), y, index=i, mixed=mixed).backward()
    seen += [module.rows.tolist() for module in loss.children() if hasattr(module, "rows")]
"""


def test_two_processes_hold_one_table(tmp_path):
    steps = []
    for _ in range(3):
        for index in ([[0, 1, 2], [3, 4]], [[5, 6], [7, 8]], [[3], [3]]):
            index = [torch.tensor(part) for part in index]
            steps.append([[torch.randn(len(i), 3) for i in index], [i % 3 for i in index], index])
    first, second, single = on_ranks(WORKER, steps, tmp_path)
    assert first == second == single and len(first) == 2


# ------------------------------------------------------------------------------------- the Trainer


def two_views(views=2):
    return ImageView(rows(), jitter, clean="clean", views=views)


@pytest.mark.parametrize("cls", [DivideMix, ELRPlus])
def test_a_resumed_run_is_bit_equal(cls, tmp_path):
    """With BatchNorm, random pictures and random mixtures; the dynamics have a row per picture."""

    def run(folder, callbacks=()):
        settings = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3}
        models = [Net(1, bn=True), Net(2, bn=True)]
        loss = cls(start=0.2, ramp=0.3) if cls is DivideMix else cls(ramp=0.3)
        hf = {"callbacks": [DynamicsCallback(tmp_path / folder / "dynamics"), *callbacks]}
        data = two_views(loss.views)
        return trainer(tmp_path / folder, models, loss, data, hf=hf, **settings)

    whole = run("whole")
    whole.train()
    run("stopped", [StopAt(8)]).train()  # a Trainer seeds the generators as it is made
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert difference(state(whole.model), state(resumed.model)) == 0
    dynamics = read_dynamics(tmp_path / "whole" / "dynamics")
    assert len(dynamics) == 3 * ROWS
    last = whole.state.log_history[-2]
    assert {"own_a", "own_b"} < set(last)
    if cls is DivideMix:
        assert 0 < last["noise_rate"] < 1 and last["right_a"] > 0
        assert whole.model.criterion.losses.rows.min() >= 0
    else:
        assert whole.model.criterion.averages.rows.shape == (ROWS, 2, CLASSES)


def test_data_with_one_view_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DivideMix compares 2 augmented.*views=2\)"):
        trainer(tmp_path, loss=DivideMix(), train=two_views(1))
