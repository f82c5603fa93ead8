"""Looks at a machine as a run would use it, and tells what would stop or slow one before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from diffpipe.config.schema import Config
from diffpipe.doctor import machine, software
from diffpipe.doctor.finding import Finding


def examine(config: Config | None) -> Iterator[Finding]:
    """Every finding, as soon as it is made.

    Args:
        config: of the run to come; None looks at what any run needs.
    """
    yield from software.versions()
    broken = list(software.imports())
    yield from broken
    names = {finding.name for finding in broken}
    for needs, look in _looks(config):
        if f"import {needs}" not in names:
            yield from look()


def _looks(config: Config | None) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
    """Looks in their order, each with the package that it needs."""
    yield "av", software.video
    yield "", lambda: software.compiler(config)
    yield "", lambda: (machine.disk(name, folder) for name, folder in _folders(config).items())
    yield "", lambda: iter([machine.host_memory()])
    yield "", lambda: machine.limits(config)

    from diffpipe.doctor import devices, reach

    yield "torch", lambda: devices.cards(config)
    yield "torch", reach.meetings


def _folders(config: Config | None) -> dict[str, Path]:
    """Where runs and their cache go."""
    if config is None:
        return {"disk of runs": Path("runs")}
    cache = config.data.cache_dir
    return {"disk of runs": config.output_dir, **({} if cache is None else {"disk of the cache": cache})}
