"""Tiny networks, pictures and Trainers for the tests of the hosting."""

import itertools
import os
import signal

import numpy as np
import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from kd_plugins import SMKD, MyLC
from kd_plugins.data import ImageView
from kd_plugins.train import (
    MutualDistillationTrainer,
    MutualTrainingArguments,
    ProgressCallback,
    as_compute_loss_func,
)

CLASSES, SIZE, ROWS = 3, 8, 48


class Net(nn.Module):
    """Pixels [B, 3, H, W] -> logits [B, C]; a few hundred parameters. ``bn`` and ``dropout`` make
    resuming hard."""

    def __init__(self, seed=0, classes=CLASSES, bn=False, dropout=0.0, scale=1.0):
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.num_classes = classes
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6) if bn else nn.GroupNorm(2, 6)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(6 * 4, classes)
        torch.random.set_rng_state(state)
        with torch.no_grad():
            self.fc.weight *= (
                8 * scale
            )  # sure of some samples from the start, so that something is selected

    def forward(self, pixels):
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(pixels)).relu(), 2)
        return self.fc(self.drop(x.flatten(1)))


class Staged(nn.Module):
    """Pixels [B, 3, H, W] -> logits [B, C], with the maps of its stages, in timm's interface."""

    def __init__(self, channels=(2, 3, 6), classes=CLASSES, seed=0):
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        pairs = itertools.pairwise((3, *channels))
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in pairs)
        self.fc = nn.Linear(channels[-1], classes)
        torch.random.set_rng_state(state)
        self.num_features, self.num_classes = channels[-1], classes
        self.feature_info = [{"num_chs": channel} for channel in channels]

    def forward_intermediates(self, pixels, output_fmt="NCHW"):
        maps = []
        for stage in self.stages:
            pixels = nn.functional.gelu(stage(pixels))
            maps.append(pixels)
        return pixels, maps

    def forward_features(self, pixels):
        return self.forward_intermediates(pixels)[0]

    def forward_head(self, last):
        return self.fc(last.mean((2, 3)))

    def forward(self, pixels):
        return self.forward_head(self.forward_features(pixels))


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 128 - 1


def jitter(picture):
    """An augmentation that shows at once when a resumed run draws other numbers."""
    pixels = to_tensor(picture)
    return pixels.flip(-1) + 0.3 * torch.randn_like(pixels) if np.random.rand() < 0.5 else pixels


def rows(n=ROWS, classes=CLASSES, wrong=0.25, seed=0):
    """Pictures whose brightness per channel tells the class; every fourth label or so is wrong."""
    rng = np.random.default_rng(seed)
    clean = np.arange(n) % classes
    noisy = np.where(rng.random(n) < wrong, (clean + 1) % classes, clean)
    pictures = rng.integers(0, 90, (n, SIZE, SIZE, 3))
    pictures[np.arange(n), :, :, clean % 3] += 120
    return [
        {"image": p.astype(np.uint8), "label": int(y), "clean": int(c)}
        for p, y, c in zip(pictures, noisy, clean, strict=True)
    ]


def view(n=ROWS, *, clean=True, transform=to_tensor, **kwargs):
    return ImageView(rows(n, **kwargs), transform, clean="clean" if clean else None)


def soft(data, sharpness=0.9, classes=CLASSES):
    """The items of a view with distributions [C] for labels, as Mixup leaves them."""
    rest = (1 - sharpness) / (classes - 1)

    def spread(label):
        return torch.full((classes,), rest).index_fill(0, torch.tensor(label), sharpness)

    return [
        item | {"labels": spread(item["labels"])}
        for item in map(data.__getitem__, range(len(data)))
    ]


def arguments(folder, cls=MutualTrainingArguments, **kwargs):
    settings = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "save_strategy": "no",
    }
    if cls is MutualTrainingArguments:
        settings["milestones"] = [0.5]
    return cls(
        str(folder),
        **settings
        | {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        | kwargs,
    )


def trainer(folder, models=None, loss=None, train=None, evaluate=None, *, hf=None, **kwargs):
    """A Trainer of two small networks with SMKD-P + MyLC; ``kwargs`` are training arguments,
    ``hf`` the Trainer's."""
    models = [Net(1), Net(2)] if models is None else models
    loss = SMKD(MyLC(window=ROWS), eta=1.5, b2=-4, normalize="batch") if loss is None else loss
    data = {"train_dataset": view() if train is None else train, "eval_dataset": evaluate}
    return MutualDistillationTrainer(
        models, loss, arguments(folder, **kwargs), **data, **(hf or {})
    )


def hard(folder, callbacks=(), **kwargs):
    """A run that is hard to resume: BatchNorm, dropout, random pictures, r and momentum. 12 steps,
    a checkpoint every two."""
    models = [Net(1, bn=True, dropout=0.2), Net(2, dropout=0.3)]
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    return trainer(
        folder,
        models,
        train=view(transform=jitter),
        hf={"callbacks": list(callbacks)},
        **saving | kwargs,
    )


class Recorder(TrainerCallback):
    """What the networks were given, batch by batch, and the state after each step."""

    def __init__(self):
        self.batches, self.states = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.keep, with_kwargs=True, prepend=True)

    def keep(self, module, args, inputs):
        if module.training:
            self.batches.append(inputs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: p.detach().clone() for name, p in model.named_parameters()})


class Epochs(ImageView):
    """A view that writes down which epochs it was told."""

    def set_epoch(self, epoch):
        told = self.__dict__.setdefault("told", [])
        if epoch not in told[-1:]:  # accelerate may tell it as well
            told.append(epoch)
        super().set_epoch(epoch)


class StopAt(TrainerCallback):
    """Training ends after this step, as if it had been interrupted; the schedule is that of the
    whole."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


class Killed(TrainerCallback):
    """The power goes."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 9:  # in the middle of the second epoch, one step after a checkpoint
            os.kill(os.getpid(), signal.SIGKILL)


def state(module):
    """Every parameter and buffer, those outside the state dict too."""
    tensors = itertools.chain(module.state_dict().items(), module.named_buffers())
    return {name: value.detach().clone() for name, value in tensors}


def difference(a, b):
    """Largest absolute difference between two states; 0.0 is bit-equal (NaN never is)."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a if a[k].numel())


def logged(run, *names):
    """The named figures of every training log."""
    return [[log[name] for name in names] for log in run.state.log_history if "loss" in log]


def vit(classes=CLASSES, seed=0, **config):
    """The smallest Hugging Face image classifier."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    sizes |= {
        "image_size": SIZE,
        "patch_size": 4,
        "num_labels": classes,
        "hidden_dropout_prob": 0.0,
    }
    return ViTForImageClassification(ViTConfig(**sizes | config))


def resnet(classes=CLASSES, seed=0):
    """A Hugging Face classifier whose checkpoints its Trainer reads back exactly (a ViT's it does
    not)."""
    torch.manual_seed(seed)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "num_labels": classes}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def plain(folder, loss, model=None, train=None, *, callbacks=None, **kwargs):
    """A stock Hugging Face Trainer with our loss."""
    settings = {
        "remove_unused_columns": False,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant_with_warmup",
    }
    settings["ddp_find_unused_parameters"] = False
    return Trainer(
        vit() if model is None else model,
        arguments(folder, TrainingArguments, **settings | kwargs),
        train_dataset=view(clean=False) if train is None else train,
        compute_loss_func=as_compute_loss_func(loss),
        callbacks=[ProgressCallback(loss), *(callbacks or [])],
    )
