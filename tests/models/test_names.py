"""Every weight of a released model has exactly one place in the original format."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError, DiffpipeError
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.models.blueprint import shipped
from diffpipe.models.names import NameMap, converter, original_names, to_diffusers, to_original

# By family: changes of the shipped config that make another released variant, and the number of tensors in its single file.
RELEASED: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    # 20 tensors in each of 28 or 36 blocks and 10 outside of them, counted in ComfyUI's comfy/ldm/cosmos/model.py.
    "cosmos": {"7b": ({}, 570), "14b": ({"num_attention_heads": 40, "num_layers": 36, "rope_scale": [2.0, 2.0, 2.0]}, 730)},
    # 20 tensors in each of 19 double blocks, 6 in each of 38 single ones, 29 in distilled_guidance_layer and 6 beside them, counted in
    # lodestone-rock/flow's src/models/chroma/model.py.
    "chroma": {"1": ({}, 643)},
    "flux": {"dev": ({}, 780), "schnell": ({"guidance_embeds": False}, 776)},
    "flux-kontext": {"dev": ({}, 780)},
    # 24 tensors in each of 20 double blocks and 8 in each of 40 single ones (others counted these 480 and 320 in Comfy-Org's file), 14 in
    # each of 2 refiners and 28 beside them.
    "hunyuan-video": {"t2v": ({}, 856)},
    # 25 tensors in each of 28 or 48 blocks and 15 outside of them, counted in ComfyUI's comfy/ldm/lightricks/model.py.
    "ltx-video": {"2b": ({}, 715), "13b": ({"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}, 1215)},
    # 13 tensors in each of 26 layers and 2 noise refiners, 11 in each of 2 context refiners and 13 beside them, counted in Alpha-VLLM's
    # models/model.py, whose norm_final is not used.
    "lumina2": {"2": ({}, 399)},
    # As many as the released UNet has parameters; the file holds its VAE and text encoders too.
    "sdxl": {"base": ({}, 1680)},
    "wan": {"14b": ({}, 1095), "1.3b": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 825)},
    # Text to video's 1095, 5 more in each of 40 blocks and 8 of img_emb, counted in wan/modules/model.py.
    "wan-i2v": {"14b": ({}, 1303)},
}
CASES = [pytest.param(f, *case, id=f"{f}-{v}") for f, variants in sorted(RELEASED.items()) for v, case in variants.items()]


def test_every_family_has_its_released_variants_here() -> None:
    assert set(RELEASED) == set(MODELS)


def rows_of(family: str, changes: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model of released size with a number for each row instead of its weights, and its config."""
    model = model_class(family)
    config = shipped(family)[model.component].config | changes
    with init_empty_weights():
        module = getattr(diffusers, model.denoiser).from_config(config)
    rows: dict[str, Tensor] = {}
    total = 0
    for name, weight in module.state_dict().items():
        rows[name] = torch.arange(total, total + weight.shape[0]).reshape(-1, *[1] * (weight.ndim - 1))
        total += weight.shape[0]
    return rows, dict(module.config)


@pytest.mark.parametrize(("family", "changes", "count"), CASES)
def test_every_row_of_a_released_model_is_exported_exactly_once(family: str, changes: dict[str, Any], count: int) -> None:
    rows, _ = rows_of(family, changes)
    names = original_names(model_class(family).originals, rows)
    assert len(names) == count
    exported = torch.cat([t.reshape(-1) for t in to_original(rows, names).values()])
    assert torch.equal(exported.sort().values, torch.arange(sum(len(t) for t in rows.values())))


@pytest.mark.parametrize(("family", "changes", "count"), CASES)
def test_a_released_file_tells_the_sizes_of_its_variant(family: str, changes: dict[str, Any], count: int) -> None:
    model = make_model(ModelConfig(family=family), ObjectiveConfig())
    base = shipped(family)[model.component].config
    with init_empty_weights():
        module = getattr(diffusers, model.denoiser).from_config(base | changes)
    weights = module.state_dict()
    original = to_original(weights, original_names(model_class(family).originals, weights))
    told = model.file_config({name: tuple(t.shape) for name, t in original.items()})
    assert base | told == base | changes | told
    assert json.dumps(told) == json.dumps({key: module.config[key] for key in told})


@pytest.mark.parametrize(("family", "changes", "count"), CASES)
def test_diffusers_and_diffpipe_turn_the_original_names_of_a_released_model_back(family: str, changes: dict[str, Any], count: int) -> None:
    rows, full = rows_of(family, changes)
    originals = model_class(family).originals
    names = original_names(originals, rows)
    original = to_original(rows, names)
    ours = to_diffusers(original, names, {n: tuple(t.shape) for n, t in rows.items()}, "file")
    theirs = converter(originals)(checkpoint=dict(original), config=full)
    for back in (ours, theirs):
        assert set(back) == set(rows)
        assert all(torch.equal(back[name], rows[name]) for name in rows)


def test_the_map_holds_at_any_width_and_depth() -> None:
    def shape_of(names: NameMap) -> dict[str, list[tuple[str, float, float]]]:
        return {n: [(p.name, p.start, p.stop) for p in pieces] for n, pieces in names.items()}

    originals = model_class("flux").originals
    with init_empty_weights():
        tiny = diffusers.FluxTransformer2DModel(
            num_layers=19,
            num_single_layers=38,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        )
    released, _ = rows_of("flux", {})
    assert shape_of(original_names(originals, tiny.state_dict())) == shape_of(original_names(originals, released))


def test_a_parameter_without_an_original_name_is_named() -> None:
    rows, _ = rows_of("wan", {"num_layers": 1})
    with pytest.raises(DiffpipeError, match=r"blocks\.0\.extra\.weight"):
        original_names(model_class("wan").originals, [*rows, "blocks.0.extra.weight"])


def test_a_file_that_lacks_a_tensor_or_has_another_size_is_named() -> None:
    rows, _ = rows_of("wan", {"num_layers": 1})
    names = original_names(model_class("wan").originals, rows)
    original, shapes = to_original(rows, names), {n: tuple(t.shape) for n, t in rows.items()}
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*blocks\.0\.ffn\.0\.bias"):
        to_diffusers({n: t for n, t in original.items() if n != "blocks.0.ffn.0.bias"}, names, shapes, "file")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.bias is \(3,\)"):
        to_diffusers({**original, "blocks.0.ffn.0.bias": torch.zeros(3)}, names, shapes, "file")
