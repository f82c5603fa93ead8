"""`diffpipe inspect`: what the data become, as tables and contact sheets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpipe.inspection import Survey


def inspect_command(config: Path, overrides: list[str], output: Path | None, decode: bool) -> None:
    from diffpipe.config.load import load_config

    loaded = load_config(config, overrides)
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from diffpipe.config.schema import MeshConfig
    from diffpipe.inspection import contact_sheets, decoded_sheets, survey
    from diffpipe.pipeline.mesh import open_mesh
    from diffpipe.toy import materialize

    loaded = materialize(loaded)
    console = Console()
    folder = output or loaded.output_dir / "inspect"
    for found in survey(loaded):
        show(found, console)
        for path in contact_sheets(found, folder):
            console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    if decode:
        with open_mesh(MeshConfig()) as mesh:
            for path in decoded_sheets(loaded, folder, mesh.device):
                console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


def show(survey: Survey, console) -> None:
    """One set's buckets, captions and what is left out."""
    from rich.table import Table

    title = f"{survey.name}: {len(survey.samples)} samples" + (f", {survey.steps} steps in the first epoch" if survey.trains else "")
    table = Table(title=title, title_justify="left")
    for head in ("frames x height x width", "samples", *(("shown an epoch", "steps", "left for the next epoch") if survey.trains else ())):
        table.add_column(head, justify="right")
    for row in survey.buckets:
        more = (row.shown, row.steps, row.leftover) if survey.trains else ()
        table.add_row(str(row.bucket), str(row.samples), *map(str, more))
    console.print(table)
    for line in survey.caption_lines():
        console.print(f"  {line}", markup=False, highlight=False)
    for what, names in (("caption", survey.captionless), ("mask", survey.maskless)):
        if names:
            console.print(f"  no {what}: {len(names)} files, such as {', '.join(names[:3])}", markup=False, highlight=False)
    for dropped in (d for d in survey.dropped if d.fault):
        console.print(f"  left out: {dropped.file}: {dropped.reason}", markup=False, highlight=False, soft_wrap=True)
    for reason, count in Counter(d.reason for d in survey.dropped if not d.fault).items():
        console.print(f"  not used: {count} x {reason}", markup=False, highlight=False)
