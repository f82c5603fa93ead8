"""Components of single files give the outputs of the module they were written from, whatever their names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
)

from diffpipe.errors import CheckpointError
from diffpipe.models.blueprint import Component, shipped
from diffpipe.models.encoders import load_component
from tests.families import CAPTIONS

# -- CLIP's picture half ---------------------------------------------------------------------------------------------

EYES = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, hidden_act="gelu"
)


def eyes() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(EYES).eval()


def image_encoder(file: Path) -> Any:
    component = Component("image_encoder", "transformers", "CLIPVisionModel", EYES.to_dict(), file=file)
    return load_component(component, torch.float32, {"image_encoder": component})


@torch.no_grad()
def sees_the_same(one: CLIPVisionModel, other: CLIPVisionModel) -> bool:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = [m(pixel_values=pixels, output_hidden_states=True).hidden_states for m in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def plain(module: CLIPVisionModel) -> dict[str, Tensor]:
    return {n.removeprefix("vision_model."): t for n, t in module.state_dict().items()}


def alibaba(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of wan/modules/clip.py's VisionTransformer."""
    named = {
        "cls_embedding": weights["embeddings.class_embedding"][None, None],
        "pos_embedding": weights["embeddings.position_embedding.weight"][None],
        "patch_embedding.weight": weights["embeddings.patch_embedding.weight"],
        "head": torch.randn(32, 16),
    }
    layers = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for leaf in ("weight", "bias"):
        named |= {f"pre_norm.{leaf}": weights[f"pre_layrnorm.{leaf}"], f"post_norm.{leaf}": weights[f"post_layernorm.{leaf}"]}
        for i in range(3):
            layer = f"encoder.layers.{i}"
            named |= {f"transformer.{i}.{own}.{leaf}": weights[f"{layer}.{theirs}.{leaf}"] for own, theirs in layers.items()}
            named[f"transformer.{i}.attn.to_qkv.{leaf}"] = torch.cat([weights[f"{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"])
    return named


def test_the_official_clip_of_wan_is_read_from_its_pth_and_from_the_half_that_kijai_took(tmp_path: Path) -> None:
    module = eyes()
    visual = {f"visual.{n}": t.contiguous() for n, t in alibaba(plain(module)).items()}
    log_scale = torch.tensor(2.6)
    torch.save({**visual, "textual.token_embedding.weight": torch.randn(7, 5), "log_scale": log_scale}, tmp_path / "models_clip.pth")
    save_file({**visual, "log_scale": log_scale}, tmp_path / "kijai.safetensors")
    save_file({n.removeprefix("visual."): t for n, t in visual.items()} | {"log_scale": log_scale}, tmp_path / "bare.safetensors")
    for name in ("models_clip.pth", "kijai.safetensors", "bare.safetensors"):
        assert sees_the_same(image_encoder(tmp_path / name), module), name


def test_comfyuis_clip_vision_is_read_under_the_names_of_the_library(tmp_path: Path) -> None:
    module = eyes()
    weights = {f"vision_model.{n}": t.contiguous() for n, t in plain(module).items()}
    weights |= {"visual_projection.weight": torch.randn(16, 32), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(weights, tmp_path / "clip_vision_h.safetensors")
    assert sees_the_same(image_encoder(tmp_path / "clip_vision_h.safetensors"), module)


@pytest.mark.parametrize(("changed", "told"), [("mlp.0.bias", "lacks .*fc1.bias"), ("extra.weight", "beside those .*extra.weight")])
def test_a_picture_encoder_that_lacks_a_tensor_or_has_another_is_refused(tmp_path: Path, changed: str, told: str) -> None:
    weights = {n: t.contiguous() for n, t in alibaba(plain(eyes())).items()}
    name = f"transformer.1.{changed}"
    weights = {n: t for n, t in weights.items() if n != name} if name in weights else weights | {name: torch.zeros(3)}
    save_file(weights, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match=rf"clip\.safetensors: .*{told}"):
        image_encoder(tmp_path / "clip.safetensors")


# -- HunyuanVideo's VAE ----------------------------------------------------------------------------------------------

HUNYUAN_VAE: dict[str, Any] = {"latent_channels": 4, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}


def comfyuis(name: str) -> str:
    """ComfyUI's name of a tensor of AutoencoderKLHunyuanVideo, as its own conversion of that class' names gives it."""
    for own, other in (
        ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
        ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        ("conv_shortcut.", "nin_shortcut."),
        ("conv_norm_out.", "norm_out."),
        *((f"down_blocks.{i}.resnets.", f"down.{i}.block.") for i in range(4)),
        *((f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.") for i in range(3)),
        *((f"up_blocks.{i}.resnets.", f"up.{3 - i}.block.") for i in range(4)),
        *((f"up_blocks.{i}.upsamplers.0.", f"up.{3 - i}.upsample.") for i in range(3)),
    ):
        name = name.replace(own, other)
    return name


def test_hunyuan_videos_vae_is_read_from_tencents_pickle_and_under_comfyuis_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = AutoencoderKLHunyuanVideo(**HUNYUAN_VAE).eval()
    weights = module.state_dict()
    torch.save({"state_dict": {f"vae.{n}": t for n, t in weights.items()}}, tmp_path / "pytorch_model.pt")
    one_cell = {n: t.reshape(*t.shape, 1, 1, 1) if "attentions" in n and t.ndim == 2 else t for n, t in weights.items()}
    comfyui = {comfyuis(n): t.contiguous() for n, t in one_cell.items()}
    assert {"decoder.up.3.upsample.conv.conv.weight", "encoder.mid.attn_1.q.weight", "decoder.up.1.block.0.nin_shortcut.conv.bias"} < set(
        comfyui
    )
    save_file(comfyui, tmp_path / "hunyuan_video_vae_bf16.safetensors")
    pixels = torch.randn(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(1))
    for name in ("pytorch_model.pt", "hunyuan_video_vae_bf16.safetensors"):
        component = Component("vae", "diffusers", "AutoencoderKLHunyuanVideo", HUNYUAN_VAE, file=tmp_path / name)
        loaded = load_component(component, torch.float32, {})
        with torch.no_grad():
            assert torch.equal(loaded(pixels).sample, module(pixels).sample), name


# -- language models as text encoders --------------------------------------------------------------------------------

LANGUAGE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@torch.no_grad()
def reads_the_same(one: Any, other: Any) -> bool:
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    states = [m(input_ids=ids, output_hidden_states=True).hidden_states for m in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def text_encoder(kind: str, file: Path) -> Any:
    component = Component("text_encoder", "transformers", kind, LANGUAGE, file=file)
    return load_component(component, torch.float32, {"text_encoder": component})


LLAMAS = {
    "comfyui": ("model.", {"lm_head.weight": (40, 32), "tokenizer": (7,)}),
    "doubled": ("model.model.", {}),
    "xtuner": ("language_model.model.", {"language_model.lm_head.weight": (40, 32), "vision_tower.vision_model.layers.0.weight": (4, 4)}),
    "comfyui-with-eyes": ("model.language_model.model.", {"model.multi_modal_projector.linear_1.weight": (4, 4)}),
    "bare": ("", {}),
}


@pytest.mark.parametrize(("prefix", "beside"), LLAMAS.values(), ids=LLAMAS)
def test_llama_is_read_from_wherever_it_lies_in_a_file(tmp_path: Path, prefix: str, beside: dict[str, tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    module = LlamaModel(LlamaConfig(**LANGUAGE)).eval()
    weights = {prefix + n: t.contiguous() for n, t in module.state_dict().items()}
    save_file(weights | {n: torch.zeros(shape) for n, shape in beside.items()}, tmp_path / "llava_llama3.safetensors")
    assert reads_the_same(text_encoder("LlamaModel", tmp_path / "llava_llama3.safetensors"), module)


def test_a_language_model_with_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    weights = {f"model.{n}": t.contiguous() for n, t in LlamaModel(LlamaConfig(**LANGUAGE)).state_dict().items()}
    save_file(weights | {"model.layers.3.mlp.up_proj.weight": torch.zeros(64, 32)}, tmp_path / "llama.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight"):
        text_encoder("LlamaModel", tmp_path / "llama.safetensors")


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sentencepiece model with Gemma's settings and marks, of a few words."""
    folder = tmp_path_factory.mktemp("sentences")
    (folder / "text.txt").write_text("\n".join([*CAPTIONS, "an assistant paints a red circle, 12 squares and 3 triangles"] * 3))
    marks = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "gemma"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
        **marks,
    )
    return (folder / "gemma.model").read_bytes()


@pytest.mark.parametrize("place", ["text_encoders.gemma2_2b.transformer.model.", "model."], ids=["packed", "alone"])
def test_gemma_and_its_tokenizer_are_read_from_comfyuis_files(tmp_path: Path, sentences: bytes, place: str) -> None:
    torch.manual_seed(0)
    module = Gemma2Model(Gemma2Config(**LANGUAGE, query_pre_attn_scalar=8)).eval()
    packed = place.startswith("text_encoders.")
    weights = {place + n: t.contiguous() for n, t in module.state_dict().items()}
    weights["text_encoders.spiece_model" if packed else "spiece_model"] = torch.tensor(list(sentences), dtype=torch.uint8)
    weights["text_encoders.gemma2_2b.logit_scale" if packed else "logit_scale"] = torch.tensor(4.6)
    if packed:
        weights |= {"vae.decoder.conv_in.weight": torch.zeros(2), "model.diffusion_model.x_embedder.weight": torch.zeros(2)}
    save_file(weights, tmp_path / "lumina_2.safetensors")
    released = shipped("lumina2")
    config = {**LANGUAGE, "query_pre_attn_scalar": 8}
    encoder = replace(released["text_encoder"], config=config, file=tmp_path / "lumina_2.safetensors")
    tokenizer = load_component(released["tokenizer"], torch.float32, {**released, "text_encoder": encoder})
    own = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    for text in (*CAPTIONS, "You are an assistant <Prompt Start> été 漢, 12  dogs"):
        assert tokenizer(text).input_ids == [own.bos_id(), *own.encode(text)], text
    assert tokenizer("a", padding="max_length", max_length=5).input_ids.count(own.pad_id()) == 3
    assert reads_the_same(load_component(encoder, torch.float32, {}), module)


def test_llama_3s_tokenizer_is_read_as_it_is_and_not_as_its_class_would_make_it(tmp_path: Path) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    whole = Tokenizer(models.BPE(ignore_merges=True))
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    whole.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    whole.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<pad>"])
    begin = ("<|begin_of_text|>", whole.token_to_id("<|begin_of_text|>"))
    whole.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[begin])
    whole.save(str(tmp_path / "tokenizer.json"))
    told = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<pad>"}
    text = f"{CAPTIONS[0]}\n\n12 squares<|eot_id|>"
    for kind, config in (("LlamaTokenizerFast", told), ("PreTrainedTokenizerFast", None)):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        loaded = load_component(Component("tokenizer", "transformers", kind, {}, folder=tmp_path), torch.float32, {})
        assert loaded(text).input_ids == whole.encode(text).ids


# -- the text encoders of SDXL -----------------------------------------------------------------------------------------


def reader(kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection]) -> Any:
    torch.manual_seed(0)
    return kind(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=10,
            bos_token_id=48,
            eos_token_id=49,
        )
    ).eval()


@torch.no_grad()
def is_read_back(name: str, one: Any, tensors: dict[str, Tensor], file: Path) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    component = Component(name, "transformers", type(one).__name__, one.config.to_dict(), file=file)
    other = load_component(component, torch.float32, {name: component})
    ids = torch.tensor([[48, 3, 7, 2, 49, 0, 0]])
    for a, b in zip(one(ids, output_hidden_states=True).to_tuple(), other(ids, output_hidden_states=True).to_tuple(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "conditioner.embedders.0.transformer."], ids=["clip-l", "whole checkpoint"])
def test_sdxls_first_text_encoder_is_read_from_comfyuis_file_and_the_whole_checkpoint(tmp_path: Path, prefix: str) -> None:
    module = reader(CLIPTextModel)
    named = {f"{prefix}text_model.{n}": t for n, t in module.state_dict().items()}
    named[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(10)[None]
    named |= {f"{prefix}text_projection.weight": torch.randn(16, 24), f"{prefix}logit_scale": torch.tensor(4.6)}
    named |= {"model.diffusion_model.out.2.bias": torch.zeros(4)} if prefix else {}
    is_read_back("text_encoder", module, named, tmp_path / "clip_l.safetensors")


@pytest.mark.parametrize("projection", ["text_projection", "text_projection.weight"])
def test_sdxls_second_text_encoder_is_read_under_openclips_names(tmp_path: Path, projection: str) -> None:
    module = reader(CLIPTextModelWithProjection)
    weights = module.state_dict()
    named = {
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        projection: weights["text_projection.weight"] if projection.endswith("weight") else weights["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for leaf in ("weight", "bias"):
        named[f"ln_final.{leaf}"] = weights[f"text_model.final_layer_norm.{leaf}"]
        for i in range(3):
            layer, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            named[f"{block}.attn.in_proj_{leaf}"] = torch.cat([weights[f"{layer}.self_attn.{n}_proj.{leaf}"] for n in "qkv"])
            named[f"{block}.attn.out_proj.{leaf}"] = weights[f"{layer}.self_attn.out_proj.{leaf}"]
            named |= {f"{block}.ln_{n}.{leaf}": weights[f"{layer}.layer_norm{n}.{leaf}"] for n in (1, 2)}
            named[f"{block}.mlp.c_fc.{leaf}"] = weights[f"{layer}.mlp.fc1.{leaf}"]
            named[f"{block}.mlp.c_proj.{leaf}"] = weights[f"{layer}.mlp.fc2.{leaf}"]
    prefixed = {f"conditioner.embedders.1.model.{n}": t for n, t in named.items()}
    is_read_back("text_encoder_2", module, prefixed, tmp_path / "sdxl.safetensors")


def test_comfyuis_clip_g_has_the_librarys_names(tmp_path: Path) -> None:
    module = reader(CLIPTextModelWithProjection)
    is_read_back("text_encoder_2", module, dict(module.state_dict()), tmp_path / "clip_g.safetensors")
