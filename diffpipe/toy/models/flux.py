"""A FluxPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path

from diffpipe.toy.tiny import make_clip, make_clip_tokenizer, make_image_vae, make_t5, make_t5_tokenizer, open_heads, pictures_for_scale


def make(folder: Path, pipeline: str = "FluxPipeline") -> None:
    """Write it, as ``pipeline`` where another one is made of the same components."""
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    clip, t5 = make_clip_tokenizer(folder / "tokenizer"), make_t5_tokenizer()
    vae = make_image_vae(pictures_for_scale(frames=0), 4, use_quant_conv=False, use_post_quant_conv=False)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    getattr(diffusers, pipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=make_clip(clip),
        tokenizer=clip,
        text_encoder_2=make_t5("T5", t5),
        tokenizer_2=t5,
        transformer=open_heads(transformer),
    ).save_pretrained(folder)
