"""What a run tells about itself, and the sinks that it tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Protocol

GIB = 1 << 30
Wish = Literal["save", "checkpoint", "preview", "stop", "quit"]  # what a person may ask of a run


@dataclass(frozen=True)
class Place:
    """Where a rank works; memory in bytes.

    Attributes:
        device: its name.
        device_memory: what the rank may hold there, ``memory.budget`` or all that the device has; 0 on the CPU.
        host_memory: what the machine has.
    """

    stage: int
    replica: int
    device: str
    device_memory: int
    host_memory: int


@dataclass(frozen=True)
class RunRecord:
    """A run before its first step.

    Attributes:
        trains: what is trained, for a person.
        places: by rank.
        config: as it was resolved, as JSON.
        resumed: name of the checkpoint that it goes on from; empty where it begins.
    """

    name: str
    trains: str
    places: tuple[Place, ...]
    config: Mapping[str, Any]
    resumed: str = ""


@dataclass(frozen=True)
class StartRecord:
    """What came before the end of a run's first step.

    Attributes:
        phases: seconds by name in the order they came, each of the rank that it took longest on.
    """

    phases: Mapping[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items() if seconds >= 0.005)
        return f"the first step was over after {sum(self.phases.values()):.2f} s ({parts})"


@dataclass(frozen=True)
class Split:
    """Where a rank's time of a step went, in seconds; together the step.

    Attributes:
        data: waiting for the batch.
        compute: both passes and the optimizer.
        stall: in the passes, waiting for weights and activations that come from host memory.
        bubble: in the passes, waiting for other stages and what they send.
        communication: what is left: averaging gradients, adding up their norm and the loss.
    """

    data: float
    compute: float
    stall: float
    bubble: float
    communication: float

    @classmethod
    def mean(cls, splits: Sequence[Split]) -> Split:
        return cls(*(sum(parts) / len(splits) for parts in zip(*map(astuple, splits), strict=True)))

    def parts(self) -> dict[str, float]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class RankRecord:
    """One rank's part of a step; memory in bytes.

    Attributes:
        device_peak: the most that it held on its device so far; 0 on the CPU.
        host: what its process holds in host memory, its workers apart.
    """

    stage: int
    replica: int
    split: Split
    device_peak: int
    host: int


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; times in seconds.

    Attributes:
        smoothed: the loss, averaged over about the last 50 steps.
        lr: the largest of all groups, times what an optimizer that finds its rate has found.
        left: what the rest of the run will take.
        by_time: (t, loss) of every sample, t in [0, 1] with 1 for pure noise.
        ranks: in order.
        graphs: compiled so far, the most of all ranks.
        skipped: steps of the run so far that moved no weights.
    """

    step: int
    steps_total: int
    epoch: int
    epoch_ends: bool
    loss: float
    smoothed: float
    bucket: str
    lr: float
    grad_norm: float
    samples: int
    step_time: float
    left: float
    by_time: tuple[tuple[float, float], ...]
    ranks: tuple[RankRecord, ...]
    graphs: int = 0
    skipped: int = 0

    @property
    def split(self) -> Split:
        """The mean of all ranks."""
        return Split.mean([rank.split for rank in self.ranks])

    @property
    def stages(self) -> dict[int, list[RankRecord]]:
        """Ranks by stage."""
        return {n: [r for r in self.ranks if r.stage == n] for n in sorted({r.stage for r in self.ranks})}

    @property
    def balance(self) -> float:
        """The mean stage's work as a part of the largest: 1 where all have as much to do."""
        work = [sum(rank.split.compute for rank in ranks) / len(ranks) for ranks in self.stages.values()]
        return sum(work) / len(work) / max(work) if max(work) > 0 else 1.0

    @property
    def device_peak(self) -> int:
        """The largest of all ranks, in bytes; so is ``host``."""
        return max(rank.device_peak for rank in self.ranks)

    @property
    def host(self) -> int:
        return max(rank.host for rank in self.ranks)

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
class PreviewRecord:
    """One sampled picture or clip.

    Attributes:
        number: of its prompt, from 0.
        path: a PNG or MP4 file.
        thumbnail: the picture as PNG, or the clip as a small GIF.
        height, width: in pixels.
    """

    step: int
    number: int
    prompt: str
    path: Path
    thumbnail: bytes
    height: int
    width: int


