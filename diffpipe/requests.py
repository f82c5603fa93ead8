"""What a run is asked to do while it trains: looked at once, behind every step, and agreed on by all ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from enum import Flag, auto
from functools import reduce
from operator import or_
from time import monotonic
from typing import Any

from diffpipe.data.workers import SIGNALS
from diffpipe.pipeline.mesh import Mesh

SAME = 1.0  # seconds in which a terminal and a launcher may both pass on one Ctrl-C


class Request(Flag):
    """What may be asked for; a run that stops writes a checkpoint first, one that quits does not. One that is interrupted tells whoever
    started it to start it again."""

    CHECKPOINT = auto()
    STOP = auto()
    EXPORT = auto()
    QUIT = auto()
    INTERRUPT = auto()
    PREVIEW = auto()
    WAIT = auto()  # with the name of the checkpoint under way, of which a rank has not written its part yet


NOTHING = Request(0)


class Requests:
    """All who may ask, as one.

    Args:
        sources: each gives what was asked for since it was last called, on this rank; ranks may be asked for different things.
    """

    def __init__(self, mesh: Mesh, sources: Sequence[Callable[[], Request]]) -> None:
        self.mesh, self.sources = mesh, sources
        self.heard = NOTHING

    def own(self) -> float:
        """What this rank was asked for since the last call, as a number that travels with others."""
        return float(reduce(or_, (source() for source in self.sources), NOTHING).value)

    def hear(self, told: Iterable[float]) -> None:
        """What each rank was asked for; called on all with the same numbers."""
        asked = reduce(or_, (Request(int(number)) for number in told), NOTHING)
        self.heard = self.heard & ~Request.WAIT | asked  # who had to be waited for may be through

    def listen(self) -> None:
        """Have all ranks tell each other once more, behind what takes long."""
        self.hear(number for (number,) in self.mesh.gather([self.own()]))

    def agreed(self) -> Request:
        """What was heard since the last call, the same on every rank."""
        heard, self.heard = self.heard, NOTHING
        return heard


class Signals:
    """Takes signals as requests to stop, from when it is entered until it is left.

    A second Ctrl-C ends the process at once. Signals are read in a thread, since Python runs no handler while its main thread waits
    for another rank; the other signals may come again and again, as schedulers send them.

    Args:
        note: tells a person that the signal was heard.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.stopping = threading.Event()
        self._before: dict[Any, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            heeded = [s for s in SIGNALS if s.name != "SIGHUP" or signal.getsignal(s) is not signal.SIG_IGN]  # as nohup has it
            self._before = {each: signal.signal(each, _heard) for each in heeded}
            self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd)
            for each, handler in self._before.items():
                signal.signal(each, handler)
            self._writer.close()

    def take(self) -> Request:
        """Whether a signal came; nothing takes it back."""
        return Request.STOP | Request.INTERRUPT if self.stopping.is_set() else NOTHING

    def _listen(self) -> None:
        first: int | None = None
        since = 0.0
        while number := self._reader.recv(1):
            came = number[0]
            if came not in SIGNALS:
                continue
            if first is None:
                first, since = came, monotonic()
                self.stopping.set()
                self.note(f"{signal.Signals(came).name}: stops behind this step, with a checkpoint; Ctrl-C ends it at once")
            elif signal.SIGINT in (first, came) and monotonic() - since > SAME:
                os._exit(130)  # torchrun passes a second Ctrl-C on as SIGTERM
        self._reader.close()


def _heard(number: int, frame: object) -> None:
    """Python's own handler of a signal that the thread reads."""
