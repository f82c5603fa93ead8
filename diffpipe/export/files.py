"""Writes safetensors files tensor by tensor, so that no file is ever held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from diffpipe.durable import written
from diffpipe.errors import DiffpipeError
from diffpipe.models.weights import DTYPES, lazily, realise

CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write ``tensors`` (lazy ones are made one at a time), aside and then renamed.

    Raises:
        DiffpipeError: when the file cannot be written; nothing half-written stays.
    """
    # As safetensors itself does: types of more bytes first, so that every tensor begins at a multiple of its own,
    # then by name, so that equal weights are equal files.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name, tensor in ordered.items():
        end = begin + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered.values():
            value = realise(tensor).detach().cpu().contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)

    return _write(path, fill)


def write_json(path: Path, content: object) -> Path:
    """Write ``content`` as JSON, aside and then renamed.

    Raises:
        DiffpipeError: when the file cannot be written.
    """
    return _write(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def cast(tensors: Mapping[str, Tensor], kind_of: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
    """The tensors with floating-point ones in the type that ``kind_of`` their name is; none is made yet."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind = kind_of(name) if tensor.is_floating_point() else tensor.dtype
        lazy = lazily(tensor.shape, kind, lambda tensor=tensor, kind=kind: realise(tensor).detach().to(kind))
        result[name] = tensor if tensor.dtype == kind else lazy
    return result


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as file:
            fill(file)
    except OSError as fault:
        raise DiffpipeError(
            f"cannot be written: {fault}", where=str(path), fix="free some space, or set output_dir to another disk"
        ) from fault
    return path
