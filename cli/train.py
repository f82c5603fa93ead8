"""`diffpipe train`."""

from __future__ import annotations

from pathlib import Path


def train_command(config: Path, overrides: list[str], resume: str | None) -> None:
    from diffpipe.config.load import load_config

    loaded = load_config(config, overrides)
    from diffpipe.cli.console import show_fault
    from diffpipe.cli.dashboard import make_sinks
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from diffpipe.train import train

    train(loaded, resume=resume, make_sinks=make_sinks, tell=show_fault)
