"""Pairs of ranks that add numbers in a loop under a watch, until the last one comes to harm.

    python tests/pipeline/watch_program.py FOLDER dies|hangs|freezes|fails|ends …

All pairs at once, forked from one process that has imported what they need, with no launcher that would end those that are left. What a
person is told by rank R of a pair lies in FOLDER/HOW-R afterwards, and its exit code in FOLDER/HOW-R-code: 1 where it is told of harm, 0
where all ranks reach the end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from diffpipe.config.schema import MeshConfig
from diffpipe.errors import DiffpipeError
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.watch import Watch
from tests.conftest import free_port

TIMEOUT = 4.0


def harm(how: str) -> None:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "freezes":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hangs":
        time.sleep(600)
    if how == "fails":
        raise DiffpipeError("the disk is full")


def add(mesh: Mesh, how: str) -> None:
    with Watch(mesh, TIMEOUT, lambda fault: print(fault, flush=True), every=0.5) as watch:
        with watch.patient():
            if mesh.rank == 1:
                time.sleep(1.2 * TIMEOUT)  # which is said to be slow here
            mesh.sum(1.0)
        for step in range(10):
            if mesh.rank == 1 and step == 3:
                harm(how)
            mesh.sum(1.0)
            watch.tick()


def run(how: str) -> NoReturn:
    """Be a rank."""
    with open_mesh(MeshConfig(replicate=2)) as mesh:
        try:
            add(mesh, how)
        except DiffpipeError as fault:
            print(fault, flush=True)
            os._exit(1)
    sys.exit(0)


def started(how: str, port: int, rank: int, told: Path) -> int:
    """Fork a rank; its number."""
    if process := os.fork():
        return process
    for place in (1, 2):
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), place)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(how)


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    ranks: dict[int, str] = {}
    for how in cases:
        port = free_port()
        ranks |= {started(how, port, rank, folder / f"{how}-{rank}"): f"{how}-{rank}" for rank in range(2)}
    awaited = {name for name in ranks.values() if name.endswith("-0") or name == "ends-1"}
    end = time.monotonic() + 60
    while awaited.intersection(ranks.values()) and time.monotonic() < end:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            name = ranks.pop(process)
            (folder / f"{name}-code").write_text(str(os.waitstatus_to_exitcode(status)))
        else:
            time.sleep(0.05)
    for process in ranks:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
