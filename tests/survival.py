"""A run in processes of its own that comes to harm at a place in its output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from diffpipe.checkpoint import list_checkpoints, read_weights
from tests.conftest import ROOT, free_port
from tests.test_train import SMALL

SETTINGS = {
    **SMALL,
    "run.steps": 6,
    "checkpoint.keep": 8,
    "schedule.kind": "constant",
    "adapter.dropout": 0.1,
    "mesh.stages": 1,
}


def arguments(output: Path, cache: Path, **more: object) -> list[str]:
    """The command line of a small run of Wan under a LoRA."""
    settings = {**SETTINGS, "output_dir": output, "data.cache_dir": cache, **more}
    return ["train", str(ROOT / "configs/quickstart_video_lora.yaml"), *(f"--set={k}={v}" for k, v in settings.items())]


class Running:
    """A started run, its output read as it comes."""

    def __init__(self, given: Sequence[str], launcher: Sequence[str] = (), **more: str) -> None:
        begin = [sys.executable, *(["-m", "torch.distributed.run", *launcher] if launcher else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
        self.process = subprocess.Popen(
            [*begin, "-m", "diffpipe", *given], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""

    def until(self, pattern: str) -> None:
        """Read on to a line that has ``pattern``, or to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if re.search(pattern, line):
                return

    def end(self) -> int:
        self.until("(?!)")
        return self.process.wait()

    def children(self) -> list[psutil.Process]:
        """The processes that came from it: first those that train, under torchrun."""
        return psutil.Process(self.process.pid).children(recursive=True)


def started_alone(given: Callable[[int], Sequence[str]], environment: Callable[[int], dict[str, str]] = lambda rank: {}) -> list[Running]:
    """Two ranks with no launcher that would end those that are left."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Running(given(rank), RANK=str(rank), **meeting, **environment(rank)) for rank in range(2)]


def run_in(output: Path) -> Path:
    (config,) = output.glob("*/config.yaml")
    return config.parent


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run's newest checkpoint holds."""
    return read_weights(list_checkpoints(run / "checkpoints")[-1])


def same_weights(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    expected, got = last_weights(one), last_weights(other)
    return expected.keys() == got.keys() and all(torch.equal(got[name], weight) for name, weight in expected.items())
