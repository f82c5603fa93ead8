"""One console, and how faults are shown on it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

import typer

from diffpipe.errors import DiffpipeError, Stopped


def run_command(command: Callable[[], None]) -> None:
    """Run a command; a user's mistake becomes a short message and exit code 1, Ctrl-C becomes 130, a run that stopped when asked 75."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console without UTF-8 must not end a run for a folder's name
    try:
        command()
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        raise typer.Exit(stop.CODE) from None
    except DiffpipeError as fault:
        show_fault(fault)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("stopped; what was cached and checkpointed stays", file=sys.stderr)
        raise typer.Exit(130) from None


def show_fault(fault: DiffpipeError) -> None:
    """The fault as a red panel on a terminal, as plain lines elsewhere; under torchrun each line names its rank."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(stderr=True)
    rank = os.environ.get("RANK")
    if console.is_terminal:
        console.print(Panel(Text(str(fault)), title="error" if rank is None else f"error, rank {rank}", border_style="red", expand=False))
    else:
        print(f"error: {fault}" if rank is None else f"error, rank {rank}: {fault}", file=sys.stderr, flush=True)


def fill_bare_resume(arguments: Sequence[str] | None = None) -> list[str]:
    """The arguments with `--resume` that names no run given an empty name, since an option's value is not optional."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    filled: list[str] = []
    for i, argument in enumerate(given):
        filled.append(argument)
        bare = i + 1 == len(given) or given[i + 1].startswith("-") or given[i + 1].endswith((".yaml", ".yml"))
        if argument == "--resume" and bare:
            filled.append("")
    return filled
