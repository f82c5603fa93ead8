"""A WanPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path

from diffpipe.toy.tiny import make_t5, make_t5_tokenizer, make_wan_vae, open_heads, pictures_for_scale


def make(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    tokenizer = make_t5_tokenizer()
    vae = make_wan_vae(pictures_for_scale(frames=5))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_t5("UMT5", tokenizer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=open_heads(transformer),
    ).save_pretrained(folder)
