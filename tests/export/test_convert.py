"""`diffpipe export FILE` gives an adapter file the names of another program, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.export.run import metadata, write_adapter
from diffpipe.models.adapters import adapter_tensors, folded
from diffpipe.takeaway import export_file
from tests.conftest import Command
from tests.export.tiny import MakeConfig, model_of, trained

ADAPTER = {"rank": 4, "alpha": 2.0}


def written(make_config: MakeConfig, family: str, folder: Path, kind: str = "diffusers") -> tuple[Path, str]:
    config = make_config(family, ADAPTER)
    model = model_of(config)
    assert config.adapter is not None
    tensors = folded(adapter_tensors(trained(config)), config.adapter)
    path = write_adapter(tensors, model, kind, folder / f"my-{kind}.safetensors", torch.float32, metadata(config, model))
    return path, str(config.model.path)


def test_every_format_turns_into_every_other_and_back(make_config: MakeConfig, family: str, tmp_path: Path) -> None:
    start, base = written(make_config, family, tmp_path)
    first = load_file(start)
    file = start
    for kind in ("comfyui", "kohya", "diffusers", "kohya", "comfyui", "diffusers"):
        (file,) = export_file(file, formats=[kind], base=base, output=tmp_path / "out")
        assert file.name == f"my-{kind}.safetensors"
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["diffpipe.format"] == kind
            assert opened.metadata()["diffpipe.family"] == family
    back = load_file(file)
    assert back.keys() == first.keys()
    for name in first:
        layer = name.rpartition(".lora_")[0]
        ours, theirs = (t[f"{layer}.lora_B.weight"] @ t[f"{layer}.lora_A.weight"] for t in (back, first))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert back[name].shape == first[name].shape, "a joined layer comes apart at its own rank"


def test_what_cannot_be_converted_says_why(make_config: MakeConfig, tmp_path: Path) -> None:
    file, base = written(make_config, "wan", tmp_path)
    with pytest.raises(ConfigError, match=r"--to: there is no format 'webui'"):
        export_file(file, formats=["webui"])
    with pytest.raises(ConfigError, match=r"its names are those of diffusers\n  expected: kohya"):
        export_file(file, formats=["comfyui"], source="kohya", base=base)
    with pytest.raises(CheckpointError, match="is no layer of Flux"):
        export_file(file, formats=["comfyui"], family="flux")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match=r"does not say which family[\s\S]*--family"):
        export_file(tmp_path / "bare.safetensors", formats=["comfyui"])


def test_the_command_converts_a_file(command: Command, make_config: MakeConfig, tmp_path: Path) -> None:
    file, base = written(make_config, "flux", tmp_path)
    done = command("export", file, "--from", "diffusers", "--to", "comfyui", "--to", "kohya", "--base", base)
    assert done.stdout.split() == [str(tmp_path / "my-comfyui.safetensors"), str(tmp_path / "my-kohya.safetensors")]
    refused = command("export", file, "--checkpoint", "3", check=False)
    assert refused.exit_code == 1 and "a file has no checkpoints" in refused.stderr
