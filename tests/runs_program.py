"""Trains every family over two stages in one launch, through the code that the command line calls.

    torchrun --nproc_per_node=2 tests/runs_program.py FOLDER

The run of FAMILY lies in FOLDER/FAMILY-KIND afterwards, KIND being full or lora, or for some a form of the base under a LoRA.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffpipe.config.schema import Config
from diffpipe.models import MODELS, model_class
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.startup import Startup
from diffpipe.toy import materialize
from diffpipe.train import print_fault, train_on

ADAPTERS: dict[str, dict[str, Any] | None] = {"full": None, "lora": {"rank": 4, "alpha": 2.0}}

FEW_BITS = [("flux", "nf4"), ("wan", "fp8")]  # bases whose weights are kept in few bits


def config_of(family: str, kind: str, folder: Path, stages: int) -> Config:
    """Two steps on drawn media, pictures and clips mixed where the family takes both, checkpointed after each."""
    video = model_class(family).geometry.fps is not None
    controls = {"controls": "toy:greys"} if model_class(family).takes_controls else {}
    return Config.model_validate(
        {
            "output_dir": folder / f"{family}-{kind}",
            "run": {"steps": 2, "seed": 5},
            "mesh": {"stages": stages},
            "batch": {"micro": 1, "accumulate": 2},
            "model": {"family": family, "path": f"toy:{family}", "dtype": "float32"},
            "adapter": ADAPTERS.get(kind, ADAPTERS["lora"]),
            "memory": {} if kind in ADAPTERS else {"quantize": kind, "swap": "all"},
            "optimizer": {"lr": 1e-3},
            "data": {
                "folders": [{"path": "toy:clips" if video else "toy:pictures", **controls}],
                "resolutions": [64],
                "frames": [1, 9],
                "aspect": {"min": 1.0, "max": 1.0, "count": 1},
                "cache_dir": folder / "cache",
                "workers": 0,
                "encode_workers": 0,
            },
            "checkpoint": {"every_steps": 1},
            "export": {"formats": ["diffusers", "comfyui"] + (["kohya"] if kind == "lora" else []), "dtype": "float32"},
        }
    )


def prepared(family: str, kind: str, folder: Path, stages: int) -> Config:
    """The config with its toys made once for all runs of the folder."""
    return materialize(config_of(family, kind, folder, stages), folder / "toys")


def main() -> None:
    folder = Path(sys.argv[1])
    runs = [(family, kind) for family in sorted(MODELS) for kind in ADAPTERS] + FEW_BITS
    configs = [prepared(family, kind, folder, 2) for family, kind in runs]
    with open_mesh(configs[0].mesh) as mesh:
        for config in configs:
            train_on(mesh, config, Startup(), resume=None, make_sinks=list, tell=print_fault)


if __name__ == "__main__":
    main()
