"""Tiny random models of the real classes, in the diffusers folder format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpipe.toy.media import COLOURS, SHAPES

M = TypeVar("M", bound=nn.Module)
WORDS = ("a", "on", "moving", "right", "left", "down", "up", "background", *COLOURS, *SHAPES)


def make_flux(folder: Path, pictures: Tensor) -> None:
    """A FluxPipeline of a few hundred thousand weights; its VAE's scale fits ``pictures`` (B C H W)."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(folder / "tokenizer", 77), make_t5_tokenizer(16)
    shape: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 8, 16, 16],
    }
    vae: Any = AutoencoderKL(
        **shape, layers_per_block=1, latent_channels=4, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False
    ).eval()
    with torch.no_grad():
        mode = vae.encode(pictures).latent_dist.mode()
    vae.register_to_config(shift_factor=mode.mean().item(), scaling_factor=1 / mode.std().item())
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
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=32,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
            )
        ),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
        ),
        tokenizer_2=t5_tokenizer,
        transformer=open_heads(transformer),
    ).save_pretrained(folder)


def make_wan(folder: Path, clips: Tensor) -> None:
    """A WanPipeline of a few hundred thousand weights; its VAE's statistics fit ``clips`` (B C F H W)."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = make_t5_tokenizer(16)
    vae: Any = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    with torch.no_grad():
        mode = vae.encode(clips).latent_dist.mode()
    vae.register_to_config(latents_mean=mode.mean((0, 2, 3, 4)).tolist(), latents_std=mode.std((0, 2, 3, 4)).tolist())
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
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
        ),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=open_heads(transformer),
    ).save_pretrained(folder)


def open_heads(module: M) -> M:
    """The module with every all-zero weight drawn small instead, so that no gradient is blocked at the start."""
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return module


def make_t5_tokenizer(length: int) -> Any:
    """A tokenizer with one token per known word, in the format of T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def make_clip_tokenizer(folder: Path, length: int) -> Any:
    """A byte-pair tokenizer without merges: one token per letter, in the format of CLIP's."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def pictures_for_scale(frames: int) -> Tensor:
    """A few drawn pictures in [-1, 1] to measure latents on: B C H W, or B C F H W with ``frames`` above 0."""
    import numpy as np

    from diffpipe.toy.media import draw

    colours = sorted(COLOURS)
    drawn = [draw(SHAPES[i % 3], colours[i], colours[i - 1], (64, 64), (32, 32), 16) for i in range(len(colours))]
    pixels = torch.stack([torch.from_numpy(np.array(d)).permute(2, 0, 1) for d in drawn]) / 127.5 - 1
    return pixels[:, :, None].repeat(1, 1, frames, 1, 1) if frames else pixels
