"""Training: the Hugging Face Trainer with peers and teachers, callbacks, the folder of a run."""

from .arguments import MutualTrainingArguments
from .callbacks import CDRCallback
from .command_line import parse_pairs, parse_settings, parse_terms, run_main, write_results
from .dynamics_callback import DynamicsCallback
from .dynamics_writer import NumberedRows
from .plain_trainer import ProgressCallback, as_compute_loss_func
from .run_folder import append_result, claim_folder, last_checkpoint, read_results
from .stages import STAGES, Stage, arguments_of, hand_over, stages_of
from .trainer import MutualDistillationTrainer

__all__ = [
    "STAGES",
    "CDRCallback",
    "DynamicsCallback",
    "MutualDistillationTrainer",
    "MutualTrainingArguments",
    "NumberedRows",
    "ProgressCallback",
    "Stage",
    "append_result",
    "arguments_of",
    "as_compute_loss_func",
    "claim_folder",
    "hand_over",
    "last_checkpoint",
    "parse_pairs",
    "parse_settings",
    "parse_terms",
    "read_results",
    "run_main",
    "stages_of",
    "write_results",
]
