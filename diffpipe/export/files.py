"""Writes safetensors files tensor by tensor, so that no file is ever held in memory."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffpipe.errors import DiffpipeError
from diffpipe.models.weights import DTYPES, realise

CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None) -> Path:
    """Write ``tensors`` (lazy ones are made one at a time), aside and then renamed.

    Args:
        dtype: what floating-point tensors are cast to; None keeps each as it is.

    Raises:
        DiffpipeError: when the file cannot be written; nothing half-written stays.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name, tensor in tensors.items():
        kind = _target(tensor, dtype)
        end = begin + tensor.numel() * kind.itemsize
        header[name] = {"dtype": CODES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for tensor in tensors.values():
                value = realise(tensor).detach().to("cpu", _target(tensor, dtype)).contiguous()
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as fault:
        aside.unlink(missing_ok=True)
        raise DiffpipeError(f"cannot be written: {fault}", where=str(path), fix="free some space, or set output_dir to another disk") from fault
    return path


def _target(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