@dataclass(frozen=True)
class Progress:
    """How far a task is.

    Attributes:
        task: such as "scan", "encode media", "preview steps" or "load".
        done, total: samples, steps, or bytes of "load"; of all ranks together where they share the work.
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
        """Samples, steps or bytes a second; 0 while unknown."""
        now = monotonic()
        began, already = self.begun.setdefault(progress.task, (now, progress.done))
        if progress.done >= progress.total:
            del self.begun[progress.task]
        return (progress.done - already) / (now - began) if now > began else 0.0


class Smoothed:
    """An exponential average that the first values do not weigh down, and those that are not finite not at all.

    Args:
        steps: about how many values it looks back.
    """

    def __init__(self, steps: float = 50.0) -> None:
        self.keep = 1 - 1 / steps
        self.sum, self.weight = 0.0, 0.0

    def of(self, value: float) -> float:
        """The average, with one more value; NaN before the first that is finite."""
        if math.isfinite(value):
            self.sum = self.keep * self.sum + value
            self.weight = self.keep * self.weight + 1
        return self.sum / self.weight if self.weight else math.nan


def by_tenth(samples: Iterable[tuple[float, float]]) -> dict[int, list[float]]:
    """Losses by the tenth of [0, 1] that their t lies in.

    Args:
        samples: (t, loss).
    """
    tenths: dict[int, list[float]] = {}
    for t, loss in samples:
        tenths.setdefault(min(int(10 * t), 9), []).append(loss)
    return tenths


class Sink(Protocol):
    """Something that records or shows a run; what it does not care for it leaves out."""

    def begin(self, run: RunRecord, ask: Callable[[Wish], None]) -> None:
        """The first step comes next.

        Args:
            ask: takes what a person asks of the run; from any thread.
        """

    def started(self, record: StartRecord) -> None:
        """The first step is over."""

    def doing(self, what: str) -> None:
        """What takes time from now on."""

    def step(self, record: StepRecord) -> None:
        """A step is over."""

    def evaluation(self, record: EvalRecord) -> None:
        """A held-out set was evaluated."""

    def best(self, step: int, loss: float) -> None:
        """The held-out loss behind a step is the lowest so far; its checkpoint is kept."""

    def preview(self, record: PreviewRecord) -> None:
        """A picture or clip was sampled."""

    def written(self, kind: str, path: Path) -> None:
        """A checkpoint, an export or a folder of previews is there."""

    def note(self, text: str) -> None:
        """Something that a person may want to know."""

    def warn(self, text: str) -> None:
        """A note of something that is not as it should be."""

    def progress(self, progress: Progress) -> None:
        """A task went on."""

    def close(self) -> None:
        """Nothing comes any more."""


class Sinks(Sink):
    """Several sinks as one. One that cannot go on (a full disk, a tracker that is gone) is left out from then on, and the others tell
    of it: training goes on without a record rather than ending for one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def begin(self, run: RunRecord, ask: Callable[[Wish], None]) -> None:
        self._each(lambda sink: sink.begin(run, ask))

    def started(self, record: StartRecord) -> None:
        self.note(str(record))
        self._each(lambda sink: sink.started(record))

    def doing(self, what: str) -> None:
        self._each(lambda sink: sink.doing(what))

    def step(self, record: StepRecord) -> None:
        self._each(lambda sink: sink.step(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._each(lambda sink: sink.evaluation(record))

    def best(self, step: int, loss: float) -> None:
        self._each(lambda sink: sink.best(step, loss))

    def preview(self, record: PreviewRecord) -> None:
        self._each(lambda sink: sink.preview(record))

    def written(self, kind: str, path: Path) -> None:
        self._each(lambda sink: sink.written(kind, path))

    def note(self, text: str) -> None:
        self._each(lambda sink: sink.note(text))

    def warn(self, text: str) -> None:
        self._each(lambda sink: sink.warn(text))

    def progress(self, progress: Progress) -> None:
        self._each(lambda sink: sink.progress(progress))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                tell(sink)
            except Exception as fault:
                self.sinks.remove(sink)
                self.warn(f"{type(sink).__name__} records no more: {type(fault).__name__}: {fault}")


class TextSink(Sink):
    """Plain lines, for a log file or an output that is no terminal.

    Args:
        write: takes one line.
        every: seconds between two lines about the progress of one task.
    """

    def __init__(self, write: Callable[[str], None], every: float = 10.0) -> None:
        self.write, self.every = write, every
        self.pace = Pace()
        self.told: dict[str, float] = {}

    @classmethod
    def to_file(cls, path: Path) -> TextSink:
        """Lines added to a file, each on disk before the next step."""

        def write(line: str) -> None:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

        return cls(write)

    def step(self, record: StepRecord) -> None:
        memory = f" device {record.device_peak / GIB:.2f} GiB" if record.device_peak else ""
        memory += f" graphs {record.graphs}" if record.graphs else ""
        split = ", ".join(f"{name} {part:.3f}" for name, part in record.split.parts().items() if part or name not in ("stall", "bubble"))
        self.write(
            f"step {record.step}/{record.steps_total} epoch {record.epoch + 1} loss {record.loss:.5f} lr {record.lr:.3g} "
            f"grad_norm {record.grad_norm:.3g} "
            f"bucket {record.bucket} {record.step_time:.3f} s ({split}){memory} left {duration(record.left)}"
        )

    def evaluation(self, record: EvalRecord) -> None:
        parts = ", ".join(f"q{q:g} {loss:.4f}" for q, loss in record.by_quantile.items())
        self.write(f"step {record.step} eval/{record.name}/loss {record.loss:.5f} ({parts})")

    def best(self, step: int, loss: float) -> None:
        self.write(f"step {step} is the best so far: held-out loss {loss:.5f}")

    def written(self, kind: str, path: Path) -> None:
        self.write(f"{kind} {path}")

    def note(self, text: str) -> None:
        self.write(text)

    def warn(self, text: str) -> None:
        self.write(f"warning: {text}")

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


def described(progress: Progress, pace: float) -> str:
    """What is done of what, how fast, and each rank's part."""
    text = f"{_counted(progress.task, progress.done)} of {_counted(progress.task, progress.total)}"
    if pace:
        text += f", {_counted(progress.task, pace)}/s"
    if len(progress.by_rank) > 1:
        text += f" (by rank {' '.join(map(str, progress.by_rank))})"
    return text


def _counted(task: str, count: float) -> str:
    """What is counted by a task: bytes when weights are loaded, else things."""
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
