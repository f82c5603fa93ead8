"""Starts programs in several processes that know of each other as under torchrun, forked from one that has imported what they need, which
would be most of a test's time. Not for GPUs: what has seen CUDA cannot be forked.

Reads requests from its input, a line of JSON each: ``processes``, ``program`` (a file, or ``-m`` and a module, with arguments),
``environment``, and the folder ``output``, in which it leaves ``stdout`` and ``stderr``. Answers each with a line: the first exit code that
is not 0, behind which the other processes are ended.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from diffusers import FluxPipeline, StableDiffusionXLPipeline, WanPipeline  # noqa: F401 - imported before the first fork

import diffpipe.cli
import diffpipe.train  # noqa: F401
import tests.families  # noqa: F401


def main() -> None:
    for line in sys.stdin:
        print(launch(json.loads(line)), flush=True)


def launch(request: dict[str, Any]) -> int:
    """Start the processes and wait for all; the first exit code that is not 0."""
    count, code = request["processes"], 0
    running = {child(request, rank) for rank in range(count)}
    while running:
        process, status = os.wait()
        running.discard(process)
        if ended := os.waitstatus_to_exitcode(status):
            code = code or ended
            for other in running:
                os.kill(other, signal.SIGTERM)
    return code


def child(request: dict[str, Any], rank: int) -> int:
    """Fork a process that runs the program; its number."""
    if process := os.fork():
        return process
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for place, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["output"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), place)
    os.environ.clear()
    os.environ |= request["environment"]
    if request["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    run(request["program"])


def run(program: list[str]) -> NoReturn:
    """Be the program."""
    module = program[0] == "-m"
    sys.argv = program[1:] if module else program
    try:
        if module:
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
