"""One process asks nothing of the system that Windows lacks, whatever letters paths have and the console cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.drawn import draw_image

CAPTION = "Größe und Übermut, 絵"


def typed(folder: Path, encoding: str, *commands: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Commands in a process of its own, whose console has an encoding."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": encoding,
        "PYTHONWARNDEFAULTENCODING": "1",
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, str(ROOT / "tests/windows_program.py"), json.dumps(commands)]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True)


def test_a_run_from_config_to_export(tmp_path: Path) -> None:
    folder = tmp_path / "Jörgs Bilder 図"
    for number in range(2):
        draw_image(folder / f"data/Straße {number} 絵.png", (64, 64), "Größe und Übermut, 絵", seed=number)
    answers = [
        "--family",
        "flux",
        "--model",
        "toy:flux",
        "--data",
        "data",
        "--resolution",
        "64",
        "--card",
        "24",
        "--gpus",
        "1",
        "--train",
        "lora",
    ]
    keys = ["data.workers=0", "data.encode_workers=0", "model.dtype=float32", "run.steps=1", "output_dir=Läufe 図"]
    config = ["meine Läufe.yaml", *(f"--set={key}" for key in keys)]
    done = typed(
        folder,
        "ascii",
        ["init", config[0], *answers],
        ["train", *config],
        ["train", *config, "--set=run.steps=2", "--resume", ""],
    )
    assert done.returncode == 0, done.stderr
    assert b"step 2/2" in done.stdout and b"L\\xe4ufe \\u56f3" in done.stdout
    (run,) = [path.parent for path in folder.glob("Läufe 図/*/config.yaml")]
    assert (run / "exports/step-00000002/flux-lora-comfyui.safetensors").is_file()


def test_tables_on_a_console_of_western_europe(tmp_path: Path) -> None:
    look = ["inspect", str(ROOT / "configs/quickstart.yaml"), "--set=mesh.stages=1", "--set=output_dir=Läufe 図"]
    done = typed(tmp_path, "cp1252", ["models"], look)
    assert done.returncode == 0, done.stderr
    told = done.stdout.decode("cp1252")
    assert "hunyuan-video" in told and "train: 48 samples" in told and "Läufe \\u56f3" in told


def test_a_fault_about_letters_that_the_console_lacks_is_told(tmp_path: Path) -> None:
    done = typed(tmp_path, "ascii", ["plan", "fehlt 図.yaml"])
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"no such file" in done.stderr and b"\\u56f3" in done.stderr
