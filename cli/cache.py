"""`diffpipe cache`."""

from __future__ import annotations

from pathlib import Path


def cache_command(config: Path, overrides: list[str], verify: bool, rebuild: bool, prune: bool) -> None:
    from diffpipe.config.load import load_config

    loaded = load_config(config, overrides)
    from diffpipe.cli.dashboard import make_sinks
    from diffpipe.cli.quiet import quiet_libraries

    quiet_libraries()
    from diffpipe.train import cache

    cache(loaded, make_sinks=make_sinks, verify=verify, rebuild=rebuild, prune=prune)
