"""A ChromaPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path

from diffpipe.toy.tiny import make_image_vae, make_t5, make_t5_tokenizer, open_heads, pictures_for_scale


def make(folder: Path) -> None:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer = make_t5_tokenizer()
    vae = make_image_vae(pictures_for_scale(frames=0), 4, use_quant_conv=False, use_post_quant_conv=False)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=64,
        approximator_layers=2,
    )
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=make_t5("T5", tokenizer),
        tokenizer=tokenizer,
        transformer=open_heads(transformer),
    ).save_pretrained(folder)
