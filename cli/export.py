"""`diffpipe export`."""

from __future__ import annotations

from pathlib import Path


def export_command(run: Path, formats: list[str], step: int | None, output: Path | None) -> None:
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from diffpipe.takeaway import export_run

    for path in export_run(run, formats=formats, step=step, output=output):
        print(path)
