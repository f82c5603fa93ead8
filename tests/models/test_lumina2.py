"""Lumina's text is its pipeline's, the refiners are adapted too, and ComfyUI's packed file is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Lumina2Pipeline
from safetensors.torch import save_file
from torch import Tensor

from diffpipe.config.schema import AdapterConfig, ModelConfig, ObjectiveConfig
from diffpipe.flow import Key
from diffpipe.models import make_model
from diffpipe.models.adapters import resolve_targets
from diffpipe.models.base import DiffusionModel
from diffpipe.models.names import to_original
from diffpipe.models.weights import realise
from tests.families import CAPTIONS, CPU, encoded, encoders_of, filled
from tests.models.test_converters import comfyuis

Toys = Callable[[str], Path]


def model_of(folder: Path, **files: Path) -> DiffusionModel:
    return make_model(ModelConfig(family="lumina2", path=str(folder), files=files, dtype="float32"), ObjectiveConfig())


@pytest.fixture
def model(toys: Toys) -> DiffusionModel:
    return model_of(toys("lumina2"))


def test_cached_text_is_what_the_pipeline_encodes_behind_its_system_prompt(model: DiffusionModel, toys: Toys) -> None:
    pipeline = Lumina2Pipeline.from_pretrained(toys("lumina2"))
    cached = model.encode_text(encoders_of(model), CAPTIONS)
    length = cached["text"].shape[1]
    with torch.no_grad():
        text, mask, *_ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False, device=CPU, max_sequence_length=length)
        bare, _ = pipeline._get_gemma_prompt_embeds(list(CAPTIONS), CPU, length)
    assert torch.equal(cached["text"], text)
    assert torch.equal(cached["text_mask"], mask.bool())
    assert not torch.equal(cached["text"], bare)
    alone = [len(pipeline.tokenizer(caption).input_ids) for caption in CAPTIONS]
    assert len(set((cached["text_mask"].sum(1) - torch.tensor(alone)).tolist())) == 1, "the same prompt stands before every caption"


@torch.no_grad()
def test_what_lies_beyond_a_caption_changes_nothing(model: DiffusionModel) -> None:
    batch = encoded(model, count=3)
    keys = [Key(0, 0, i, 0) for i in range(3)]
    module = filled(model.load_denoiser())
    outputs = []
    for noise in (torch.zeros(()), torch.randn(batch["text"].shape, generator=torch.Generator().manual_seed(1))):
        text = torch.where(batch["text_mask"][..., None], batch["text"], noise)
        inputs, _ = model.prepare({**batch, "text": text}, keys)
        outputs.append(module(**inputs, return_dict=False)[0])
    torch.testing.assert_close(*outputs)


def test_refiners_are_adapted_and_nothing_outside_of_blocks(model: DiffusionModel) -> None:
    module = model.load_denoiser()
    targets = resolve_targets(model, module, AdapterConfig(rank=4))
    assert {name.split(".")[0] for name in targets} == {"layers", "noise_refiner", "context_refiner"}
    assert "norm_out.linear_2" not in targets


def test_one_packed_file_gives_the_transformer_the_vae_and_gemma(model: DiffusionModel, toys: Toys, tmp_path: Path) -> None:
    pipeline = encoders_of(model).pipeline
    tensors = to_original(model.weights().tensors, model.original_names())
    packed = {f"model.diffusion_model.{n}": realise(t).clone() for n, t in tensors.items()}
    packed["model.diffusion_model.norm_final.weight"] = torch.ones(48)
    for name, t in pipeline.vae.state_dict().items():
        packed[f"vae.{comfyuis(name)}"] = (t[..., None, None] if ".attentions." in name and t.ndim == 2 else t).clone()
    packed |= {f"text_encoders.gemma2_2b.transformer.model.{n}": t.clone() for n, t in pipeline.text_encoder.state_dict().items()}
    packed |= {"text_encoders.gemma2_2b.logit_scale": torch.tensor(4.6), "text_encoders.spiece_model": torch.zeros(7, dtype=torch.uint8)}
    save_file(packed, tmp_path / "lumina_2.safetensors")
    apart = model_of(toys("lumina2"), **dict.fromkeys(("transformer", "vae", "text_encoder"), tmp_path / "lumina_2.safetensors"))
    ours, theirs = apart.weights(), model.weights()
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.read(n), theirs.read(n)) for n in theirs.names())
    got, expected = encoded(apart), encoded(model)
    assert all(torch.equal(got[n], t) for n, t in expected.items())


def test_q_k_and_v_of_unequal_sizes_are_joined_in_that_order(model: DiffusionModel) -> None:
    weights = model.weights()
    joined: Tensor = realise(to_original(weights.tensors, model.original_names())["layers.2.attention.qkv.weight"])
    parts = [weights.read(f"layers.2.attn.to_{n}.weight") for n in "qkv"]
    assert [len(p) for p in parts] == [48, 24, 24]
    assert torch.equal(joined, torch.cat(parts))
