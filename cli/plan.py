"""`diffpipe plan`: what a run would hold and take, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffpipe.metrics import GIB

if TYPE_CHECKING:
    from diffpipe.pipeline.memory.cards import Card
    from diffpipe.plan import Plan, Scaled, StagePlan


def plan_command(config: Path, overrides: list[str], card: str | None, devices: int | None) -> None:
    from diffpipe.config.load import load_config

    loaded = load_config(config, overrides)
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from diffpipe.plan import make_plan, scale

    if devices is None:
        show(make_plan(loaded, card), Console())
    else:
        show_meshes(*scale(loaded, devices, card), Console())


def show(plan: Plan, console) -> None:
    """What the whole run does, then each stage."""
    of = "the data's" if plan.scanned else "all that the config allows, for the data is not here"
    for line in (*plan.lines, f"planned for a card like {plan.card.name}, in GiB and seconds a step; buckets: {of}"):
        console.print(line, markup=False, highlight=False)
    for number, stage in enumerate(plan.stages):
        console.print()
        spans = ", ".join(first if first == last else f"{first} to {last}" for first, last in stage.spans)
        for line in (f"stage {number}: {spans}", *lines(stage)):
            console.print(line, markup=False, highlight=False)
        console.print(table(stage))


def show_meshes(card: Card, meshes: list[Scaled], console) -> None:
    """What each mesh makes of a step, a row each."""
    from rich import box
    from rich.table import Table

    console.print(
        f"steps of the largest bucket on cards like {card.name}, simulated pass by pass; GiB of the busiest stage", highlight=False
    )
    columns = {
        "schedule": lambda m: f"{m.mesh.schedule}" + (f" {m.mesh.spans}" if m.mesh.spans > 1 else ""),
        "s/step": lambda m: f"{m.seconds:.3g}",
        "samples/s": lambda m: f"{m.samples / m.seconds:.3g}",
        "bubble": lambda m: f"{m.course.bubble:.1%}",
        "balance": lambda m: f"{m.course.balance:.2f}",
        "held": lambda m: _gib(m.held),
        "sent": lambda m: _gib(m.sent),
        "reduced": lambda m: _gib(m.reduced),
    }
    shown = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("mesh", no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for mesh in meshes:
        shown.add_row(f"{mesh.mesh.stages} x {mesh.mesh.replicas}", *(told(mesh) for told in columns.values()))
    console.print(shown)


def lines(stage: StagePlan) -> Iterator[str]:
    """What is the same for all buckets."""
    estimate = next(iter(stage.buckets.values()))
    held = ", ".join(f"{name} {_gib(count)}" for name, count in estimate.always.items() if count)
    yield f"  {stage.count} units, {stage.share:.0%} of the weights"
    yield f"  always held: {held}"
    if estimate.homes:
        yield f"  weights in host memory: {_gib(estimate.homes)}"
    yield from (f"  {reason}" for reason in stage.reasons)
    yield from (f"  warning: {warning}" for warning in stage.warnings)


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
