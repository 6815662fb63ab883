"""One optimizer and one schedule for several networks: clipping, settings, learning rates."""

import pytest
import torch
from helpers.tiny import Net, difference, logged, trainer
from torch import nn

from kd_plugins import CE, Loss, Mutual, SelectNone
from kd_plugins.train import MutualTrainingArguments


def step(tmp_path, models, loss=None, **kwargs):
    """How far each network went in one step, as tensors by name."""
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    loss = Mutual(CE(), SelectNone()) if loss is None else loss
    settings = {
        "max_steps": 1,
        "milestones": [],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
    }
    run = trainer(tmp_path, models, loss, **settings | kwargs)
    run.train()
    return run, [
        {n: p.detach() - b[n] for n, p in m.named_parameters()}
        for m, b in zip(models, before, strict=True)
    ]


def rates(run):
    return [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log]


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup"])
def test_constant_means_constant(tmp_path, kind):
    """Only the default schedule is cut at the milestones."""
    settings = {"milestones": [0.5], "lr_scheduler_type": kind, "max_steps": 4}
    run, _ = step(tmp_path, [Net(1), Net(2)], **settings)
    assert rates(run)[0] == 0.05
    assert rates(run)[-1] == pytest.approx(0.05 if kind == "constant" else 0.01)


def test_the_optimizer_of_the_user(tmp_path):
    chosen = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})}
    run, _ = step(tmp_path, [Net(1), Net(2)], hf=chosen)
    assert isinstance(getattr(run.optimizer, "optimizer", run.optimizer), torch.optim.AdamW)
    assert rates(run) == [1e-3]

    networks = [Net(1), Net(2)]
    own = torch.optim.SGD([p for n in networks for p in n.parameters()], 0.1)
    with pytest.raises(ValueError, match="optim_per_peer would be ignored"):
        step(tmp_path, networks, hf={"optimizers": (own, None), "optim_per_peer": [{}, {}]})
    learns = Mutual(CE(), SelectNone())
    learns.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Mutual learns extra.weight, extra.bias, and the opt"):
        step(tmp_path, networks, learns, hf={"optimizers": (own, None)})


def norm(moves):
    return torch.stack([d.square().sum() for d in moves.values()]).sum().sqrt().item()


def test_clipping_is_per_network(tmp_path):
    """Joint clipping would let one peer's spike shrink the other's step."""
    calm, (alone, _) = step(tmp_path, [Net(1), Net(2)], max_grad_norm=0.5)
    spike, (beside, spiked) = step(tmp_path, [Net(1), Net(2, scale=1e4)], max_grad_norm=0.5)
    assert difference(alone, beside) == 0
    assert norm(beside) == pytest.approx(0.05 * 0.5, rel=1e-3)  # learning rate x clipped norm
    assert norm(spiked) == pytest.approx(0.05 * 0.5, rel=1e-2)
    assert logged(spike, "grad_norm")[0][0] > 100 * logged(calm, "grad_norm")[0][0] > 50
    _, (free, wild) = step(tmp_path, [Net(1), Net(2, scale=1e4)])
    assert norm(free) > 2 * norm(beside)
    assert norm(wild) > 1e3 * norm(spiked)


def test_optimizer_settings_per_network(tmp_path):
    own = [{"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.004, "momentum": 0.0}]
    run = trainer(tmp_path, hf={"optim_per_peer": own}, weight_decay=0.3)
    run.train()
    first, second = run.optimizer.param_groups
    assert (first["momentum"], second["momentum"]) == (0.9, 0.0)
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.3)
    assert (first["initial_lr"], second["initial_lr"]) == (0.02, 0.004)
    assert (first["lr"], second["lr"]) == pytest.approx(
        (0.02 * 0.2, 0.004 * 0.2)
    )  # the schedule multiplies both
    assert {id(p) for p in first["params"]} == {id(p) for p in run.peers[0].parameters()}
    _, (a, b) = step(tmp_path, [Net(1), Net(2)], hf={"optim_per_peer": [{"lr": 0.0}, {}]})
    assert norm(a) == 0 < norm(b)
    with pytest.raises(ValueError, match=r"SGD has no setting \['learning_rate'\]"):
        trainer(tmp_path, hf={"optim_per_peer": [{"learning_rate": 0.1}, {}]}).train()


def test_momentum_is_on_and_decay_covers_everything(tmp_path):
    """With no gradient at all, two steps by hand: v = decay w, w -= lr v; v = 0.9 v + decay w, w
    -= lr v. Norms too."""
    models = [Net(1, bn=True), Net(2)]
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    _, moves = step(
        tmp_path,
        models,
        0.0 * Mutual(CE(), SelectNone()),
        max_steps=2,
        learning_rate=0.1,
        weight_decay=0.5,
    )
    for move, start in zip(moves, before, strict=True):
        for name, w in start.items():
            v = 0.5 * w
            w1 = w - 0.1 * v
            w2 = w1 - 0.1 * (0.9 * v + 0.5 * w1)
            torch.testing.assert_close(w + move[name], w2, rtol=1e-5, atol=1e-7)
        assert move["norm.weight"].abs().min() > 0.1


def test_parameters_of_the_loss_learn(tmp_path):
    class Scaled(Loss):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def per_sample(self, logits, target):
            return -(target * (self.log_scale.exp() * logits).log_softmax(-1)).sum(-1)

    run = trainer(tmp_path, Net(1), Scaled(), num_train_epochs=1, max_grad_norm=1.0)
    run.train()
    assert len(run.optimizer.param_groups) == 2
    assert run.model.criterion.log_scale.abs() > 1e-3


def test_learning_rates_by_hand(tmp_path):
    def rates(**kwargs):
        run = trainer(tmp_path, Net(1), CE(), max_steps=10, learning_rate=1e-3, **kwargs)
        run.train()
        return [rate for [rate] in logged(run, "learning_rate")]

    one = 1e-3
    assert rates(milestones=[0.3, 0.6, 0.8], lr_decay=0.1) == pytest.approx(
        [one] * 3 + [one / 10] * 3 + [one / 100] * 2 + [one / 1000] * 2
    )
    assert rates(milestones=[0.5], warmup_steps=3) == pytest.approx(
        [one / 4, one / 2, 3 * one / 4] + [one] * 2 + [one / 5] * 5
    )
    linear = [one * (10 - i) / 10 for i in range(10)]
    assert rates(lr_scheduler_type="linear") == pytest.approx(
        linear
    )  # takes the place of the default milestones
    defaults = MutualTrainingArguments(str(tmp_path))
    # without it two processes on a machine without an accelerator run apart, and bf16 is refused
    assert defaults.use_cpu is not torch.accelerator.is_available()
    assert (defaults.milestones, defaults.lr_decay, defaults.optim, defaults.optim_args) == (
        [0.3, 0.6, 0.8],
        0.2,
        "sgd",
        "momentum=0.9",
    )
