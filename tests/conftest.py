"""What tests share: worlds of several gloo processes, and a quiet single thread."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

World = Callable[..., subprocess.CompletedProcess[str]]
Command = Callable[..., Result]
Toys = Callable[[str], Path]
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, for one worker runs a whole file: those that start several processes, then whole runs and
    pipelines."""
    launching = {item.path for item in items if {"world", "torchrun"} & set(getattr(item, "fixturenames", ()))}
    long = (ROOT / "tests", ROOT / "tests/pipeline", ROOT / "tests/cli")
    items.sort(key=lambda item: (item.path not in launching, item.path.parent not in long))


def environment_of(processes: int) -> dict[str, str]:
    """What tells processes of each other."""
    common = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if processes == 1:
        return common
    count = str(processes)
    return {**common, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(f"{done.args} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="session")
def torchrun() -> World:
    """Runs a Python program in several processes by torchrun, or in one without; gives the finished process."""

    def run(processes: int, *arguments: str | Path, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        settings = (f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
        launcher = ["-m", "torch.distributed.run", *settings] if processes > 1 else []
        command = [sys.executable, *launcher, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment_of(1), capture_output=True, text=True, timeout=timeout)
        return checked(done, check)

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Runs a Python program in several processes that know of each other as under torchrun, forked from one that has imported what they
    need; gives what they came to."""
    command, pipe = [sys.executable, ROOT / "tests/nursery.py"], subprocess.PIPE
    nursery = subprocess.Popen(command, cwd=ROOT, env=environment_of(1), stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    asked, answers = nursery.stdin, nursery.stdout
    assert asked is not None and answers is not None

    def run(processes: int, *arguments: str | Path, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        output, program = tmp_path_factory.mktemp("world"), [str(a) for a in arguments]
        request = {"processes": processes, "program": program, "environment": environment_of(processes), "output": str(output)}
        asked.write(json.dumps(request) + "\n")
        asked.flush()
        given_up = threading.Timer(timeout, os.killpg, (nursery.pid, signal.SIGKILL))
        given_up.start()
        answer = answers.readline()
        given_up.cancel()
        told = [(output / name).read_text() if (output / name).exists() else "" for name in ("stdout", "stderr")]
        return checked(subprocess.CompletedProcess(program, int(answer or -signal.SIGKILL), *told), check)

    yield run
    asked.close()
    nursery.wait()


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs a command line in this process; gives its exit code and what it printed."""

    def run(*arguments: str | Path, check: bool = True) -> Result:
        from diffpipe.cli import app

        done = CliRunner().invoke(app, [str(a) for a in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if check and done.exit_code:
            raise AssertionError(f"{arguments} ended with {done.exit_code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    return run


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Gives the folder of a family's tiny checkpoint, made when it is first asked for."""
    home = tmp_path_factory.mktemp("toys")
    return lambda family: toy_checkpoint(family, home)


def home_of(toys: Toys, *families: str) -> Path:
    """Where the tiny checkpoints of families lie, made before several processes look for them at once."""
    (home,) = {toys(family).parent.parent for family in families}
    return home


def toy_checkpoint(family: str, home: Path) -> Path:
    """A family's tiny checkpoint under ``home``."""
    from diffpipe.config.schema import Config
    from diffpipe.toy import materialize

    raw = {
        "output_dir": home,
        "run": {"steps": 1},
        "model": {"family": family, "path": f"toy:{family}"},
        "data": {"folders": [{"path": "unused"}]},
    }
    made = materialize(Config.model_validate(raw)).model.path
    assert made is not None
    return Path(made)
