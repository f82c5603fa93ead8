"""Runs survive: signals, kills, damaged checkpoints, other meshes and samples that give no finite loss."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from diffpipe.checkpoint import STATE, list_checkpoints
from diffpipe.config.schema import Config
from diffpipe.errors import DiffpipeError
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.run import CONFIG, LAUNCH, dump, launched_as, open_run
from tests.conftest import ROOT, Command, World
from tests.survival import Running, arguments, run_in, same_weights, started_alone

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unbroken(command: Command, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps with checkpoints at 2, 4 and 6."""
    output = tmp_path_factory.mktemp("unbroken")
    command(*arguments(output, cache))
    return run_in(output)


@pytest.fixture
def broken(unbroken: Path, tmp_path: Path) -> Path:
    """The same run, had it ended at step 4."""
    copied = tmp_path / "runs" / unbroken.name
    shutil.copytree(unbroken, copied)
    shutil.rmtree(list_checkpoints(copied / "checkpoints")[-1])
    return copied


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+/\d+ .*?loss (\S+)", text, re.M)]


@posix
def test_a_signal_ends_the_run_behind_its_step_with_a_checkpoint_and_code_75(cache: Path, tmp_path: Path) -> None:
    running = Running(arguments(tmp_path, cache, **{"run.steps": 2000, "checkpoint.every_steps": "null", "data.workers": 1}))
    running.until("^step 3/")
    for each in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):  # of a connection; of schedulers, ahead of time and when it is up
        for process in (*running.children(), running.process):
            process.send_signal(each)
    assert running.end() == 75
    run = run_in(tmp_path)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    step = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= step < 2000
    assert "stops behind this step, with a checkpoint" in running.output
    assert f"stopped behind step {step}; --resume {run} goes on" in running.output


@posix
def test_a_second_ctrl_c_ends_a_rank_that_waits_for_another_at_once(cache: Path, tmp_path: Path) -> None:
    first, last = started_alone(lambda rank: arguments(tmp_path, cache, **{"mesh.stages": 2, "run.steps": 2000}))
    try:
        last.until("^step 3/")
        first.process.send_signal(signal.SIGSTOP)
        last.process.send_signal(signal.SIGINT)
        last.until("SIGINT: stops behind this step")
        time.sleep(1.2)
        last.process.send_signal(signal.SIGINT)
        assert last.end() == 130
    finally:
        first.process.kill()


@posix
def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on_by_itself(cache: Path, tmp_path: Path) -> None:
    more = {"mesh.stages": 2, "run.steps": 16}
    running = Running(arguments(tmp_path, cache, **more), ["--standalone", "--nproc_per_node=2", "--max-restarts=1"])
    running.until("^checkpoint .*step-00000002")
    running.children()[0].kill()
    assert running.end() == 0, running.output[-3000:]
    assert re.search(r"^resumed from step-000000\d+", running.output, re.M)
    assert "step 16/16" in running.output
    assert run_in(tmp_path)  # one folder, of one run


@posix
def test_ranks_end_with_a_torchrun_that_is_killed_before_they_have_met(cache: Path, tmp_path: Path) -> None:
    running = Running(arguments(tmp_path, cache, **{"mesh.stages": 2}), ["--standalone", "--nproc_per_node=2"])
    while len(ranks := running.children()) < 2 or min(sum(rank.cpu_times()[:2]) for rank in ranks) < 1:  # amid what they import
        time.sleep(0.1)
    running.process.kill()
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert running.end() and "torchrun, which started this process, is gone: it ends" in running.output


