"""`--checkpoint` of commands that take one of a run's."""

from __future__ import annotations

from typing import Literal


def step_of(checkpoint: str | None) -> int | Literal["best"] | None:
    """The step, or best; None for the newest."""
    from diffpipe.errors import ConfigError

    if checkpoint is None or checkpoint == "best":
        return checkpoint
    if not checkpoint.isdecimal():
        raise ConfigError(repr(checkpoint), where="--checkpoint", expected="the step of a checkpoint, such as 500, or best")
    return int(checkpoint)
