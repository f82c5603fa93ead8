"""Which rows of which original tensor each diffusers parameter is, found by sending row numbers through diffusers' converter."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from diffpipe.errors import CheckpointError, DiffpipeError

NUMBER = re.compile(r"(?<=[.a-z])\d+(?=\.)")  # also of names that put it at the end of a word, as Cosmos' blocks.block0
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Originals:
    """The names of a family's original checkpoint, which is also the layout ComfyUI reads.

    Attributes:
        denoiser: name of the diffusers class whose single-file converter knows them.
        shapes: makes names and shapes of one block of each kind at released width: what repeats follows from it.
        config: what the converter asks of the config.
        convert: the converter, where it is not the one that diffusers registers for the class.
        repeats: a name whose first number counts blocks begins with a word that ends like this.
        inside: the word right before the number that counts blocks, where that is not the first number, as in a UNet.
        ignored: patterns of names that files hold and the model has no use for.
    """

    denoiser: str
    shapes: Callable[[], Shapes]
    config: Mapping[str, Any] = field(default_factory=dict)
    convert: Callable[..., dict[str, Tensor]] | None = None
    repeats: tuple[str, ...] = ("blocks",)
    inside: str | None = None
    ignored: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.shapes)

    def number(self, name: str) -> re.Match[str] | None:
        """Where a name, original or diffusers', counts blocks."""
        if self.inside is not None:
            return re.search(rf"(?<=\.{re.escape(self.inside)}\.)\d+(?=\.)", name)
        return NUMBER.search(name) if name.split(".")[0].endswith(self.repeats) else None

    def in_block(self, name: str) -> bool:
        """Whether a name, original or diffusers', counts blocks."""
        return self.number(name) is not None


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


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    """The shapes of a linear layer."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def original_names(originals: Originals, parameters: Collection[str]) -> NameMap:
    """The original tensors of a model, each as pieces of diffusers parameters in the order of their rows.

    The converter only knows the released widths, so the map is found on blocks of those, and then holds for
    every block and width: what repeats over blocks has one block's number in its name.

    Args:
        parameters: names of the model's diffusers parameters, all of which the map must cover.

    Raises:
        DiffpipeError: when a parameter has no place in the original format.
    """
    template = _template(originals)
    found: NameMap = {}
    covered: set[str] = set()
    known = set(parameters)
    for original, pieces in template.items():
        for number in _numbers(pieces[0].name, known):
            filled = [Piece(_fill(p.name, number), p.start, p.stop) for p in pieces]
            if all(p.name in known for p in filled):
                found[_fill(original, number)] = filled
                covered |= {p.name for p in filled}
    missing = known - covered
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


@cache
def _template(originals: Originals) -> NameMap:
    """The map with block numbers as ``{n}``, from one block of each kind at released width."""
    rows = originals.shapes()
    ids: dict[str, Tensor] = {}
    starts: list[int] = []
    names = list(rows)
    total = 0
    for name, shape in rows.items():
        ids[name] = torch.arange(total, total + shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        starts.append(total)
        total += shape[0]
    converted = converter(originals)(checkpoint=dict(ids), config=dict(originals.config))
    edges = torch.tensor(starts)
    runs: dict[str, list[tuple[int, Piece]]] = {name: [] for name in names}
    for parameter, tensor in converted.items():
        numbers = tensor.reshape(-1)
        count = len(numbers)
        # A new run begins where row numbers stop rising by one, as where two halves were swapped.
        cuts = [0, *(torch.nonzero(numbers[1:] != numbers[:-1] + 1).reshape(-1) + 1).tolist(), count]
        for a, b in pairwise(cuts):
            owner = int(torch.searchsorted(edges, numbers[a], right=True)) - 1
            runs[names[owner]].append((int(numbers[a]), Piece(_general(parameter, originals), a / count, b / count)))
    return {_general(name, originals): [piece for _, piece in sorted(found, key=lambda r: r[0])] for name, found in runs.items() if found}


def first_blocks(originals: Originals) -> tuple[set[str], set[str]]:
    """The names in the first block of each kind: the original ones, and diffusers'."""
    blocks = {name: pieces for name, pieces in _template(originals).items() if "{n}" in name}
    return {_fill(name, "0") for name in blocks}, {_fill(p.name, "0") for pieces in blocks.values() for p in pieces}


def converter(originals: Originals) -> Callable[..., dict[str, Tensor]]:
    """Turns original names into diffusers names."""
    if originals.convert is not None:
        return originals.convert
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return SINGLE_FILE_LOADABLE_CLASSES[originals.denoiser]["checkpoint_mapping_fn"]


def _general(name: str, originals: Originals) -> str:
    """The name with a block's number as ``{n}``; other numbers are places inside the block, or of what holds it."""
    number = originals.number(name)
    return name if number is None else f"{name[: number.start()]}{{n}}{name[number.end() :]}"


