"""`diffpipe plan` tells what each stage and bucket of any family would hold and take, without data, weights or a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Command

Toys = Callable[[str], Path]


def written(folder: Path, **sections: Any) -> Path:
    raw = {"output_dir": str(folder), "run": {"steps": 3}, "adapter": {"rank": 4}, **sections}
    file = folder / "plan.yaml"
    file.write_text(json.dumps(raw))  # JSON is YAML
    return file


def test_a_config_is_planned_by_stage_and_bucket(command: Command, toys: Toys, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        mesh={"stages": 2},
        batch={"accumulate": 2},
        model={"family": "wan", "path": str(toys("wan")), "dtype": "bfloat16"},
        data={"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[256, 256, 9], [128, 128, 17]]},
        memory={"swap": 1, "offload": True, "offload_threshold": 0.001},
    )
    shown = command("plan", config, "--card", "RTX 3090").stdout
    assert max(map(len, shown.splitlines())) <= 80
    told = " ".join(shown.split())
    assert told.count("9x256x256") == told.count("17x128x128") == 2
    assert "2 processes: 2 stages x 1 replicas" in told and "a card like RTX 3090" in told
    assert "all that the config allows" in told


def test_the_released_size_is_planned_with_nothing_of_it_here(command: Command, tmp_path: Path) -> None:
    data = {"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[1024, 1024]]}
    config = written(tmp_path, model={"family": "lumina2"}, data=data)
    keys = ("memory.budget=8GiB", "memory.offload=false", "memory.swap=8")
    told = command("plan", config, *(f"--set={key}" for key in keys), "--card", "RTX 4090").stdout
    assert "2.617 B parameters" in told
    assert "memory.offload: false (set in the config)" in told and "memory.swap: 8 (set in the config)" in told
    assert "too much" in told


def test_all_weights_of_a_large_model_are_planned_block_by_block(command: Command, tmp_path: Path) -> None:
    data = {"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[1024, 1024]]}
    model, optimizer = {"family": "flux", "trainable_dtype": "bfloat16"}, {"kind": "adamw8bit-kahan", "clip": None}
    config = written(tmp_path, adapter=None, model=model, optimizer=optimizer, data=data, memory={"swap": "all", "compile": True})
    told = command("plan", config, "--card", "RTX 4090").stdout
    row = next(line.split() for line in told.splitlines() if line.strip().startswith("1x1024x1024"))
    assert "s/step" in told and len(row) == 9 and max(map(len, told.splitlines())) <= 80
    # Weights alone are 22 GiB, their optimizer state 66; two blocks at a time are not a tenth of it.
    assert float(row[1]) < 9


def test_previews_are_planned_with_what_is_on_the_device_meanwhile(command: Command, toys: Toys, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        model={"family": "wan", "path": str(toys("wan"))},
        data={"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[64, 64, 5]]},
        mesh={"stages": 2, "memory": ["17MiB", "108MiB"]},
        preview={"prompts": ["a", {"prompt": "b", "width": 512, "height": 256, "frames": 9}]},
    )
    told = " ".join(command("plan", config, "--card", "RTX 4090").stdout.split())
    sampling = re.findall(r"previews of 9x256x512: sampling (\d+\.\d+) MiB \(most of it workspace, (\d+\.\d+) MiB\)", told)
    assert len(sampling) == 2 and all(float(most) < float(peak) for peak, most in sampling)
    assert told.count("decoding in tiles of 256 pixels") == 1, "one stage decodes"
    assert told.count("warning: a preview for which memory runs out is left out") == 1
    assert "left out: preview.prompts.1: sampling 9x256x512 on stage 0 needs" in told
    assert "expected: at most 17.0 MiB, mesh.memory fix: smaller preview.width and preview.height" in told


def test_a_preview_that_would_end_a_sharded_run_ends_the_plan(command: Command, tmp_path: Path) -> None:
    data = {"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[256, 256]]}
    preview = {"prompts": ["a"], "width": 8192, "height": 8192}
    model = {"family": "lumina2", "dtype": "bfloat16"}
    config = written(tmp_path, model=model, data=data, mesh={"shard": 2}, preview=preview)
    done = command("plan", config, "--card", "RTX 3060", check=False)
    told = " ".join(done.stderr.split())
    assert done.exit_code == 1 and "preview.prompts.0" in told and "sampling 1x8192x8192 on stage 0 needs" in told
    assert "what is free on the device" in told


def test_all_meshes_of_many_devices_are_simulated(command: Command, toys: Toys, tmp_path: Path) -> None:
    data = {"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[128, 128, 5]]}
    config = written(tmp_path, model={"family": "wan", "path": str(toys("wan"))}, batch={"accumulate": 64}, data=data)
    shown = command("plan", config, "--devices", 512, "--card", "H100").stdout
    assert max(map(len, shown.splitlines())) <= 80
    rows = [line.split() for line in shown.splitlines() if re.match(r"\d+ x \d+ ", line)]
    # It has 6 blocks.
    assert sorted((int(row[0]), int(row[2])) for row in rows) == [(1, 512), (2, 256), (4, 128)]
    alone = next(row for row in rows if row[0] == "1")
    assert alone[3] == "1f1b" and "0.0%" in alone, "a stage alone never waits"


def test_devices_that_make_no_mesh_are_an_error(command: Command, toys: Toys, tmp_path: Path) -> None:
    data = {"folders": [{"path": str(tmp_path / "elsewhere")}], "sizes": [[128, 128, 5]]}
    config = written(tmp_path, mesh={"shard": 4}, model={"family": "wan", "path": str(toys("wan"))}, data=data)
    done = command("plan", config, "--devices", 6, check=False)
    assert done.exit_code == 1 and "--devices" in done.stderr and "a multiple of 4" in done.stderr
