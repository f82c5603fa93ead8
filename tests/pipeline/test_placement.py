"""The planner cuts where time balances and memory allows, and takes the schedule that idles least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.outlook import read_times, write_times
from diffpipe.pipeline.calibrate import keys, measure, sizes
from diffpipe.pipeline.memory.cards import CARDS
from diffpipe.pipeline.placement import Placement, Placer, whole
from diffpipe.pipeline.rehearsal import Rehearsal, Unit

Toys = Callable[[str], Path]
CARD = CARDS[-1]
CPU = torch.device("cpu")
UNITS = 6  # of the tiny Wan
BUCKET = (5, 64, 64)


def asked(toys: Toys, mesh: dict[str, Any], **more: Any) -> tuple[Config, DiffusionModel]:
    raw = {
        "run": {"steps": 1},
        "mesh": {"stages": 2, **mesh},
        "batch": {"accumulate": 8},
        "model": {"family": "wan", "path": str(toys("wan")), "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"folders": [{"path": "unused"}]},
        **more,
    }
    config = Config.model_validate(raw)
    return config, make_model(config.model, config.objective)


@pytest.fixture(scope="module")
def units(toys: Toys) -> list[Unit]:
    return whole(*asked(toys, {}), CARD).inventory(BUCKET)


Place = Callable[..., Placement]


@pytest.fixture
def place(toys: Toys, units: list[Unit]) -> Place:
    def run(mesh: dict[str, Any], limits: Any = None, measured: Any = None, **more: Any) -> Placement:
        return Placer(*asked(toys, mesh, **more), CARD, [BUCKET], limits, measured, units).place()

    return run


def test_a_stage_of_a_slow_device_gets_fewer_units(place: Place) -> None:
    fast, slow = {BUCKET: [(1.0, 2.0)] * UNITS}, {BUCKET: [(2.0, 4.0)] * UNITS}
    even = place({"split": "time", "schedule": "1f1b"}, measured=[fast, fast])
    uneven = place({"split": "time", "schedule": "1f1b"}, measured=[fast, slow])
    assert even.spans == ((0, 3), (3, 6)) and even.course.balance == 1
    assert uneven.spans == ((0, 4), (4, 6)) and uneven.course.balance == 1


def test_each_stage_fits_its_memory_as_it_is_rehearsed(toys: Toys, place: Place) -> None:
    mesh = {"schedule": "1f1b", "split": "time"}
    times = [{BUCKET: [(1.0, 2.0)] * UNITS}] * 2
    config, model = asked(toys, mesh)
    free = place(mesh, measured=times)
    exact = [peak_of(config, model, free, stage) for stage in range(2)]
    less = exact[1] - int(0.04 * (exact[1] - CARD.workspace))
    tight = place(mesh, limits=[2 * exact[0], less], measured=times)
    assert tight.spans[1][0] > free.spans[1][0]
    assert peak_of(config, model, tight, 1) <= less


def peak_of(config: Config, model: DiffusionModel, placement: Placement, stage: int) -> int:
    settled = config.model_copy(update={"mesh": placement.mesh})
    return Rehearsal(settled, model, stage, CARD).estimate(BUCKET, settled.memory).peak


def test_memory_fills_uneven_cards_alike(place: Place) -> None:
    placement = place({"split": "memory", "schedule": "1f1b"}, limits=[4 << 30, 1 << 30])
    assert placement.spans[0] == (0, 5)


def test_the_schedule_that_idles_least_is_taken_and_the_reason_told(place: Place) -> None:
    placement = place({})
    assert placement.mesh.schedule == "interleaved" and (placement.mesh.spans or 0) > 1
    assert len(placement.spans) == 2 * (placement.mesh.spans or 0)
    told = "\n".join(placement.lines())
    assert "mesh.schedule: interleaved" in told and "1f1b" in told and "bubble" in told and "balance" in told


def test_where_links_are_slow_stages_run_further_ahead(place: Place) -> None:
    def chosen(seconds: float, **more: Any) -> Placement:
        return place({"spans": 1}, measured=[{BUCKET: [(seconds, 2 * seconds)] * UNITS}] * 2, **more)

    assert chosen(1.0).mesh.schedule == "1f1b"
    short = chosen(1e-5)  # beside which a payload's way is long
    assert short.mesh.schedule == "eager-1f1b" and "mesh.schedule: eager-1f1b" in "\n".join(short.lines())
    assert chosen(1e-5, batch={"accumulate": 5}).mesh.schedule == "1f1b"  # makes no rounds of one size


@pytest.mark.parametrize(
    ("mesh", "more", "schedule"),
    [
        ({}, {"batch": {"accumulate": 5}}, "1f1b"),  # makes no rounds of one size
        ({}, {"memory": {"swap": 2}}, "1f1b"),
        ({"split": [2]}, {}, "1f1b"),
        ({"spans": 1}, {}, "1f1b"),
        ({"schedule": "gpipe"}, {}, "gpipe"),
        ({"spans": 1}, {"adapter": None, "memory": {"recompute": "none"}}, "zero-bubble"),
    ],
)
def test_no_schedule_is_taken_that_the_config_does_not_allow(place: Place, mesh: dict, more: dict, schedule: str) -> None:
    assert place(mesh, **more).mesh.schedule == schedule


def test_a_schedule_that_holds_too_much_is_not_taken(toys: Toys, units: list[Unit]) -> None:
    # So that what is in flight outweighs all else.
    heavy = [replace(unit, saved=1000 * (unit.saved + unit.fixed)) for unit in units]

    def chosen(mesh: dict[str, Any], limits: list[int] | None = None) -> Placement:
        return Placer(*asked(toys, {"split": "parameters", **mesh}), CARD, [BUCKET], limits, units=heavy).place()

    plain = chosen({"schedule": "1f1b"})
    assert chosen({}).mesh.schedule == "interleaved"
    assert chosen({}, [max(plain.held)] * 2).mesh.schedule == "1f1b"


def test_more_spans_than_units_are_an_error(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"mesh\.stages: 2 stages of 4 spans for 6 units"):
        place({"schedule": "interleaved", "spans": 4})


# -- measured times ------------------------------------------------------------------------------------------------------


def test_units_of_one_kind_are_measured_once_and_never_again_while_nothing_changes(toys: Toys, tmp_path: Path) -> None:
    config, model = asked(toys, {})
    rehearsal = whole(config, model, CARD)
    found = measure(rehearsal, [BUCKET], CPU, {})
    told = keys(rehearsal, BUCKET, CPU)
    assert len(told) == UNITS and set(told) == found.keys() and len(found) < UNITS
    assert all(ahead > 0 and back > 0 for ahead, back in found.values())
    write_times(tmp_path / "times.json", found)
    known = read_times(tmp_path / "times.json")
    assert known == found and measure(rehearsal, [BUCKET], CPU, known) == {}
    changed = whole(*asked(toys, {}, memory={"recompute": "none"}), CARD)
    assert measure(changed, [BUCKET], CPU, known).keys().isdisjoint(known)


def test_a_damaged_file_of_times_costs_a_measurement(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text('{"a": [1]')
    assert read_times(tmp_path / "times.json") == {}


def test_buckets_that_are_measured_are_few() -> None:
    buckets = [(1, 512, 512), (1, 640, 384), (1, 1024, 1024), (1, 1152, 896), (81, 512, 512)]
    assert sizes(buckets) == [(81, 512, 512), (1, 1024, 1024), (1, 512, 512)]
