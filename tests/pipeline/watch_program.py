"""Two ranks that add numbers in a loop under a watch, until the last one comes to harm.

    RANK=… python tests/pipeline/watch_program.py dies|hangs|freezes|fails|ends

Prints what a person is told; ends with 1 where something is, 0 where all ranks reach the end.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from diffpipe.config.schema import MeshConfig
from diffpipe.errors import DiffpipeError
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.watch import Watch

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


def main() -> None:
    with open_mesh(MeshConfig(replicate=2)) as mesh:
        try:
            add(mesh, sys.argv[1])
        except DiffpipeError as fault:
            print(fault, flush=True)
            os._exit(1)


if __name__ == "__main__":
    main()
