"""`diffpipe sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def sample_command(
    run: Path,
    texts: list[str],
    prompt: dict[str, Any],
    preview: dict[str, Any],
    checkpoint: str | None,
    output: Path | None,
    overrides: list[str],
) -> None:
    from diffpipe.cli.checkpoint import step_of
    from diffpipe.cli.console import show_fault
    from diffpipe.cli.dashboard import make_sinks
    from diffpipe.cli.quiet import quiet_libraries
    from diffpipe.errors import ConfigError

    quiet_libraries()
    from diffpipe.sample import config_of, sample_run

    own = {name: value for name, value in prompt.items() if value is not None}
    if own and not texts:
        raise ConfigError(
            "the run's own prompts are sampled, which say it themselves",
            where=", ".join(f"--{name}" for name in own),
            fix="add --prompt, or leave it out",
        )
    given = [{"prompt": text, **own} for text in texts]
    changes = {name: value for name, value in preview.items() if value is not None}
    sample_run(
        run, config_of(run, overrides, given, changes), step=step_of(checkpoint), output=output, make_sinks=make_sinks, tell=show_fault
    )
