"""A StableDiffusionXLPipeline of a few hundred thousand weights, cut into the same units as the released one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpipe.toy.tiny import make_clip, make_clip_tokenizer, make_image_vae, open_heads, pictures_for_scale

UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 24 + 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "norm_num_groups": 4,
}


def make(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, tokenizer_2 = make_clip_tokenizer(folder / "tokenizer"), make_clip_tokenizer(folder / "tokenizer_2")
    tokenizer_2.pad_token = "!"
    vae = make_image_vae(pictures_for_scale(frames=0), 4)
    vae.register_to_config(shift_factor=None)
    scheduler: Any = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=make_clip(tokenizer, width=24),
        tokenizer=tokenizer,
        text_encoder_2=make_clip(tokenizer_2, "CLIPTextModelWithProjection", width=32),
        tokenizer_2=tokenizer_2,
        unet=open_heads(UNet2DConditionModel(**UNET)),
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
