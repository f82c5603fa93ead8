"""Every family at its released size and usual resolution with random weights: does a LoRA start, step and export, how fast, in
how much memory.

    python -m benchmarks.families [FAMILY ...] [--steps 3]
    python -m benchmarks.families --foresee H100   # what is planned, on any machine
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.synthetic import USUAL, Config, DiffusionModel, make_random, microbatches
from diffpipe.pipeline.memory.estimate import Estimate


def config_of(family: str, steps: int) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": steps},
            "model": {"family": family},
            "adapter": {"rank": 32},
            "data": {"folders": [{"path": "unused"}]},
            "export": {"formats": ["diffusers", "comfyui", "kohya"]},
        }
    )


def foresee(family: str, config: Config, model: DiffusionModel, card: str | None) -> Estimate:
    """What a step is planned to hold and take; needs no GPU where the card is named."""
    from diffpipe.pipeline.memory.cards import find_card
    from diffpipe.pipeline.rehearsal import Rehearsal

    height, width, frames = USUAL[family]
    return Rehearsal(config, model, 0, find_card(card, torch.device("cpu" if card else "cuda"))).estimate(
        (frames, height, width), config.memory
    )


def run(family: str, steps: int, folder: Path) -> str:
    """One family's row of the table."""
    from diffpipe.export.run import export_weights
    from diffpipe.optim import make_optimizer, set_rates
    from diffpipe.pipeline.build import build
    from diffpipe.pipeline.mesh import open_mesh

    height, width, frames = USUAL[family]
    config = config_of(family, steps)
    model = make_random(config)
    foreseen = foresee(family, config, model, None)
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        module = pipeline.module
        built = time.perf_counter() - begun
        optimizer = make_optimizer(config.optimizer, module.named_parameters())
        set_rates(optimizer, 1.0)
        times, losses = [], []
        for step in range(steps + 1):
            batch = microbatches(model, height, width, frames, 1, step)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            losses.append(pipeline.train(batch).item())
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        files = export_weights(config, model, module, mesh, folder / family, config.export.formats)
        exported = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() / 2**30
    assert len(files) == 3 and all(f.stat().st_size > 1 << 20 for f in files)
    count = sum(p.numel() for p in module.parameters()) / 1e9
    size = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
    return (
        f"| {family} | {count:.1f} B | {size} | {statistics.median(times[1:]):.2f} | {peak:.1f} "
        f"| {foreseen.seconds:.2f} | {foreseen.peak / 2**30:.1f} | {losses[0]:.3f} | {built:.0f} | {exported:.0f} |"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("families", nargs="*", default=sorted(USUAL))
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--foresee", metavar="CARD", help="run nothing; print what is foreseen for a card, such as H100")
    given = options.parse_args()
    if given.foresee:
        for family in given.families:
            config = config_of(family, given.steps)
            estimate = foresee(family, config, make_random(config), given.foresee)
            print(f"| {family} | {estimate.peak / 2**30:.1f} | {estimate.seconds:.2f} |", flush=True)
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    print("| family | parameters | size | s/step | peak GiB | foreseen s/step | peak GiB | first loss | build s | export s |")
    print("|" + " --- |" * 10)
    with tempfile.TemporaryDirectory() as folder:
        for family in given.families:
            print(run(family, given.steps, Path(folder)), flush=True)
            gc.collect()  # its parts know each other, and would be counted with the next family's
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
