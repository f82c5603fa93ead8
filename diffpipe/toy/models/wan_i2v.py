"""A WanImageToVideoPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path

from diffpipe.toy.tiny import make_t5, make_t5_tokenizer, make_wan_vae, open_heads, pictures_for_scale


def make(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    # diffusers' attention takes the last 512 tokens for text and what comes before for the image's.
    tokenizer = make_t5_tokenizer(512)
    eyes = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, hidden_act="gelu"
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4 + 4 + 4,  # noisy latents, mask, latents of the first frame
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
        image_dim=32,
        added_kv_proj_dim=64,
    )
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=make_t5("UMT5", tokenizer),
        image_encoder=CLIPVisionModel(eyes),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        vae=make_wan_vae(pictures_for_scale(frames=5)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=open_heads(transformer),
    ).save_pretrained(folder)
