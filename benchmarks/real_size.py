"""Runs a LoRA training at a model's real size on random weights: does it start, step and export, how fast, in how much memory.

    python benchmarks/real_size.py flux  [--steps 8] [--resolution 1024] [--work DIR]
    python benchmarks/real_size.py wan   [--steps 4] [--resolution 512 --frames 81]

The denoiser has the released size and is written as real safetensors; encoders are small ones of the real classes with the
released output widths, so only act two is of real size. Needs 30 GB of disk, and a GPU for figures that mean something.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffpipe.export.files import write_safetensors  # noqa: E402
from diffpipe.models.weights import Lazy  # noqa: E402
from diffpipe.toy.media import SHAPES, draw, write_clip  # noqa: E402
from diffpipe.toy.tiny import make_clip_tokenizer, make_t5_tokenizer  # noqa: E402


def text_encoder(kind: str, width: int, vocabulary: int) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, d_model=width, d_kv=64, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def make_flux(folder: Path) -> nn.Module:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip, t5 = make_clip_tokenizer(folder / "tokenizer", 77), make_t5_tokenizer(512)
    config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [8] * 4}
    vae = AutoencoderKL(**blocks, layers_per_block=1, latent_channels=16, norm_num_groups=4, scaling_factor=1.0, shift_factor=0.0)
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, CLIPTextModel(config), clip, text_encoder("T5", 4096, len(t5)), t5, None
    ).save_pretrained(folder)
    with init_empty_weights():
        return FluxTransformer2DModel(guidance_embeds=True)


def make_wan(folder: Path) -> nn.Module:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    t5 = make_t5_tokenizer(512)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    WanPipeline(
        tokenizer=t5,
        text_encoder=text_encoder("UMT5", 4096, len(t5)),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=None,
    ).save_pretrained(folder)
    with init_empty_weights():
        return WanTransformer3DModel()


def write_denoiser(folder: Path, empty: nn.Module) -> int:
    """Random bf16 weights in files of 10 GB, made one tensor at a time; returns their bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(shape: torch.Size) -> torch.Tensor:
        # Norm weights near one and small biases, as in a trained model: depth must not blow activations up.
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=torch.bfloat16)
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.01

    tensors = {
        n: Lazy(torch.empty(t.shape, dtype=torch.bfloat16, device="meta"), lambda s=t.shape: random(s))
        for n, t in empty.state_dict().items()
    }
    names = list(tensors)
    size = sum(t.numel() * 2 for t in tensors.values())
    count = size // (10 << 30) + 1
    groups = [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, group in zip(files, groups, strict=True):
        write_safetensors(folder / file, {n: tensors[n] for n in group}, {})
    weight_map = {n: f for f, group in zip(files, groups, strict=True) for n in group}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    empty.save_config(folder)
    return size


def make_media(folder: Path, resolution: int, frames: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        pictures = [draw(SHAPES[i], "red", "blue", (resolution, resolution), (200 + 2 * f, 200), 90) for f in range(frames)]
        file = folder / (f"{i}.mp4" if frames > 1 else f"{i}.png")
        write_clip(file, pictures) if frames > 1 else pictures[0].save(file)
        file.with_suffix(".txt").write_text(f"a red {SHAPES[i]} on a blue background")


def run(work: Path, family: str, steps: int, resolution: int, frames: int, settings: list[str]) -> tuple[int, int]:
    """Train through the command line; returns the largest anonymous host memory while loading, and over all, in bytes."""
    config = {
        "output_dir": str(work / "runs"),
        "run": {"steps": steps},
        "model": {"family": family, "path": str(work / family)},
        "adapter": {"rank": 32},
        "data": {
            "folders": [{"path": str(work / f"{family}-media")}],
            "resolutions": [resolution],
            "frames": sorted({1, frames}),
            "workers": 1,
        },
        "export": {"formats": ["diffusers", "comfyui"]},
    }
    path = work / f"{family}.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "diffpipe", "train", str(path), *(f"--set={setting}" for setting in settings)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = loading = 0
    import threading

    stepping = threading.Event()

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("step "):
                stepping.set()

    reader = threading.Thread(target=show)
    reader.start()
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
        peak = max(peak, anonymous)
        loading = loading if stepping.is_set() else max(loading, anonymous)
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        sys.exit(process.returncode)
    return loading, peak


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("family", choices=["flux", "wan"])
    options.add_argument("--steps", type=int, default=8, help="0 only writes the weights")
    options.add_argument("--resolution", type=int, default=1024)
    options.add_argument("--frames", type=int, default=1)
    options.add_argument("--work", type=Path, default=Path("real-size"))
    options.add_argument("--set", action="append", default=[], help="passed on to train")
    given = options.parse_args()
    folder = given.work / given.family
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "written"
    if not done.exists():
        begun = time.time()
        size = write_denoiser(folder / "transformer", {"flux": make_flux, "wan": make_wan}[given.family](folder))
        index = json.loads((folder / "model_index.json").read_text())
        index["transformer"] = ["diffusers", {"flux": "FluxTransformer2DModel", "wan": "WanTransformer3DModel"}[given.family]]
        (folder / "model_index.json").write_text(json.dumps(index))
        print(f"wrote {size / 2**30:.1f} GiB of weights in {time.time() - begun:.0f} s", flush=True)
        done.touch()
    if not given.steps:
        return
    make_media(given.work / f"{given.family}-media", given.resolution, given.frames)
    loading, peak = run(given.work.resolve(), given.family, given.steps, given.resolution, given.frames, given.set)
    print(f"host memory (anonymous, without mapped files): {loading / 2**30:.2f} GiB until the first step, {peak / 2**30:.2f} GiB over all")


if __name__ == "__main__":
    main()
