"""Cosmos is trained as a class without its padding mask, and exported as the released one."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import CosmosTransformer3DModel
from safetensors.torch import load_file

from diffpipe.export.run import export_tensors
from diffpipe.models.blueprint import shipped
from tests.export.tiny import MakeConfig, model_of, trained


def test_what_is_exported_has_the_config_and_the_names_of_the_released_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("cosmos")
    module = trained(config)
    folder, single = export_tensors(config, model_of(config), module.state_dict(), tmp_path, ["diffusers", "comfyui"])
    written = json.loads((folder / "config.json").read_text())
    assert written["concat_padding_mask"] is shipped("cosmos")["transformer"].config["concat_padding_mask"] is True
    assert written["in_channels"] == written["out_channels"] == module.config["in_channels"] - 1
    loaded = CosmosTransformer3DModel.from_pretrained(folder)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert loaded.patch_embed.proj.in_features == module.patch_embed.proj.in_features
    named = load_file(single)
    # The names that diffusers and ComfyUI tell the model by.
    for name in ("x_embedder.proj.1.weight", "blocks.block0.blocks.0.block.attn.to_q.0.weight", "extra_pos_embedder.pos_emb_h"):
        assert f"net.{name}" in named
