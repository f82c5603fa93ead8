"""HunyuanVideo's text is its pipeline's, its files are read whoever named the tensors, and its relatives are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from safetensors.torch import save_file
from torch import Tensor

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError
from diffpipe.flow import Key
from diffpipe.models import make_model
from diffpipe.models.adapter_files import name_adapter, read_adapter
from diffpipe.models.base import DiffusionModel
from diffpipe.models.encoders import load_component
from diffpipe.models.names import to_original
from diffpipe.models.weights import realise
from diffpipe.toy.tiny import LENGTH
from tests.families import CAPTIONS, encoded, encoders_of

Toys = Callable[[str], Path]


def model_of(folder: Path, **given: object) -> DiffusionModel:
    return make_model(
        ModelConfig.model_validate({"family": "hunyuan-video", "path": str(folder), "dtype": "float32", **given}), ObjectiveConfig()
    )


@pytest.fixture
def model(toys: Toys) -> DiffusionModel:
    return model_of(toys("hunyuan-video"))


def original(model: DiffusionModel) -> dict[str, Tensor]:
    return {n: realise(t).clone() for n, t in to_original(model.weights().tensors, model.original_names()).items()}


def test_cached_text_is_what_the_pipeline_encodes_and_all_of_the_caption(model: DiffusionModel, toys: Toys) -> None:
    pipeline = HunyuanVideoPipeline.from_pretrained(toys("hunyuan-video"))
    cached = model.encode_text(encoders_of(model), CAPTIONS)
    with torch.no_grad():
        text, pooled, mask = pipeline.encode_prompt(list(CAPTIONS), device=torch.device("cpu"), max_sequence_length=LENGTH)
    assert torch.equal(cached["text"], text)
    assert torch.equal(cached["pooled"], pooled)
    assert torch.equal(cached["text_mask"], mask.bool())
    assert cached["text_mask"].sum(1).tolist() == [len(caption.split()) + 1 for caption in CAPTIONS], "the words and what ends them"


def test_a_tokenizer_that_pads_on_the_left_gives_the_same_text(model: DiffusionModel) -> None:
    encoders = model.load_encoders(torch.device("cpu"))
    expected = model.encode_text(encoders, CAPTIONS)
    encoders.pipeline.tokenizer.padding_side = "left"
    got = model.encode_text(encoders, CAPTIONS)
    assert all(torch.equal(got[n], t) for n, t in expected.items())


def test_the_guidance_of_the_config_reaches_the_model_a_thousandfold(toys: Toys) -> None:
    model = model_of(toys("hunyuan-video"), guidance=6.0)
    inputs, _ = model.prepare(encoded(model), [Key(0, 0, i, 0) for i in range(2)])
    assert inputs["guidance"].tolist() == [6000.0, 6000.0]


def test_a_large_clip_is_encoded_in_tiles_to_latents_of_its_size(model: DiffusionModel) -> None:
    with torch.no_grad():
        latents = model.encode_media(encoders_of(model), torch.zeros(1, 3, 21, 32, 272))["latents"]
    assert latents.shape == (1, 4, 6, 4, 34)
    with pytest.raises(ValueError, match="20 frames"):
        model.encode_media(encoders_of(model), torch.zeros(1, 3, 20, 32, 32))


def comfyuis(name: str) -> str:
    """What ComfyUI calls an original tensor, in the order in which it renames them when it loads a file."""
    for own, other in (
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."),
        ("_attn_qkv.", "_attn.qkv."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
        ("_attn_proj.", "_attn.proj."),
        (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
    ):
        name = name.replace(own, other)
    return name


def test_comfyuis_and_tencents_files_give_the_same_weights(model: DiffusionModel, toys: Toys, tmp_path: Path) -> None:
    tensors = original(model)
    comfyui = {f"model.model.{comfyuis(n)}": t for n, t in tensors.items()}
    changed = [n for n in tensors if comfyuis(n) != n]
    assert all(
        any(re.search(p, n) for n in changed) for p in ("^double", "^single", "^time_in", "^guidance_in", r"^txt_in.*blocks", "c_emb")
    )
    save_file(comfyui, tmp_path / "hunyuan_video_t2v_720p_bf16.safetensors")
    torch.save({"module": tensors}, tmp_path / "mp_rank_00_model_states.pt")
    for name in ("hunyuan_video_t2v_720p_bf16.safetensors", "mp_rank_00_model_states.pt"):
        got, base = model_of(toys("hunyuan-video"), files={"transformer": tmp_path / name}).weights(), model.weights()
        assert got.names() == base.names()
        assert all(torch.equal(got.read(n), base.read(n)) for n in base.names()), name


def test_a_lora_under_comfyuis_own_names_is_read(model: DiffusionModel, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name in model.adapter_targets(model.load_denoiser()):
        rows, columns = model.shapes[f"{name}.weight"]
        tensors |= {f"{name}.lora_A.weight": torch.ones(4, columns), f"{name}.lora_B.weight": torch.ones(rows, 4)}
    save_file({comfyuis(n): t for n, t in name_adapter(tensors, model, "comfyui").items()}, tmp_path / "lora.safetensors")
    assert read_adapter(tmp_path / "lora.safetensors", model).keys() == tensors.keys()


def test_tencents_fp8_whose_scales_lie_elsewhere_is_refused(model: DiffusionModel, toys: Toys, tmp_path: Path) -> None:
    tensors = original(model)
    tensors["single_blocks.0.linear1.weight"] = tensors["single_blocks.0.linear1.weight"].to(torch.float8_e4m3fn)
    torch.save({"module": tensors}, tmp_path / "mp_rank_00_model_states_fp8.pt")
    with pytest.raises(CheckpointError, match=r"states_fp8\.pt: .*fp8"):
        model_of(toys("hunyuan-video"), files={"transformer": tmp_path / "mp_rank_00_model_states_fp8.pt"}).weights()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance_embeds": False}, "no guidance"),
        ({"image_condition_type": "token_replace"}, "an image"),
        ({"image_condition_type": "latent_concat", "in_channels": 9}, "an image"),
        ({"in_channels": 8}, "an image"),
    ],
)
def test_folders_of_other_models_of_the_class_are_refused(toys: Toys, tmp_path: Path, changes: dict[str, object], told: str) -> None:
    folder = shutil.copytree(toys("hunyuan-video"), tmp_path / "other")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=rf"transformer: it .*{told}"):
        model_of(folder).weights()


def test_files_of_other_models_of_the_class_are_refused(model: DiffusionModel, toys: Toys, tmp_path: Path) -> None:
    tensors = original(model)
    free = {n: t for n, t in tensors.items() if not n.startswith("guidance_in.")}
    image = tensors | {"img_in.proj.weight": torch.zeros(64, 9, 1, 2, 2)}
    for name, held, told in (("free", free, "no guidance"), ("image", image, "an image")):
        save_file(held, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: it .*{told}"):
            model_of(toys("hunyuan-video"), files={"transformer": tmp_path / f"{name}.safetensors"}).weights()


def test_without_a_folder_the_tokenizer_must_be_named() -> None:
    blueprint = make_model(ModelConfig(family="hunyuan-video"), ObjectiveConfig()).blueprint
    with pytest.raises(CheckpointError) as told:
        load_component(blueprint["tokenizer"], torch.float32, blueprint)
    assert told.value.found.startswith("nothing says where tokenizer ")
    assert told.value.expected == "a folder with tokenizer.json or spiece.model"
    assert told.value.fix.startswith("name it as model.files.tokenizer")
