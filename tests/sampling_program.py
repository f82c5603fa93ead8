"""Samples latents of families over stages, and writes them to a file on the rank that speaks for the run.

    torchrun --nproc_per_node=STAGES tests/sampling_program.py STAGES TOYS OUTPUT FAMILY ...

The tiny checkpoints must be in TOYS already.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpipe.config.schema import Config, MeshConfig
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.sampling import Conditions, Interrupted, Sampler
from tests.conftest import toy_checkpoint
from tests.families import CAPTIONS, encoders_of, frames_of

STEPS, SEED = 3, 5


def config_of(family: str, checkpoint: Path, **sections: dict[str, Any]) -> Config:
    """A config that samples a tiny checkpoint in float32; sections add to its own."""
    raw: dict[str, Any] = {
        "run": {"steps": 1},
        "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
        "data": {"folders": [{"path": "unused"}]},
        "preview": {"steps": STEPS},
    }
    return Config.model_validate({**raw, **{name: {**raw.get(name, {}), **section} for name, section in sections.items()}})


def picture(height: int, width: int) -> Tensor:
    """Pixels 1 3 1 H W that 8 bits hold, as those of files are."""
    return torch.randint(0, 256, (1, 3, 1, height, width), generator=torch.Generator().manual_seed(height)) / 127.5 - 1


def conditions_of(model: DiffusionModel, caption: str = CAPTIONS[0], negative: str | None = None) -> Conditions:
    """What a sample of two latent frames is made from, encoded."""
    step, frames, encoders = model.geometry.multiple, frames_of(model), encoders_of(model)
    height, width = 2 * step, 3 * step
    away = model.no_prompt if negative is None else negative
    with torch.no_grad():
        text = model.encode_text(encoders, [caption])
        against = None if away is None else model.encode_negative(encoders, [away])
        still = torch.nn.functional.pad(picture(height, width), (0, 0, 0, 0, 0, frames - 1))
        shown = model.encode_media(encoders, still) if model.takes_image else {}
    first = [None if given is None else {name: tensor[0] for name, tensor in given.items()} for given in (text, against, shown)]
    assert first[0] is not None
    return Conditions(SEED, frames, height, width, first[0], first[1], first[2] or {})


def opened(config: Config, mesh: Mesh) -> tuple[DiffusionModel, Pipeline]:
    model = make_model(config.model, config.objective)
    return model, build(config, model, mesh)


def main() -> None:
    stages, toys, output = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    made: dict[str, Tensor] = {}
    with open_mesh(MeshConfig(stages=stages)) as mesh:
        for family in sys.argv[4:]:
            config = config_of(family, toy_checkpoint(family, toys), mesh={"stages": stages})
            model, pipeline = opened(config, mesh)
            sampler = Sampler(model, pipeline)
            made[family] = sampler.sample(conditions_of(model), config.preview)
            if family == "flux":
                given_up(sampler, mesh, conditions_of(model), config)
                made["flux again"] = after_a_shortage(sampler, pipeline, conditions_of(model), config)
        if mesh.reporter:
            save_file(made, output)


def given_up(sampler: Sampler, mesh: Mesh, wanted: Conditions, config: Config) -> None:
    """A sample that the first stage alone gives up in the middle ends on all."""
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return mesh.stage == 0 and len(asked) == 2

    try:
        sampler.sample(wanted, config.preview, stop)
    except Interrupted:
        assert len(asked) == 2
    else:
        raise AssertionError("not all stages were told")


def after_a_shortage(sampler: Sampler, pipeline: Pipeline, wanted: Conditions, config: Config) -> Tensor:
    """The same sample once more, behind one for which the first stage had no memory in the middle of a step."""
    unit = pipeline.module.get_submodule(pipeline.spans[0].part.units[1])
    forward, calls = unit.forward, []

    def short(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 and pipeline.spans[0].part.first:
            raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB")
        return forward(*args, **kwargs)

    unit.forward = short
    try:
        sampler.sample(wanted, config.preview)
    except torch.OutOfMemoryError:
        return sampler.sample(wanted, config.preview)
    finally:
        unit.forward = forward
    raise AssertionError("no stage was told that one has no memory left")


if __name__ == "__main__":
    main()
