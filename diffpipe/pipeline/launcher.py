"""Ends a process whose launcher is gone: where it waits for others, it may do so for long, and nobody else would end it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from diffpipe import STARTED_BY


@contextmanager
def ended_with_torchrun(every: float = 1.0) -> Iterator[None]:
    """Until it is left, this process ends soon after the torchrun that started it; one that was started otherwise may outlive its parent.

    On Windows it does not show that a parent has ended, nor anywhere for one that ended before this package was imported.

    Args:
        every: seconds between two looks, in a thread.
    """
    left = threading.Event()
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        threading.Thread(target=_look, args=(left, every), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _look(left: threading.Event, every: float) -> None:
    while os.getppid() == STARTED_BY:
        if left.wait(every):
            return
    with suppress(OSError):  # who read what is printed may be gone too
        print("torchrun, which started this process, is gone: it ends", file=sys.stderr, flush=True)
    os._exit(1)
