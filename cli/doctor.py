"""`diffpipe doctor`: a line for each finding, with its cure."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from diffpipe.doctor.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


def doctor_command(config: Path | None, overrides: list[str]) -> None:
    from diffpipe.config.load import load_config

    loaded = load_config(config, overrides) if config is not None else None
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from diffpipe.doctor import examine

    console, count = Console(), Counter[str]()
    for finding in examine(loaded):
        show(finding, console)
        count[finding.state] += 1
    told = ", ".join(f"{count[state]} {state}{'' if state == 'ok' or count[state] == 1 else 's'}" for state in STYLES)
    console.print(told, highlight=False)
    if count["fault"]:
        raise typer.Exit(1)


def show(finding: Finding, console) -> None:
    """State, name and what was found; the cure below."""
    from rich.text import Text

    line = Text.assemble((f"{finding.state:<8}", STYLES[finding.state]), (f"{finding.name}: ", "bold"), finding.found)
    console.print(line, highlight=False, soft_wrap=True)
    if finding.cure:
        console.print(Text(f"        cure: {finding.cure}"), highlight=False, soft_wrap=True)
