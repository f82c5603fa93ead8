"""Measures each step on all ranks and makes the record of it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from diffpipe.data.loader import Batch
from diffpipe.metrics import RankRecord, Smoothed, Split, StepRecord
from diffpipe.pipeline.memory.compiling import graphs
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.schedule import Pipeline


class Measured(NamedTuple):
    """What one rank measured of a step; times in seconds, memory in bytes.

    Attributes:
        data: waiting for the batch.
        passes: what came then, until the last of this rank's passes was done.
        busy: computing in these passes, stalls included.
        stall: waiting in these passes for copies from host memory.
        optimizer: moving the weights.
    """

    stage: float
    replica: float
    data: float
    passes: float
    busy: float
    stall: float
    optimizer: float
    device_peak: float
    host: float
    graphs: float


class Meter:
    """Times the laps of a step on this rank, and makes one record of what all ranks measured.

    Attributes:
        held: the most that this rank held on its device in the last step, in bytes; 0 on the CPU.
    """

    def __init__(self, mesh: Mesh, pipeline: Pipeline, steps_total: int) -> None:
        self.mesh, self.pipeline, self.steps_total = mesh, pipeline, steps_total
        self.laps: defaultdict[str, float] = defaultdict(float)
        self.smoothed = Smoothed()
        self.held = self.peak = self.steps = 0
        self.first = self.began = self.lapped = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.pipeline.clock.take()  # an evaluation may have run since the last step
        self.pipeline.memory.stalled()
        self.laps.clear()
        if self.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.mesh.device)
        self.began = self.lapped = time.perf_counter()
        self.first = self.first or self.began

    def lap(self, name: str, on_device: bool = True) -> None:
        """All since the last lap was of this kind; that on the device is waited for."""
        if on_device and self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        now = time.perf_counter()
        self.laps[name] += now - self.lapped
        self.lapped = now

    def measured(self, batch: Batch) -> list[float]:
        """What this rank measured of the step that is over now, for all ranks to know; as many numbers on each."""
        losses = self.pipeline.losses().tolist()
        pairs = zip(batch.times, losses or [math.nan] * len(batch.times), strict=True)
        return [*self._measured(), *(x for pair in pairs for x in pair)]

    def record(
        self, step: int, batch: Batch, told: Sequence[Sequence[float]], loss: float, norm: float, lr: float, skipped: int
    ) -> StepRecord:
        """The step that is over now, the same on every rank.

        Args:
            told: what each rank ``measured``, in the order of ranks.
            loss, norm: of the whole step, the same on every rank.
            skipped: steps of the run so far that moved no weights.
        """
        cut = len(Measured._fields)
        ranks, known = [Measured(*row[:cut]) for row in told], [row[cut:] for row in told]
        now = time.perf_counter()
        self.steps += 1
        return StepRecord(
            step=step,
            steps_total=self.steps_total,
            epoch=batch.epoch,
            epoch_ends=batch.epoch_ends,
            loss=loss,
            smoothed=self.smoothed.of(loss),
            bucket=str(batch.bucket),
            lr=lr,
            grad_norm=norm,
            samples=len(batch.samples) * self.mesh.replicas,
            step_time=now - self.began,
            left=(self.steps_total - step) * (now - self.first) / self.steps,
            by_time=tuple(pair for row in known for pair in zip(row[::2], row[1::2], strict=True) if math.isfinite(pair[1])),
            ranks=split(ranks, now - self.began),
            graphs=int(max(rank.graphs for rank in ranks)),
            skipped=skipped,
        )

    def _measured(self) -> Measured:
        if self.mesh.device.type == "cuda":
            self.held = self.pipeline.held()
            self.peak = max(self.peak, self.held)
        passes, computing = self.laps["passes"], self.pipeline.clock.take()
        return Measured(
            stage=self.mesh.stage,
            replica=self.mesh.replica,
            data=self.laps["data"],
            passes=passes,
            busy=computing if self.mesh.stages > 1 else passes,
            stall=self.pipeline.memory.stalled(),
            optimizer=self.laps["optimizer"],
            device_peak=self.peak,
            host=psutil.Process().memory_info().rss,
            graphs=graphs(),
        )


def split(ranks: list[Measured], took: float) -> tuple[RankRecord, ...]:
    """Where each rank's time of a step went.

    A stage is idle from when it began to wait for its batch until the slowest stage of its replica is through its passes, except while
    it computes: in its own passes it waits for others, and behind them too.

    Args:
        took: the whole step, in seconds.
    """
    records = []
    for rank in ranks:
        through = max(other.data + other.passes for other in ranks if other.replica == rank.replica)
        # Ranks begin a step at slightly different times, so that what they measured may be more than the step.
        compute = max(0.0, min(rank.busy - rank.stall + rank.optimizer, took - rank.data - rank.stall))
        bubble = max(0.0, min(through - rank.data - rank.busy, took - rank.data - rank.stall - compute))
        rest = max(0.0, took - rank.data - compute - rank.stall - bubble)
        parts = Split(data=rank.data, compute=compute, stall=rank.stall, bubble=bubble, communication=rest)
        records.append(RankRecord(int(rank.stage), int(rank.replica), parts, int(rank.device_peak), int(rank.host)))
    return tuple(records)
