"""Audit data and runs: wrong labels, training dynamics, influence, metrics and pictures."""

from .dynamics import read_dynamics, summarise
from .estimate_transition import estimate_transition
from .gallery import contact_sheet, html_page, write_suspects
from .influence import influence_scores, select_lowest
from .predict import predict_probs
from .suspects import correct_labels, drop_suspects, find_suspects

__all__ = [
    "contact_sheet",
    "correct_labels",
    "drop_suspects",
    "estimate_transition",
    "find_suspects",
    "html_page",
    "influence_scores",
    "predict_probs",
    "read_dynamics",
    "select_lowest",
    "summarise",
    "write_suspects",
]
