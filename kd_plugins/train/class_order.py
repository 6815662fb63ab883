"""Networks whose classes are those of the data in another order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.labels import refuse_other_order
from ..losses.base import peer_name

logger = logging.getLogger(__name__)


def check_class_order(
    peers: Sequence[nn.Module], teachers: Sequence[nn.Module], views: Mapping[str, Any]
) -> None:
    """Refuse teachers in another order, and peers that are only evaluated; warn of other peers.

    Args:
        views: data sets by name; ``"train"`` is there if the peers learn.
    """
    data = next(iter(views.values()), None)
    refuse_other_order({f"teacher {k}": teacher for k, teacher in enumerate(teachers)}, data)
    try:
        refuse_other_order({f"network {peer_name(k)}": p for k, p in enumerate(peers)}, data)
    except ValueError as error:
        if "train" not in views:
            raise
        # a fresh head may have kept the names of the one before it
        logger.warning(f"{error}. Otherwise it learns them anew, in the order of the data")
