"""Trains a tiny Flux and writes each step's record as a line of JSON, on the rank that speaks for the run.

torchrun --nproc_per_node=N tests/records_program.py FOLDER KEY=VALUE ...
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from diffpipe.config.load import load_config
from diffpipe.metrics import Sink, StepRecord
from diffpipe.train import train
from tests.conftest import ROOT


class Records(Sink):
    """Writes what it is told of steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self, record: StepRecord) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def main() -> None:
    folder, settings = Path(sys.argv[1]), sys.argv[2:]
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"output_dir={folder}", f"data.cache_dir={folder.parent}/cache", *settings])
    train(config, resume=None, make_sinks=lambda: [Records(folder / "records.jsonl")])


if __name__ == "__main__":
    main()
