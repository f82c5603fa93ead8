"""Decides whether a step whose loss or gradient is not finite ends the run or is skipped, and says which files it came from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from diffpipe.config.schema import OptimizerConfig
from diffpipe.data.loader import Batch
from diffpipe.errors import DiffpipeError
from diffpipe.pipeline.mesh import Mesh

NAMED = 8  # files of a message


class Guard:
    """Judges every step, the same way on every rank.

    Args:
        files: of each sample.

    Attributes:
        skipped: steps of the run that moved no weights.
        in_a_row: how many of them were the last ones.
    """

    def __init__(self, config: OptimizerConfig, mesh: Mesh, files: Sequence[str]) -> None:
        self.config, self.mesh, self.files = config, mesh, files
        self.skipped, self.in_a_row = 0, 0

    def judge(self, step: int, loss: float, norm: float, batch: Batch, shares: Sequence[Tensor]) -> str | None:
        """Nothing where the step may move the weights; otherwise what a person should know of its being skipped. All ranks call this.

        Args:
            loss, norm: of the whole step, the same on every rank.
            shares: the losses of this rank's microbatches, none but on the last stage.

        Raises:
            DiffpipeError: where the config says that such a step ends the run, or too many were skipped in a row.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return None
        found = f"the {'gradient' if math.isfinite(loss) else 'loss and with it the gradient'} of step {step} is not finite"
        found += f" (bucket {batch.bucket}; {self._origin(batch, shares)})"
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.config.on_nan == "skip" and self.in_a_row < self.config.nan_limit:
            return f"{found}: skipped, {self.in_a_row} in a row, {self.skipped} in all"
        raise DiffpipeError(
            found + (f", {self.in_a_row} in a row" if self.config.on_nan == "skip" else ""),
            where="optimizer.nan_limit" if self.config.on_nan == "skip" else "optimizer.on_nan",
            fix="look at these files; or train with --resume from the last checkpoint and a lower optimizer.lr, or model.dtype bfloat16"
            " instead of float16, or model.attention sdpa instead of cudnn"
            + ("" if self.config.on_nan == "skip" else "; optimizer.on_nan: skip leaves such steps out"),
        )

    def _origin(self, batch: Batch, shares: Sequence[Tensor]) -> str:
        """The files of the microbatches whose losses are not finite, or of all where each is."""
        micro = len(batch.samples) // len(batch.microbatches)
        bad = [number for number, share in enumerate(shares) if not math.isfinite(share.item())]
        own = [self.files[s] for number in bad for s in batch.samples[number * micro : (number + 1) * micro]]
        every = [self.files[s] for s in batch.samples] if shares else []
        told = self.mesh.exchange((own, every))
        names = [name for one, _ in told for name in one] or [name for _, one in told for name in one]
        names = list(dict.fromkeys(names))
        return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
