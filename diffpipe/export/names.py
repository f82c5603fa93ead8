"""Which rows of which original tensor each diffusers parameter is, found by sending row numbers through diffusers' converter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffpipe.errors import DiffpipeError
from diffpipe.export.originals import ORIGINALS

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Piece:
    """A run of rows of a diffusers parameter, as part of an original tensor.

    Attributes:
        name: the diffusers parameter.
        start, stop: its rows, as shares of its row count: a tiny model's rows follow from its own shapes.
    """

    name: str
    start: float = 0.0
    stop: float = 1.0


NameMap = dict[str, list[Piece]]  # original name to the pieces it is made of, in order


def original_names(denoiser: str, parameters: Collection[str]) -> NameMap:
    """The original tensors of a model, each as pieces of diffusers parameters in the order of their rows.

    The converter only knows the released widths, so the map is found on blocks of those, and then holds for
    every block and width: what repeats over blocks has one block's number in its name.

    Args:
        denoiser: name of the diffusers class.
        parameters: names of the model's diffusers parameters, all of which the map must cover.

    Raises:
        DiffpipeError: when a parameter has no place in the original format.
    """
    template = _template(denoiser)
    found: NameMap = {}
    covered: set[str] = set()
    for original, pieces in template.items():
        for number in _numbers(pieces[0].name, parameters):
            filled = [Piece(_fill(p.name, number), p.start, p.stop) for p in pieces]
            if all(p.name in parameters for p in filled):
                found[_fill(original, number)] = filled
                covered |= {p.name for p in filled}
    missing = set(parameters) - covered
    if missing:
        raise DiffpipeError(
            f"{len(missing)} parameters have no original name, such as {min(missing)}", where="export.formats", fix="export as diffusers"
        )
    return found


def _fill(template: str, number: str) -> str:
    return template.replace("{n}", number)


def _numbers(template: str, parameters: Collection[str]) -> list[str]:
    """The block numbers that a template stands for in this model; one empty string when it names no block."""
    if "{n}" not in template:
        return [""]
    pattern = re.compile(re.escape(template).replace(r"\{n\}", r"(\d+)"))
    return sorted({m.group(1) for name in parameters if (m := pattern.fullmatch(name))}, key=int)


def _template(denoiser: str) -> NameMap:
    """The map with block numbers as ``{n}``, from one block of each kind at released width."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if denoiser not in ORIGINALS:
        raise DiffpipeError(f"the original names of {denoiser} are not known", where="export.formats", fix="export as diffusers")
    rows, config = ORIGINALS[denoiser]
    ids: dict[str, Tensor] = {}
    starts: list[int] = []
    names = list(rows)
    total = 0
    for name, shape in rows.items():
        ids[name] = torch.arange(total, total + shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        starts.append(total)
        total += shape[0]
    converted = SINGLE_FILE_LOADABLE_CLASSES[denoiser]["checkpoint_mapping_fn"](checkpoint=dict(ids), config=dict(config))
    edges = torch.tensor(starts)
    runs: dict[str, list[tuple[int, Piece]]] = {name: [] for name in names}
    for parameter, tensor in converted.items():
        numbers = tensor.reshape(-1)
        count = len(numbers)
        # A new run begins where row numbers stop rising by one, as where two halves were swapped.
        cuts = [0, *(torch.nonzero(numbers[1:] != numbers[:-1] + 1).reshape(-1) + 1).tolist(), count]
        for a, b in pairwise(cuts):
            owner = int(torch.searchsorted(edges, numbers[a], right=True)) - 1
            runs[names[owner]].append((int(numbers[a]), Piece(_general(parameter), a / count, b / count)))
    return {_general(name): [piece for _, piece in sorted(found, key=lambda r: r[0])] for name, found in runs.items() if found}


def _general(name: str) -> str:
    """The name with its first number, a block's, as ``{n}``; later numbers are places inside the block."""
    return NUMBER.sub("{n}", name, count=1) if name.split(".")[0].endswith("blocks") else name


def rename(tensors: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Full weights under original names; nothing is read yet."""
    renamed: dict[str, Tensor] = {}
    for original, pieces in names.items():
        rows = [tensors[p.name] if (p.start, p.stop) == (0.0, 1.0) else _rows(tensors[p.name], p) for p in pieces]
        renamed[original] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return renamed


def _rows(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor[round(piece.start * tensor.shape[0]) : round(piece.stop * tensor.shape[0])]


def rename_lora(tensors: Mapping[str, Tensor], names: NameMap, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Adapters under original names, one per original layer.

    Layers that the original format joins (q, k, v) become one adapter whose A is theirs stacked and whose B is
    block diagonal: its rank is the sum of theirs and its update is exactly theirs side by side.

    Args:
        tensors: by ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``.
        rows: of each diffusers parameter, for layers without an adapter inside a joined one.
    """
    renamed: dict[str, Tensor] = {}
    for original, pieces in names.items():
        layers = list(dict.fromkeys(p.name.removesuffix(".weight") for p in pieces))
        adapted = [layer for layer in layers if f"{layer}.lora_A.weight" in tensors]
        if not original.endswith(".weight") or not adapted:
            continue
        downs = [tensors[f"{layer}.lora_A.weight"] for layer in adapted]
        ups = {layer: tensors[f"{layer}.lora_B.weight"] for layer in adapted}
        blocks = []
        for piece in pieces:
            layer = piece.name.removesuffix(".weight")
            height = round((piece.stop - piece.start) * rows[piece.name])
            like = ups[adapted[0]]
            row = [_rows(ups[a], piece) if a == layer else like.new_zeros(height, ups[a].shape[1]) for a in adapted]
            blocks.append(torch.cat(row, 1))
        layer = original.removesuffix(".weight")
        renamed[f"{layer}.lora_A.weight"] = torch.cat(downs)
        renamed[f"{layer}.lora_B.weight"] = torch.cat(blocks)
    return renamed
