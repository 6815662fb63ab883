"""The losses are on logits: networks that read tokens learn from each other as networks that see
pictures do."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import logged, trainer
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from kd_plugins import CE, KD, SMKD, MyLC
from kd_plugins.models import PeerModule

CLASSES, WORDS, LENGTH = 3, 12, 6


def bert(seed, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "num_labels": CLASSES}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": LENGTH}
    return BertForSequenceClassification(BertConfig(**sizes | config))


def texts(n, seed=0, wrong=0.0):
    """The class is that of the word that stands most often; the last tokens are padding."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    words = 1 + labels[:, None] + CLASSES * rng.integers(0, 3, (n, LENGTH))
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, n)[:, None]
    words = np.where(mask, words, rng.integers(1, 10, (n, LENGTH)))  # what is masked misleads
    given = np.where(rng.random(n) < wrong, (labels + 1) % CLASSES, labels)
    columns = {"input_ids": words, "attention_mask": mask.astype(np.int64), "labels": given}
    return Dataset.from_dict(columns | {"index": np.arange(n)})


def run_of(folder, models, loss, **kwargs):
    settings = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 0.03}
    settings |= {"per_device_train_batch_size": 32, "num_train_epochs": 6, "logging_steps": 5}
    return trainer(folder, models, loss, texts(192, wrong=0.2), texts(60, 1), **settings | kwargs)


def test_two_berts_learn_from_each_other(tmp_path):
    loss = SMKD(eta=1.5, b2=-4, normalize="batch")
    run = run_of(tmp_path, [bert(1), bert(2)], loss)
    run.train()
    assert all(np.isfinite(logged(run, "loss", "own_a", "taught_b", "selected_a")).ravel())
    assert max(log[0] for log in logged(run, "selected_a")) > 0
    figures = run.evaluate()
    assert min(figures[f"eval_accuracy_{name}"] for name in ("a", "b", "ensemble")) > 0.8
    test = texts(60, 1).with_format("torch")[:]
    inputs = {name: test[name] for name in ("input_ids", "attention_mask")}
    for k, folder in enumerate(run.export()):
        alone = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        logits = alone(**inputs).logits
        torch.testing.assert_close(logits, run.peers[k].eval()(**inputs).logits)
        accuracy = (logits.argmax(-1) == test["labels"]).float().mean().item()
        assert accuracy == pytest.approx(figures[f"eval_accuracy_{'ab'[k]}"], abs=1e-4)
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "text-classification"
        assert "AutoModelForSequenceClassification.from_pretrained" in card.text


def test_teachers_and_averages_read_tokens_too(tmp_path):
    teacher = bert(3).train()
    before = {name: p.requires_grad for name, p in teacher.named_parameters()}
    run = run_of(tmp_path, bert(1), CE() + KD(), hf={"teachers": [teacher]}, num_train_epochs=1)
    run.train()
    assert teacher.training and before == {
        n: p.requires_grad for n, p in teacher.named_parameters()
    }


def test_columns_that_a_network_does_not_name_are_left_out():
    batch = {name: torch.as_tensor(np.array(texts(4)[name])) for name in texts(4).column_names}
    hosted = PeerModule([bert(1), bert(2)], SMKD(MyLC(window=4))).eval()
    assert hosted(**batch, length=torch.ones(4))["logits"].shape == (4, 2, CLASSES)
    with pytest.raises(ValueError, match=r"none of the inputs of Bert.*input_ids.*has \['words'\]"):
        hosted(words=batch["input_ids"])


def test_plain_training_arguments_keep_the_columns(tmp_path):
    """``remove_unused_columns=True`` goes by the networks, not by the module that hosts them."""
    run = run_of(
        tmp_path,
        [bert(1), bert(2)],
        SMKD(MyLC(window=192)),
        remove_unused_columns=True,
        max_steps=2,
    )
    run.train()
    assert run.state.global_step == 2
