"""State over the data set, as buffers: it follows the module to its device, into the checkpoint and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode without gradients; after it each part is as it was, since parts may be frozen in eval mode."""
    was = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in was:
            module.training = training


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over all processes; the value itself when there is one. Collective: every rank must call it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_over_ranks(value: Tensor) -> Tensor:
    """The rows of all processes one after another; the value itself when there is one. Collective.

    On an accelerator every rank must bring as many rows (samplers do): learning how many would make the host wait.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    world, rows = dist.get_world_size(), [len(value)] * dist.get_world_size()
    if value.device.type == "cpu":
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(value)]))
        rows = [int(n) for n in counts]
        value = torch.cat([value, value.new_zeros(max(rows) - len(value), *value.shape[1:])])
    parts = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(parts, value.contiguous())
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


class KeepsPrecision(nn.Module):
    """A module whose own float buffers keep their dtype under ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    A mean over 2.4 million samples, or a schedule of 100,000 steps, does not fit the 8 bits of a bfloat16.
    """

    @property
    def moves_state(self) -> bool:
        """Whether state may change now: in training mode with gradients enabled.

        A validation pass under ``no_grad`` leaves it alone. Ask before entering ``no_grad`` yourself.
        """
        return self.training and torch.is_grad_enabled()

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
            raise ValueError(
                f"window={window}: expected at least 1 sample; a mean over none is undefined"
            )
        self.window = int(window)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))  # never above window

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Count values [B] in. Those that are not finite are left out: a NaN would stay for ever."""
        known = values - values  # 0, or NaN for what is not finite
        sums = torch.stack([(values + known).nansum(), (known == 0).sum()])
        total, n = sum_over_ranks(sums.to(self.mean.dtype)).unbind()
        self.count.add_(n).clamp_(max=self.window)
        change = torch.addcmul(total, n, self.mean, value=-1.0)
        self.mean.addcdiv_(change, torch.maximum(self.count, n).clamp_(min=1.0))


class SampleTable(KeepsPrecision):
    """A row of numbers for each training sample, read and written by its position in the data set.

    All processes write what any of them has seen, so they hold the same table, each in its checkpoint and back. Where two
    ranks saw the same sample (a padded last batch), all take the same one of the two. Rows with a NaN are not written.

    Args:
        num_samples: rows of the data set.
        shape: of a sample's row; none for one number.
        fill: what stands there at first.
        dtype: of the numbers.
    """

    rows: Tensor

    def __init__(
        self, num_samples: int, *shape: int, fill: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(
                f"num_samples={num_samples}: expected the number of rows of the training data"
            )
        self.num_samples = int(num_samples)
        self.register_buffer("rows", torch.full((self.num_samples, *shape), fill, dtype=dtype))

    def read(self, index: Tensor) -> Tensor:  # [B] -> [B, *shape]
        self._check(index)
        return self.rows[index]

    @torch.no_grad()
    def write(self, index: Tensor, values: Tensor) -> None:  # [B], [B, *shape]
        self._check(index)
        index, values = (
            gather_over_ranks(index),
            gather_over_ranks(values.detach().to(self.rows.dtype)),
        )
        order = torch.arange(len(index), device=index.device)
        values = values[
            torch.where(index[:, None] == index, order, -1).amax(1)
        ]  # the last of equals, on every rank
        if values.is_floating_point():
            known = (
                torch.isfinite(values)
                .reshape(len(values), -1)
                .all(1)
                .view(-1, *[1] * (values.dim() - 1))
            )
            values = torch.where(known, values, self.rows[index])
        self.rows[index] = values

    def _check(self, index: Tensor) -> None:
        if (
            index.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # an accelerator asserts by itself
            wrong = (index < 0) | (index >= self.num_samples)
            if wrong.any():
                raise ValueError(
                    f"index {index[wrong][0].item()} is outside the table of num_samples={self.num_samples}: "
                    "give the loss the number of rows of the training data"
                )


class Progress(KeepsPrecision):
    """Training progress t/Γ in [0, 1] for a loss or a selector that follows a schedule.

    It is a tensor (a Python float would recompile the graph at every step) and not in the checkpoint: whoever trains
    sets it before each step.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()), persistent=False)
        self.known = False

    def set(self, progress: float) -> None:
        self.value.fill_(progress)
        self.known = True

    def get(self, owner: nn.Module) -> Tensor:
        if not self.known:
            raise RuntimeError(
                f"{type(owner).__name__} follows a schedule over training and does not know the progress: call "
                "loss.set_progress(step / total_steps) before each step, or add ProgressCallback(loss) to the Trainer; "
                "without it the schedule would silently stay at its start"
            )
        return self.value
