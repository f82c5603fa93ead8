"""`diffpipe export`."""

from __future__ import annotations

from pathlib import Path


def export_command(
    source: Path, formats: list[str], checkpoint: str | None, output: Path | None, form: str | None, family: str | None, base: str | None
) -> None:
    from diffpipe.cli.checkpoint import step_of
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from diffpipe.errors import ConfigError
    from diffpipe.takeaway import export_file, export_run

    if source.is_file():
        if checkpoint is not None:
            raise ConfigError("a file has no checkpoints", where="--checkpoint", fix="leave it out, or name a run folder")
        written = export_file(source, formats=formats, source=form, family=family, base=base, output=output)
    else:
        if form or family or base:
            raise ConfigError("a run knows its own", where="--from, --family, --base", fix="leave them out, or name an adapter file")
        written = export_run(source, formats=formats, step=step_of(checkpoint), output=output)
    for path in written:
        print(path)
