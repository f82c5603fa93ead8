"""What a person asks of a run: by a key in the terminal that shows it, or by a file in its folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from diffpipe.metrics import Wish
from diffpipe.requests import NOTHING, Request

REQUESTS: dict[Wish, Request] = {
    "save": Request.EXPORT,
    "checkpoint": Request.CHECKPOINT,
    "preview": Request.PREVIEW,
    "stop": Request.CHECKPOINT | Request.STOP,
    "quit": Request.QUIT,
}
FILES: tuple[Wish, ...] = ("save", "checkpoint", "preview", "stop")


def forget(folder: Path) -> list[str]:
    """Remove the files by which something was asked for before a run goes on; gives a line to tell for each."""
    told: list[str] = []
    for path in (folder / wish for wish in FILES):
        if path.is_file():
            try:
                path.unlink()
                told.append(f"{path.name}: the file {path} is from before this start; it is removed and not obeyed")
            except OSError as fault:
                told.append(f"{path.name}: the file {path} is from before this start, but cannot be removed: {fault}")
    return told


class Wishes:
    """Keeps what was asked for until the run takes it; on the rank that speaks for the run.

    Args:
        folder: the run's; an empty file called save, checkpoint, preview or stop asks for that, and goes when the run takes it.
        note, warn: tell a person.
        every: seconds between two looks into the folder, which may lie on a slow network.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], warn: Callable[[str], None], every: float = 1.0) -> None:
        self.folder, self.note, self.warn, self.every = folder, note, warn, every
        self.asked = NOTHING
        self.lock = threading.Lock()
        self.looked = -every
        self.stuck: set[str] = set()

    def ask(self, wish: Wish) -> None:
        """Ask for something; from any thread."""
        with self.lock:
            self.asked |= REQUESTS[wish]

    def take(self) -> Request:
        """What was asked for since the last call."""
        self._look()
        with self.lock:
            asked, self.asked = self.asked, NOTHING
        return asked

    def ends(self) -> bool:
        """Whether what was asked for, and not taken yet, ends the run."""
        self._look()
        with self.lock:
            return bool(self.asked & (Request.STOP | Request.QUIT))

    def _look(self) -> None:
        if monotonic() - self.looked < self.every:
            return
        self.looked = monotonic()
        for wish in FILES:
            path = self.folder / wish
            if wish in self.stuck or not path.is_file():
                continue
            try:
                path.unlink()
                self.note(f"{wish}: asked for by the file {path}, which is removed")
            except OSError as fault:  # else it would ask again behind every step
                self.stuck.add(wish)
                self.warn(f"{path} is obeyed once and not looked at again, for it cannot be removed: {fault}")
            self.ask(wish)
