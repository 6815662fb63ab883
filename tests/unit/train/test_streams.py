"""Data without a length."""

from helpers.tiny import Net, jitter, trainer, view
from torch.utils.data import IterableDataset

from kd_plugins import CE, DynamicsCallback
from kd_plugins.audit import read_dynamics


def test_a_view_within_a_stream_is_told_each_epoch(tmp_path):
    """The Trainer's own epoch is a share of max_steps there."""

    class Stream(IterableDataset):
        def __init__(self):
            self.view, self.epochs = view(8, transform=jitter), []

        def __iter__(self):
            self.epochs.append(int(self.view._epoch))
            yield from (self.view[k] for k in range(8))

    stream = Stream()
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "dataloader_num_workers": 0}
    watched = {"callbacks": [DynamicsCallback()]}
    trainer(tmp_path, Net(1), CE(), stream, hf=watched, **settings).train()
    assert stream.epochs[:4] == [0, 1, 2, 3]
    rows = read_dynamics(tmp_path / "dynamics")
    assert sorted(set(rows["epoch"])) == [0, 1, 2, 3]
