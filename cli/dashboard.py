"""The run on a terminal: a live picture, and plain lines where there is no terminal."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from time import monotonic
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from diffpipe.cli.keys import Keys, open_keys
from diffpipe.cli.picture import View, picture
from diffpipe.metrics import EvalRecord, Pace, Progress, RunRecord, Sink, StepRecord, TextSink, Wish, described

REFRESH = 2  # pictures a second: they take time of the process that trains
KEYS: dict[str, tuple[Wish, str]] = {
    "s": ("save", "export"),
    "c": ("checkpoint", "checkpoint"),
    "p": ("preview", "preview"),
    "x": ("stop", "checkpoint and stop"),
    "q": ("quit", "quit"),
}
SURE = 5.0  # seconds in which q must be pressed again


def make_sinks() -> list[Sink]:
    """What shows a run to the person who started it."""
    console = Console(file=Whole(sys.stdout))  # pyright: ignore[reportArgumentType]
    # rich takes FORCE_COLOR for a terminal, which a log file may have.
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return [Dashboard(console)]
    return [TextSink(lambda line: print(line, flush=True))]


class Whole:
    """An output whose every write a terminal shows at once, so that no half of a picture is ever seen (DEC private mode 2026).

    A terminal that does not know the mode leaves it out.
    """

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> int:
        return self.file.write(f"\x1b[?2026h{text}\x1b[?2026l" if "\x1b[" in text else text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Dashboard(Sink):
    """A metrics sink drawn with rich: bars of what is prepared, then the picture of the run; notes scroll by above it."""

    def __init__(self, console: Console) -> None:
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
        self.view: View | None = None
        self.keys: Keys | None = None
        self.ask: Callable[[Wish], None] | None = None
        self.quitting = -SURE
        self.lock = threading.RLock()  # rich draws in a thread of its own
        self.live = Live(self, console=console, refresh_per_second=REFRESH, vertical_overflow="crop")
        self.live.start()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.lock:
            shown = [] if self.view is None else [picture(self.view, console, options)]
        yield from shown
        if self.tasks:
            yield self.bars

    def begin(self, run: RunRecord, ask: Callable[[Wish], None]) -> None:
        keys = open_keys(self.pressed)
        previews = bool(run.config["preview"]["prompts"])
        told = (f"{key} {what}" for key, (wish, what) in KEYS.items() if wish != "preview" or previews)
        shown = "" if keys is None else ", ".join(told)
        with self.lock:
            self.view, self.keys, self.ask = View(run, shown), keys, ask

    def pressed(self, key: str) -> None:
        """A key was pressed; called in the thread that reads them."""
        view, now = self.view, monotonic()
        if key not in KEYS or view is None or self.ask is None:
            return
        wish, what = KEYS[key]
        with self.lock:
            if wish == "quit" and now - self.quitting > SURE:
                self.quitting, view.hint = now, "q again quits without a checkpoint"
                return
            view.hint = ""
            if what not in view.asked:
                view.asked.append(what)
        self.ask(wish)

    def doing(self, what: str) -> None:
        if self.view is not None:
            with self.lock:
                self.view.doing, self.view.asked = (what, monotonic()), []
                if monotonic() - self.quitting > SURE:
                    self.view.hint = ""

    def step(self, record: StepRecord) -> None:
        view = self.view
        assert view is not None
        with self.lock:
            view.recent.append(record)
            view.by_time.extend(record.by_time)
            if math.isfinite(record.loss):  # else the step was skipped
                view.losses.add(record.loss)
                view.last_losses.append(record.loss)
                view.buckets[record.bucket] = 0.9 * view.buckets.get(record.bucket, record.loss) + 0.1 * record.loss

    def evaluation(self, record: EvalRecord) -> None:
        assert self.view is not None
        with self.lock:
            self.view.evaluations.setdefault(record.name, []).append(record)

    def best(self, step: int, loss: float) -> None:
        assert self.view is not None
        with self.lock:
            self.view.best = step, loss

    def written(self, kind: str, path: Path) -> None:
        if self.view is not None:
            with self.lock:
                self.view.written[kind] = (path, monotonic())
        self.note(f"{kind} {path}")

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        if self.view is not None:
            with self.lock:
                self.view.warnings.append(text)
        self._print(f"warning: {text}", "yellow")

    def progress(self, progress: Progress) -> None:
        count = described(progress, self.pace.of(progress))
        if progress.done >= progress.total:
            if (bar := self.tasks.pop(progress.task, None)) is not None:
                self.bars.remove_task(bar)
            self.note(f"{progress.task} {count}")
        elif progress.task not in self.tasks:
            self.tasks[progress.task] = self.bars.add_task(progress.task, total=progress.total, completed=progress.done, count=count)
        else:
            self.bars.update(self.tasks[progress.task], completed=progress.done, total=progress.total, count=count)

    def close(self) -> None:
        self.doing("")
        if self.keys is not None and self.view is not None:
            self.keys.close()
            self.view.keys = ""
        self.live.stop()

    def _print(self, text: str, style: str = "") -> None:
        """Lines above the picture, broken between words; a path stays whole, to be copied."""
        console = self.live.console
        folded: list[str] = []
        for line in text.splitlines():
            folded += wrap(line, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        console.print("\n".join(folded), markup=False, highlight=False, soft_wrap=True, style=style)
