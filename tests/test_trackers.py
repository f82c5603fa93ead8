"""Weights & Biases is recorded to where it is asked for, and its key stays in the environment."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.test_train import arguments

KEY = "0123456789abcdef0123456789abcdef01234567"
ASKED = {"mesh.stages": 1, "run.steps": 2, "eval.sets": "[]", "metrics.wandb": "{project: mine}"}
SHOWN = {"preview.prompts": "[a square]", "preview.steps": 1}


def test_a_run_is_recorded_without_its_key_being_written_anywhere(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home/wandb"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home/wandb"))
    command(*arguments(tmp_path / "run", **ASKED, **SHOWN))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    (record,) = [p for p in files if p.suffix == ".wandb"]
    assert record.is_relative_to(tmp_path / "run")
    written = time.monotonic() + 20  # W&B's own process may end behind the run
    while b"preview/0" not in record.read_bytes() and time.monotonic() < written:
        time.sleep(0.1)
    for known in (b"train/loss_smoothed", b"time/compute", b"loss_by_t/", b"optimizer.lr", b"preview/0"):
        assert known in record.read_bytes()
    assert not [p for p in files if KEY.encode() in p.read_bytes()]


def test_what_is_missing_for_it_is_told_before_anything_else(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = command(*arguments(tmp_path / "run", **ASKED), check=False)
    assert done.exit_code == 1 and "metrics.wandb: the environment variable WANDB_API_KEY is not set" in done.stderr
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    done = command(*arguments(tmp_path / "run", **ASKED), check=False)
    assert done.exit_code == 1 and "pip install 'diffpipe[wandb]'" in done.stderr
    assert not list((tmp_path / "run").glob("*/config.yaml")), "no run is begun"
