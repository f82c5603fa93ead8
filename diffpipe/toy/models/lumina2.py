"""A Lumina2Pipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path

from diffpipe.toy.tiny import LENGTH, make_image_vae, make_t5_tokenizer, open_heads, pictures_for_scale

SYSTEM_PROMPT = 32  # tokens of what the pipeline puts before a caption


def make(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = make_t5_tokenizer(SYSTEM_PROMPT + LENGTH)
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Two heads share a key and a value, so q, k and v are of unequal sizes as in the released model.
    transformer = Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=48,
        num_layers=6,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )
    Lumina2Pipeline(
        transformer=open_heads(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=make_image_vae(pictures_for_scale(frames=0), 4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Gemma2Model(gemma),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
