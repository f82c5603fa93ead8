"""What tiny random models share: tokenizers of a few words, small text encoders, pictures to measure latents on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpipe.toy.media import COLOURS, SHAPES

M = TypeVar("M", bound=nn.Module)
WORDS = ("a", "on", "moving", "right", "left", "down", "up", "background", *COLOURS, *SHAPES)
LENGTH = 16  # tokens of a caption
# Four levels, so that a latent cell is 8 x 8 pixels as in the released VAEs.
VAE_SHAPE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def make_image_vae(pictures: Tensor, channels: int, **config: Any) -> Any:
    """An AutoencoderKL whose scale fits ``pictures`` (B C H W)."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**VAE_SHAPE, latent_channels=channels, **config).eval()
    with torch.no_grad():
        mode = vae.encode(pictures).latent_dist.mode()
    vae.register_to_config(shift_factor=mode.mean().item(), scaling_factor=1 / mode.std().item())
    return vae


def make_wan_vae(clips: Tensor) -> Any:
    """An AutoencoderKLWan whose statistics fit ``clips`` (B C F H W)."""
    from diffusers import AutoencoderKLWan

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
    return vae


def make_t5(kind: str, tokenizer: Any, feed_forward: str = "gated-gelu") -> Any:
    """A small text encoder: ``kind`` is "T5" or "UMT5"; the first T5, of 2019, has another ``feed_forward``: "relu"."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj=feed_forward
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def make_clip(tokenizer: Any, kind: str = "CLIPTextModel", width: int = 32) -> Any:
    """A small CLIP text encoder of class ``kind``."""
    import transformers

    return getattr(transformers, kind)(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def open_heads(module: M) -> M:
    """The module with every all-zero weight drawn small instead, so that no gradient is blocked at the start."""
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)
    return module


def make_t5_tokenizer(length: int = LENGTH) -> Any:
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


def make_clip_tokenizer(folder: Path, length: int = 77) -> Any:
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
