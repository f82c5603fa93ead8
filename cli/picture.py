"""The picture of a run: what the dashboard knows, laid out for the size of the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from time import monotonic

from rich.console import Console, ConsoleOptions
from rich.panel import Panel
from rich.text import Text

from diffpipe.cli.chart import Series, bar, chart
from diffpipe.metrics import GIB, EvalRecord, RunRecord, Split, StepRecord, by_tenth, duration

WINDOW = 20  # steps that times are averaged over
ROOMY = 36  # lines of a terminal that has space for more than the essential
ABOVE = 3  # lines of the terminal left for notes
PARTS = {"data": "data", "compute": "compute", "stall": "stall", "bubble": "bubble", "communication": "comm"}


@dataclass
class View:
    """What is known of a run.

    Attributes:
        keys: what can be pressed.
        losses: of the whole run; the last ones apart.
        by_time: (t, loss) of the last samples.
        best: the step with the lowest held-out loss, and that loss, where its checkpoint is kept.
        doing: what takes time now, and since when.
        asked: what a person asked for and has not got yet.
        hint: the answer to the last key, where it asked for nothing yet.
        written: by kind of file, the last one and when it was written.
    """

    run: RunRecord
    keys: str
    began: float = field(default_factory=monotonic)
    losses: Series = field(default_factory=Series)
    last_losses: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=WINDOW))
    buckets: dict[str, float] = field(default_factory=dict)
    by_time: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=2000))
    evaluations: dict[str, list[EvalRecord]] = field(default_factory=dict)
    best: tuple[int, float] | None = None
    doing: tuple[str, float] = ("", 0.0)
    asked: list[str] = field(default_factory=list)
    hint: str = ""
    written: dict[str, tuple[Path, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def picture(view: View, console: Console, options: ConsoleOptions) -> Panel:
    """The view as a panel that leaves some lines of the terminal."""
    painter = Painter(view, options.max_width - 4, console.height - ABOVE - 2, options.ascii_only or console.legacy_windows)
    return Panel(
        Text("\n").join(painter.lines()),
        title=Text(view.run.name, "bold cyan"),
        title_align="left",
        subtitle=Text(view.keys, "dim") if view.keys else None,
        subtitle_align="left",
        border_style="cyan",
    )


class Painter:
    """Lines of one width; blocks of them that matter less are left out where there are not enough lines.

    Args:
        plain: ASCII alone.
    """

    def __init__(self, view: View, width: int, height: int, plain: bool) -> None:
        self.view, self.width, self.height, self.plain = view, width, height, plain
        self.roomy = height + ABOVE + 2 >= ROOMY

    def lines(self) -> list[Text]:
        """All lines."""
        head = [*self.head(), self.now()]
        more = 6 if self.roomy else 2
        # By what matters most: what does not fit any more is left out.
        blocks = {
            "ranks": self.ranks(self.height - len(head) - 1),
            "saved": self.saved(),
            "warned": self.warned(more),
            "evals": self.evals(more),
        }
        if self.roomy:
            blocks |= {"curve": self.curve(9), "times": self.times(), "buckets": self.worst()}
        gap = [Text()] if self.roomy else []
        left, fitting = self.height - len(head), []
        for name, block in blocks.items():
            if block and len(block) + len(gap) <= left:
                fitting.append(name)
                left -= len(block) + len(gap)
        order = [n for n in ("curve", "ranks", "times", "buckets", "evals", "saved", "warned") if n in fitting]
        return [self._fitted(line) for line in [*head, *(line for name in order for line in [*gap, *blocks[name]])]]

    def head(self) -> Iterator[Text]:
        """What is trained, how far it is, and how it does."""
        elapsed = duration(monotonic() - self.view.began)
        what = Text(self.view.run.trains, "bold")
        what.truncate(self.width - len(elapsed) - 2, overflow="crop")
        yield Text().append_text(what).append(" " * (self.width - what.cell_len - len(elapsed))).append(elapsed, "dim")
        if not self.view.recent:
            return
        r, recent = self.view.recent[-1], self.view.recent
        yield self._filled(
            told(("step", f"{r.step} of {r.steps_total}"), ("epoch", str(r.epoch + 1)), ("left", duration(r.left))), r.step / r.steps_total
        )
        line = told(("loss", f"{r.loss:.4f}"), ("smoothed", f"{r.smoothed:.4f}"))
        yield line.append(chart(self.view.last_losses, max(1, self.width - line.cell_len), ascii_only=self.plain)[0], "cyan")
        took = sum(x.step_time for x in recent)
        speed = [("s/step", f"{took / len(recent):.3f}"), ("samples/s", f"{sum(x.samples for x in recent) / took:.3g}")]
        graphs = [("compiled graphs", str(r.graphs))] if r.graphs else []
        yield told(("lr", f"{r.lr:.3g}"), ("grad norm", f"{r.grad_norm:.3g}"), *speed, *graphs)

    def now(self) -> Text:
        """What takes time now, and what comes then."""
        what, since = self.view.doing
        seconds = monotonic() - since if what else 0.0
        line = told(("now", (what or "ended") + (f", {duration(seconds)}" if seconds >= 1 else "")))
        line.append(f"then {', '.join(self.view.asked)}   " if self.view.asked else "", "yellow")
        return line.append(self.view.hint, "yellow")

    def ranks(self, room: int) -> list[Text]:
        """Where the time of each rank goes, and its memory; by stage where ranks are too many for ``room`` rows."""
        if not self.view.recent or room < 1:
            return []
        last = self.view.recent[-1]
        groups = [[n] for n in range(len(last.ranks))]
        if len(groups) > room:
            groups = [[n for n, r in enumerate(last.ranks) if r.stage == s] for s in last.stages]
        left_out = len(groups) - room + 1 if len(groups) > room else 0
        groups = groups[: len(groups) - left_out]
        cells = [["stage", *PARTS.values(), "device GiB", "host GiB"], *map(self._rank, groups)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        rows = [Text("   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))) for row in cells]
        rows[0].stylize("dim")
        for row, group in zip(rows[1:], groups, strict=True):
            row.stylize(self._alarm(group))
        return rows + ([Text(f"and {left_out} more", "dim")] if left_out else [])

    def _rank(self, group: Sequence[int]) -> list[str]:
        """One row, of one rank or of all ranks of a stage: its mean time, its largest memory."""
        recent, last = self.view.recent, self.view.recent[-1]
        place = self.view.run.places[group[0]]
        name = f"{place.stage}"
        if any(p.replica for p in self.view.run.places):
            name += f"/{place.replica}" if len(group) == 1 else f" x{len(group)}"
        took = sum(r.step_time for r in recent) / len(recent)
        parts = Split.mean([r.ranks[n].split for r in recent for n in group]).parts()
        device, host = max(last.ranks[n].device_peak for n in group), max(last.ranks[n].host for n in group)
        return [
            name,
            *(f"{parts[part] / took:.0%}" if took else "" for part in PARTS),
            f"{device / GIB:.2f} of {place.device_memory / GIB:.1f}" if place.device_memory else "on the CPU",
            f"{host / GIB:.2f} of {place.host_memory / GIB:.0f}",
        ]

    def _alarm(self, group: Sequence[int]) -> str:
        """Red where memory is beyond its limit, yellow where it is close."""
        limit = self.view.run.places[group[0]].device_memory
        share = max(self.view.recent[-1].ranks[n].device_peak for n in group) / limit if limit else 0.0
        return "red" if share > 1 else "yellow" if share > 0.95 else ""

    def saved(self) -> list[Text]:
        """The last file of each kind, in as few lines as they take."""
        resumed = self.view.run.resumed
        said = {"checkpoint": f"{resumed}, resumed from" if resumed else "none yet", "export": "none yet"}
        for kind, (path, since) in self.view.written.items():
            # An export lies in a folder called by its step, a checkpoint is one.
            name = next((part for part in reversed(path.parts) if part.startswith("step-")), path.name)
            said[kind] = f"{name}, {duration(monotonic() - since)} ago"
        lines = [Text()]
        for kind, what in said.items():
            one = told((kind, what))
            if lines[-1].cell_len + len(one.plain.rstrip()) > self.width:
                lines.append(Text())
            lines[-1].append_text(one)
        return lines

    def warned(self, most: int) -> list[Text]:
        """The newest warning, in as many lines as it takes, and those before it for which there is space."""
        lines: list[str] = []
        earlier = len(self.view.warnings)
        for text in reversed(self.view.warnings):
            told = f"warning: {text.splitlines()[0]}"
            folded = wrap(told, self.width, subsequent_indent="  ", max_lines=most, placeholder=" ...")
            if len(lines) + len(folded) > most:
                break
            lines, earlier = [*folded, *lines], earlier - 1
        if earlier:
            lines.insert(0, f"{earlier} earlier warning{'s' if earlier > 1 else ''} in log.txt")
        return [Text(line, "yellow") for line in lines]

    def evals(self, most: int) -> list[Text]:
        """The held-out losses."""
        lines = []
        for name, records in list(self.view.evaluations.items())[:most]:
            losses = [r.loss for r in records]
            line = told((f"eval {name}", f"{losses[-1]:.4f}"), ("at step", str(records[-1].step)), ("at first", f"{losses[0]:.4f}"))
            lines.append(line.append(chart(losses, 20, ascii_only=self.plain)[0] if len(losses) > 1 else "", "cyan"))
        if self.view.best is not None:
            step, loss = self.view.best
            lines.append(told(("best checkpoint", f"{loss:.4f}"), ("at step", str(step))))
        return lines

    def curve(self, height: int) -> list[Text]:
        """The loss of the whole run."""
        losses = self.view.losses.values
        if len(losses) < 2:
            return []
        rows = chart(losses, self.width - 9, height, self.plain)
        labels = [f"{max(losses):8.4f} ", *[" " * 9] * (height - 2), f"{min(losses):8.4f} "]
        return [Text().append(label, "dim").append(row, "cyan") for label, row in zip(labels, rows, strict=True)]

    def times(self) -> list[Text]:
        """The loss by tenth of t."""
        tenths = {n: sum(losses) / len(losses) for n, losses in sorted(by_tenth(self.view.by_time).items())}
        if not tenths:
            return []
        head = "t".ljust(8) + "".join(f"{f'{n / 10:.1f}-{(n + 1) / 10:.1f}':>9}" for n in tenths)
        return [Text(head, "dim"), Text().append("loss".ljust(8), "dim").append("".join(f"{loss:9.4f}" for loss in tenths.values()))]

    def worst(self) -> list[Text]:
        """The buckets with the largest loss."""
        worst = sorted(self.view.buckets.items(), key=lambda b: -b[1])[:5]
        return [told(*((f"bucket {name}", f"{loss:.4f}") for name, loss in worst))] if worst else []

    def _filled(self, line: Text, share: float) -> Text:
        """A line with a bar to its end."""
        line.append(f"{share:4.0%} ")
        done, rest = bar(share, max(0, self.width - line.cell_len), self.plain)
        return line.append(done, "green").append(rest, "dim")

    def _fitted(self, line: Text) -> Text:
        line.no_wrap = True
        if self.plain:
            line.plain = line.plain.encode("ascii", "replace").decode()
        line.truncate(self.width, overflow="crop")
        return line


def told(*pairs: tuple[str, str]) -> Text:
    """Names and values side by side, with space for more behind."""
    line = Text()
    for name, value in pairs:
        line.append(f"{name} ", "dim").append(f"{value}   ")
    return line
