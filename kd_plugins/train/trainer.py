"""One HF Trainer for one network, for peers that teach each other, and for teachers beside them."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback as TrainerBar
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from ..data import as_view, same_classes
from ..losses.base import Loss, peer_name
from ..losses.mutual import Mutual
from ..models.card import model_card
from ..models.export import export
from ..models.factory import logits_of, make_model, make_teacher
from ..models.hosted import Hosted
from ..models.input_config import batch_range, input_configs
from .arguments import MutualTrainingArguments
from .callbacks import ScheduleCallback, _ShortBar
from .checks import refuse_arguments, refuse_labels, refuse_pairing, refuse_tables
from .run_folder import describe_run, last_checkpoint, refuse_damaged, refuse_other_run, write_run
from .sizes import bind_sizes

logger = logging.get_logger(__name__)


def as_compute_loss_func(loss: Loss) -> Callable[..., Tensor]:
    """``compute_loss_func`` for a plain HF ``Trainer``, right under accumulation and on several processes.

    >>> callback = ProgressCallback(loss)  # doctest: +SKIP
    >>> Trainer(vit, args, compute_loss_func=as_compute_loss_func(loss), callbacks=[callback])  # doctest: +SKIP
    """

    def compute_loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits = logits_of(outputs)
        # The Trainer does not switch the mode of the loss. Evaluation must not change its state.
        loss.train(torch.is_grad_enabled())
        if any(t.device != logits.device for t in (*loss.buffers(), *loss.parameters())):
            loss.to(logits.device)
        value = loss(logits, labels)
        if num_items_in_batch is None or loss.reduction == "sum":
            return value
        # The Trainer adds up the values of all accumulation steps and processes. It counts the
        # items as (labels != -100).sum(): B for class indices [B], B * C for distributions [B, C].
        return value * (labels.numel() / num_items_in_batch)

    return compute_loss


class MutualDistillationTrainer(Trainer):
    """HF ``Trainer`` that hosts one network, or several that teach each other, and the loss they share.

    Pixels are handed over as the first network expects them; the others get them re-normalised (``pretrained_cfg``) and
    resized if their input size is fixed. Bytes (uint8) are normalised on the device, for each network as it expects. Logged
    are the loss terms and diagnostics of the loss (``own_a``, ``selected_a``, ``chi``, ``r_a`` ...; with clean labels
    ``right_a``, the share of the taught labels that is true). Evaluated are top-1 and top-5 accuracy of each network and of
    their ensemble (mean probability); with clean labels also the memorisation of wrong ones. ``eval_loss`` is plain
    cross-entropy, mean over networks: it compares across losses.

    Args:
        models: a network or a sequence of them: timm names, timm modules, Hugging Face classifiers or any module from
            pixels [B, 3, H, W] to logits [B, C].
        loss: a loss for one network, or (``peers = True``) for as many as there are.
        args: ``MutualTrainingArguments``.
        teachers: frozen networks, for a loss that reads ``teacher`` or ``teacher_features``: modules, or names, folders and
            files as :func:`kd_plugins.models.make_teacher` takes them. Not with a training set that brings their logits
            (:func:`~kd_plugins.data.cache_teachers`).
        train_dataset, eval_dataset: rows with ``pixel_values`` and ``labels`` (and ``index``, ``clean_labels``), such as
            :class:`~kd_plugins.data.ImageView`; eval_dataset may be a dictionary of them.
        optim_per_peer: optimizer settings of each network that differ from ``args``: ``[{"lr": 0.1}, {"lr": 0.01}]``.
        **hf: any other argument of ``Trainer``. ``compute_metrics`` replaces the metrics above; it
            is given logits [N, C] of one network, [N, K, C] of peers.

    Raises:
        ValueError, TypeError: what these networks, this loss and these data cannot do together, at construction.
    """

    model: Hosted
    loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch

    def __init__(
        self,
        models: str | nn.Module | Sequence[str | nn.Module],
        loss: Loss,
        args: TrainingArguments | None = None,
        *,
        teachers: Sequence[str | Path | nn.Module] = (),
        train_dataset: Any = None,
        eval_dataset: Any = None,
        optim_per_peer: Sequence[dict[str, Any]] | None = None,
        **hf: Any,
    ) -> None:
        args = args if args is not None else MutualTrainingArguments()
        refuse_arguments(args, hf.get("compute_metrics") is not None)
        set_seed(
            args.seed
        )  # models made from names are then the same in every run, and differ from each other
        train_dataset = as_view(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: as_view(part) for name, part in eval_dataset.items()}
        else:
            eval_dataset = as_view(eval_dataset)
        data = train_dataset if train_dataset is not None else eval_dataset
        num_classes = getattr(data, "num_classes", None)
        models = [models] if isinstance(models, str | nn.Module) else list(models)
        peers = [make_model(model, num_classes) for model in models]
        masters = [make_teacher(teacher, num_classes) for teacher in teachers]
        refuse_pairing(peers, masters, loss, getattr(train_dataset, "teacher_logits", None))
        for name, view in _named({"train": train_dataset}, eval_dataset):
            refuse_labels(view, peers, name)
            same_classes(view, train_dataset, f"the {name} data")
        refuse_tables(loss, train_dataset)
        bind_sizes(loss, peers, masters, train_dataset)
        if optim_per_peer is not None and len(optim_per_peer) != len(peers):
            raise ValueError(
                f"optim_per_peer has {len(optim_per_peer)} entries for {len(peers)} networks; expected one each"
            )
        self.optim_per_peer = optim_per_peer or [{}] * len(peers)

        watch = getattr(train_dataset, "clean_labels", None) is not None
        for module in loss.modules():
            if isinstance(module, Mutual):
                module.watch = watch
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._first_batches: dict[str, dict[str, Any]] = {}  # by kind, for the export
        self._predicts = False
        hf.setdefault("compute_metrics", self._metrics)
        hosted = Hosted(peers, loss, masters)
        super().__init__(hosted, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **hf)
        self.label_names = ["labels"]
        self.add_callback(ScheduleCallback(loss))  # the loss is part of the model
        if self.pop_callback(TrainerBar):
            self.add_callback(_ShortBar)

    @property
    def peers(self) -> list[nn.Module]:
        """The networks that learn."""
        return list(self.model.peers)

    # ------------------------------------------------------------------------------------------------------- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group per network, weight decay on all of it, and one for the loss if it learns something."""
        if self.optimizer is None:
            hosted: Any = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, hosted)  # type: ignore[arg-type]
            groups = []
            for peer, own in zip(hosted.peers, self.optim_per_peer, strict=True):
                params = [p for p in peer.parameters() if p.requires_grad]
                groups.append({"params": params, "weight_decay": self.args.weight_decay, **own})
            if learned := [p for p in hosted.criterion.parameters() if p.requires_grad]:
                groups.append({"params": learned, "weight_decay": self.args.weight_decay})
            self.optimizer = cls(groups, **kwargs)
            if unknown := {k for own in self.optim_per_peer for k in own} - set(
                self.optimizer.defaults
            ):
                raise ValueError(
                    f"optim_per_peer: {cls.__name__} has no setting {sorted(unknown)} and would ignore it; "
                    f"it has {sorted(self.optimizer.defaults)}"
                )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Warm-up, then steps at the milestones; what ``lr_scheduler_type`` says if that is not a constant."""
        args: Any = self.args
        milestones: Any = getattr(args, "milestones", None)
        stepped = milestones and args.lr_scheduler_type in ("constant", "constant_with_warmup")
        if self.lr_scheduler is not None or not stepped:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            decay = args.lr_decay ** bisect_right(milestones, step / max(num_training_steps, 1))
            return decay * min(1.0, (step + 1) / (warmup + 1))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.create_optimizer(), factor
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each network by itself: one peer's spike must not shrink the other's step. Returns the largest norm."""
        self.accelerator.unscale_gradients()
        parts = [list(part.parameters()) for part in (*self.model.peers, self.model.criterion)]
        norms = [nn.utils.clip_grad_norm_(part, self.args.max_grad_norm) for part in parts if part]
        return torch.stack(norms).max()

    # -------------------------------------------------------------------------------------------------- steps and logs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        kind = "training" if self.model.training else "evaluation"
        if kind not in self._first_batches and "pixel_values" in inputs:
            self._first_batches[kind] = batch_range(inputs["pixel_values"])
        outputs = model(**inputs)
        if self.model.training:
            for name, value in self.model.stats.items():  # on the device: nothing waits for it
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
            self._steps += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _set_signature_columns_if_needed(self) -> None:
        """With ``remove_unused_columns=True``, the columns that the networks name are kept."""
        super()._set_signature_columns_if_needed()
        known = {
            *(self._signature_columns or ()),
            *(n for names in self.model.names for n in names),
        }
        self._signature_columns: Any = sorted(known)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss reported since the last log: means over steps and processes."""
        if "loss" in logs and self._steps:
            names = sorted(self._sums)
            stacked = torch.stack([self._sums[name] for name in names]) / self._steps
            means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
            self._sums, self._steps = {}, 0
            self._refuse_nan(means)
            means.pop("loss")
            for name in [n for n in means if n.startswith("selected_right_")]:
                peer, right = name.removeprefix("selected_right_"), means.pop(name)
                if means[f"selected_{peer}"] > 0:
                    means[f"right_{peer}"] = right / means[f"selected_{peer}"]
            logs |= {name: float(f"{value:.6g}") for name, value in means.items()}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; weights that a NaN has reached are not written over good ones."""
        if self._steps:
            self._refuse_nan({name: value.item() for name, value in self._sums.items()})
        # the gradient of the last step may be NaN where its loss was not
        if bad := [
            name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()
        ]:
            self._refuse_nan({"loss": math.nan, **dict.fromkeys(bad, math.nan)})
        super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        # networks in channels_last are strided, and safetensors takes packed tensors only
        super()._save(output_dir, {name: value.contiguous() for name, value in state_dict.items()})
        if self.args.should_save:
            write_run(Path(output_dir or str(self.args.output_dir)), self._run(), self.args)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process then completes the checkpoint and deletes older ones. Every process has
        # to have written its part by then.
        self.accelerator.wait_for_everyone()

    def _run(self) -> dict[str, Any]:
        """What this run is: see :func:`~kd_plugins.train.run_folder.describe_run`."""
        hosted = self.model
        run = describe_run(
            self.args, hosted.criterion, hosted.peers, hosted.teachers, self.train_dataset
        )
        return run | {"optim_per_peer": json.loads(json.dumps(self.optim_per_peer, default=str))}

    def _refuse_nan(self, means: dict[str, float]) -> None:
        if not math.isfinite(means["loss"]):
            bad = [name for name, value in means.items() if not math.isfinite(value)]
            raise FloatingPointError(
                f"the training loss is {means['loss']} at step {self.state.global_step} (not finite: {bad[:9]}); the weights are "
                f"lost, the last checkpoint in {self.args.output_dir} is not. Lower the learning rate ({self.args.learning_rate}), "
                "clip (max_grad_norm) or warm up, and resume"
            )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's. ``resume_from_checkpoint=True`` goes on from the last complete checkpoint,
        if there is one, and starts anew otherwise.

        Raises:
            ValueError: the checkpoint belongs to another run, or a file is missing or damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            refuse_damaged(folder)
            refuse_other_run(folder, self._run())
        self._sums, self._steps = {}, 0
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if resume_from_checkpoint and not self._sums:
                error.add_note(
                    f"while resuming from {resume_from_checkpoint}, before the first step: where a "
                    "file there is damaged, or not of this trainer, resume from another checkpoint"
                )
            raise
        finally:
            self.model.release_teachers()
        for name, view in _named({"train": self.train_dataset}, self.eval_dataset):
            broken = sorted(set(gather_object(view.broken()))) if hasattr(view, "broken") else []
            if broken and self.is_world_process_zero():
                shown = ", ".join(broken[:20]) + (" ..." if len(broken) > 20 else "")
                logger.warning(
                    f"{len(broken)} pictures of the {name} data were not readable and were replaced: {shown}"
                )
        return output

    def _last_checkpoint(self) -> str | None:
        """The last checkpoint that every process can go on from."""
        paths = gather_object([last_checkpoint(self.args.output_dir)])
        return None if None in paths else min(paths, key=lambda p: int(p.rsplit("-", 1)[1]))

    # ------------------------------------------------------------------------------------------------------ evaluation

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As the Trainer's, with logits [B, C] of one network or [B, K, C] of peers.

        For the Trainer's own metrics the networks are ranked here, on the device: five class ids a
        sample, where the logits of 20,000 samples, 1,000 classes and two networks take 300 MB.
        """
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if logits is None:
            return loss, None, labels
        logits, clean = logits if isinstance(logits, tuple) else (logits, None)
        own = self.compute_metrics == self._metrics
        if own and not self._predicts:
            logits = _ranked(logits)
        elif logits.shape[1] == 1:
            logits = logits[:, 0]
        return loss, (logits, clean) if own and clean is not None else logits, labels

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As the Trainer's; ``predictions`` are logits [N, C] of one network, [N, K, C] of peers."""
        self._predicts = True
        try:
            output = super().predict(*args, **kwargs)
        finally:
            self._predicts = False
        predictions: Any = output.predictions
        return output._replace(
            predictions=predictions[0] if isinstance(predictions, tuple) else predictions
        )

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from ..audit.metrics import peer_metrics

        labels, ranked = np.asarray(prediction.label_ids), cast(Any, prediction.predictions)
        ranked, clean = ranked if isinstance(ranked, tuple) else (ranked, None)
        if self._predicts:
            logits = torch.from_numpy(ranked)
            ranked = _ranked(logits if logits.dim() == 3 else logits.unsqueeze(1)).numpy()
        return peer_metrics(ranked, labels if labels.ndim == 1 else labels.argmax(-1), clean)

    # ---------------------------------------------------------------------------------------------------------- export

    def export(
        self,
        output_dir: str | Path | None = None,
        *,
        input_config: dict[str, Any] | None = None,
        **card: Any,
    ) -> list[Path]:
        """Save each network by itself, with a model card, as ``peer_a``, ``peer_b`` ...: see
        :func:`kd_plugins.models.export`.

        With it goes how pictures were prepared for this network: as the evaluation data say
        (``view.input_config()``), else the training data, composed with what the network's input
        adapter does.

        Args:
            output_dir: where to; ``args.output_dir`` by default.
            input_config: of the batches, where the data cannot say it: ``input_size`` (C, H, W),
                ``mean``, ``std`` (left out for bytes), ``crop_pct``, ``interpolation``.
            **card: fields of the card's metadata, as the hub names them:
                ``license="apache-2.0"``, ``datasets=["uoft-cs/cifar100"]``.

        Raises:
            ValueError: the first evaluation batch contradicts the config that would be exported.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folders = [folder / f"peer_{peer_name(k)}" for k in range(len(self.model.peers))]
        if self.is_world_process_zero():
            names = getattr(self.train_dataset, "class_names", None)
            configs = self._input_configs(input_config)
            for k, path in enumerate(folders):
                export(self.model.peers[k], path, names, configs[k])
                if hasattr(self.processing_class, "save_pretrained"):  # a tokenizer
                    self.processing_class.save_pretrained(path)  # type: ignore[union-attr]
                self._write_card(k, path, configs[k], card)
        return folders

    def _write_card(
        self, k: int, folder: Path, config: dict[str, Any] | None, card: dict[str, Any]
    ) -> None:
        text = model_card(self, k, input_config=config, **card)
        (folder / "README.md").write_text(text, encoding="utf-8")

    def _input_configs(self, given: dict[str, Any] | None) -> list[dict[str, Any] | None]:
        """How pictures were prepared for each network."""
        evals = self.eval_dataset
        evals = next(iter(evals.values()), None) if isinstance(evals, dict) else evals
        views = {"evaluation": evals, "training": self.train_dataset}
        adapters = self.model.inputs[: len(self.model.peers)]
        return input_configs(adapters, views, self._first_batches, given)  # type: ignore[arg-type]

    def create_model_card(self, **card: Any) -> None:
        """Write the networks and their cards: see :meth:`export`."""
        self.export(**card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        input_config: dict[str, Any] | None = None,
        **card: Any,
    ) -> list[Any]:
        """Upload each network with its card, and nothing else, to a repository of its own, which is made if need be.

        They are called ``args.hub_model_id`` (or as the output folder) with ``-a``, ``-b`` ... behind it, of a single network
        with nothing. Arguments are those of the Trainer, ``card`` that of :meth:`export`; what is not given is taken from
        ``args.hub_token``, ``hub_revision`` and ``hub_private_repo``. Returns a commit per network, futures with
        ``blocking=False``; on other processes than the main one nothing.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return []
        api: Any = HfApi()
        args, peers = self.args, range(len(self.model.peers))
        token = args.hub_token if token is None else token
        private = args.hub_private_repo if private is None else private
        name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
        names = [f"{name}-{peer_name(k)}" if len(peers) > 1 else name for k in peers]
        folders = self.export(input_config=input_config, **card)
        repos = [
            api.create_repo(n, token=token, private=private, exist_ok=True).repo_id for n in names
        ]
        commits, configs = [], self._input_configs(input_config)
        for k, repo, folder in zip(peers, repos, folders, strict=True):
            self._write_card(k, folder, configs[k], {"repo": repo, **card})
            commits.append(
                api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    commit_message=commit_message,
                    token=token,
                    revision=args.hub_revision if revision is None else revision,
                    run_as_future=not blocking,
                    allow_patterns=[
                        "config.json",
                        "model*.safetensors",
                        "model*.json",
                        "preprocessor_config.json",
                        *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt"),
                        "README.md",
                    ],
                )
            )
        return commits


def _ranked(logits: Tensor) -> Tensor:
    """[B, K, C] -> class ids [B, K (+ 1), 5], most likely first. Peers are followed by their
    ensemble (mean probability).
    """
    scores = logits.float().softmax(-1)
    if scores.shape[1] > 1:
        scores = torch.cat([scores, scores.mean(1, keepdim=True)], dim=1)
    return scores.topk(min(5, scores.shape[-1]), dim=-1).indices.to(torch.int32)


def _named(first: dict[str, Any], evals: Any) -> list[tuple[str, Any]]:
    """(name, view) of every data set."""
    views = first | (evals if isinstance(evals, dict) else {"eval": evals})
    return [(name, view) for name, view in views.items() if view is not None]
