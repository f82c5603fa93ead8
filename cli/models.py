"""`diffpipe models`: a table of the registry."""

from __future__ import annotations


def models_command(markdown: bool) -> None:
    from diffpipe.models import support

    if markdown:
        print(support.markdown(), end="")
        return
    from rich.console import Console
    from rich.table import Table

    rows, alike = support.support()
    table = Table()
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "model.family")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.print(table)
    for line in support.alike_lines(alike):
        console.print(line, highlight=False)
