"""State over the data set, in buffers: it is in the checkpoint and moves with the module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode, without gradients. Afterwards each of their modules is as it was."""
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
    """Sum over all processes. Every rank must call it; a single process gets the value itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_over_ranks(value: Tensor) -> Tensor:
    """The rows of all processes, one after another. Every rank must call it.

    On an accelerator all ranks must bring equally many rows, as samplers do. To exchange the
    numbers, the host would have to wait.
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
    """A module whose own float buffers keep their dtype under ``.half()`` and ``.to(dtype)``.

    The 8 bits of a bfloat16 are too few for a mean over 2.4 million samples.
    """

    @property
    def moves_state(self) -> bool:
        """Whether state may change now: in training mode with gradients enabled.

        A validation pass under ``no_grad`` leaves it alone. Ask before you enter ``no_grad``.
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
    """Mean over the last samples: of all up to ``window`` samples, then exponential.

    m <- m + (n / N) (mean of the batch - m) with N = min(samples seen, window), for n samples in
    the batch over all ranks. It counts samples, so that a short last batch weighs less than a full
    one.
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
        """Count values [B] in, except those that are not finite: a NaN would stay for ever."""
        known = values - values  # 0, or NaN for what is not finite
        sums = torch.stack([(values + known).nansum(), (known == 0).sum()])
        total, n = sum_over_ranks(sums.to(self.mean.dtype)).unbind()
        self.count.add_(n).clamp_(max=self.window)
        change = torch.addcmul(total, n, self.mean, value=-1.0)
        self.mean.addcdiv_(change, torch.maximum(self.count, n).clamp_(min=1.0))


class SampleTable(KeepsPrecision):
    """A row of numbers for each training sample, by its position in the data set.

    Every process writes the rows of all processes, so their tables are equal. If two ranks saw the
    same sample (a padded last batch), all take the same one of the two rows. Rows with a NaN are
    not written.

    Args:
        num_samples: rows of the data set.
        shape: of a sample's row; nothing for one number.
        fill: the first value.
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
        index = gather_over_ranks(index)
        values = gather_over_ranks(values.detach().to(self.rows.dtype))
        order = torch.arange(len(index), device=index.device)
        last = torch.where(index[:, None] == index, order, -1).amax(1)  # of equal positions
        values = values[last]
        if values.is_floating_point():
            known = torch.isfinite(values).reshape(len(values), -1).all(1)
            known = known.view(-1, *[1] * (values.dim() - 1))
            values = torch.where(known, values, self.rows[index])
        self.rows[index] = values

    def _check(self, index: Tensor) -> None:
        # an accelerator asserts by itself
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = (index < 0) | (index >= self.num_samples)
            if wrong.any():
                raise ValueError(
                    f"index {index[wrong][0].item()} is outside the table of "
                    f"num_samples={self.num_samples}: give the loss the number of rows of the "
                    "training data"
                )


class Progress(KeepsPrecision):
    """Training progress t/Γ in [0, 1] for a loss or a selector that follows a schedule.

    It is a tensor, since a Python float would recompile the graph at every step. It is not in the
    checkpoint: the training loop sets it before each step.
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
                f"{type(owner).__name__} follows a schedule and does not know the progress: call "
                "loss.set_progress(step / total_steps) before each step, or add "
                "ProgressCallback(loss) to the Trainer; the schedule would stay at its start"
            )
        return self.value
