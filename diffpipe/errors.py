"""What went wrong, in the user's words: the one exception that the command line turns into a short message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DiffpipeError(Exception):
    """A fault that the user can cure.

    Args:
        found: what was found, naming the value.
        where: the config key (``batch.micro``) or the file it was found in.
        expected: what would have been right.
        fix: what to change.
    """

    def __init__(self, found: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        self.found, self.where, self.expected, self.fix = found, str(where), expected, fix
        super().__init__(self._text())

    def _text(self) -> str:
        head = f"{self.where}: {self.found}" if self.where else self.found
        lines = [head]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):
        # Crosses process borders (loader workers, spawned ranks): rebuilt from its parts, not from the joined text.
        return _rebuild, (type(self), self.found, self.where, self.expected, self.fix)


class ConfigError(DiffpipeError):
    """One or more faults of a config file, reported together."""


class MediaError(DiffpipeError):
    """A media or caption file that cannot become a sample."""


class CheckpointError(DiffpipeError):
    """Weights or a training state that are not what the config says."""


class ShortageError(DiffpipeError):
    """A device has no memory left."""


class Stopped(Exception):
    """A run that was asked to stop and did, with a checkpoint to go on from; no fault.

    Args:
        folder: the run's.
        step: the last that was trained.
    """

    CODE = 75  # of the process: what sysexits.h calls a temporary failure, to be tried again

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped behind step {step}; --resume {typed(folder)} goes on")


def typed(path: Path) -> str:
    """A path as a person types it in a command."""
    return f'"{path}"' if " " in str(path) else str(path)


@contextmanager
def told_of_disk(found: str, where: str, fix: str, kind: type[DiffpipeError] = DiffpipeError) -> Iterator[None]:
    """Turns what a disk raises that is full or cannot be written into a fault in the user's words."""
    try:
        yield
    except OSError as fault:
        raise kind(f"{found}: {fault.strerror or fault}", where=where, fix=fix) from fault


def causes(fault: BaseException) -> Iterator[BaseException]:
    """The fault, what it was raised for, what that was raised for, and so on: libraries wrap what they meet."""
    cause: BaseException | None = fault
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _rebuild(kind: type[DiffpipeError], found: str, where: str, expected: str, fix: str) -> DiffpipeError:
    return kind(found, where=where, expected=expected, fix=fix)
