"""How long a run takes until its first step is over, by phase: with an empty cache, and again with a warm one.

    python -m benchmarks.startup [CONFIG] [--repeats 5] [--stages 1] [--set KEY=VALUE ...]

Each start is a process of its own (torchrun's, with several stages) that ends behind its first step. A phase's time is that of the rank
that it took longest on; libraries are imported where they are first needed. Of the warm starts it prints the median and the range.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent


def start(config: Path, output: Path, stages: int, settings: list[str]) -> dict[str, float]:
    """Seconds of each phase of one run."""
    known = set(output.glob("*/tensorboard"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stages}"] if stages > 1 else []
    given = [f"output_dir={output}", f"data.cache_dir={output}/cache", "run.steps=1", f"mesh.stages={stages}", *settings]
    command = [sys.executable, *launcher, "-m", "diffpipe", "train", str(config), *(f"--set={each}" for each in given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    (folder,) = set(output.glob("*/tensorboard")) - known
    events = EventAccumulator(str(folder))
    events.Reload()
    return {t.removeprefix("startup/"): events.Scalars(t)[0].value for t in events.Tags()["scalars"] if t.startswith("startup/")}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("config", nargs="?", type=Path, default=ROOT / "configs/quickstart.yaml")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--stages", type=int, default=1)
    options.add_argument("--set", action="append", default=[], help="passed on to train")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = [start(given.config, Path(folder), given.stages, given.set) for _ in range(1 + given.repeats)]
    print("| phase | empty cache, s | warm cache, s (range) |\n| --- | --- | --- |")
    for phase in starts[0]:
        row([each[phase] for each in starts], phase)
    row([sum(each.values()) for each in starts], "all")


def row(seconds: list[float], name: str) -> None:
    empty, *warm = seconds
    print(f"| {name.replace('_', ' ')} | {empty:.2f} | {statistics.median(warm):.2f} ({min(warm):.2f} to {max(warm):.2f}) |", flush=True)


if __name__ == "__main__":
    main()
