"""What the Trainer trains on: plain HF data sets, distributions, extra columns, epochs of views."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from helpers.tiny import (
    SIZE,
    Epochs,
    Net,
    difference,
    jitter,
    plain,
    rows,
    soft,
    state,
    to_tensor,
    trainer,
    view,
    vit,
)
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import FakeData

from kd_plugins import CE, TruncatedGCE
from kd_plugins.data import ImageView


def hf_dataset(n=16, features=None, **more):
    """A data set of datasets with a transform, which alone makes pixels and labels."""
    data = rows(n)
    columns = {
        "picture": [row["image"].tolist() for row in data],
        "label": [row["label"] for row in data],
    }

    def transform(batch):
        pictures = [to_tensor(np.array(p, dtype=np.uint8)) for p in batch["picture"]]
        made = {"pixel_values": pictures, "labels": batch["label"]}
        return made | {name: batch[name] for name in more}

    made = Dataset.from_dict(columns | more)
    if features:
        made = made.cast_column("label", features)
    return made.with_transform(transform)


def test_plain_hf_dataset_with_a_transform(tmp_path):
    """Dropping the columns that forward() does not name would take the picture away before the
    transform sees it."""
    run = trainer(tmp_path, train=hf_dataset(), num_train_epochs=1)
    run.train()
    assert run.state.global_step == 2
    assert "selected_a" in run.state.log_history[0]
    assert "right_a" not in run.state.log_history[0]


def test_networks_by_name_find_the_classes_of_a_plain_hf_dataset(tmp_path):
    """The ClassLabel of its features; and a loss that needs sizes finds them there as well."""
    train = hf_dataset(features=ClassLabel(names=["red", "green", "blue"]))
    run = trainer(tmp_path, ["resnet10_cifar"], CE() + 0.1 * TruncatedGCE(), train=train)
    assert run.peers[0].num_classes == 3
    assert run.model.criterion.terms[1].num_samples == 16


def test_extra_columns_are_left_alone(tmp_path):
    train = hf_dataset(file=["a.png"] * 16, source=list(range(16)))
    run = trainer(tmp_path, [Net(1), vit()], train=train, num_train_epochs=1)
    run.train()
    assert run.state.global_step == 2


def test_rows_that_no_batch_can_hold_are_refused(tmp_path):
    """Before anything is made, with the words that lead to a view."""
    picture = Image.new("RGB", (SIZE, SIZE))
    pairs = TensorDataset(torch.zeros(8, 3, SIZE, SIZE), torch.zeros(8, dtype=torch.long))
    raw = Dataset.from_dict({"image": [picture] * 4, "label": [0, 1, 2, 0]})
    forgotten = ImageView(raw, lambda picture: picture)
    cases = {
        r"row 0 of the train data is a tuple: expected a mapping with pixel_values": pairs,
        r"row 0 of the train data is a tuple.*ImageView\(dataset, transform\)": FakeData(4),
        r"'image' in row 0 of the train data is a picture of PIL \(Png.*ImageView\(dataset": raw,
        r"'pixel_values' in row 0.*the transform must return a tensor.*ToTensor": forgotten,
    }
    for words, data in cases.items():
        with pytest.raises(TypeError, match=words):
            trainer(tmp_path, ["resnet10_cifar"] * 2, train=data)
    with pytest.raises(TypeError, match="row 0 of the hard data is a tuple"):
        trainer(tmp_path, evaluate={"hard": pairs})


def test_rows_for_a_collator_of_the_user_are_left_to_it(tmp_path):
    pairs = TensorDataset(torch.zeros(8, 3, SIZE, SIZE), torch.zeros(8, dtype=torch.long))

    def collate(rows):
        return {"pixel_values": torch.stack([x for x, _ in rows]), "labels": rows[0][1].repeat(8)}

    hf = {"data_collator": collate}
    trainer(tmp_path, Net(), CE(), train=pairs, num_train_epochs=1, hf=hf).train()


def test_rows_without_labels_say_so(tmp_path):
    bare = [{"pixel_values": torch.zeros(3, SIZE, SIZE)}] * 8
    with pytest.raises(ValueError, match="the training batch has no labels"):
        trainer(tmp_path, train=bare).train()
    with pytest.raises(ValueError, match="the batch has no labels"):
        plain(tmp_path, CE(), train=bare).train()


def test_distributions_in_training_and_evaluation(tmp_path):
    """eval_loss is their cross-entropy; the class that counts as right is the most probable one."""
    hard, spread = view(21), soft(view(21))
    run = trainer(tmp_path, train=soft(view(24)), evaluate=spread, num_train_epochs=1)
    run.train()
    metrics, wanted = run.evaluate(), run.evaluate(hard)
    x, y = (torch.stack([row[k] for row in spread]) for k in ("pixel_values", "labels"))
    with torch.no_grad():
        losses = [F.cross_entropy(peer(x), y).item() for peer in run.peers]
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(wanted["eval_accuracy"])
    assert metrics["eval_memorised"] == pytest.approx(wanted["eval_memorised"])


def test_views_are_told_the_epoch_also_after_a_resume(tmp_path):
    def run(**kwargs):
        train = Epochs(rows(20), jitter, clean="clean")
        return train, trainer(
            tmp_path, train=train, gradient_accumulation_steps=2, num_train_epochs=3, **kwargs
        )

    data, whole = run(save_strategy="steps", save_steps=1)
    whole.train()
    assert data.told == [0, 1, 2]
    assert whole.state.global_step == 6
    for start, told in ((2, [1, 2]), (3, [1, 2]), (4, [2])):
        data, resumed = run()
        resumed.train(str(tmp_path / f"checkpoint-{start}"))
        assert data.told == told
        assert difference(state(resumed.model), state(whole.model)) == 0
