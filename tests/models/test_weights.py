"""Checkpoints of every form give the model's weights, and those that cannot say why before anything is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.models import MODELS, make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.models.names import to_original
from diffpipe.models.weights import open_file, realise

Toys = Callable[[str], Path]


def model_of(family: str, toys: Toys, file: Path | None = None) -> DiffusionModel:
    component = make_model(ModelConfig(family=family, path=str(toys(family))), ObjectiveConfig()).component
    files = {component: file} if file is not None else {}
    return make_model(ModelConfig(family=family, path=str(toys(family)), files=files, dtype="float32"), ObjectiveConfig())


def original(model: DiffusionModel) -> dict[str, Tensor]:
    """The tiny denoiser's weights under the original names."""
    source = model.weights()
    return {n: realise(t).clone() for n, t in to_original(source.tensors, model.original_names()).items()}


def saved(tensors: dict[str, Tensor], file: Path, prefix: str = "") -> Path:
    save_file({prefix + n: t.contiguous() for n, t in tensors.items()}, file)
    return file


def same(got: DiffusionModel, expected: DiffusionModel, relative: float = 0.0) -> None:
    ours, theirs = got.weights(), expected.weights()
    assert ours.names() == theirs.names()
    for name in theirs.names():
        torch.testing.assert_close(ours.read(name, torch.float32), theirs.read(name, torch.float32), rtol=relative, atol=0)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_file_under_original_or_diffusers_names_gives_the_same_weights(toys: Toys, tmp_path: Path, family: str) -> None:
    base = model_of(family, toys)
    tensors = original(base)
    for prefix in ("", *base.prefixes):
        same(model_of(family, toys, saved(tensors, tmp_path / f"original-{len(prefix)}.safetensors", prefix)), base)
    source = base.weights()
    same(model_of(family, toys, saved({n: source.read(n) for n in source.names()}, tmp_path / "diffusers.safetensors")), base)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_fp8_files_are_read_with_their_scales(toys: Toys, tmp_path: Path, family: str) -> None:
    base = model_of(family, toys)
    tensors = original(base)
    big = [n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2]
    plain = {n: t.to(torch.float8_e4m3fn) if n in big else t for n, t in tensors.items()}
    got = model_of(family, toys, saved(plain, tmp_path / "plain.safetensors")).weights()
    exact = {n: t.to(torch.float8_e4m3fn).float() if n in big else t for n, t in tensors.items()}
    back = to_original({n: got.read(n, torch.float32) for n in got.names()}, base.original_names())
    assert all(torch.equal(back[n], t) for n, t in exact.items())
    # e4m3 keeps 3 bits behind the leading one, so a scaled weight is off by at most one part in 16 (and bfloat16's rounding).
    for word, marker in (("scale_weight", "scaled_fp8"), ("weight_scale", None)):
        scaled: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in big:
                scale = tensor.abs().max() / 448
                scaled |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.removesuffix("weight") + word: scale.reshape(1)}
            else:
                scaled[name] = tensor
        if marker:
            scaled[marker] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        got = model_of(family, toys, saved(scaled, tmp_path / f"{word}.safetensors")).weights()
        back = to_original({n: got.read(n, torch.float32) for n in got.names()}, base.original_names())
        for name in big:
            error = (back[name] - tensors[name]).abs() / (tensors[name].abs() + tensors[name].abs().max() / 448)
            assert error.max() < 0.07, name


def test_a_scale_for_each_row_is_applied_to_its_row(toys: Toys, tmp_path: Path) -> None:
    base = model_of("wan", toys)
    tensors = original(base)
    name = "blocks.0.ffn.0.weight"
    rows = torch.arange(1, len(tensors[name]) + 1).float().unsqueeze(1)
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), "blocks.0.ffn.0.weight_scale": rows}
    got = model_of("wan", toys, saved(tensors, tmp_path / "rows.safetensors")).weights().read("blocks.0.ffn.net.0.proj.weight")
    torch.testing.assert_close(got.float(), (tensors[name].float() * rows).to(torch.bfloat16).float())


def test_a_pickle_of_plain_tensors_is_read_and_one_with_code_is_refused(toys: Toys, tmp_path: Path) -> None:
    base = model_of("wan", toys)
    for wrapped in (original(base), {"module": original(base)}):
        torch.save(wrapped, tmp_path / "plain.pth")
        same(model_of("wan", toys, tmp_path / "plain.pth"), base)

    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"weight": Harm()}, tmp_path / "code.pt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Harm()))
    for name in ("code.pt", "raw.bin"):
        with pytest.raises(CheckpointError, match=r"a pickle that cannot be loaded as plain tensors"):
            model_of("wan", toys, tmp_path / name).weights()
    assert not (tmp_path / "harmed").exists()


def test_a_truncated_or_foreign_file_is_named(toys: Toys, tmp_path: Path) -> None:
    file = saved(original(model_of("wan", toys)), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=r"wan\.safetensors: its tensors are not those of Flux"):
        model_of("flux", toys, file).weights()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"wan\.safetensors: cannot be read as safetensors"):
        model_of("wan", toys, file).weights()
    with pytest.raises(ConfigError, match=r"model\.files\.transformer: .*nowhere"):
        model_of("wan", toys, tmp_path / "nowhere.safetensors").weights()


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_missing_or_unknown_tensor_is_named_before_anything_is_read(toys: Toys, tmp_path: Path, family: str) -> None:
    tensors = original(model_of(family, toys))
    gone = sorted(tensors)[-1]
    with pytest.raises(CheckpointError) as told:
        model_of(family, toys, saved({n: t for n, t in tensors.items() if n != gone}, tmp_path / "less.safetensors")).weights()
    assert gone in str(told.value) and "less.safetensors" in str(told.value)
    with pytest.raises(CheckpointError, match=r"more\.safetensors: has 1 that the model does not know, such as strange\.weight"):
        model_of(family, toys, saved(tensors | {"strange.weight": torch.zeros(2)}, tmp_path / "more.safetensors")).weights()


def test_fp8_that_is_scaled_but_lacks_a_scale_is_refused(toys: Toys, tmp_path: Path) -> None:
    tensors = original(model_of("wan", toys))
    tensors["blocks.1.ffn.0.weight"] = tensors["blocks.1.ffn.0.weight"].to(torch.float8_e4m3fn)
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0\.weight is scaled fp8 without its scale"):
        model_of("wan", toys, saved(tensors, tmp_path / "bare.safetensors")).weights()
    tensors["blocks.1.ffn.0.comfy_quant"] = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0 is quantised as nvfp4"):
        model_of("wan", toys, saved(tensors, tmp_path / "quant.safetensors")).weights()


def test_a_folder_with_a_weight_of_another_shape_is_refused(toys: Toys, tmp_path: Path) -> None:
    base = model_of("wan", toys)
    source = base.weights()
    tensors = {n: source.read(n) for n in source.names()}
    tensors["blocks.0.ffn.net.2.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.net\.2\.bias is \(3,\)[\s\S]*expected: \(64,\)"):
        model_of("wan", toys, saved(tensors, tmp_path / "wrong.safetensors")).weights()


def test_only_the_tensors_asked_for_are_read(toys: Toys, tmp_path: Path) -> None:
    file = saved(original(model_of("flux", toys)), tmp_path / "flux.safetensors")
    tensors = open_file(file)
    held = load_file(file)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: tuple(t.shape) for n, t in held.items()}
    assert all(t.device.type == "meta" for t in tensors.values())
    assert torch.equal(realise(tensors["img_in.weight"]), held["img_in.weight"])
