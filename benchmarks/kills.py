"""Kills runs with SIGKILL at random moments of training, checkpointing and exporting, resumes each, and compares their ends bit for bit.

    python benchmarks/kills.py [--kills 100] [--seed 0] [--ranks 1 2]

Every run is the command line's own, forked from a process that has imported everything. Of several ranks either all are killed, as
when a machine goes down, or one, and the others must end by themselves. Ends with 1 where a resume fails or a bit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from diffusers import FluxTransformer2DModel  # noqa: E402, F401 - imported before the first fork

import diffpipe.train  # noqa: E402
from benchmarks.synthetic import BRIEF  # noqa: E402
from diffpipe.checkpoint import list_checkpoints, read_weights  # noqa: E402

if not hasattr(diffpipe, "cli"):
    diffpipe.__path__.append(str(ROOT))
from diffpipe.cli import app  # noqa: E402

STEPS = 12
MOMENTS = ("training", "checkpointing", "exporting")


def arguments(output: Path, ranks: int, resume: Path | None) -> list[str]:
    settings = {
        **BRIEF,
        "output_dir": output,
        "run.steps": STEPS,
        "mesh.stages": ranks,
        "export.every_steps": 3,
        "export.formats": "[diffusers, comfyui]",
    }
    given = ["train", str(ROOT / "configs/quickstart.yaml"), *(f"--set={k}={v}" for k, v in settings.items())]
    return given + (["--resume", str(resume)] if resume else [])


def start(given: list[str], ranks: int, log: Path) -> list[int]:
    """A process of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        if child := os.fork():
            started.append(child)
            continue
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 1
        try:
            app(args=given, standalone_mode=False)
            code = 0
        except BaseException as end:  # a fork must never come back into the loop
            code = getattr(end, "exit_code", 1)
            print(repr(end))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return started


def finished(processes: list[int], within: float = 120.0) -> list[int] | None:
    """The exit codes of all, None where they do not end in time."""
    codes: dict[int, int] = {}
    end = time.monotonic() + within
    while len(codes) < len(processes) and time.monotonic() < end:
        for process in processes:
            if process not in codes and (done := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.005)
    return [codes[p] for p in processes] if len(codes) == len(processes) else None


def runs(output: Path) -> list[Path]:
    """Run folders, oldest first."""
    return sorted(path.parent for path in output.glob("*/config.yaml"))


def due(moment: str, output: Path, chance: random.Random) -> Callable[[], bool]:
    """Tells when to kill: at a drawn time behind the first sight of what belongs to the moment, once the ranks have met."""
    pattern = {"training": "*/log.txt", "checkpointing": "*/checkpoints/.unfinished-*", "exporting": "*/exports/*"}[moment]
    delay = chance.uniform(0, 2.0) if moment == "training" else chance.uniform(0, 0.03)
    patience = 0.0 if moment == "training" else chance.uniform(0, 1.5)  # so that it is not always the first of a start
    began, since = time.time(), 0.0

    def tell() -> bool:
        nonlocal since
        now = time.time()
        if not since and now - began > patience and any(_changed(path) > began for path in output.glob(pattern)):
            since = now
        return bool(since) and now - since >= delay

    return tell


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed since it was listed
        return 0.0


def digest(run: Path) -> dict[str, str]:
    """The hash of every trained weight and of every exported file at the end of a run."""
    weights = read_weights(list_checkpoints(run / "checkpoints")[-1])
    held = {name: hashlib.blake2b(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in weights.items()}
    for file in sorted((run / "exports" / f"step-{STEPS:08d}").rglob("*.safetensors")):
        content = file.read_bytes()
        held[file.name] = hashlib.blake2b(content[int.from_bytes(content[:8], "little") :]).hexdigest()  # the header names the config
    return held


def break_once(output: Path, log: Path, ranks: int, run: Path | None, moment: str, alone: bool, chance: random.Random) -> tuple[bool, bool]:
    """Start or resume a run and kill it; gives whether it was killed, and whether it had ended before."""
    processes = start(arguments(output, ranks, run), ranks, log)
    tell = due(moment, output, chance)
    over = False
    while not tell() and not over:
        time.sleep(0.001)
        over = os.waitid(os.P_PID, processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    if not over:
        for victim in [chance.choice(processes)] if alone else processes:
            os.kill(victim, signal.SIGKILL)
    codes = finished(processes)
    if codes is None or (any(codes) and -signal.SIGKILL not in codes):
        raise SystemExit(f"ended with {codes}\n{log.read_text()[-3000:]}")
    return not over, not any(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    chance, begun = random.Random(given.seed), time.monotonic()
    killed: Counter[str] = Counter()
    ended = 0
    with tempfile.TemporaryDirectory() as name:
        output, log = Path(name) / "runs", Path(name) / "log.txt"
        expected: dict[int, dict[str, str]] = {}
        for ranks in given.ranks:
            if any(finished(start(arguments(output, ranks, None), ranks, log)) or [1]):
                raise SystemExit(f"the unbroken run failed\n{log.read_text()[-3000:]}")
            expected[ranks] = digest(runs(output)[-1])
        while killed.total() < given.kills:
            ranks, left, before = chance.choice(given.ranks), min(chance.randint(2, 6), given.kills - killed.total()), runs(output)
            over = False
            while not over and left:
                moment, alone = chance.choice(MOMENTS), ranks > 1 and chance.random() < 0.5
                was, over = break_once(output, log, ranks, newest(output, before), moment, alone, chance)
                killed[f"{moment}, {ranks} rank{'s' if ranks > 1 else ''}{', one of them' if alone else ''}"] += was
                left -= was
            if not over and any(finished(start(arguments(output, ranks, newest(output, before)), ranks, log)) or [1]):
                raise SystemExit(f"a resume failed after {dict(killed)}\n{log.read_text()[-3000:]}")
            found = digest(runs(output)[-1])
            if differing := [name for name in expected[ranks] if found.get(name) != expected[ranks][name]]:
                raise SystemExit(f"{differing[:5]} differ after {dict(killed)}\n{log.read_text()[-3000:]}")
            ended += 1
            print(f"{killed.total()} kills, {ended} runs ended with the bits of the unbroken run", flush=True)
    print(f"{killed.total()} kills over {ended} runs in {time.monotonic() - begun:.0f} s: every resume succeeded, every end was bit-equal")
    for what, count in sorted(killed.items()):
        print(f"  {count:3d} while {what}")


def newest(output: Path, before: list[Path]) -> Path | None:
    """The run to go on with, where one that was started since has a checkpoint."""
    made = [run for run in runs(output) if run not in before and list_checkpoints(run / "checkpoints")]
    return made[-1] if made else None


if __name__ == "__main__":
    main()
