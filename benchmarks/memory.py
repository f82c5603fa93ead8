"""Speed and memory of training at real size under memory policies, on one GPU, with random weights: LoRA of rank 32, or in full.

    python -m benchmarks.memory [CASE ...] [--steps 9]
    python -m benchmarks.memory [CASE ...] --foresee H200

Prints for each case seconds a step (median after four steps), the largest memory allocated from the fifth step on, what the planner
predicted of both, host memory that streams use, and what was copied. Each case runs in a process of its own. With ``--foresee`` nothing is
run, and no GPU is needed: what the planner predicts for a card is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.synthetic import Config, DiffusionModel, make_random, microbatches
from diffpipe.metrics import amount
from diffpipe.pipeline.memory.estimate import Estimate
from diffpipe.pipeline.memory.layer import MemoryLayer

FLUX = ("flux", 1024, 1024, 1)
WAN = ("wan", 512, 512, 81)
FP8 = {"quantize": "fp8", "compile": True}
LEAST = {**FP8, "swap": "all", "offload": True}
GRAPHS = {"cuda_graphs": True}
BUS = {"FluxTransformerBlock": "block"}  # their weights take longer to come than they take to compute
# By name: family, height, width and frames; microbatches; the memory section.
CASES: dict[str, tuple[tuple[str, int, int, int], int, dict]] = {
    "flux-plain": (FLUX, 1, {}),
    "flux-compiled": (FLUX, 1, {"compile": True}),
    "flux-fp8": (FLUX, 1, FP8),
    "flux-free": (FLUX, 1, {**FP8, **GRAPHS, "recompute": "none"}),
    "flux-least": (FLUX, 1, {**LEAST, **GRAPHS, "quantize": "fp7", "recompute": "selective", "recompute_kinds": BUS, "room": 1200}),
    "flux-least-4": (FLUX, 4, {**LEAST, **GRAPHS, "recompute": "selective"}),
    "wan-plain": (WAN, 1, {}),
    "wan-fp8": (WAN, 1, FP8),
    "wan-free": (WAN, 1, {**FP8, "recompute": "selective", "recompute_every": 2}),  # takes 117 GiB
    "wan-least": (WAN, 1, {**LEAST, "recompute": "parts", "feed_forward_chunks": 2}),
    "flux-full": (FLUX, 1, {"compile": True, "swap": "all", "room": 6000}),
}
# Cases whose adapters are stepped in the backward pass, their optimizer's state in host memory.
RELEASED = {"release": True, "offload": True}
STEPPING = {"wan-least": RELEASED}
WARM = 4  # steps that compile, find out in which order weights come, and are captured


def config_of(name: str, steps: int, extra: dict, attention: str) -> Config:
    (family, *_), count, memory = CASES[name]
    return Config.model_validate(
        {
            "run": {"steps": steps},
            "model": {"family": family, "trainable_dtype": "bfloat16", "attention": attention},
            "adapter": None if name.endswith("full") else {"rank": 32},
            "optimizer": {"kind": "adamw8bit-kahan", "clip": None, **STEPPING.get(name, {})},
            "batch": {"accumulate": count},
            "data": {"folders": [{"path": "unused"}]},
            "memory": {**memory, **extra},
        }
    )


def foreseen(name: str, config: Config, model: DiffusionModel, card: str | None) -> Estimate:
    """What the planner predicts of a case's steps on a card, by default the one that is there."""
    from diffpipe.pipeline.memory.cards import find_card
    from diffpipe.pipeline.rehearsal import Rehearsal

    height, width, frames = CASES[name][0][1:]
    device = torch.device("cpu" if card else "cuda")
    return Rehearsal(config, model, 0, find_card(card, device)).estimate((frames, height, width), config.memory)


