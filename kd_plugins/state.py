"""State over the data set, as buffers: it follows the module to its device, into the checkpoint and back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over all processes; the value itself when there is one. Collective: every rank must call it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class KeepsPrecision(nn.Module):
    """A module whose own float buffers keep their dtype under ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    A mean over 2.4 million samples, or a schedule of 100,000 steps, does not fit the 8 bits of a bfloat16.
    """

    def _apply(self, fn, recurse=True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class RunningMean(KeepsPrecision):
    """Mean over the last ``window`` samples or so: cumulative up to ``window`` samples, exponential with that horizon after.

    m <- m + (n / N) (mean of the batch - m), N = min(samples seen, window), n samples in the batch over all ranks.
    Counting samples, not batches, keeps a short last batch from weighing as much as a full one.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1 sample; a mean over none is undefined")
        self.window = int(window)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))  # never above window

    @torch.no_grad()
    def update(self, values: Tensor) -> None:  # [B]
        # a NaN would stay in the mean for ever, also where the GradScaler skips the step
        known = torch.isfinite(values)
        total = torch.where(known, values, 0.0).sum().to(self.mean.dtype)
        total, n = sum_over_ranks(torch.stack([total, known.sum().to(total.dtype)]))  # one message
        seen = (self.count + n).clamp(max=self.window)
        share = (n / seen.clamp_min(1.0)).clamp(max=1.0)
        self.mean.add_(share * (total / n.clamp_min(1.0) - self.mean))
        self.count.copy_(seen)
