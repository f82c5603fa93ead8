"""A device without memory left ends a run with what was asked for, where, and what would make it fit."""

from __future__ import annotations

import pytest
import torch

from diffpipe.config.schema import Config
from diffpipe.errors import DiffpipeError
from diffpipe.pipeline.memory.shortage import explained, remedies

CPU = torch.device("cpu")
ASKED = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.57 GiB of which 1.06 GiB is free."


def config_of(**memory: object) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"family": "flux", "path": "x"},
            "adapter": {"rank": 4},
            "batch": {"micro": 2, "accumulate": 3},
            "data": {"folders": [{"path": "x"}]},
            "memory": memory,
        }
    )


def test_the_fault_beneath_what_wraps_it_is_told_with_its_place_and_cures() -> None:
    with pytest.raises(DiffpipeError) as told, explained("step 3 of bucket 1x64x64", CPU, remedies(config_of(recompute="none"))):
        try:
            raise torch.OutOfMemoryError(ASKED)
        except torch.OutOfMemoryError as fault:
            raise RuntimeError("[Stage 0] failed to run forward") from fault
    assert told.value.found == "the memory of cpu ran out in step 3 of bucket 1x64x64, which asked for 2.50 GiB"
    first, second = told.value.fix.split("; or ")[:2]
    assert first == "memory.recompute: block with recompute_every: 1" and second == "memory.quantize: fp8"


def test_another_fault_passes() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained("a step", CPU, ()):
        raise RuntimeError("shapes do not fit")


def test_nothing_is_advised_that_is_set_already() -> None:
    told = list(remedies(config_of(quantize="fp8", swap="all", offload=True)))
    assert told == ["batch.micro: 1 with batch.accumulate: 6", "more mesh.stages", "smaller data.resolutions or data.frames"]
