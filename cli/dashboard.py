"""The run on a terminal: a live dashboard, and plain lines where there is no terminal."""

from __future__ import annotations

from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from diffpipe.metrics import GIB, EvalRecord, Pace, Progress, Sink, StepRecord, TextSink, described

BARS = "▁▂▃▄▅▆▇█"


def make_sinks() -> list[Sink]:
    """What shows a run to the person who started it."""
    console = Console()
    if console.is_terminal:
        return [Dashboard(console)]
    return [TextSink(lambda line: print(line, flush=True))]


class Dashboard:
    """A metrics sink drawn with rich."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Bars(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.pace = Pace()
        self.last: StepRecord | None = None
        self.losses: deque[float] = deque(maxlen=60)
        self.buckets: dict[str, float] = {}
        self.evaluations: dict[str, list[float]] = {}
        self.live = Live(self.draw(), console=console, refresh_per_second=4)
        self.live.start()

    def step(self, record: StepRecord) -> None:
        self.last = record
        self.losses.append(record.loss)
        before = self.buckets.get(record.bucket, record.loss)
        self.buckets[record.bucket] = 0.9 * before + 0.1 * record.loss
        self.progress(Progress("train", record.step, record.steps_total))
        self.live.update(self.draw())

    def evaluation(self, record: EvalRecord) -> None:
        self.evaluations.setdefault(record.name, []).append(record.loss)
        self.live.update(self.draw())

    def note(self, text: str) -> None:
        self.live.console.print(text, markup=False, highlight=False)

    def progress(self, progress: Progress) -> None:
        count = described(progress, self.pace.of(progress))
        if progress.task not in self.tasks:
            self.tasks[progress.task] = self.bars.add_task(progress.task, total=progress.total, completed=progress.done, count=count)
            return
        if self.bars.tasks[self.tasks[progress.task]].finished and progress.done < progress.total:
            self.bars.reset(self.tasks[progress.task])
        self.bars.update(self.tasks[progress.task], completed=progress.done, total=progress.total, count=count)

    def close(self) -> None:
        self.live.update(self.draw(), refresh=True)
        self.live.stop()

    def draw(self) -> Group:
        """The whole picture."""
        if self.last is None:
            return Group(self.bars)
        return Group(Panel(self._numbers(self.last), title="training", border_style="cyan"), self.bars)

    def _numbers(self, r: StepRecord) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(2):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True, ratio=1)
        memory = f"device {r.device_peak / GIB:.2f} GiB, " if r.device_peak else ""
        share = {
            name: part / r.step_time if r.step_time else 0
            for name, part in (("data", r.data_time), ("compute", r.compute_time), ("comm", r.communication_time))
        }
        table.add_row("loss", f"[bold]{r.loss:.4f}[/] {spark(self.losses)}", "grad norm", f"{r.grad_norm:.3g}")
        table.add_row("step", f"{r.step} of {r.steps_total}, epoch {r.epoch + 1}", "lr", f"{r.lr:.3g}")
        table.add_row(
            "step time",
            f"{r.step_time:.3f} s, {r.samples_per_second:.2f} samples/s",
            "split",
            ", ".join(f"{n} {v:.0%}" for n, v in share.items()),
        )
        table.add_row("memory", f"{memory}host {r.host_peak / GIB:.2f} GiB", "bucket", r.bucket)
        if r.graphs:
            table.add_row("compiled", f"{r.graphs} graphs", "", "")
        worst = sorted(self.buckets.items(), key=lambda b: -b[1])[:4]
        table.add_row("bucket loss", ", ".join(f"{name} {loss:.3f}" for name, loss in worst), "", "")
        for name, losses in self.evaluations.items():
            table.add_row(f"eval {name}", f"{losses[-1]:.4f} {spark(losses[-30:])}", "at start", f"{losses[0]:.4f}")
        return table


def spark(values: deque[float] | list[float]) -> str:
    """The values as a row of bars."""
    low, high = min(values), max(values)
    width = high - low or 1.0
    return "".join(BARS[round((v - low) / width * (len(BARS) - 1))] for v in values)
