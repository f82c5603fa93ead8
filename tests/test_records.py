"""What a run says of its steps is true: times add up to the step, the losses of samples to that of the step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from diffpipe.meter import Measured, split
from diffpipe.metrics import RankRecord, Smoothed, Split, StepRecord, TextSink, by_tenth
from diffpipe.trackers import scalars
from tests.conftest import ROOT, World

SMALL = (
    *("run.steps=2", "data.resolutions=[64]", "data.workers=0", "data.encode_workers=0"),
    *("eval.sets=[]", "batch.micro=2", "batch.accumulate=2"),
)
Records = list[dict[str, Any]]
PARTS = ("data", "compute", "stall", "bubble", "communication")


def records(world: World, folder: Path, processes: int, *more: str) -> Records:
    world(processes, ROOT / "tests/records_program.py", folder, *SMALL, *more)
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def stages(world: World, home: Path) -> Records:
    return records(world, home / "stages", 2, "mesh.stages=2", "batch.accumulate=4")


@pytest.fixture(scope="module")
def replicas(world: World, home: Path) -> Records:
    return records(world, home / "replicas", 2, "mesh.stages=1", "mesh.replicate=2")


@pytest.fixture(scope="module")
def one(world: World, home: Path) -> Records:
    """In one process, whose weights stream."""
    streamed = ("memory.swap=all", "optimizer.clip=null", "schedule.warmup=0", "optimizer.lr=1e-9")
    return records(world, home / "one", 1, "mesh.stages=1", "batch.accumulate=4", *streamed)


@pytest.fixture(scope="module")
def both(world: World, home: Path) -> Records:
    return records(world, home / "both", 4, "mesh.stages=2", "mesh.replicate=2", "batch.micro=1")


def test_in_a_step_ranks_tell_each_other_twice_and_average_gradients_once(
    one: Records, stages: Records, replicas: Records, both: Records
) -> None:
    # The first tells of the start too. Each more would be a round trip in which all devices of a large mesh are idle.
    told, averaged = ["allgather_", "allgather_"], ["allreduce_"]
    for run, expected in ((one, []), (stages, told), (replicas, averaged + told), (both, averaged + told)):
        assert [record["collectives"] for record in run[1:]] == [expected]


def test_the_parts_of_every_ranks_time_are_the_step(one: Records, stages: Records, replicas: Records) -> None:
    for record in (*one, *stages, *replicas):
        for rank in record["ranks"]:
            assert sum(rank["split"].values()) == pytest.approx(record["step_time"], rel=1e-6)
            assert all(rank["split"][part] >= 0 for part in PARTS)
            assert rank["split"]["compute"] > 0
    assert [(r["stage"], r["replica"]) for r in stages[0]["ranks"]] == [(0, 0), (1, 0)]
    assert [(r["stage"], r["replica"]) for r in replicas[0]["ranks"]] == [(0, 0), (0, 1)]


def test_stages_wait_for_each_other_and_replicas_do_not(stages: Records, replicas: Records) -> None:
    assert all(rank["split"]["bubble"] > 0 for record in stages for rank in record["ranks"])
    assert all(rank["split"]["bubble"] == 0 for record in replicas for rank in record["ranks"])


def test_streamed_weights_stall_where_they_are_copied_and_only_there(one: Records, stages: Records, replicas: Records) -> None:
    assert all(record["ranks"][0]["split"]["stall"] > 0 and record["ranks"][0]["split"]["bubble"] == 0 for record in one)
    assert all(rank["split"]["stall"] == 0 for record in stages for rank in record["ranks"])


def test_the_losses_of_all_replicas_samples_average_to_the_steps_and_each_has_its_own_t(
    one: Records, stages: Records, replicas: Records
) -> None:
    for record in (*one, *stages, *replicas):
        losses = [loss for _, loss in record["by_time"]]
        assert len(losses) == record["samples"] == 8
        assert sum(losses) / len(losses) == pytest.approx(record["loss"], rel=1e-5)
        assert all(0 <= t <= 1 for t, _ in record["by_time"]) and len({t for t, _ in record["by_time"]}) == 8
    # The first step's samples are the same on any mesh, and so are their noise and the weights.
    for other in (stages, replicas):
        for (t, loss), (other_t, other_loss) in zip(sorted(one[0]["by_time"]), sorted(other[0]["by_time"]), strict=True):
            assert (t, loss) == pytest.approx((other_t, other_loss), rel=1e-4)


def test_a_stage_is_idle_until_the_slowest_of_its_replica_is_through() -> None:
    def measured(stage: int, replica: int, **known: float) -> Measured:
        given = dict.fromkeys(Measured._fields, 0.0) | {"stage": stage, "replica": replica} | known
        return Measured(**given)

    ranks = split(
        [
            measured(0, 0, data=1.0, passes=5.0, busy=4.0, stall=1.0, optimizer=0.5),
            measured(1, 0, data=0.5, passes=4.0, busy=2.0),
            measured(1, 1, data=0.0, passes=3.0, busy=3.0),
        ],
        took=8.0,
    )
    first, second, other = (rank.split for rank in ranks)
    assert (first.data, first.compute, first.stall, first.bubble, first.communication) == (1.0, 3.5, 1.0, 1.0, 1.5)
    assert (second.compute, second.bubble, second.communication) == (2.0, 3.5, 2.0)
    assert (other.bubble, other.communication) == (0.0, 5.0), "a replica does not wait for another's stages"


def test_balance_is_the_mean_stages_work_as_a_part_of_the_largest() -> None:
    def rank(stage: int, compute: float) -> RankRecord:
        return RankRecord(stage, 0, Split(0.0, compute, 0.0, 0.0, 0.0), 0, 0)

    def record(*ranks: RankRecord) -> StepRecord:
        return StepRecord(1, 1, 0, False, 1.0, 1.0, "1x64x64", 1e-4, 1.0, 1, 4.0, 0.0, (), ranks)

    assert scalars(record(rank(0, 3.0), rank(1, 1.0)))["time/balance"] == pytest.approx(2 / 3)
    assert "time/balance" not in scalars(record(rank(0, 3.0)))


def test_a_smoothed_value_follows_without_leaning_on_the_first() -> None:
    smoothed = Smoothed(10)
    assert smoothed.of(3.0) == 3.0
    assert smoothed.of(1.0) == pytest.approx((0.9 * 3 + 1) / 1.9)
    assert smoothed.of(math.nan) == smoothed.of(math.inf) == pytest.approx((0.9 * 3 + 1) / 1.9), "of steps that were skipped"
    assert [smoothed.of(2.0) for _ in range(200)][-1] == pytest.approx(2.0)


def test_every_t_belongs_to_one_tenth() -> None:
    assert by_tenth([(0.0, 1.0), (0.05, 2.0), (0.1, 3.0), (0.999, 4.0), (1.0, 5.0)]) == {0: [1.0, 2.0], 1: [3.0], 9: [4.0, 5.0]}


def test_the_log_goes_on_behind_the_name_of_a_file_that_is_no_text(tmp_path: Path) -> None:
    log = TextSink.to_file(tmp_path / "log.txt")
    for line in ("bad\udcff.png has no caption", "ü"):
        log.note(line)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "bad\\udcff.png has no caption\nü\n"
