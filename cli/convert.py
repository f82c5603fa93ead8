"""`diffpipe convert`: the new config, and what became of every old key."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpipe.migration.draft import Fate


def convert_command(source: Path, output: Path | None, gpus: int | None) -> None:
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from diffpipe.durable import write_durably
    from diffpipe.errors import ConfigError, typed
    from diffpipe.migration import convert
    from diffpipe.migration.settings import Scale

    if output is not None and output.exists():
        raise ConfigError("is there already", where=str(output), fix="name another file with -o, or delete it")
    made = convert(source, Scale(gpus))
    if output is None:
        print(made.text, end="")
    else:
        try:
            write_durably(output, made.text.encode())
        except OSError as fault:
            raise ConfigError(f"cannot be written: {fault.strerror or fault}", where=str(output), fix="name another file") from fault
    show(made.fates, sys.stderr if output is None else sys.stdout)
    if output is not None:
        print(f"{output}: see what it takes with `diffpipe plan {typed(output)}`")


def show(fates: tuple[Fate, ...], to) -> None:
    """Every key once, those that a person should look at last."""
    for outcome in ("carried", "changed", "left out"):
        of = [fate for fate in fates if fate.outcome == outcome]
        print(f"{'not carried over' if outcome == 'left out' else outcome}: {len(of)} key{'' if len(of) == 1 else 's'}", file=to)
        for fate in of:
            print(f"  {fate.line()}", file=to)
