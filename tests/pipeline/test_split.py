"""Stages are cut where their bytes balance, or where the config says."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from diffpipe.config.load import validate
from diffpipe.config.schema import MeshConfig
from diffpipe.errors import ConfigError
from diffpipe.models.base import StageSpec
from diffpipe.pipeline.split import balance_bytes, split, stage_bytes

SPEC = StageSpec(units=("blocks.*",), carry=("embed",), post=("head", "table"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
        self.head = nn.Linear(2, 2, bias=False)
        self.table = nn.Parameter(nn.Linear(3, 1).weight.detach())


def test_bytes_before_the_units_count_to_the_first_and_bytes_after_to_the_last() -> None:
    assert stage_bytes(Model(), SPEC) == [256 + 64, 256, 256, 256 + 16 + 12]


@pytest.mark.parametrize(
    ("sizes", "stages", "spans"),
    [
        ([1, 1, 1, 1], 2, [(0, 2), (2, 4)]),
        ([9, 1, 1, 1], 2, [(0, 1), (1, 4)]),
        ([1, 1, 1, 9], 3, [(0, 1), (1, 3), (3, 4)]),
        ([5], 1, [(0, 1)]),
        ([3, 3, 3], 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_the_largest_stage_is_as_small_as_can_be(sizes: list[int], stages: int, spans: list[tuple[int, int]]) -> None:
    assert balance_bytes(sizes, stages) == spans


def test_every_stage_gets_a_unit_even_when_one_unit_outweighs_the_rest() -> None:
    assert all(stop > start for start, stop in balance_bytes([1, 1, 1, 1000], 4))


def test_a_list_is_taken_as_written() -> None:
    assert split(Model(), SPEC, MeshConfig(stages=3, split=[1, 3])) == [(0, 1), (1, 3), (3, 4)]


def test_more_stages_than_units_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.stages: 5 stages for 4 units"):
        split(Model(), SPEC, MeshConfig(stages=5))


def test_a_span_past_the_last_unit_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.split"):
        split(Model(), SPEC, MeshConfig(stages=2, split=[4]))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"mesh": {"stages": 1, "schedule": "interleaved"}}, "needs stages 2 or more"),
        ({"mesh": {"stages": 2, "schedule": "interleaved", "spans": 1}}, "needs spans 2 or more"),
        ({"mesh": {"stages": 2, "schedule": "1f1b", "spans": 2}}, "needs schedule interleaved or zero-bubble"),
        ({"mesh": {"stages": 2, "schedule": "eager-1f1b", "spans": 2}}, "needs schedule interleaved or zero-bubble"),
        ({"mesh": {"stages": 1, "schedule": "eager-1f1b"}}, "needs stages 2 or more"),
        ({"mesh": {"stages": 2, "spans": 2, "split": [3]}}, "2 stages of 2 spans need 3"),
        ({"mesh": {"stages": 3, "split": [4, 2]}}, "must rise strictly"),
        ({"mesh": {"stages": 2, "memory": ["24GiB"]}}, "memory has 1 entries for 2 stages"),
        ({"mesh": {"stages": 2, "memory": ["24GiB", "16GiB"]}, "memory": {"budget": "12GiB"}}, "mesh.memory and memory.budget"),
        ({"mesh": {"stages": 2, "schedule": "interleaved"}, "batch": {"accumulate": 5}}, "a multiple of mesh.stages 2"),
        ({"mesh": {"stages": 2, "schedule": "zero-bubble"}, "adapter": {}}, "adapter must be null"),
        ({"mesh": {"stages": 2, "schedule": "zero-bubble"}}, "memory.recompute must be none"),
    ],
)
def test_a_mesh_that_cannot_run_is_an_error_that_says_why(sections: dict[str, Any], told: str) -> None:
    base = {"run": {"steps": 1}, "model": {"family": "flux"}, "data": {"folders": [{"path": "unused"}]}, "batch": {"accumulate": 4}}
    with pytest.raises(ConfigError, match=told):
        validate({**base, **sections}, "the test")
