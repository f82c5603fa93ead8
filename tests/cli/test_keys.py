"""Keys and files ask a run for what they say, on a real terminal, and the terminal is afterwards as it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from diffpipe.checkpoint import list_checkpoints
from tests.conftest import ROOT
from tests.test_train import PROGRAM, arguments

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="opens a terminal as POSIX has them")
LONG = {"run.steps": 100000, "checkpoint.every_steps": 100000, "eval.sets": "[]", "preview.prompts": "[a square]", "preview.steps": 1}
READER = """
import time
from diffpipe.cli.keys import open_keys
open_keys(lambda key: print("pressed", key, flush=True))
print("ready", flush=True)
time.sleep(100)
"""


class Screen:
    """A program on a terminal of its own, as a shell starts it: the leader of the terminal's foreground."""

    def __init__(self, *command: str) -> None:
        import pty
        import termios

        self.ours, theirs = pty.openpty()
        self.found = termios.tcgetattr(self.ours)
        termios.tcsetwinsize(self.ours, (24, 80))
        self.shown = ""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONIOENCODING": "ascii"}
        start = [
            sys.executable,
            "-c",
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])",
        ]
        self.process = subprocess.Popen(
            [*start, *command], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def read(self, seconds: float) -> None:
        import select

        if select.select([self.ours], [], [], seconds)[0]:
            try:
                self.shown += os.read(self.ours, 1 << 16).decode(errors="replace")
            except OSError:  # every process has closed it
                time.sleep(0.05)

    def wait_for(self, ready: Callable[[], object], what: str, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not ready():
            self.read(0.1)
            assert time.monotonic() < end, f"{what} did not come\n{self.shown[-4000:]}"

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.shown, text)

    def press(self, key: str) -> None:
        os.write(self.ours, key.encode())

    def settings(self) -> list:
        import termios

        return termios.tcgetattr(self.ours)

    def end(self) -> int:
        self.wait_for(lambda: self.process.poll() is not None, "the end")
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                each.kill()
            self.process.wait()
        os.close(self.ours)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def open_screen(*command: str) -> Screen:
        opened.append(Screen(*command))
        return opened[-1]

    yield open_screen
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie that share a cache."""
    return tmp_path_factory.mktemp("home")


def folder_of(output: Path) -> Path:
    return max(output.glob("*/config.yaml")).parent


def test_keys_export_checkpoint_and_stop_a_run_of_two_stages_and_the_terminal_is_as_it_was(
    screen: Callable[..., Screen], home: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    shown = screen(*launcher, *PROGRAM, *arguments(home / "läufe 日本", **LONG, **{"mesh.stages": 2}))
    shown.wait_for_text("q quit")
    run = folder_of(home / "läufe 日本")
    shown.wait_for(lambda: shown.settings() != shown.found, "reading of keys, one by one")
    shown.press("s")
    shown.wait_for_text("export ")
    shown.press("p")
    shown.wait_for(lambda: list((run / "previews").glob("*/00.png")), "a preview")
    shown.press("c")
    shown.wait_for(lambda: list_checkpoints(run / "checkpoints"), "a checkpoint")
    shown.press("q")
    shown.wait_for_text("q again quits")
    shown.press("x")
    assert shown.end() == 0
    assert shown.shown.isascii() and "l\\xe4ufe" in shown.shown and "\\u65e5" in shown.shown
    assert shown.settings() == shown.found
    (exported,) = (run / "exports").iterdir()
    first, last = list_checkpoints(run / "checkpoints")
    assert exported.name < last.name and first.name < last.name
    log = (run / "log.txt").read_text()
    assert re.search(rf"checkpoint .*{last.name}\nended behind step {int(last.name[5:])} of 100000, as asked", log)


def test_a_killed_process_leaves_the_terminal_as_it_was(screen: Callable[..., Screen]) -> None:
    shown = screen(sys.executable, "-c", READER)
    shown.wait_for(lambda: shown.settings() != shown.found, "reading of keys")
    shown.press("k")
    shown.wait_for_text("pressed k")
    shown.process.send_signal(signal.SIGKILL)
    shown.wait_for(lambda: shown.settings() == shown.found, "the terminal's own settings", seconds=20)
    shown.wait_for(lambda: "\x1b[?25h" in shown.shown[-20:], "the cursor")


def test_files_in_the_run_folder_ask_for_the_same_where_there_is_no_terminal(home: Path) -> None:
    command = [sys.executable, *PROGRAM, *arguments(home / "files", **LONG, **{"mesh.stages": 1})]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    wishes = iter(["save", "checkpoint", "preview", "stop"])
    wish, answers = "", {"save": "export ", "checkpoint": "checkpoint ", "preview": f"preview {home}", "stop": "ended behind step"}
    run = Path()
    for line in process.stdout:
        assert "\x1b" not in line, "a log has no control codes"
        if line.startswith("step 1/"):
            run = folder_of(home / "files")
        if run != Path() and (not wish or line.startswith(answers[wish])):
            if wish:
                assert not (run / wish).exists(), "a file that was obeyed is gone"
            if (wish := next(wishes, "")) == "":
                break
            (run / wish).touch()
    process.stdout.read()
    assert process.wait(60) == 0
    told = re.findall(r"^(\w+): asked for by the file", (run / "log.txt").read_text(), re.M)
    assert told == ["save", "checkpoint", "preview", "stop"]
    assert len(list_checkpoints(run / "checkpoints")) == 2 and len(list((run / "exports").iterdir())) == 1
