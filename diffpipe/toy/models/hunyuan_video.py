"""A HunyuanVideoPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpipe.toy.tiny import LENGTH, WORDS, make_clip, make_clip_tokenizer, open_heads, pictures_for_scale

TEMPLATE = 95  # tokens that the pipeline cuts off before the caption


def make(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import LlamaConfig, LlamaModel

    clip, words = make_clip_tokenizer(folder / "tokenizer_2"), _tokenizer()
    llama = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=words.pad_token_id,
        initializer_range=0.5,  # so that text is of about unit size
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=words,
        transformer=open_heads(transformer),
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=make_clip(clip),
        tokenizer_2=clip,
    ).save_pretrained(folder)


def _vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    shape: dict[str, Any] = {"latent_channels": 4, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
    vae: Any = AutoencoderKLHunyuanVideo(**shape).eval()
    with torch.no_grad():
        mode = vae.encode(pictures_for_scale(frames=5)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / mode.std().item())
    return vae


def _tokenizer() -> Any:
    """One token a word, in the format of Llama 3's; as there, the template before the caption is 95 tokens long."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    vocabulary = {token: i for i, token in enumerate([*marks, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(marks)
    # Llama takes one word of the template for two: so does this, of a word that no caption has.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|detail|\w+|[^\w\s]"), "removed", invert=True)
    begin = ("<|begin_of_text|>", vocabulary["<|begin_of_text|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=TEMPLATE + LENGTH,
    )
