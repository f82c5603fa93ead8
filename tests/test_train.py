"""Whole runs through the command line, in one and several real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpipe.checkpoint import list_checkpoints, read_weights
from diffpipe.cli.console import fill_bare_resume
from tests.conftest import ROOT, Command, World

PROGRAM = ["-m", "diffpipe"]
SMALL = {
    "run.steps": 4,
    "batch.micro": 1,
    "batch.accumulate": 2,
    "data.resolutions": "[64]",
    "data.workers": 0,
    "data.encode_workers": 0,
    "eval.quantiles": "[0.5]",
    "checkpoint.every_steps": 2,
    "schedule.warmup": 0,
    "metrics.every_steps": 1,
}


def arguments(output: Path, **more: object) -> list[str]:
    settings = {**SMALL, "output_dir": output, "data.cache_dir": output.parent / "cache", **more}
    return ["train", str(ROOT / "configs/quickstart.yaml"), *(f"--set={k}={v}" for k, v in settings.items())]


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+/\d+ .*?loss (\S+)", output, re.M)]


def test_replicas_share_a_step_that_one_process_takes_alone(world: World, command: Command, tmp_path: Path) -> None:
    alone = command(*arguments(tmp_path / "one", **{"mesh.stages": 1, "batch.accumulate": 4}))
    more = {"mesh.stages": 2, "mesh.replicate": 2, "batch.accumulate": 2}
    shared = world(4, *PROGRAM, *arguments(tmp_path / "four", **more))
    assert losses(shared.stdout) == pytest.approx(losses(alone.stdout), rel=1e-4)


def test_a_run_goes_on_in_another_schedule_and_cut_as_one_process_does(world: World, command: Command, tmp_path: Path) -> None:
    more = {"run.steps": 4, "batch.accumulate": 4, "schedule.kind": "constant", "export.formats": "[diffusers]", "eval.sets": "[]"}
    alone = command(*arguments(tmp_path / "one", **{**more, "mesh.stages": 1}))
    stages = {**more, "mesh.stages": 2, "mesh.split": "time"}
    begun = world(2, *PROGRAM, *arguments(tmp_path / "two", **{**stages, "mesh.schedule": "interleaved", "run.steps": 2}))
    (run,) = [p.parent for p in (tmp_path / "two").glob("*/config.yaml")]
    kept = read_weights(list_checkpoints(run / "checkpoints")[-1])
    exported = load_file(next((run / "exports").glob("*/transformer/*.safetensors")))
    assert exported.keys() == kept.keys() and all(torch.equal(t, kept[name]) for name, t in exported.items())
    ended = world(2, *PROGRAM, *arguments(tmp_path / "two", **{**stages, "mesh.schedule": "1f1b"}), "--resume", run.name)
    assert losses(begun.stdout) + losses(ended.stdout) == pytest.approx(losses(alone.stdout), rel=1e-4)
    assert "mesh.schedule was 'interleaved', now '1f1b'" in ended.stdout
    measured = [re.search(r"measured (\d+) kinds of units, (\d+) were known", done.stdout) for done in (begun, ended)]
    assert [found and found.groups() for found in measured] == [("2", "0"), ("0", "2")], "two kinds of blocks"
    assert begun.stdout.count("predicted: bubble") == 1


def test_a_run_with_loader_workers_ends_when_it_is_through(world: World, tmp_path: Path) -> None:
    # They ignore the signal that an interpreter which ends sends its workers before it waits for them.
    settings = {"mesh.stages": 2, "run.steps": 2, "data.workers": 1, "data.encode_workers": 1, "eval.sets": "[]"}
    done = world(2, *PROGRAM, *arguments(tmp_path / "run", **settings), timeout=200)
    assert len(losses(done.stdout)) == 2


def test_a_run_folder_holds_what_the_docs_promise(command: Command, tmp_path: Path) -> None:
    command(*arguments(tmp_path / "run", **{"mesh.stages": 1, "run.steps": 2, "checkpoint.keep": 1, "checkpoint.every_steps": 1}))
    (run,) = [p.parent for p in (tmp_path / "run").glob("*/config.yaml")]
    assert {p.name for p in run.iterdir()} == {"config.yaml", "checkpoints", "exports", "tensorboard", "log.txt"}
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step-00000002"]
    assert "eval/held-out/loss" in (run / "log.txt").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    wanted = {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "eval/held-out/loss",
        "time/data",
        "time/compute",
        "time/communication",
        "time/stall",
        "time/bubble",
        "train/loss_smoothed",
        "memory/host",
    }
    assert wanted <= set(events.Tags()["scalars"])
    phases = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("startup/")}
    assert {"startup/imports", "startup/encode", "startup/weights", "startup/evaluation", "startup/first_step"} <= phases.keys()
    (told,) = re.findall(r"first step was over after (\S+) s \(.*first step", (run / "log.txt").read_text())
    assert sum(phases.values()) == pytest.approx(float(told), abs=0.01) and min(phases.values()) >= 0
    (bins,) = events.Histograms("train/loss_by_t")
    assert bins.step == 2 and bins.histogram_value.bucket_limit[:3] == pytest.approx([0.1, 0.2, 0.3])
    given = b"".join(events.SummaryMetadata(tag).plugin_data.content for tag in events.summary_metadata if tag.startswith("_hparams_"))
    assert b"model.family" in given and b"output_dir" not in given
    headings = {tag: events.SummaryMetadata(tag).display_name for tag in ("time/left", "memory/host", "startup/encode", "train/loss")}
    assert list(headings.values()) == ["time/left, seconds", "memory/host, GiB", "startup/encode, seconds", ""]
    assert [events.Scalars("train/epoch")[0].value, b"true" in given] == [1, True]
    (text,) = events.Tensors("config/text_summary")
    assert b"\n    eval.quantiles: [0.5]\n" in text.tensor_proto.string_val[0]


def test_the_newest_run_goes_on_when_resume_names_none(command: Command, tmp_path: Path) -> None:
    begun = command(*arguments(tmp_path / "run", **{"mesh.stages": 1, "run.steps": 2, "eval.at_start": "false"}))
    assert "step 0 eval" not in begun.stdout and "step 2 eval" in begun.stdout
    asked = fill_bare_resume([*arguments(tmp_path / "run", **{"mesh.stages": 1, "run.steps": 4}), "--resume"])
    resumed = command(*asked)
    assert "changed since the run began: run.steps was 2, now 4" in resumed.stdout
    assert "step 4/4" in resumed.stdout
    again = command(*asked)
    assert "nothing is left to train behind step 4: raise run.steps or run.epochs" in again.stdout
    other = command(*arguments(tmp_path / "run", **{"mesh.stages": 1, "model.family": "chroma"}), "--resume", "", check=False)
    assert other.exit_code == 1 and "trains flux, but the config chroma" in other.stderr


def test_a_run_goes_on_without_the_file_that_its_adapter_began_with(command: Command, tmp_path: Path) -> None:
    lora = {"mesh.stages": 1, "run.steps": 1, "adapter": "{rank: 2}", "eval.sets": "[]"}
    command(*arguments(tmp_path / "first", **lora))
    file = next((tmp_path / "first").glob("*/exports/*/*.safetensors"))
    more = {**lora, "adapter": f"{{rank: 2, init: {file}}}"}
    command(*arguments(tmp_path / "second", **more))
    file.unlink()
    assert "step 2/2" in command(*arguments(tmp_path / "second", **{**more, "run.steps": 2}), "--resume", "").stdout


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mesh.stages": 2}, "torchrun --nproc_per_node=2"),
        ({"mesh.shard": 2}, "torchrun --nproc_per_node=2"),
        ({"model.family": "wan"}, "expected: transformer/config.json of a WanTransformer3DModel"),
        ({"model.path": "null"}, "nothing says where transformer (FluxTransformer2DModel) lies"),
        ({"model.path": "nowhere"}, "model.path: nowhere: no such folder"),
        ({"optimiser.lr": 1}, "did you mean optimizer?"),
        ({"model.family": "fluks"}, "model.family"),
        ({"optimizer.kind": "adamv", "data.folders": "[{path: nowhere}]"}, "optimizer.kind: there is no optimizer 'adamv'"),
        ({"data.folders": "[{path: nowhere}]"}, "nowhere"),
        ({"adapter.init": "none.pt", "data.folders": "[{path: nowhere}]"}, "adapter.init: none.pt: no such file"),
    ],
)
def test_a_mistake_ends_with_exit_code_1_and_a_message_without_a_traceback(
    command: Command, tmp_path: Path, settings: dict, told: str
) -> None:
    done = command(*arguments(tmp_path / "run", **{"mesh.stages": 1, **settings}), check=False)
    assert done.exit_code == 1
    assert told in done.stderr and "Traceback" not in done.stderr
    assert told not in done.stdout, "it is said once"


@pytest.mark.parametrize(
    ("launcher", "settings", "told"),
    [
        ("torchrun", {"mesh.stages": 1}, "expected: 1 process"),
        ("world", {"mesh.stages": 2, "mesh.schedule": "interleaved", "mesh.spans": 9}, "2 stages of 9 spans for 8 units"),
    ],
)
def test_every_process_of_a_launch_ends_with_the_mistake(
    request: pytest.FixtureRequest, tmp_path: Path, launcher: str, settings: dict[str, object], told: str
) -> None:
    launch: World = request.getfixturevalue(launcher)
    done = launch(2, *PROGRAM, *arguments(tmp_path / "run", **settings), check=False)
    assert done.returncode == 1
    assert told in done.stderr
    # torchrun adds a report of its own after the message.
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