def test_only_what_torchrun_starts_again_goes_on_by_itself(
    command: Command, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(restarts: int, steps: int) -> str:
        for name, value in {"RUN_ID": "none", "RESTART_COUNT": str(restarts)}.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
        monkeypatch.setenv("MASTER_PORT", "29500")  # which the next launch may have too
        return command(*arguments(tmp_path, cache, **{"run.steps": steps})).stdout

    assert "resumed" not in launched(0, 2)
    assert "resumed from step-00000002" in launched(1, 4)
    assert "resumed" not in launched(0, 2)
    assert len(list(tmp_path.glob("*/config.yaml"))) == 2
    assert len(list(tmp_path.glob("*/launch.txt"))) == 1, "the name belongs to the newer launch"


def test_launches_that_have_one_port_after_another_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(reports: str, restarts: int) -> str:
        told = {"RUN_ID": "none", "RESTART_COUNT": str(restarts), "ERROR_FILE": f"/tmp/{reports}/attempt_{restarts}/0/error.json"}
        for key, value in told.items():
            monkeypatch.setenv(f"TORCHELASTIC_{key}", value)
        monkeypatch.setenv("MASTER_PORT", "29500")
        launch = launched_as()
        assert launch is not None and launch.again == (restarts > 0)
        return launch.name

    first = name("none_a", 0)
    assert name("none_a", 1) == first
    assert name("none_b", 1) != first, "whose processes ended before they had a run must not go on with another"


@posix
def test_a_run_goes_on_when_an_agent_that_starts_for_the_first_time_takes_anothers_place(cache: Path, broken: Path) -> None:
    (broken / LAUNCH).write_text("job")
    ranks = started_alone(
        lambda rank: arguments(broken.parent, cache, **{"mesh.stages": 2}),
        # The rank that speaks for the run, the last stage, is new; each start has a store of its own.
        lambda rank: {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": str(1 - rank), "TORCHELASTIC_USE_AGENT_STORE": "False"},
    )
    assert [rank.end() for rank in ranks] == [0, 0], ranks[1].output[-3000:]
    assert "resumed from step-00000004" in ranks[1].output


@posix
def test_runs_killed_at_random_end_with_the_bits_of_the_unbroken_run() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", "--kills", "3", "--seed", "1", "--ranks", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 kills over" in done.stdout and "every resume succeeded, every end was bit-equal" in done.stdout


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(command: Command, unbroken: Path, cache: Path, broken: Path) -> None:
    newest = list_checkpoints(broken / "checkpoints")[-1]
    (file,) = newest.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    done = command(*arguments(broken.parent, cache), "--resume", broken)
    assert "step-00000004 is damaged (rank-00000.safetensors has other bytes than were written)" in done.stdout
    assert "kept as damaged-step-00000004" in done.stdout and "resumed from step-00000002" in done.stdout
    assert same_weights(unbroken, broken)


def test_a_run_whose_folder_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"run": {"steps": 1}, "model": {"family": "flux", "path": "x"}, "data": {"folders": [{"path": "x"}]}})
    checkpoint = tmp_path / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE).write_text(json.dumps({"step": 1, "files": {}, "data": {"group": 1}, "versions": {}}))
    (tmp_path / CONFIG).write_bytes(dump(config))
    with open_mesh(config.mesh) as mesh:
        assert open_run(config, str(tmp_path), mesh).resumed == checkpoint

        def full(path: Path, content: bytes) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("diffpipe.run.write_durably", full)
        with pytest.raises(DiffpipeError, match=r"the run cannot go on in its folder: Read-only file system"):
            open_run(config, str(tmp_path), mesh)


