"""What diffusion-pipe calls its model types, where their files lie, and which of its keys it reads for which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from diffpipe.config.schema import DType

DTYPES = get_args(DType)


@dataclass(frozen=True)
class Family:
    """What of diffusion-pipe's way with one model type a conversion must know.

    Attributes:
        kind: what it calls the type.
        name: the family here.
        paths: by its key, the components here that the file or folder is.
        folder: the key of a folder whose parts are components here, and where in it each lies.
        units: units here in each layer of its list, by which partition_split counts.
        paired: whether the family has two kinds of blocks, of which blocks_to_swap n keeps n // 2 of the first in host memory and
            2 (n - n // 2) + 1 of the second.
        format: what its LoRAs are saved as.
    """

    kind: str
    name: str
    paths: Mapping[str, tuple[str, ...]]
    folder: tuple[str, Mapping[str, str]] | None = None
    units: tuple[int, ...] = (0, *[1] * 200)
    paired: bool = False
    format: str = "comfyui"

    def streamed(self, swapped: int) -> int:
        """Blocks whose weights blocks_to_swap keeps in host memory."""
        first = swapped // 2
        return first + 2 * (swapped - first) + 1 if self.paired else swapped


def _paired(first: int, second: int) -> tuple[int, ...]:
    return (0, *[1] * first, 0, *[1] * second, 0)


# A layer of SDXL's list is a resnet with the attention behind it, or a sampler; that of the middle's second resnet has the attention.
SDXL_UNITS = (0, 1, 1, 1, 2, 2, 1, 2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 2, 1, 1, 1, 1, 0)
ONE = {"transformer_path": ("transformer",), "vae_path": ("vae",)}
OFFICIAL_HUNYUAN = {
    "transformer": "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
    "vae": "hunyuan-video-t2v-720p/vae/pytorch_model.pt",
    "text_encoder": "text_encoder",
    "tokenizer": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "tokenizer_2": "text_encoder_2",
}
OFFICIAL_WAN = {
    "transformer": "",
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "google/umt5-xxl",
}
WAN_CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
FAMILIES = {
    f.kind: f
    for f in (
        Family("sdxl", "sdxl", {}, units=SDXL_UNITS, format="kohya"),
        Family("flux", "flux", {"transformer_path": ("transformer",)}, units=_paired(19, 38), paired=True, format="diffusers"),
        Family("ltx-video", "ltx-video", {}),
        Family(
            "hunyuan-video",
            "hunyuan-video",
            {**ONE, "llm_path": ("text_encoder", "tokenizer"), "clip_path": ("text_encoder_2", "tokenizer_2")},
            ("ckpt_path", OFFICIAL_HUNYUAN),
            _paired(20, 40),
            paired=True,
        ),
        Family("cosmos", "cosmos", {**ONE, "text_encoder_path": ("text_encoder",)}),
        Family("lumina_2", "lumina2", {**ONE, "llm_path": ("text_encoder",)}),
        Family("wan", "wan", {"transformer_path": ("transformer",), "llm_path": ("text_encoder",)}, ("ckpt_path", OFFICIAL_WAN)),
        Family(
            "chroma",
            "chroma",
            {"transformer_path": ("transformer",)},
            ("diffusers_path", {"vae": "vae", "text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}),
            _paired(19, 38),
            paired=True,
        ),
    )
}
# Types that diffusion-pipe trains and diffpipe does not.
ELSEWHERE = (
    *("hidream", "sd3", "cosmos_predict2", "anima", "omnigen2", "qwen_image", "hunyuan_image", "auraflow", "z_image", "hunyuan_video_15"),
    *("flux2", "ernie_image", "ltx2", "ideogram4", "krea2", "minimax_h3"),
)
FLOWS = ("flux", "ltx-video", "hunyuan-video", "lumina_2", "wan", "chroma")
COMFY = ("z_image", "hunyuan_video_15", "flux2", "ernie_image", "ideogram4", "krea2", "minimax_h3")
# Keys that some types alone read; for the others diffusion-pipe ignores them without a word.
READ_BY: dict[str, tuple[str, ...]] = {
    "checkpoint_path": ("sdxl",),
    "v_pred": ("sdxl",),
    "min_snr_gamma": ("sdxl",),
    "debiased_estimation_loss": ("sdxl",),
    "unet_lr": ("sdxl",),
    "text_encoder_1_lr": ("sdxl",),
    "text_encoder_2_lr": ("sdxl",),
    "diffusers_path": ("flux", "ltx-video", "chroma", "hidream", "sd3", "omnigen2", "qwen_image"),
    "transformer_path": ("flux", "hunyuan-video", "cosmos", "lumina_2", "wan", "chroma", "cosmos_predict2", "qwen_image", "auraflow"),
    "vae_path": ("hunyuan-video", "cosmos", "lumina_2", "cosmos_predict2", "qwen_image", "hunyuan_image", "auraflow"),
    "text_encoder_path": ("cosmos", "qwen_image", "hunyuan_image", "auraflow"),
    "llm_path": ("hunyuan-video", "lumina_2", "wan", "cosmos_predict2", "anima"),
    "clip_path": ("hunyuan-video",),
    "ckpt_path": ("hunyuan-video", "wan"),
    "single_file_path": ("ltx-video",),
    "first_frame_conditioning_p": ("ltx-video",),
    "bypass_guidance_embedding": ("flux",),
    "transformer_dtype": ("flux", "ltx-video", "hunyuan-video", "wan", "chroma", "hidream", "sd3"),
    "timestep_sample_method": FLOWS,
    "sigmoid_scale": FLOWS,
    "shift": ("flux", "hunyuan-video", "lumina_2", "wan", "chroma"),
    "flux_shift": ("flux", "wan", "chroma", "hidream", "sd3"),
    "lumina_shift": ("lumina_2",),
    "guidance": ("flux", "hunyuan-video"),
    "min_t": ("wan",),
    "max_t": ("wan",),
    "cache_text_embeddings": ("wan", "cosmos_predict2", "anima"),
    "text_encoder_fp8": ("wan", "cosmos_predict2"),
    "text_encoder_nf4": ("cosmos_predict2",),
    "t5_path": ("cosmos_predict2",),
    "multiscale_loss_weight": ("cosmos_predict2", "anima"),
    "self_attn_lr": ("cosmos_predict2", "anima"),
    "cross_attn_lr": ("cosmos_predict2", "anima"),
    "mlp_lr": ("cosmos_predict2", "anima"),
    "mod_lr": ("cosmos_predict2", "anima"),
    "llm_adapter_lr": ("cosmos_predict2", "anima"),
    "llm_adapter_path": ("cosmos_predict2", "anima"),
    "llama3_path": ("hidream",),
    "llama3_4bit": ("hidream",),
    "max_llama3_sequence_length": ("hidream",),
    "byt5_path": ("hunyuan_image",),
    "max_sequence_length": ("auraflow",),
    "diffusion_model": (*COMFY, "ltx2"),
    "diffusion_model_dtype": (*COMFY, "ltx2"),
    "merge_adapters": (*COMFY, "ltx2"),
    "vae": COMFY,
    "text_encoders": COMFY,
    "text_encoder": ("ltx2",),
    "audio_vae": ("minimax_h3",),
    "cfg": ("minimax_h3",),
    "image_shift": ("minimax_h3",),
}
