"""Every weight of a released model has exactly one place in the original format."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from diffpipe.errors import DiffpipeError
from diffpipe.export.names import NameMap, original_names, rename

WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# The number of tensors in the released single files.
RELEASED = [
    pytest.param("FluxTransformer2DModel", {"guidance_embeds": True}, 780, id="flux-dev"),
    pytest.param("FluxTransformer2DModel", {"guidance_embeds": False}, 776, id="flux-schnell"),
    pytest.param("WanTransformer3DModel", WAN_SMALL, 825, id="wan-1.3b"),
    pytest.param("WanTransformer3DModel", {}, 1095, id="wan-14b"),
]


def rows_of(kind: str, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model of released size with a number for each row instead of its weights, and its config."""
    with init_empty_weights():
        module = getattr(diffusers, kind)(**config)
    rows: dict[str, Tensor] = {}
    total = 0
    for name, weight in module.state_dict().items():
        rows[name] = torch.arange(total, total + weight.shape[0]).reshape(-1, *[1] * (weight.ndim - 1))
        total += weight.shape[0]
    return rows, dict(module.config)


@pytest.mark.parametrize(("kind", "config", "count"), RELEASED)
def test_every_row_of_a_released_model_is_exported_exactly_once(kind: str, config: dict[str, Any], count: int) -> None:
    rows, _ = rows_of(kind, config)
    names = original_names(kind, rows)
    assert len(names) == count
    exported = torch.cat([t.reshape(-1) for t in rename(rows, names).values()])  # type: ignore[arg-type]
    assert torch.equal(exported.sort().values, torch.arange(sum(len(t) for t in rows.values())))


@pytest.mark.parametrize(("kind", "config", "count"), RELEASED)
def test_diffusers_converter_turns_the_original_names_of_a_released_model_back(kind: str, config: dict[str, Any], count: int) -> None:
    rows, full = rows_of(kind, config)
    original = rename(rows, original_names(kind, rows))  # type: ignore[arg-type]
    back = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](checkpoint=dict(original), config=full)
    assert set(back) == set(rows)
    assert all(torch.equal(back[name], rows[name]) for name in rows)


def test_the_map_holds_at_any_width_and_depth() -> None:
    def shape_of(names: NameMap) -> dict[str, list[tuple[str, float, float]]]:
        return {n: [(p.name, p.start, p.stop) for p in pieces] for n, pieces in names.items()}

    with init_empty_weights():
        tiny = diffusers.FluxTransformer2DModel(
            num_layers=19,
            num_single_layers=38,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        )
    released, _ = rows_of("FluxTransformer2DModel", {"guidance_embeds": True})
    assert shape_of(original_names("FluxTransformer2DModel", tiny.state_dict())) == shape_of(
        original_names("FluxTransformer2DModel", released)
    )


def test_a_parameter_without_an_original_name_is_named() -> None:
    rows, _ = rows_of("WanTransformer3DModel", {"num_layers": 1})
    with pytest.raises(DiffpipeError, match=r"blocks\.0\.extra\.weight"):
        original_names("WanTransformer3DModel", [*rows, "blocks.0.extra.weight"])


def test_a_class_without_known_original_names_is_refused() -> None:
    with pytest.raises(DiffpipeError, match="SD3Transformer2DModel"):
        original_names("SD3Transformer2DModel", [])
