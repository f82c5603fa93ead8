"""Two stages export while the first cannot write: each says what it was told, and none waits for the other.

python stuck.py HOME
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from diffpipe.config.schema import Config, MeshConfig
from diffpipe.errors import DiffpipeError
from diffpipe.export.run import export_weights
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.toy import materialize
from tests.export.tiny import model_of, trained

home = Path(sys.argv[1])
config = materialize(
    Config.model_validate(
        {
            "output_dir": home,
            "run": {"steps": 1},
            "mesh": {"stages": 2},
            "model": {"family": "wan", "path": "toy:wan", "dtype": "float32"},
            "data": {"folders": [{"path": "unused"}]},
        }
    )
)
with open_mesh(MeshConfig(stages=2)) as mesh:
    module = trained(config)
    if mesh.stage == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        export_weights(config, model_of(config), module, mesh, home / "exports" / "step-1", ["diffusers"])
    except DiffpipeError as fault:
        (home / f"told-{mesh.stage}.txt").write_text(str(fault))
