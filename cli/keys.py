"""Reads single keys from the terminal while something else runs, and leaves the terminal as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

POLL = 0.2  # seconds between two looks at the keyboard


class Terminal(Protocol):
    """A keyboard."""

    def read(self) -> str:
        """The keys pressed within ``POLL`` seconds; raises OSError where none will come any more."""
        ...

    def restore(self) -> None:
        """Leave the terminal as it was found."""
        ...


class Keys:
    """Calls ``pressed`` with each key, in a thread, until it is closed."""

    def __init__(self, terminal: Terminal, pressed: Callable[[str], None]) -> None:
        self.terminal, self.pressed = terminal, pressed
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._read, name="keys", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        self.terminal.restore()

    def _read(self) -> None:
        while not self.over.is_set():
            try:
                keys = self.terminal.read()
            except OSError:  # the terminal was closed
                return
            if not keys.startswith("\x1b"):  # an arrow or function key
                for key in keys:
                    self.pressed(key)


def open_keys(pressed: Callable[[str], None]) -> Keys | None:
    """Keys of the terminal that this process was started from; None where it has none."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    return Keys(open_terminal(), pressed)


if sys.platform == "win32":
    import msvcrt

    class WindowsTerminal:
        """The console that this process is attached to; its keys come one by one as they are."""

        def read(self) -> str:
            if not msvcrt.kbhit():
                time.sleep(POLL)
                return ""
            key = msvcrt.getwch()
            if key in ("\x00", "\xe0"):  # an arrow or function key, which comes as two
                msvcrt.getwch()
                return ""
            return key

        def restore(self) -> None:
            """Nothing was changed."""

    def open_terminal() -> Terminal:
        return WindowsTerminal()

else:
    import select
    import termios

    LFLAG, CC = 3, 6  # places in what tcgetattr gives

    class PosixTerminal:
        """The terminal on standard input, its lines not waited for and not echoed while this process has it in the foreground.

        Ctrl-C and Ctrl-Z stay what they are. In the background nothing is read: it would stop the process, or, under torchrun, whose
        processes are sessions of their own, take keys away from the shell.
        """

        def __init__(self) -> None:
            self.fd = sys.stdin.fileno()
            self.saved: list[Any] = termios.tcgetattr(self.fd)
            self.changed: list[Any] = termios.tcgetattr(self.fd)
            self.changed[LFLAG] &= ~(termios.ICANON | termios.ECHO)
            self.changed[CC][termios.VMIN], self.changed[CC][termios.VTIME] = 1, 0
            self.guard: subprocess.Popen[bytes] | None = None

        def read(self) -> str:
            if not foreground(self.fd):
                time.sleep(POLL)
                return ""
            try:
                if termios.tcgetattr(self.fd) != self.changed:  # at first, and where a shell set its own in between
                    self.guard = self.guard or self._guard()
                    termios.tcsetattr(self.fd, termios.TCSANOW, self.changed)
            except termios.error as fault:
                raise OSError(*fault.args) from fault
            if not select.select([self.fd], [], [], POLL)[0] or not foreground(self.fd):
                return ""
            if not (keys := os.read(self.fd, 64)):
                raise OSError("end of input")
            return keys.decode(errors="ignore")

        def restore(self) -> None:
            try:
                # In the background, setting a terminal would stop the process; and then it is another's.
                if foreground(self.fd) and termios.tcgetattr(self.fd) == self.changed:
                    termios.tcsetattr(self.fd, termios.TCSANOW, self.saved)
            except (OSError, termios.error):
                pass  # the terminal was closed
            if self.guard is not None:
                self.guard.communicate(b"in order\n")

        def _guard(self) -> subprocess.Popen[bytes]:
            program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), *map(_as_text, (self.saved, self.changed))]
            # A session of its own, which signals to this process's group do not reach.
            return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=self.fd, start_new_session=True)

    def open_terminal() -> Terminal:
        return PosixTerminal()

    def foreground(fd: int) -> bool:
        """Whether the keys of a terminal are for this process, or for the launcher that gave it a session of its own."""
        try:
            return os.tcgetpgrp(fd) == os.getpgrp()
        except OSError:  # not the terminal of this process's session
            pass
        try:
            group, _, _, holder = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[2:6]
        except (OSError, ValueError):  # no Linux: it cannot be told
            return False
        return group == holder

    def _as_text(settings: list[Any]) -> str:
        return json.dumps(settings, default=lambda byte: {"byte": byte.decode("latin-1")})
