"""Fine-tune a pretrained timm model on doubtful labels with MyLC, in the plain HF Trainer.

    python recipes/finetune_mylc.py --model resnet50.a1_in1k --data ethz/food101 --bf16
    python recipes/finetune_mylc.py --model runs/cifar/peer_a --data FOLDER --size 32
    python recipes/finetune_mylc.py --model resnet18=WEIGHTS.safetensors --data FOLDER

`--data` is a hub id or a folder. Its labels are used as they are; `--rate 0.4` first makes 40% of
them wrong. `--method ce` is the baseline. Expected: 46.3 ± 1.2 against 46.3 ± 1.1 per cent on ten
classes at 32 px, see recipes/README.md. The same in a plain PyTorch loop: README.md.
"""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

import kd_plugins as kd
from kd_plugins.audit.metrics import TopKAccuracy

DEFAULTS = {"output_dir": "runs/finetune_mylc", "report_to": "none", "save_total_limit": 2}
DEFAULTS |= {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 25}
DEFAULTS |= {"num_train_epochs": 10, "per_device_train_batch_size": 32, "learning_rate": 3e-4}
DEFAULTS |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 0.05}


@dataclass
class Settings:
    model: str = HfArg(default="resnet50.a1_in1k", help="timm name, NAME=FILE or exported folder")
    data: str = HfArg(default="ethz/food101", help="hub id or folder")
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(default=None, help="column of classes, if there are several")
    size: int | None = HfArg(default=None, help="side in px; default: what the model expects")
    method: str = HfArg(default="mylc", help="mylc, ce or any other loss for one network")
    b1: float = HfArg(default=10.0, help="steepness of MyLC's trust")
    prime: bool = HfArg(default=False, help="measure r first; the model knows these classes")
    rate: float = HfArg(default=0.0, help="share of labels made wrong first")


class Classifier(nn.Module):
    """A timm model with the signature that the Trainer expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        # the faster layout for convolutions on a CPU; safetensors refuses weights that have it
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return {"logits": self.model(pixel_values)}


def load(s: Settings, args: TrainingArguments) -> tuple:
    """Training and test data, with wrong labels if asked."""
    train, test, s.image, s.label = kd.data.load_pictures(s.data, s.image, s.label)
    classes = train.features[s.label].num_classes
    noise = kd.data.symmetric(classes, s.rate)
    train = kd.data.noisy_view(train, noise, seed=args.seed, label=s.label)
    if s.rate:
        print(kd.data.noise_report(train[s.label], train["noisy_label"], classes))
    return train, test, classes


def main() -> None:
    on_cpu = {"use_cpu": not torch.accelerator.is_available()}
    s, args = kd.train.parse_settings(Settings, TrainingArguments, defaults=DEFAULTS | on_cpu)
    loss = kd.create_loss(s.method, **({"b1": s.b1} if s.method == "mylc" else {}))
    set_seed(args.seed)
    train, test, classes = load(s, args)
    name = f"local-dir:{s.model}" if Path(s.model).is_dir() else s.model
    model = kd.models.make_model(name, classes, pretrained=True)
    size = {"input_size": (3, s.size, s.size)} if s.size else {}
    cfg = timm.data.resolve_data_config(size, model=model)
    crops = timm.data.create_transform(**cfg, is_training=True, color_jitter=None)
    plain = timm.data.create_transform(**cfg)
    columns = {"image": s.image, "seed": args.seed, "label": "noisy_label"}
    train_view = kd.data.ImageView(train, crops, clean=s.label if s.rate else None, **columns)
    test_view = kd.data.ImageView(test, plain, **columns | {"label": s.label})
    loss.bind(num_samples=len(train_view), num_classes=classes)
    if s.prime:
        view = kd.data.ImageView(train, plain, **columns)
        r = loss.prime(model.to(args.device), DataLoader(view, args.per_device_eval_batch_size))
        print(f"r = {r:.3f} before training")

    accuracy = TopKAccuracy()
    trainer = Trainer(
        Classifier(model),
        args,
        train_dataset=train_view,
        eval_dataset=test_view,
        compute_loss_func=kd.as_compute_loss_func(loss),
        callbacks=[kd.ProgressCallback(loss)],
        # ranked classes instead of logits: much less memory
        preprocess_logits_for_metrics=lambda logits, labels: logits.topk(min(5, classes)).indices,
        compute_metrics=lambda p: accuracy.compute(
            predictions=p.predictions, references=p.label_ids
        ),
    )
    kd.train.claim_folder(args, **vars(s))  # not before all of it could be made
    trainer.train(resume_from_checkpoint=kd.train.last_checkpoint(args.output_dir))
    figures = trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir, "model")
        kd.models.export(model, folder, train_view.class_names, test_view.input_config())
        kd.train.write_results(s, args, figures)


if __name__ == "__main__":
    kd.train.run_main(main)
