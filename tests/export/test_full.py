"""Whole weights load in diffusers, as a folder and as a single file under the original names."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpipe.checkpoint import Checkpoints
from diffpipe.config.schema import AdapterConfig, CheckpointConfig, Config, MeshConfig
from diffpipe.errors import CheckpointError, DiffpipeError
from diffpipe.export.files import cast, write_safetensors
from diffpipe.export.run import export_tensors, export_weights, write_component
from diffpipe.models.weights import open_files, open_folder
from diffpipe.optim import make_optimizer
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.pipeline.stage import sum_errors
from diffpipe.run import CONFIG, dump
from diffpipe.takeaway import export_run
from tests.conftest import World
from tests.export.tiny import MakeConfig, aligned, as_trained, model_of, output_of, trained
from tests.families import microbatch


def export(config: Config, tensors: dict[str, Tensor], folder: Path, *formats: str) -> list[Path]:
    files = [write_safetensors(folder / f"stage-{i}.safetensors", dict(list(tensors.items())[i::2]), {}) for i in range(2)]
    return export_tensors(config, model_of(config), open_files(files), folder / "out", formats)


def test_a_folder_loads_with_from_pretrained_and_gives_the_trained_output(make_config: MakeConfig, family: str, tmp_path: Path) -> None:
    config = make_config(family)
    module = trained(config)
    (path,) = export(config, module.state_dict(), tmp_path, "diffusers")
    model = model_of(config)
    loaded = getattr(diffusers, model.denoiser).from_pretrained(path).eval()
    whole = model.components(module.state_dict())[model.component]
    assert all(torch.equal(t, whole[n]) for n, t in loaded.state_dict().items())
    assert torch.equal(output_of(as_trained(loaded, model), model), output_of(module, model))


def test_a_folder_in_several_files_loads_with_from_pretrained(make_config: MakeConfig, family: str, tmp_path: Path) -> None:
    config = make_config(family)
    model = model_of(config)
    whole = model.components(trained(config).state_dict())[model.component]
    size = sum(t.nbytes for t in whole.values())
    path = write_component(tmp_path, model.component, whole, model, {}, limit=size // 3)
    assert len(list(path.glob("*-of-*.safetensors"))) > 2
    loaded = getattr(diffusers, model.denoiser).from_pretrained(path).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in whole.items())
    assert open_folder(path).names() == set(whole)


def test_a_later_folder_replaces_an_earlier_one_of_more_files(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("wan")
    whole = trained(config).state_dict()
    for limit in (100_000, 1 << 30):
        path = write_component(tmp_path, "transformer", whole, model_of(config), {}, limit=limit)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["transformer"]


def test_weights_that_were_not_trained_come_from_the_base(make_config: MakeConfig, family: str, tmp_path: Path) -> None:
    config = make_config(family)
    whole = trained(config).state_dict()
    some = dict(list(whole.items())[:5])
    (path,) = export(config, some, tmp_path, "diffusers")
    model = model_of(config)
    base, written = model.weights(), open_folder(path)
    expected = model.components({name: some[name] if name in some else base.read(name) for name in whole})[model.component]
    assert written.names() == set(expected)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in expected.items())


def test_weights_that_diffusers_keeps_in_float32_are_not_rounded(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("wan", export={"dtype": "bfloat16"})
    module = trained(config)
    folder, single = export(config, module.state_dict(), tmp_path, "diffusers", "comfyui")
    loaded = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    kept = {n for n, t in loaded.items() if t.dtype == torch.float32}
    assert "scale_shift_table" in kept
    assert "blocks.0.attn1.to_q.weight" not in kept
    whole = module.state_dict()
    assert all(torch.equal(t, whole[n] if n in kept else whole[n].to(torch.bfloat16)) for n, t in loaded.items())
    assert torch.equal(load_file(single)["head.modulation"], whole["scale_shift_table"])


def test_diffusers_loads_a_wan_single_file(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("wan")
    module = trained(config)
    (path,) = export(config, module.state_dict(), tmp_path, "comfyui")
    loaded = WanTransformer3DModel.from_single_file(str(path), config=config.model.path, subfolder="transformer").eval()
    assert torch.equal(output_of(aligned(loaded), model_of(config)), output_of(module, model_of(config)))


def test_diffpipe_trains_on_from_its_own_single_file(make_config: MakeConfig, family: str, tmp_path: Path) -> None:
    config = make_config(family)
    whole = trained(config).state_dict()
    (path,) = export(config, whole, tmp_path, "comfyui")
    again = config.model_copy(update={"model": config.model.model_copy(update={"files": {model_of(config).component: path}})})
    weights = model_of(again).weights()
    assert all(torch.equal(weights.read(n), t) for n, t in whole.items())


def test_diffpipe_trains_on_from_an_original_release_in_several_files(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("wan")
    whole = trained(config).state_dict()
    (path,) = export(config, whole, tmp_path, "comfyui")
    release = tmp_path / "Wan2.1"
    release.mkdir()
    (release / "config.json").write_text('{"_class_name": "WanModel"}')
    original = sorted(load_file(path).items())
    files = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": dict(original[i::2]) for i in range(2)}
    for name, tensors in files.items():
        save_file(tensors, release / name)
    index = {"weight_map": {n: name for name, tensors in files.items() for n in tensors}}
    (release / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    again = config.model_copy(update={"model": config.model.model_copy(update={"files": {"transformer": release}})})
    weights = model_of(again).weights()
    assert all(torch.equal(weights.read(n), t) for n, t in whole.items())
    (release / next(iter(files))).unlink()
    with pytest.raises(CheckpointError, match="lacks diffusion_pytorch_model-00001"):
        model_of(again).weights()


def test_a_file_is_what_safetensors_itself_would_hold(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "wide": torch.randn(2, 3),
        "number": torch.tensor(4.0),
        "none": torch.zeros(0, 2),
        "flag": torch.tensor([True]),
    }
    write_safetensors(tmp_path / "ours.safetensors", tensors, {"a": "b"})
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_a_full_disk_is_told_and_leaves_the_earlier_file(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    config = make_config("wan")
    whole = trained(config).state_dict()
    export(config, whole, tmp_path, kind)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    files = open_files(sorted(tmp_path.glob("stage-*")))
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses to write on, as on a full disk
    try:
        with pytest.raises(DiffpipeError, match="cannot be written"):
            export_tensors(config, model_of(config), files, tmp_path / "out", [kind])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_parts_left_by_a_killed_export_on_more_stages_are_not_read(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("wan")
    module = trained(config)
    stale = {n: torch.zeros_like(t) for n, t in module.state_dict().items()}
    write_safetensors(tmp_path / ".step-1-parts" / "stage-1-0.safetensors", stale, {})
    with open_mesh(MeshConfig()) as mesh:
        (path,) = export_weights(config, model_of(config), module, mesh, tmp_path / "step-1", ["diffusers"])
    written = open_folder(path)
    assert all(torch.equal(written.read(n), t) for n, t in module.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=4, alpha=6.0)], ids=["full", "lora"])
def test_an_export_from_a_checkpoint_is_the_export_while_training(
    make_config: MakeConfig, family: str, tmp_path: Path, adapter: AdapterConfig | None
) -> None:
    config = make_config(family, adapter.model_dump() if adapter else None)
    module = trained(config)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(adapter is None or ".lora_" in name)
    optimizer = make_optimizer(config.optimizer, module.named_parameters())
    inputs, targets = microbatch(model_of(config))
    sum_errors(module(**inputs, return_dict=False), targets).backward()
    optimizer.step()
    run = tmp_path / "run"
    with open_mesh(MeshConfig()) as mesh:
        live = export_weights(config, model_of(config), module, mesh, tmp_path / "live", ["diffusers", "comfyui"])
        checkpoints = Checkpoints(run / "checkpoints", mesh, CheckpointConfig(), pinned=False)
        checkpoints.save(7, module, optimizer, {})
        checkpoints.finish()
    (run / CONFIG).write_bytes(dump(config))
    later = export_run(run, formats=["diffusers", "comfyui"])
    assert {p.parent for p in later} == {run / "exports" / "step-00000007"}
    for one, other in zip(live, later, strict=True):
        pairs = [(f, other / f.name) for f in sorted(one.iterdir())] if one.is_dir() else [(one, other)]
        assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def test_casting_makes_nothing_before_it_is_written() -> None:
    given = {"a": torch.randn(3), "b": torch.arange(3)}
    lazily = cast(given, lambda _: torch.bfloat16)
    assert lazily["a"].device.type == "meta"
    assert lazily["b"] is given["b"]


def test_a_stage_that_cannot_write_stops_the_export_on_every_stage(world: World, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    world(2, Path(__file__).with_name("stuck.py"), tmp_path, timeout=120)
    told = [(tmp_path / f"told-{stage}.txt").read_text() for stage in range(2)]
    assert "stage-0-0.safetensors: cannot be written" in told[0]
    assert told[0] == told[1]
    assert not list((tmp_path / "exports").iterdir())
