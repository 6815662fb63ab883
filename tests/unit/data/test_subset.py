"""Subset, random_split and ConcatDataset of views: as the view itself, or refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.tiny import Net, arguments, jitter, rows, to_tensor, trainer, view
from torch.utils.data import ConcatDataset, DataLoader, Subset, random_split
from transformers import Trainer

from kd_plugins import SMKD, MyLC
from kd_plugins.data import ImageView, as_view, cache_teachers, num_samples, set_epoch
from kd_plugins.losses import CE, Joint
from kd_plugins.train import MutualDistillationTrainer, ProgressCallback, as_compute_loss_func

ROWS = [7, 3, 11, 2, 2]


def test_a_subset_knows_what_the_view_knows():
    whole = view(12)
    part = as_view(Subset(whole, ROWS))
    assert (len(part), num_samples(part), part.num_classes) == (5, 12, 3)
    assert part.class_names == whole.class_names and part.broken() == []
    assert np.array_equal(part.labels, whole.labels[ROWS])
    assert np.array_equal(part.clean_labels, whole.clean_labels[ROWS])
    (batch,) = DataLoader(part, 8)
    assert batch["index"].tolist() == ROWS and batch["labels"].tolist() == part.labels.tolist()
    assert as_view(part) is part and as_view(whole) is whole and as_view(None) is None
    assert as_view(Subset(view(12, clean=False), ROWS)).clean_labels is None
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert again.num_classes == 3 and again[0]["index"] == 7


def test_a_subset_of_a_subset():
    inner = Subset(view(12), ROWS)
    part = as_view(Subset(inner, torch.tensor([2, 0])))
    assert part.labels.tolist() == view(12).labels[[11, 7]].tolist() and num_samples(part) == 12
    assert [part[k]["index"] for k in range(2)] == [11, 7]


def test_a_subset_of_cached_teachers(tmp_path):
    part = as_view(Subset(cache_teachers(view(12), [Net(1)], tmp_path), ROWS))
    assert part[0]["teacher"].shape == (1, 3) and num_samples(part) == 12
    assert part.num_classes == 3


def test_other_data_sets_are_left_alone():
    plain = Subset([{"labels": 0}] * 4, [0, 2])
    assert as_view(plain) is plain and num_samples(plain) == 2
    joined = ConcatDataset([plain, plain])
    assert as_view(joined) is joined and num_samples(joined) == 4
    assert num_samples(None) is None
    set_epoch(plain, 1)


@pytest.mark.parametrize("part", [view(6), Subset(view(6), [0]), ConcatDataset([view(6)])])
def test_views_are_not_joined(part):
    joined = ConcatDataset([[{}], part])
    for call in (
        as_view,
        num_samples,
        lambda d: set_epoch(d, 1),
        lambda d: as_view(Subset(d, [0])),
    ):
        with pytest.raises(ValueError, match=r"same index.*concatenate_datasets"):
            call(joined)


def test_the_epoch_reaches_a_view_through_subsets():
    whole = view(12, transform=jitter)
    part = Subset(Subset(whole, ROWS), [0, 1, 2])

    def pixels():
        return torch.stack([item["pixel_values"] for item in part])

    first = pixels()
    set_epoch(part, 1)
    assert not torch.equal(pixels(), first)
    set_epoch(part, 0)
    assert torch.equal(pixels(), first)


class Wrapped(torch.utils.data.Dataset):
    """What people write around a view."""

    def __init__(self, view):
        self.inner = view

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        return self.inner[i]


def test_the_epoch_reaches_a_view_inside_a_data_set_of_ones_own(tmp_path):
    whole = recorded()
    trainer(tmp_path, loss=SMKD(MyLC(window=32), eta=1.5, b2=-4), train=Wrapped(whole)).train()
    assert {epoch for epoch, _ in whole.seen} == {0, 1}
    set_epoch(Wrapped(Subset(whole, [0])), 5)
    assert whole[0] is not None and whole.seen[-1] == (5, 0)


def test_the_certainty_is_a_mean_over_the_rows_that_are_trained_on(tmp_path):
    loss = MyLC()
    trainer(tmp_path, [Net(1)], loss, train=Subset(view(32), range(8, 24)))
    assert loss.window == 16


class Epochs(ImageView):
    """Keeps the epoch of every item that is read."""

    seen: list

    def __getitem__(self, index):
        self.seen.append((int(self._epoch), index))
        return super().__getitem__(index)


def recorded():
    data = Epochs(rows(32), jitter, clean="clean")
    data.seen = []
    return data


def test_a_split_trains_and_augments_in_every_epoch(tmp_path):
    whole = recorded()
    train, held_out = random_split(whole, [24, 8], torch.Generator().manual_seed(0))
    run = trainer(tmp_path, loss=SMKD(MyLC(window=24), eta=1.5, b2=-4), train=train)
    whole.seen.clear()  # the Trainer has looked at the first row
    run.train()
    for epoch in range(2):
        assert sorted(i for e, i in whole.seen if e == epoch) == sorted(train.indices)
    assert run.train_dataset.num_classes == 3
    assert "eval_loss" in run.evaluate(as_view(held_out))


def test_a_table_has_a_row_for_each_of_the_views_rows(tmp_path):
    part = Subset(view(32), range(8, 24))
    with pytest.raises(ValueError, match=r"num_samples=16.*32"):
        trainer(tmp_path, [Net(1)], Joint(num_samples=16, num_classes=3), train=part)
    loss = Joint(num_samples=32, num_classes=3)
    trainer(tmp_path, [Net(1)], loss, train=part).train()
    (visits,) = loss.visits.buffers()
    assert visits.flatten().nonzero().flatten().tolist() == list(range(8, 24))


def test_networks_by_name_get_the_number_of_classes(tmp_path):
    train = Subset(view(12, transform=to_tensor), [0, 3, 6])  # labels of one class only
    args = arguments(tmp_path)
    run = MutualDistillationTrainer(["test_resnet"], CE(), args, train_dataset=train)
    assert run.peers[0].num_classes == 3


@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_the_trainer_refuses_joined_views(tmp_path, role):
    with pytest.raises(ValueError, match="concatenate_datasets"):
        trainer(tmp_path, **{role: ConcatDataset([view(8), view(8)])})


def plain(folder, data):
    class Wrapped(Net):
        def forward(self, pixel_values, **_):
            return {"logits": super().forward(pixel_values)}

    loss = CE()
    args = arguments(folder, remove_unused_columns=False)
    return Trainer(
        Wrapped(1),
        args,
        train_dataset=data,
        compute_loss_func=as_compute_loss_func(loss),
        callbacks=[ProgressCallback(loss)],
    )


def test_a_plain_trainer(tmp_path):
    whole = recorded()
    train, _ = random_split(whole, [24, 8], torch.Generator().manual_seed(0))
    run = plain(tmp_path, train)
    run.train()
    for epoch in range(2):
        assert sorted(i for e, i in whole.seen if e == epoch) == sorted(train.indices)
    with pytest.raises(ValueError, match="concatenate_datasets"):
        plain(tmp_path, ConcatDataset([view(8), view(8)])).train()
