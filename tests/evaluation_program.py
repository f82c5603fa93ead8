"""Runs a command line of diffpipe, in which one rank alone gets a signal, with its evaluation batch of a number.

torchrun tests/evaluation_program.py RANK NUMBER train …
"""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import count
from typing import Any
from unittest import mock

from torch import Tensor

from diffpipe.cli import main
from diffpipe.pipeline.schedule import Pipeline


def heard_at(batch: int) -> None:
    """Have a signal come with an evaluation batch of this rank's, counted over the run."""
    evaluate, counted = Pipeline.evaluate, count(1)

    def interrupted(*given: Any) -> Tensor:
        if next(counted) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a thread takes it
        return evaluate(*given)

    mock.patch.object(Pipeline, "evaluate", interrupted).start()


if __name__ == "__main__":
    rank, batch, *sys.argv[1:] = sys.argv[1:]
    if os.environ["RANK"] == rank:
        heard_at(int(batch))
    main()
