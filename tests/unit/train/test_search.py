"""Hyperparameter search: every trial has networks and a loss of its own."""

import pytest
from helpers.tiny import Net, difference, state, trainer, view
from transformers import trainer as hf_trainer
from transformers.trainer_utils import HPSearchBackend

from kd_plugins import SMKD, MyLC


def pair():
    return [Net(1), Net(2)]


class Trial(dict):
    """What a search backend knows of a trial."""


class Trials:
    """A search backend: what transformers does with optuna or ray, for two trials."""

    default_hp_space = staticmethod(lambda trial: {"learning_rate": trial["rate"]})

    def ensure_available(self):
        pass

    def run(self, run, n_trials, direction, **kwargs):
        found = []
        for number in range(n_trials):
            trial = Trial(rate=0.05, eta=1.5 + number)
            trial.number, trial.params = number, {}
            run.train(trial=trial)
            found.append((run.evaluate()["eval_loss"], state(run.model)))
        return found


def test_hyperparameter_search_makes_everything_anew_for_each_trial(tmp_path, monkeypatch):
    """The networks start from the same weights, the loss from an empty state; both know the
    trial."""
    monkeypatch.setitem(
        hf_trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Trials
    )
    monkeypatch.setattr(hf_trainer.Trainer, "_report_to_hp_search", lambda *_: None)
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # knows the types of optuna
    etas, losses = [], []

    def loss(trial):
        etas.append(trial and trial["eta"])
        losses.append(SMKD(MyLC(), eta=1.5, normalize="batch"))
        return losses[-1]

    settings = {"evaluate": view(8), "num_train_epochs": 1}
    run = trainer(tmp_path, lambda trial: pair(), loss, **settings)
    (first, a), (second, b) = run.hyperparameter_search(backend="optuna", n_trials=2)
    assert etas == [None, 1.5, 2.5]
    assert first == second
    assert difference(a, b) == 0
    assert run.model.criterion is losses[2]
    assert losses[1].refine[0].r > 0
    alone = trainer(tmp_path / "alone", pair(), SMKD(eta=1.5, normalize="batch"), **settings)
    alone.train()
    assert difference(a, state(alone.model)) == 0
    with pytest.raises(ValueError, match="direction='maximize': expected a compute_objective"):
        run.hyperparameter_search(backend="optuna", n_trials=2, direction="maximize")
    run.hyperparameter_search(backend="optuna", n_trials=2)
    assert run.compute_objective({"eval_loss": 0.5, "eval_accuracy": 1.0}) == 0.5
    several = {"eval_x_loss": 0.5, "eval_x_accuracy": 1.0, "eval_y_loss": 1.5}
    assert run.compute_objective(several) == 1.0
    with pytest.raises(RuntimeError, match=r"MutualDistillationTrainer\(lambda trial: \["):
        alone.hyperparameter_search(backend="optuna", n_trials=2)