def to_original(tensors: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Full weights under original names; nothing is read yet."""
    renamed: dict[str, Tensor] = {}
    for original, pieces in names.items():
        rows = [tensors[p.name] if (p.start, p.stop) == (0.0, 1.0) else rows_of(tensors[p.name], p) for p in pieces]
        renamed[original] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return renamed


def to_diffusers(tensors: Mapping[str, Tensor], names: NameMap, shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, Tensor]:
    """Full weights of an original checkpoint under diffusers names; nothing is read yet.

    Args:
        shapes: of the model's parameters by diffusers name, which tell where a joined original is cut.
        origin: the file, for messages.

    Raises:
        CheckpointError: when an original is missing, or has another size than the model's parameters make up.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(
            f"lacks {len(missing)} of {len(names)} tensors, such as {missing[0]}",
            where=origin,
            expected="a complete checkpoint of this family and size",
            fix="download it again, or change model.family or the file",
        )
    parts: dict[str, list[tuple[float, Tensor]]] = {}
    for original, pieces in names.items():
        whole = tensors[original]
        sizes = [_height(p, shapes) for p in pieces]
        numel = sum(round((p.stop - p.start) * prod(shapes[p.name])) for p in pieces)
        if sum(sizes) != whole.shape[0] or numel != whole.numel():
            raise CheckpointError(
                f"{original} is {tuple(whole.shape)}, which does not make up {', '.join(f'{p.name} {shapes[p.name]}' for p in pieces)}",
                where=origin,
                expected="a checkpoint of the size that the config says",
            )
        begin = 0
        for piece, size in zip(pieces, sizes, strict=True):
            parts.setdefault(piece.name, []).append((piece.start, whole if len(sizes) == 1 else whole[begin : begin + size]))
            begin += size
    found = {name: [t for _, t in sorted(runs, key=lambda r: r[0])] for name, runs in parts.items()}
    joined = {name: runs[0] if len(runs) == 1 else torch.cat(runs) for name, runs in found.items()}
    # A linear layer may be stored as a convolution of one cell.
    return {name: t if tuple(t.shape) == shapes[name] else t.reshape(shapes[name]) for name, t in joined.items()}


def lora_to_original(tensors: Mapping[str, Tensor], names: NameMap, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Adapters under original names, one per original layer.

    Layers that the original format joins (q, k, v) become one adapter whose A is theirs stacked and whose B is
    block diagonal: its rank is the sum of theirs and its update is exactly theirs side by side.

    Args:
        tensors: by ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``.
        shapes: of the model's parameters, for layers without an adapter inside a joined one.
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
            like = ups[adapted[0]]
            height = _height(piece, shapes)
            row = [rows_of(ups[a], piece) if a == layer else like.new_zeros(height, ups[a].shape[1]) for a in adapted]
            blocks.append(torch.cat(row, 1))
        layer = original.removesuffix(".weight")
        renamed[f"{layer}.lora_A.weight"] = torch.cat(downs)
        renamed[f"{layer}.lora_B.weight"] = torch.cat(blocks)
    return renamed


def lora_to_diffusers(tensors: Mapping[str, Tensor], names: NameMap, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Adapters of original layers as adapters of the diffusers layers they join; the reverse of ``lora_to_original``.

    Each gets the rows of B that are its own, without the ranks that do not reach them.

    Args:
        tensors: by ``<original layer>.lora_A.weight`` and ``<original layer>.lora_B.weight``.
    """
    renamed: dict[str, Tensor] = {}
    for original, pieces in names.items():
        source = original.removesuffix(".weight")
        if not original.endswith(".weight") or f"{source}.lora_A.weight" not in tensors:
            continue
        down, up = tensors[f"{source}.lora_A.weight"], tensors[f"{source}.lora_B.weight"]
        begin = 0
        rows: dict[str, list[tuple[float, Tensor]]] = {}
        for piece in pieces:
            size = _height(piece, shapes)
            rows.setdefault(piece.name, []).append((piece.start, up[begin : begin + size]))
            begin += size
        for name, runs in rows.items():
            layer = name.removesuffix(".weight")
            own = torch.cat([t for _, t in sorted(runs, key=lambda r: r[0])])
            used = own.any(0) if len(rows) > 1 else torch.ones(own.shape[1], dtype=torch.bool)
            if used.any():
                renamed[f"{layer}.lora_A.weight"], renamed[f"{layer}.lora_B.weight"] = down[used], own[:, used]
    return renamed


def rows_of(tensor: Tensor, piece: Piece) -> Tensor:
    """The rows of a diffusers parameter that a piece stands for."""
    return tensor[round(piece.start * tensor.shape[0]) : round(piece.stop * tensor.shape[0])]


def _height(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> int:
    height = shapes[piece.name][0]
    return round(piece.stop * height) - round(piece.start * height)