def test_a_run_goes_on_over_replicas_with_the_same_samples_and_losses(
    command: Command, world: World, unbroken: Path, cache: Path, broken: Path
) -> None:
    shutil.rmtree(list_checkpoints(broken / "checkpoints")[-1])
    settings = {"mesh.replicate": 2, "batch.accumulate": 1, "run.steps": 4, "adapter.dropout": 0.0}
    done = world(2, "-m", "diffpipe", *arguments(broken.parent, cache, **settings), "--resume", broken)
    assert "changed since the run began: mesh.replicate was 1, now 2" in done.stdout
    alone = command(*arguments(broken.parent / "alone", cache, **{"run.steps": 4, "adapter.dropout": 0.0}))
    shared, whole = losses(done.stdout), losses(alone.stdout)
    assert len(shared) == 2
    # The first two steps had dropout, which moves no sample.
    assert shared == pytest.approx(whole[2:], rel=2e-2)
    back = command(*arguments(broken.parent, cache), "--resume", broken)
    assert "mesh.replicate was 2, now 1" in back.stdout and "step 6/6" in back.stdout


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch.accumulate": 3}, "fix: set batch.accumulate to 2; or set batch.may_change to true"),
        ({"batch.micro": 4}, "fix: take a batch.micro, mesh.replicate and mesh.shard whose product divides 2"),
    ],
)
def test_other_samples_per_step_are_refused_unless_they_may_change(
    command: Command, cache: Path, broken: Path, settings: dict[str, int], told: str
) -> None:
    done = command(*arguments(broken.parent, cache, **settings), "--resume", broken, check=False)
    assert done.exit_code == 1
    assert "step-00000004 was saved with 2" in done.stderr and told in done.stderr
    on = command(*arguments(broken.parent, cache, **settings, **{"batch.may_change": "true"}), "--resume", broken)
    assert "step 6/6" in on.stdout


def test_no_kill_in_the_middle_of_removing_old_checkpoints_leaves_one_that_looks_whole(command: Command, cache: Path, broken: Path) -> None:
    one, two = list_checkpoints(broken / "checkpoints")
    (one / "state.json").unlink()  # as a removal begins
    (broken / "checkpoints" / ".unfinished-step-00000006").mkdir()  # as a writing begins
    command(*arguments(broken.parent, cache, **{"checkpoint.keep": 1}), "--resume", broken)
    assert [p.name for p in (broken / "checkpoints").iterdir()] == ["step-00000006"]
    assert not two.exists()


def blank(folder: Path, number: int) -> None:
    """Overwrite a cached latent with NaN, as a failing disk or encoder may."""
    shard = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = sorted(n for n, about in header.items() if n.endswith("latents") and about["dtype"] == "F32")
    begin, end = header[names[number]]["data_offsets"]
    content[8 + size + begin : 8 + size + end] = np.full((end - begin) // 4, np.nan, np.float32).tobytes()
    shard.write_bytes(content)


def test_steps_that_are_not_finite_are_skipped_and_their_files_named_or_end_the_run(
    command: Command, unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    broken_cache = tmp_path / "cache"
    shutil.copytree(cache, broken_cache)
    for number in range(3):
        blank(broken_cache, number)
    more = {"run.steps": "null", "run.epochs": 1, "optimizer.nan_limit": 20}
    done = command(*arguments(tmp_path / "skips", broken_cache, **more, **{"optimizer.on_nan": "skip"}))
    skipped = re.findall(r"the loss and with it the gradient of step \d+ is not finite \(bucket \S+; ([^)]+)\): skipped", done.stdout)
    files = [Path(file) for step in skipped for file in step.split(", ")]
    assert len(files) == 3 and all(file.is_file() for file in files)
    assert np.isnan(losses(done.stdout)).sum() == len(skipped)
    ended = command(*arguments(tmp_path / "stops", broken_cache, **more), check=False)
    assert ended.exit_code == 1
    assert "optimizer.on_nan: the loss and with it the gradient" in ended.stderr and files[0].name in ended.stderr
    row = command(
        *arguments(tmp_path / "row", broken_cache, **{"optimizer.on_nan": "skip", "optimizer.nan_limit": 3, "optimizer.lr": 1e30}),
        check=False,
    )
    assert row.exit_code == 1 and "3 in a row" in row.stderr and ".mp4" in row.stderr


@posix
def test_ranks_with_different_configs_all_end_with_what_differs(cache: Path, tmp_path: Path) -> None:
    for rank in started_alone(lambda rank: arguments(tmp_path, cache, **{"mesh.stages": 2, "optimizer.lr": 1e-3 + rank})):
        assert rank.end() == 1
        assert "rank 1: optimizer.lr is 1.001, not 0.001" in rank.output and "Traceback" not in rank.output
