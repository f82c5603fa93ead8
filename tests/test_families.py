"""Whole runs of every family: the same on two stages as on one, exact after a resume, and exported as diffusers reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpipe.checkpoint import list_checkpoints, read_weights
from diffpipe.config.schema import Config
from diffpipe.encode import prepare_data
from diffpipe.flow import Key
from diffpipe.models import MODELS, make_model
from diffpipe.models.adapters import attach, base_name, is_adapter, resolve_targets
from diffpipe.models.base import DiffusionModel
from diffpipe.train import train
from tests.conftest import ROOT, World
from tests.export.tiny import as_trained
from tests.families import frames_of, microbatch
from tests.runs_program import ADAPTERS, FEW_BITS, prepared

CASES = [pytest.param(family, kind, id=f"{family}-{kind}") for family in sorted(MODELS) for kind in ADAPTERS]


@pytest.fixture(scope="session")
def two_stages(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs over two stages."""
    folder = tmp_path_factory.mktemp("runs")
    world(2, ROOT / "tests/runs_program.py", folder, timeout=1200)
    return folder


def run_in(folder: Path) -> Path:
    (run,) = [p.parent for p in folder.glob("*/config.yaml")]
    return run


def losses(run: Path) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+/\d+ .*?loss (\S+)", (run / "log.txt").read_text(), re.M)]


@pytest.fixture(scope="session")
def one_process(two_stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Config, Path]]:
    """Gives the config and the run of a family in this process, on the same cache and toys."""
    done: dict[tuple[str, str], tuple[Config, Path]] = {}

    def run(family: str, kind: str) -> tuple[Config, Path]:
        if (family, kind) not in done:
            config = prepared(family, kind, two_stages, 1)
            config = config.model_copy(update={"output_dir": tmp_path_factory.mktemp(f"{family}-{kind}")})
            done[family, kind] = config, train(config, resume=None, make_sinks=list)
        return done[family, kind]

    return run


@pytest.mark.parametrize(("family", "kind"), [*CASES, *FEW_BITS])
def test_two_stages_train_as_one_process_does(two_stages: Path, one_process: Any, family: str, kind: str) -> None:
    _, one = one_process(family, kind)
    two = run_in(two_stages / f"{family}-{kind}")
    assert len(losses(one)) == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, got = (read_weights(list_checkpoints(run / "checkpoints")[-1]) for run in (one, two))
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=3e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_family_knows_the_shapes_of_what_it_caches(one_process: Any, family: str) -> None:
    config, _ = one_process(family, "lora")
    model = make_model(config.model, config.objective)
    samples, report = prepare_data(config, model, config.data.folders, device=torch.device("cpu"))
    assert report.encoded == 0
    for number, bucket in enumerate(samples.buckets):
        row, blank = samples.read(number, Key(0, 0, number, 0)), model.blank(bucket.frames, bucket.height, bucket.width)
        assert {n: (t.shape, t.dtype) for n, t in blank.items()} == {n: (t.shape, t.dtype) for n, t in row.items()}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_resumed_run_ends_with_the_unbroken_runs_weights_bit_for_bit(one_process: Any, tmp_path: Path, family: str, kind: str) -> None:
    config, whole = one_process(family, kind)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for later in list_checkpoints(broken / "checkpoints")[1:]:
        shutil.rmtree(later)
    train(config.model_copy(update={"output_dir": tmp_path}), resume=str(broken), make_sinks=list)
    expected, got = (read_weights(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, broken))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_run_over_two_stages_goes_on_in_one_process(two_stages: Path, tmp_path: Path, family: str) -> None:
    two = tmp_path / "two"
    shutil.copytree(run_in(two_stages / f"{family}-lora"), two)
    config = prepared(family, "lora", two_stages, 1)
    config = config.model_copy(update={"output_dir": tmp_path, "run": config.run.model_copy(update={"steps": 3})})
    train(config, resume=str(two), make_sinks=list)
    assert "mesh.stages was 2, now 1" in (two / "log.txt").read_text()
    assert [p.name for p in list_checkpoints(two / "checkpoints")][-1] == "step-00000003"


def trained_module(config: Config, run: Path) -> tuple[DiffusionModel, nn.Module]:
    """The denoiser with the weights that a run ended with."""
    model = make_model(config.model, config.objective)
    module = model.load_denoiser()
    if config.adapter is not None:
        attach(module, resolve_targets(model, module, config.adapter), config.adapter, torch.float32)
    source, trained = model.weights(), read_weights(list_checkpoints(run / "checkpoints")[-1])
    held = {n: trained[n] if n in trained else source.read(base_name(n)) for n in module.state_dict() if n in trained or not is_adapter(n)}
    module.load_state_dict(held, assign=True)
    return model, module.eval()


@torch.no_grad()
def output(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return module(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_an_exported_lora_gives_the_trained_models_output_in_diffusers(two_stages: Path, family: str, form: str) -> None:
    config = prepared(family, "lora", two_stages, 1)
    run = run_in(two_stages / f"{family}-lora")
    model, module = trained_module(config, run)
    inputs, _ = microbatch(model, frames=frames_of(model))
    wanted = output(module, inputs)
    fresh: Any = as_trained(getattr(diffusers, model.denoiser).from_pretrained(model.blueprint[model.component].folder), model)
    before = output(fresh, inputs)
    file = run / "exports/step-00000002" / f"{family}-lora-{form}.safetensors"
    if form == "kohya":
        # What diffusers makes of foreign names differs by family; here diffpipe's own reader turns them back.
        from diffpipe.models.adapter_files import name_adapter, read_adapter

        tensors = name_adapter(read_adapter(file, model), model, "diffusers")
    else:
        tensors = load_file(file)
    getattr(fresh, model.component, fresh).load_lora_adapter(tensors, prefix=model.component)
    got = output(fresh, inputs)
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert (got - before).norm() / before.norm() > 1e-4


@pytest.mark.parametrize("family", sorted(MODELS))
def test_exported_whole_weights_load_in_diffusers_with_the_trained_output(two_stages: Path, family: str) -> None:
    config = prepared(family, "full", two_stages, 1)
    run = run_in(two_stages / f"{family}-full")
    model, module = trained_module(config, run)
    inputs, _ = microbatch(model, frames=frames_of(model))
    folder = run / "exports/step-00000002"
    loaded = as_trained(getattr(diffusers, model.denoiser).from_pretrained(folder / model.component), model)
    got, wanted = output(loaded, inputs), output(module, inputs)
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    again = make_model(
        config.model.model_copy(update={"files": {model.component: folder / f"{family}-comfyui.safetensors"}}), config.objective
    )
    source = again.weights()
    assert all(torch.equal(source.read(n, torch.float32), t) for n, t in module.state_dict().items())
