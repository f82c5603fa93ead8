"""What tests share: worlds of several gloo processes, and a quiet single thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

World = Callable[..., subprocess.CompletedProcess[str]]
Command = Callable[..., Result]
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start several processes come first, for they take longest and one worker runs a whole file."""
    launching = {item.path for item in items if "world" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in launching)


@pytest.fixture(scope="session")
def world() -> World:
    """Runs a Python program in several processes as torchrun does; gives the finished process."""

    def run(processes: int, *arguments: str | Path, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_addr=127.0.0.1",
            f"--master_port={free_port()}",
        ]
        command = [*(launcher if processes > 1 else [sys.executable]), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    return run


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
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a family's tiny checkpoint, made when it is first asked for."""
    home = tmp_path_factory.mktemp("toys")
    return lambda family: toy_checkpoint(family, home)


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
