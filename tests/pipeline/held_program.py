"""Holds on each stage what was foreseen, whatever arrives from others.

    torchrun --nproc_per_node=STAGES tests/pipeline/held_program.py STAGES FOLDER SCHEDULE/FAMILY ...

Prints of each what every stage held in a step of several microbatches, as a part of what was foreseen of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffpipe.config.schema import Config
from diffpipe.models import make_model
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.rehearsal import Rehearsal
from tests.conftest import toy_checkpoint
from tests.pipeline.test_rehearsal import CARD, allocated, batch_of, bucket_of

MICROBATCHES = 8


def config_of(family: str, schedule: str, stages: int, checkpoint: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {"stages": stages, "schedule": schedule},
            "batch": {"accumulate": MICROBATCHES},
            "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
            "adapter": {"rank": 4},
            "data": {"folders": [{"path": "unused"}]},
            "memory": {"recompute": "block"},
        }
    )


def held(config: Config, mesh: Mesh) -> float:
    """What a step holds beside the model's inputs, which the CPU does not copy, as a part of what was foreseen."""
    model = make_model(config.model, config.objective)
    bucket = bucket_of(model)
    rehearsal = Rehearsal(config, model, mesh.stage, CARD)
    timeline = rehearsal.timeline(bucket)
    moment = rehearsal.estimate(bucket, config.memory).moment
    pipeline = build(config, model, mesh)
    pipeline.train(batch_of(model, bucket, MICROBATCHES))
    pipeline.module.zero_grad()
    batch = batch_of(model, bucket, MICROBATCHES)
    found = allocated(lambda: pipeline.train(batch))
    return found / (moment.whole - MICROBATCHES * sum(timeline.bytes.get(s, 0) for s in timeline.given))


def main() -> None:
    stages, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), [case.split("/") for case in sys.argv[3:]]
    # Before the processes meet: in a group, transformers saves on its first rank alone.
    configs = [config_of(family, schedule, stages, toy_checkpoint(family, folder)) for schedule, family in cases]
    with open_mesh(configs[0].mesh) as mesh:
        for config in configs:
            parts = mesh.exchange(held(config, mesh))
            if mesh.reporter:
                print(f"held {config.mesh.schedule}/{config.model.family}", *(f"{part:.3f}" for part in parts), flush=True)


if __name__ == "__main__":
    main()
