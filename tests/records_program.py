"""Trains a tiny Flux and writes each step's record as a line of JSON, with the collectives begun since the one before, on the rank that
speaks for the run.

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
from tests.pipeline.mesh_program import Collectives


class Records(Sink):
    """Writes what it is told of steps."""

    def __init__(self, path: Path, collectives: Collectives) -> None:
        self.path, self.collectives = path, collectives

    def step(self, record: StepRecord) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(record), "collectives": self.collectives.names}) + "\n")
        self.collectives.names = []


def main() -> None:
    folder, settings = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(exist_ok=True)
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"output_dir={folder.parent}", *settings])
    with Collectives() as collectives:
        train(config, resume=None, make_sinks=lambda: [Records(folder / "records.jsonl", collectives)])


if __name__ == "__main__":
    main()
