"""Gives a terminal its settings back when the process that changed them is gone without having done so.

    python guard.py SAVED CHANGED       standard input: a pipe from that process; standard output: the terminal

A program of its own, since nothing inside a process survives SIGKILL. A line on the pipe says that all is in order.
"""

from __future__ import annotations

import json
import sys
import termios

SHOW_CURSOR = b"\x1b[?25h"


def main() -> None:
    assert sys.platform != "win32"
    if sys.stdin.readline():
        return
    saved, changed = (json.loads(text, object_hook=lambda o: o["byte"].encode("latin-1")) for text in sys.argv[1:])
    terminal = sys.stdout.fileno()
    if termios.tcgetattr(terminal) == changed:  # else somebody else uses it by now, such as a shell
        termios.tcsetattr(terminal, termios.TCSANOW, saved)
        sys.stdout.buffer.write(SHOW_CURSOR)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
