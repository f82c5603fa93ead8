"""What a run tells about itself, and the sinks that record it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Protocol

GIB = 1 << 30


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Times are in seconds, memory in bytes (the largest of all ranks)."""

    step: int
    steps_total: int
    epoch: int
    epoch_ends: bool
    loss: float
    bucket: str
    lr: float
    grad_norm: float
    samples: int
    step_time: float
    data_time: float
    compute_time: float
    communication_time: float
    device_peak: int
    host_peak: int
    graphs: int = 0  # compiled so far, the most of all ranks
    skipped: int = 0  # steps of the run so far that moved no weights

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.step_time if self.step_time > 0 else math.inf


@dataclass(frozen=True)
class EvalRecord:
    """The loss on one held-out set: the mean, and by quantile of the timestep distribution."""

    step: int
    name: str
    loss: float
    by_quantile: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far a task is.

    Attributes:
        task: such as "scan", "encode media" or "load".
        done, total: samples, or bytes of "load"; of all ranks together where they share the work.
        by_rank: how much each rank has done, empty where there is no sharing.
    """

    task: str
    done: int
    total: int
    by_rank: tuple[int, ...] = ()


class Pace:
    """How fast tasks go, measured from when each was first told of; a task that was finished may begin anew."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[float, int]] = {}

    def of(self, progress: Progress) -> float:
        """Samples or bytes a second; 0 while unknown."""
        now = monotonic()
        began, already = self.begun.setdefault(progress.task, (now, progress.done))
        if progress.done >= progress.total:
            del self.begun[progress.task]
        return (progress.done - already) / (now - began) if now > began else 0.0


class Sink(Protocol):
    """Something that records or shows a run."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvalRecord) -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """Several sinks as one. One that cannot write (a full disk) is left out from then on, and the others tell of it:
    training goes on without a record rather than ending for one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def step(self, record: StepRecord) -> None:
        self._each(lambda sink: sink.step(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._each(lambda sink: sink.evaluation(record))

    def note(self, text: str) -> None:
        self._each(lambda sink: sink.note(text))

    def progress(self, progress: Progress) -> None:
        self._each(lambda sink: sink.progress(progress))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                tell(sink)
            except OSError as fault:
                self.sinks.remove(sink)
                self.note(f"{type(sink).__name__} records no more: {fault}")


class TensorBoardSink:
    """Scalars for TensorBoard.

    Args:
        folder: where its event files go.
        resumed_at: the step a resumed run goes on from; what was written after it is hidden.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)

    def step(self, record: StepRecord) -> None:
        values = {
            "train/loss": record.loss,
            f"train/loss/{record.bucket}": record.loss,
            "train/lr": record.lr,
            "train/grad_norm": record.grad_norm,
            "train/epoch": record.epoch,
            "train/samples_per_second": record.samples_per_second,
            "time/step": record.step_time,
            "time/data": record.data_time,
            "time/compute": record.compute_time,
            "time/communication": record.communication_time,
            "memory/device": record.device_peak / GIB,
            "memory/host": record.host_peak / GIB,
            "compile/graphs": record.graphs,
            "train/skipped": record.skipped,
        }
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, record.step)

    def evaluation(self, record: EvalRecord) -> None:
        self.writer.add_scalar(f"eval/{record.name}/loss", record.loss, record.step)
        for quantile, loss in record.by_quantile.items():
            self.writer.add_scalar(f"eval/{record.name}/loss_q{quantile:g}", loss, record.step)

    def note(self, text: str) -> None:
        """Notes are for people; the log has them."""

    def progress(self, progress: Progress) -> None:
        """Progress is for people."""

    def close(self) -> None:
        self.writer.close()


class TextSink:
    """Plain lines, for a log file or an output that is no terminal.

    Args:
        write: takes one line.
        every: seconds between two lines about the progress of one task.
    """

    def __init__(self, write: Callable[[str], None], every: float = 10.0) -> None:
        self.write, self.every = write, every
        self.pace = Pace()
        self.told: dict[str, float] = {}
        self.first: tuple[float, int] | None = None

    @classmethod
    def to_file(cls, path: Path) -> TextSink:
        """Lines added to a file, each on disk before the next step."""

        def write(line: str) -> None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

        return cls(write)

    def step(self, record: StepRecord) -> None:
        self.first = self.first or (monotonic() - record.step_time, record.step - 1)
        per_step = (monotonic() - self.first[0]) / (record.step - self.first[1])
        left = duration((record.steps_total - record.step) * per_step)
        memory = f" device {record.device_peak / GIB:.2f} GiB" if record.device_peak else ""
        memory += f" graphs {record.graphs}" if record.graphs else ""
        self.write(
            f"step {record.step}/{record.steps_total} epoch {record.epoch + 1} loss {record.loss:.5f} lr {record.lr:.3g} "
            f"grad_norm {record.grad_norm:.3g} "
            f"bucket {record.bucket} {record.step_time:.3f} s (data {record.data_time:.3f}, compute {record.compute_time:.3f}, "
            f"communication {record.communication_time:.3f}){memory} left {left}"
        )

    def evaluation(self, record: EvalRecord) -> None:
        parts = ", ".join(f"q{q:g} {loss:.4f}" for q, loss in record.by_quantile.items())
        self.write(f"step {record.step} eval/{record.name}/loss {record.loss:.5f} ({parts})")

    def note(self, text: str) -> None:
        self.write(text)

    def progress(self, progress: Progress) -> None:
        now, pace = monotonic(), self.pace.of(progress)
        finished = progress.done >= progress.total
        if not finished and now - self.told.setdefault(progress.task, now) < self.every:
            return
        self.told[progress.task] = now
        if finished:
            del self.told[progress.task]
        left = f" left {duration((progress.total - progress.done) / pace)}" if pace and not finished else ""
        self.write(f"{progress.task} {described(progress, pace)}{left}")

    def close(self) -> None:
        """Every line is written at once."""


def described(progress: Progress, pace: float) -> str:
    """What is done of what, how fast, and each rank's part."""
    text = f"{_counted(progress.task, progress.done)} of {_counted(progress.task, progress.total)}"
    if pace:
        text += f", {_counted(progress.task, pace)}/s"
    if len(progress.by_rank) > 1:
        text += f" (by rank {' '.join(map(str, progress.by_rank))})"
    return text


def _counted(task: str, count: float) -> str:
    """What is counted by a task: bytes when weights are loaded, else samples."""
    if task != "load":
        return f"{count}" if isinstance(count, int) else f"{count:.3g}"
    return amount(count)


def amount(count: float) -> str:
    """Bytes in the unit that fits them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / (1 << 20):.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
