"""`diffpipe plan`: what a run would hold and take, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffpipe.metrics import GIB

if TYPE_CHECKING:
    from diffpipe.plan import Plan, StagePlan


def plan_command(config: Path, overrides: list[str], card: str | None) -> None:
    from diffpipe.config.load import load_config

    loaded = load_config(config, overrides)
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from diffpipe.plan import make_plan

    show(make_plan(loaded, card), Console())


def show(plan: Plan, console) -> None:
    """What the whole run does, then each stage."""
    of = "the data's" if plan.scanned else "all that the config allows, for the data is not here"
    for line in (*plan.lines, f"planned for a card like {plan.card.name}, in GiB and seconds a step; buckets: {of}"):
        console.print(line, markup=False, highlight=False)
    for number, stage in enumerate(plan.stages):
        console.print()
        for line in (f"stage {number}: {stage.units[0]} to {stage.units[1]}", *lines(stage)):
            console.print(line, markup=False, highlight=False)
        console.print(table(stage))


def lines(stage: StagePlan) -> Iterator[str]:
    """What is the same for all buckets."""
    estimate = next(iter(stage.buckets.values()))
    held = ", ".join(f"{name} {_gib(count)}" for name, count in estimate.always.items() if count)
    yield f"  {stage.count} units, {stage.share:.0%} of the weights"
    yield f"  always held: {held}"
    if estimate.homes:
        yield f"  weights in host memory: {_gib(estimate.homes)}"
    yield from (f"  {reason}" for reason in stage.reasons)


def table(stage: StagePlan):
    """What each bucket's steps hold on the device and in host memory, copy and take, in GiB and seconds."""
    from rich import box
    from rich.table import Table

    columns = {
        "peak": lambda e: _gib(e.peak),
        "s/step": lambda e: f"{e.seconds:.3g}",
        "activations": lambda e: _gib(e.moment.saved + e.moment.flight),
        "gradients": lambda e: _gib(e.moment.gradients),
        "workspace": lambda e: _gib(e.parts["workspace"]),
        "host": lambda e: _gib(e.buffers),
        "to device": lambda e: f"{e.to_device / GIB:.1f}",
        "to host": lambda e: f"{e.to_host / GIB:.1f}",
    }
    shown = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("bucket", no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for bucket, estimate in stage.buckets.items():
        shown.add_row(str(bucket), *(told(estimate) for told in columns.values()))
    return shown


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
