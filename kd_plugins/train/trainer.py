"""One HF Trainer for one network, for peers that teach each other, and for teachers beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments, set_seed
from transformers import trainer as trainer_module
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data import as_view
from ..losses.base import Loss
from ..models.factory import make_model, make_teacher, network_list
from ..models.hosted import PeerModule
from ..models.input_config import batch_range, normalization_of, warn_of_inputs
from .arguments import MutualTrainingArguments
from .callbacks import ScheduleCallback, short
from .check_arguments import (
    refuse_arguments,
    refuse_hf_arguments,
    refuse_shared,
    refuse_untrained,
    warn_of_single,
)
from .checks import refuse_data, refuse_nan, refuse_pairing, refuse_rows
from .class_order import check_class_order
from .collapse import CollapseCallback
from .evaluation import RankingTrainer
from .optimizer import clip_each, peer_optimizer, stepped
from .publish import PublishingTrainer
from .run_folder import describe_run, last_checkpoint, refuse_damaged, refuse_other_run, write_run
from .search import SearchingTrainer
from .sizes import bind_sizes, num_classes_of

logger = logging.get_logger(__name__)

Models = str | nn.Module | Sequence[str | nn.Module]


class MutualDistillationTrainer(RankingTrainer, SearchingTrainer, PublishingTrainer):
    """HF ``Trainer`` of one network, or of several that teach each other, and of their loss.

    The training data bring pixels as the first network expects them; for the others they are
    normalised anew (``pretrained_cfg``) and resized if their input size is fixed. Bytes (uint8) are
    normalised on the device, for each network as it expects. Other inputs (``input_ids``) go to
    each network that names them.

    The log has the terms and diagnostics of the loss (``own_a``, ``selected_a``, ``threshold``
    ...); with clean labels ``right_a`` is the share of the taught labels that is true. Evaluation
    gives top-1 and top-5 accuracy of each network and of their ensemble (mean probability); with
    clean labels also how many wrong labels were memorised. ``eval_loss`` is plain cross-entropy,
    mean over networks: it compares across losses.

    Args:
        models: a network or a sequence of them: timm names, timm modules, Hugging Face classifiers
            or any module that returns logits [B, C]. For ``hyperparameter_search``: a function that
            is given the trial (or None) and returns them.
        loss: a loss for as many networks (``loss.num_peers``). What its constructor left open
            (``loss.bind``) is taken from data and networks. Or a function of the trial, too.
        args: ``MutualTrainingArguments``.
        teachers: trained networks, one or several, for a loss that reads ``teacher`` or
            ``teacher_features``: modules, or names, folders and files as
            :func:`kd_plugins.models.make_teacher` takes them. Not with training data that bring
            their logits (``cache_teachers``).
        train_dataset, eval_dataset: rows with ``pixel_values`` and ``labels`` (and ``index``,
            ``clean_labels``), such as :class:`~kd_plugins.data.ImageView`. ``eval_dataset`` may be
            a dictionary of them.
        optim_per_peer: optimizer settings of each network that differ from ``args``:
            ``[{"lr": 0.1}, {"lr": 0.01}]``.
        **hf: any other argument of ``Trainer``. ``compute_metrics`` replaces the metrics above; it
            is given logits [N, C] of one network, [N, K, C] of peers.

    Raises:
        ValueError, TypeError: what these networks, this loss and these data cannot do together.

    Notes:
        Several GPUs and hosts work by DDP (``accelerate launch``, ``torchrun``). FSDP, DeepSpeed
        and ``nn.DataParallel`` are refused. Under accumulation the gradient is the mean over the
        micro-batches. It differs from that of one large batch where the last micro-batch is
        smaller, and where there are class weights.
    """

    model: PeerModule
    loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch

    def __init__(
        self,
        models: Models | Callable[[Any], Models],
        loss: Loss | Callable[[Any], Loss],
        args: TrainingArguments | None = None,
        *,
        teachers: str | Path | nn.Module | Sequence[str | Path | nn.Module] = (),
        train_dataset: Any = None,
        eval_dataset: Any = None,
        optim_per_peer: Sequence[dict[str, Any]] | None = None,
        **hf: Any,
    ) -> None:
        args = args if args is not None else MutualTrainingArguments()
        refuse_arguments(args)
        refuse_hf_arguments(args, hf)
        if optim_per_peer and (hf.get("optimizers") or (None,))[0] is not None:
            raise ValueError(
                "optim_per_peer would be ignored: the optimizer that is passed has its settings"
            )
        train_dataset, evals = as_view(train_dataset), eval_dataset
        evals = (
            {k: as_view(v) for k, v in evals.items()} if isinstance(evals, dict) else as_view(evals)
        )
        self._views = _named({"train": train_dataset}, evals)
        if hf.get("data_collator") is None:
            refuse_rows(self._views, args)
        self._num_classes = num_classes_of(next(iter(self._views.values()), None))
        # Networks made from names are then the same in every run, and differ from each other.
        set_seed(args.seed)
        self._models, self._loss, self.optim_per_peer = models, loss, optim_per_peer
        self._teachers = [make_teacher(t, self._num_classes) for t in network_list(teachers)]
        self._sums: dict[str, Tensor] = {}  # of the diagnostics since the last log
        self._steps = 0
        self._first_batches, self.evaluated = {}, {}
        if searched := _is_function(models) or _is_function(loss):
            refuse_shared(models, loss)
        hf.setdefault("compute_metrics", self._metrics)
        hf |= {"model_init": self._host} if searched else {"model": self._host()}
        super().__init__(args=args, train_dataset=train_dataset, eval_dataset=evals, **hf)
        self.label_names = ["labels"]
        self.add_callback(ScheduleCallback())
        self.add_callback(CollapseCallback())
        bar = trainer_module.DEFAULT_PROGRESS_CALLBACK  # in a notebook, a table
        if self.pop_callback(bar):
            self.add_callback(short(bar))

    def _host(self, trial: Any = None) -> PeerModule:
        """The networks and their loss in one module; of a search, those of a trial."""
        sources: tuple[Any, Any] = self._models, self._loss
        models, loss = (f(trial) if _is_function(f) else f for f in sources)
        peers = [make_model(model, self._num_classes) for model in network_list(models)]
        data = self._views.get("train")
        refuse_pairing(peers, self._teachers, loss, getattr(data, "teacher_logits", None))
        refuse_data(self._views, peers, loss)
        check_class_order(peers, self._teachers, self._views)
        if self.optim_per_peer is not None and len(self.optim_per_peer) != len(peers):
            raise ValueError(
                f"optim_per_peer has {len(self.optim_per_peer)} entries for {len(peers)} networks; "
                "expected one each"
            )
        bind_sizes(loss, peers, self._teachers, data)
        known = normalization_of(self._views.values(), [*peers, *self._teachers])
        warn_of_inputs(self._teachers, peers[0], known)
        return PeerModule(peers, loss, self._teachers, known)

    @property
    def peers(self) -> list[nn.Module]:
        """The networks that learn."""
        return list(self.model.peers)

    # ------------------------------------------------------------------- optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group per network, and one for the loss if it learns something."""
        if self.optimizer is None:
            hosted: Any = self.model if model is None else model
            given = self.optimizer_cls_and_kwargs
            cls, settings = given or self.get_optimizer_cls_and_kwargs(self.args, hosted)
            decay, own = self.args.weight_decay, self._own_settings()
            self.optimizer = peer_optimizer(hosted, own, decay, cls, settings)
        return self.optimizer

    def _own_settings(self) -> list[dict[str, Any]]:
        return list(self.optim_per_peer or [{} for _ in self.model.peers])

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Warm-up and milestones; or what ``lr_scheduler_type`` says, if it was given."""
        args: Any = self.args
        milestones = getattr(args, "milestones", None)
        default = args.lr_scheduler_type == MutualTrainingArguments.lr_scheduler_type
        if self.lr_scheduler is not None or not (milestones and default):
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = args.get_warmup_steps(num_training_steps)
        factor = stepped(milestones, args.lr_decay, warmup, num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.create_optimizer(), factor
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_each([*self.model.peers, self.model.criterion], self.args.max_grad_norm)

    # ---------------------------------------------------------------------------- steps and logs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The loss of a batch, as the hosted module computes it."""
        kind = "training" if self.model.training else "evaluation"
        pixels = inputs.get("pixel_values")
        if kind not in self._first_batches and pixels is not None and pixels.dim() == 4:
            self._first_batches[kind] = batch_range(pixels)
        outputs = model(**inputs)
        if self.model.training:
            for name, value in self.model.stats.items():  # on the device: nothing waits for it
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
            self._steps += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _set_signature_columns_if_needed(self) -> None:
        """With ``remove_unused_columns=True``, the columns that the networks name are kept."""
        super()._set_signature_columns_if_needed()
        known = set(self._signature_columns or ()).union(*self.model.names)
        self._signature_columns: Any = sorted(known)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss reported since the last log: means over steps and processes."""
        if "loss" in logs and self._steps:
            names = sorted(self._sums)
            stacked = torch.stack([self._sums[name] for name in names]) / self._steps
            means = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
            self._sums, self._steps = {}, 0
            refuse_nan(means, self.args, self.state.global_step)
            means.pop("loss")
            for name in [n for n in means if n.startswith("selected_right_")]:
                peer, right = name.removeprefix("selected_right_"), means.pop(name)
                if means[f"selected_{peer}"] > 0:
                    means[f"right_{peer}"] = right / means[f"selected_{peer}"]
            logs |= {name: float(f"{value:.6g}") for name, value in means.items()}
        super().log(logs, start_time)

    # --------------------------------------------------------------------- training, checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's. ``resume_from_checkpoint=True`` goes on from the last complete
        checkpoint, if there is one, and starts anew otherwise.

        Raises:
            ValueError: the checkpoint belongs to another run, or a file is missing or damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            refuse_damaged(folder)
            refuse_other_run(folder, self._run())
            if (state := self._finished(folder)) is not None:
                return state
        self._sums, self._steps = {}, 0
        warn_of_single(self.args, self.train_dataset, self.peers)
        refuse_untrained(self.model.criterion, self.optimizer)
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
            self.model.teachers.release()
        self._name_broken()
        return output

    def _finished(self, folder: Path) -> TrainOutput | None:
        """Load a checkpoint at ``max_steps``: the Trainer would take one more step in its epoch."""
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self._load_from_checkpoint(str(folder))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        logger.info(f"{folder} is at max_steps={self.args.max_steps}: there is nothing to train")
        losses = [log["train_loss"] for log in state.log_history if "train_loss" in log]
        return TrainOutput(state.global_step, losses[-1] if losses else 0.0, {})

    def _last_checkpoint(self) -> str | None:
        """The last checkpoint that every process can go on from."""
        paths = gather_object([last_checkpoint(self.args.output_dir)])
        return None if None in paths else min(paths, key=lambda p: int(p.rsplit("-", 1)[1]))

    def _name_broken(self) -> None:
        """Warn of the pictures that could not be read."""
        for name, view in _named({"train": self.train_dataset}, self.eval_dataset).items():
            broken = sorted(set(gather_object(view.broken()))) if hasattr(view, "broken") else []
            if broken and self.is_world_process_zero():
                shown = ", ".join(broken[:20]) + (" ..." if len(broken) > 20 else "")
                logger.warning(
                    f"{len(broken)} pictures of the {name} data were not readable and were "
                    f"replaced: {shown}"
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's. Weights that a NaN has reached are not written over good ones."""
        if self._steps:
            sums = {name: value.item() for name, value in self._sums.items()}
            refuse_nan(sums, self.args, self.state.global_step)
        # the gradient of the last step may be NaN where its loss was not
        weights = self.model.named_parameters()
        if bad := [name for name, p in weights if not torch.isfinite(p).all()]:
            nans = dict.fromkeys(["loss", *bad], math.nan)
            refuse_nan(nans, self.args, self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        # safetensors takes packed tensors (those of channels_last are strided) that share no memory
        packed = {name: value.contiguous() for name, value in state_dict.items()}
        first = {value.data_ptr(): name for name, value in reversed(packed.items())}
        tied = {k: v.clone() for k, v in packed.items() if v.numel() and first[v.data_ptr()] != k}
        super()._save(output_dir, packed | tied)
        if self.args.should_save:
            write_run(Path(output_dir or str(self.args.output_dir)), self._run(), self.args)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process then completes the checkpoint and deletes older ones. Every process has
        # to have written its part by then.
        self.accelerator.wait_for_everyone()

    def _run(self) -> dict[str, Any]:
        """What this run is: see :func:`~kd_plugins.train.run_folder.describe_run`."""
        hosted, own = self.model, json.loads(json.dumps(self._own_settings(), default=str))
        run = describe_run(
            self.args, hosted.criterion, hosted.peers, hosted.teachers, self.train_dataset
        )
        return run | {"optim_per_peer": own}


def _named(first: dict[str, Any], evals: Any) -> dict[str, Any]:
    """Every data set by its name."""
    views = first | (evals if isinstance(evals, dict) else {"eval": evals})
    return {name: view for name, view in views.items() if view is not None}


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)
