"""Runs one training again and again, several at once so that processes wait at ever other moments, and counts how many ends there are.

    python benchmarks/repeats.py [FAMILY ...] [--runs 90] [--beside 3] [--ranks 2]

All weights of a tiny model of the family are trained, a sample a microbatch. Every run is the command line's own, forked from a process
that has imported everything. Ends with 1 where not all have the same bits.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.kills import digest, finished, runs, start  # noqa: E402
from benchmarks.synthetic import BRIEF  # noqa: E402
from diffpipe.models import model_class  # noqa: E402


def arguments(family: str, folder: Path, ranks: int, number: int) -> list[str]:
    video = model_class(family).geometry.fps is not None
    settings = {
        **{key: value for key, value in BRIEF.items() if not key.startswith("adapter.")},
        "output_dir": folder / str(number),
        "run.steps": 60,
        "mesh.stages": ranks,
        "mesh.schedule": "interleaved",  # sends and computes by turns most often
        "mesh.spans": 2,
        "model.family": family,
        "model.path": f"toy:{family}",
        "data.folders": f"[{{path: 'toy:{'clips' if video else 'pictures'}'}}]",
        "data.frames": "[1, 9]",
        "checkpoint.every_steps": 60,
        "export.formats": "[diffusers]",
    }
    return ["train", str(ROOT / "configs/quickstart.yaml"), *(f"--set={k}={v}" for k, v in settings.items())]


def ends(family: str, given: argparse.Namespace, folder: Path) -> Counter[tuple[tuple[str, str], ...]]:
    """How often each end was come to."""
    log = folder / "log.txt"
    found: Counter[tuple[tuple[str, str], ...]] = Counter()
    for first in range(0, given.runs, given.beside):
        numbers = range(first, min(first + given.beside, given.runs))
        processes = [start(arguments(family, folder, given.ranks, n), given.ranks, log) for n in numbers]
        for number, started in zip(numbers, processes, strict=True):
            if any(finished(started, within=600.0) or [1]):
                raise SystemExit(f"a run failed\n{log.read_text()[-3000:]}")
            weights = {n: h for n, h in digest(runs(folder / str(number))[-1]).items() if not n.endswith(".safetensors")}
            found[tuple(sorted(weights.items()))] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=["ltx-video"])
    parser.add_argument("--runs", type=int, default=90)
    parser.add_argument("--beside", type=int, default=3, help="at once")
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    differ = False
    for family in given.families:
        with tempfile.TemporaryDirectory() as name:
            counts = sorted(ends(family, given, Path(name)).values(), reverse=True)
        print(
            f"{family}: {given.runs} runs over {given.ranks} ranks, {given.beside} at once: {len(counts)} ends, of {counts} runs",
            flush=True,
        )
        differ |= len(counts) > 1
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
