"""Audit data and runs: wrong labels, training dynamics, influence, metrics and pictures."""

from .corrected_data import write_corrected
from .corrections import apply_decisions, correct_labels, drop_suspects
from .decisions import read_decisions, without_decided
from .dynamics import read_dynamics, summarise
from .estimate_transition import estimate_transition
from .exchange import (
    from_argilla,
    from_datalab,
    from_label_studio,
    label_studio_config,
    to_argilla,
    to_datalab,
    to_label_studio,
)
from .file_names import with_files
from .frozen import frozen_features, noise_of_pictures
from .gallery import contact_sheet, html_page, write_suspects
from .influence import influence_scores, select_lowest
from .neighbours import near_duplicates
from .noise_tables import farthest, noise_summary, write_noise, write_oddities
from .out_of_sample import out_of_sample
from .predict import predict_probs
from .ranking import LabelNoise, estimate_label_noise
from .suspects import find_suspects
from .zero_shot import zero_shot_probs

__all__ = [
    "LabelNoise",
    "apply_decisions",
    "contact_sheet",
    "correct_labels",
    "drop_suspects",
    "estimate_label_noise",
    "estimate_transition",
    "farthest",
    "find_suspects",
    "from_argilla",
    "from_datalab",
    "from_label_studio",
    "frozen_features",
    "html_page",
    "influence_scores",
    "label_studio_config",
    "near_duplicates",
    "noise_of_pictures",
    "noise_summary",
    "out_of_sample",
    "predict_probs",
    "read_decisions",
    "read_dynamics",
    "select_lowest",
    "summarise",
    "to_argilla",
    "to_datalab",
    "to_label_studio",
    "with_files",
    "without_decided",
    "write_corrected",
    "write_noise",
    "write_oddities",
    "write_suspects",
    "zero_shot_probs",
]
