"""Ranks of a job of 64 are set up and take a step in this process; torch's fake process group stands for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffpipe.config.schema import Config
from diffpipe.models import make_model
from diffpipe.optim import make_optimizer, set_rates
from diffpipe.pipeline.build import build
from diffpipe.pipeline.memory.cards import CARDS
from diffpipe.pipeline.mesh import Mesh, laid_out
from diffpipe.pipeline.placement import Placer
from tests.families import CPU, microbatch

Toys = Callable[[str], Path]
WORLD = 64
# With the ranks that are tried. Sharded weights are of one rank: DTensor keeps what it finds out about a mesh for as long as a process.
JOBS = {
    "sharded": ({"stages": 4, "replicate": 4, "shard": 4, "schedule": "1f1b"}, [37]),
    "interleaved": ({"stages": 2, "replicate": 32, "schedule": "interleaved"}, [0, 37, 63]),
}


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Config, int], Mesh]]:
    """Makes this process a rank of a world that is not there."""
    # torch's stages ask their neighbours whether all know their shapes: a fake world says neither yes nor no.
    monkeypatch.setattr(dist, "recv", lambda tensor, *args, **kwargs: tensor.fill_(1))

    def become(config: Config, rank: int) -> Mesh:
        if dist.is_initialized():
            dist.destroy_process_group()
        store = FakeStore()
        dist.init_process_group("fake", store=store, rank=rank, world_size=WORLD)
        return laid_out(config.mesh, CPU, "cpu", store)

    yield become
    dist.destroy_process_group()


@pytest.mark.parametrize(("mesh", "ranks"), JOBS.values(), ids=JOBS)
def test_ranks_of_a_large_job_are_set_up_and_take_a_step(
    toys: Toys, be: Callable[[Config, int], Mesh], mesh: dict[str, Any], ranks: list[int]
) -> None:
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": mesh,
            "batch": {"accumulate": 4},
            "model": {"family": "wan", "path": str(toys("wan")), "dtype": "float32"},
            "data": {"folders": [{"path": "unused"}]},
        }
    )
    model = make_model(config.model, config.objective)
    config = config.model_copy(update={"mesh": Placer(config, model, CARDS[0], [(5, 64, 64)]).place().mesh})
    named: dict[int, set[str]] = {}
    for rank in ranks:
        place = be(config, rank)
        assert place.rank == place.stage * place.replicas + place.replica and place.world == WORLD
        assert place.reporter == (rank == place.reporter_rank)
        pipeline = build(config, model, place)
        optimizer = make_optimizer(config.optimizer, pipeline.trained.items())
        release = pipeline.memory.release_with(optimizer, place.mean_over_replicas)
        set_rates(optimizer, 1.0)
        share = pipeline.train([microbatch(model, seed=i, count=1) for i in range(config.batch.accumulate)])
        _, counted = pipeline.gradients()
        loss, norm = place.loss_and_norm(share, counted)
        release.step_rest()
        assert share.shape == loss.shape == norm.shape == torch.Size([])
        held = {n: p.numel() for n, p in pipeline.trained.items()}
        whole = {n: p.numel() for n, p in pipeline.module.named_parameters()}
        assert sum(held.values()) < 0.3 * sum(whole.values()) if place.shards > 1 else held == whole
        named.setdefault(place.stage, set(held))
        assert named[place.stage] == set(held)
    assert len(named) == 1 or not set.intersection(*named.values()), "no stage holds what another does"
