"""Describes a run before its first step: what is trained, and where."""

from __future__ import annotations

import platform

import psutil
import torch

from diffpipe.config.schema import Config
from diffpipe.metrics import Place, RunRecord
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.mesh import Mesh
from diffpipe.run import Run

KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}


def describe(config: Config, model: DiffusionModel, run: Run, mesh: Mesh) -> RunRecord:
    """The record of a run, the same on every rank; called by all of them."""
    adapter = config.adapter
    what = "all weights" if adapter is None else f"{KINDS[adapter.kind]} of rank {adapter.rank}"
    return RunRecord(
        name=run.folder.name,
        trains=f"{model.title}, {what}",
        places=tuple(mesh.exchange(_place(config, mesh))),
        config=config.model_dump(mode="json"),
        resumed=run.resumed.name if run.resumed is not None else "",
    )


def _place(config: Config, mesh: Mesh) -> Place:
    name, memory = platform.processor() or platform.machine(), 0
    if mesh.device.type == "cuda":
        properties = torch.cuda.get_device_properties(mesh.device)
        budget = config.mesh.memory[mesh.stage] if config.mesh.memory is not None else config.memory.budget
        name, memory = properties.name, budget or properties.total_memory
    return Place(mesh.stage, mesh.replica, f"{name} on {platform.node()}", memory, psutil.virtual_memory().total)