def run(name: str, config: Config, steps: int, profile: bool) -> dict[str, float]:
    """One case in this process."""
    from diffpipe.optim import make_optimizer, set_rates
    from diffpipe.pipeline.build import build
    from diffpipe.pipeline.mesh import open_mesh
    from diffpipe.pipeline.replay import spare_workspace

    if config.memory.cuda_graphs:
        spare_workspace()
    (_, height, width, frames), count, _ = CASES[name]
    model = make_random(config)
    predicted = foreseen(name, config, model, None)
    print(f"  predicted {predicted.told()}, {predicted.seconds:.3f} s", flush=True)
    begun = time.perf_counter()
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        module = pipeline.module
        optimizer = make_optimizer(config.optimizer, module.named_parameters())
        release = pipeline.memory.release_with(optimizer, mesh.mean_over_replicas)
        set_rates(optimizer, 1.0)
        print(f"  built in {time.perf_counter() - begun:.1f} s", flush=True)
        times, losses, copied, peak = [], [], [], 0
        for step in range(steps):
            batch = microbatches(model, height, width, frames, count, step)
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            losses.append(pipeline.train(batch).item())
            trained = time.perf_counter() - begun
            release.step_rest()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
            if step >= WARM:
                peak = max(peak, pipeline.held())
            else:
                copied.append(moved(pipeline.memory))  # what is replayed later does the same, uncounted
            print(f"  step {step}: {times[-1]:.3f} s, optimizer {times[-1] - trained:.3f} s, loss {losses[-1]:.5f}", flush=True)
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                pipeline.train(microbatches(model, height, width, frames, count))
                torch.cuda.synchronize()
            print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=70), file=sys.stderr)
        stream, offload = pipeline.memory.stream, pipeline.memory.offload
        return {
            "seconds": statistics.median(times[WARM:]),
            "peak": peak / 2**30,
            "predicted": predicted.peak / 2**30,
            "ratio": predicted.peak / peak,
            "foreseen": predicted.seconds,
            "host": (sum(h.flat.numel() for h in stream.homes.values()) if stream else 0) / 2**30
            + (offload.held if offload else 0) / 2**30,
            "moved": (copied[-1] - copied[-2]) / 2**30,
            "loss": losses[-1],
        }


def moved(memory: MemoryLayer) -> int:
    """Bytes that were copied so far, both ways."""
    return (memory.stream.moved if memory.stream else 0) + (2 * memory.offload.moved if memory.offload else 0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("cases", nargs="*", default=list(CASES))
    options.add_argument("--steps", type=int, default=9)
    options.add_argument("--set", action="append", default=[], help="a key of the memory section, as JSON: room=2000")
    options.add_argument("--attention", default="fa4", choices=["sdpa", "fa4", "cudnn"], help="kernels, as model.attention")
    options.add_argument("--profile", action="store_true", help="print where a step's time goes on the device")
    options.add_argument("--here", action="store_true", help="run in this process and print JSON")
    options.add_argument("--foresee", metavar="CARD", help="run nothing, and print what the planner predicts for the card")
    given = options.parse_args()
    extra = {k: json.loads(v) for k, _, v in (s.partition("=") for s in given.set)}
    configs = {name: config_of(name, given.steps, extra, given.attention) for name in given.cases}
    if given.here:
        print(json.dumps(run(given.cases[0], configs[given.cases[0]], given.steps, given.profile)))
        return
    if given.foresee:
        for name, config in configs.items():
            found = foreseen(name, config, make_random(config), given.foresee)
            print(f"{name:22} {found.seconds:.3f} s, {found.told()}, to device {amount(found.to_device)} a step", flush=True)
        return
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for name in given.cases:
        arguments = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            name,
            "--here",
            f"--steps={given.steps}",
            f"--attention={given.attention}",
            *(f"--set={s}" for s in given.set),
        ]
        arguments += ["--profile"] if given.profile else []
        done = subprocess.run(arguments, capture_output=True, text=True)
        if given.profile:
            print("\n".join(line for line in done.stderr.splitlines() if "|" not in line)[-6000:], flush=True)
        if done.returncode:
            print(f"{name:22} failed: {done.stderr.strip().splitlines()[-1]}\n{done.stderr[-1500:]}", flush=True)
            continue
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name:22} " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    main()
