"""`diffpipe models`: the registry, a paragraph for each family, for its columns do not fit 80 letters side by side."""

from __future__ import annotations


def models_command(markdown: bool) -> None:
    from diffpipe.models import support

    if markdown:
        print(support.markdown(), end="")
        return
    from rich.console import Console
    from rich.table import Table

    rows, alike = support.support()
    table = Table.grid(padding=(0, 2))
    for row in rows:
        (_, family), (_, title), *more = row.items()
        table.add_row(f"[bold]{family}[/]", title)
        table.add_row("", "; ".join(f"[dim]{column}[/] {value}" for column, value in more))
    console = Console()
    console.print(table)
    console.print("\nAll of them:")
    for line in support.alike_lines(alike):
        console.print(line, highlight=False)
