"""Adapter files under the names of diffusers, ComfyUI and kohya: read whatever they are called, and named for each."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffpipe.errors import CheckpointError, DiffpipeError
from diffpipe.models.adapters import MAGNITUDE
from diffpipe.models.names import lora_to_diffusers, lora_to_original, rows_of
from diffpipe.models.weights import lazily, open_file, parse_json, read_json, read_metadata, realise

if TYPE_CHECKING:
    from diffpipe.models.base import DiffusionModel

# Other tools' words for the tensors of a layer's adapter.
WORDS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
    "dora_scale": MAGNITUDE,
    f"{MAGNITUDE}.weight": MAGNITUDE,
}
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
KINDS = ("lora_A.weight", "lora_B.weight", MAGNITUDE, *LOKR, "alpha")
WORD = re.compile(rf"^(.+?)\.({'|'.join(re.escape(w) for w in sorted([*WORDS, *KINDS], key=len, reverse=True))})$")
PREFIXES = ("base_model.model.", "lycoris_", "lora_transformer_", "lora_unet_", "diffusion_model.", "transformer.", "unet.")
Settings = Mapping[str, Mapping[str, Any]]  # peft's config of an adapter, by component


def read_adapter(file: Path, model: DiffusionModel) -> dict[str, Tensor]:
    """The tensors of an adapter file by plain name (``<diffusers layer>.lora_A.weight`` …), alpha / rank multiplied in.

    Alpha stands among the tensors, or in what peft and diffusers keep of their settings; where neither says, it is the rank.

    Raises:
        CheckpointError: when the file cannot be read, or holds a tensor that is no adapter of this family.
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in open_file(file).items():
        found = WORD.match(name)
        if found is None:
            raise CheckpointError(f"{name} is no tensor of an adapter", where=str(file), expected="<layer>.lora_A.weight and the like")
        layers[found[1]][WORDS.get(found[2], found[2])] = tensor
    if not layers:
        raise CheckpointError("holds no tensor", where=str(file), expected="<layer>.lora_A.weight and the like")
    own, original = _layer_names(model)
    settings = _peft_settings(file)
    direct: dict[str, Tensor] = {}
    joined: dict[str, Tensor] = {}
    for name, tensors in layers.items():
        scaled = _scaled(tensors, name, file, settings)
        place = next((n for n in _spellings(name, model) if n in own or n in original), None)
        if place is None and model.has_no_use_for(name):
            continue
        if place is None:
            raise _foreign(name, file, model, next(iter(own.values())))
        into, layer = (direct, own[place]) if place in own else (joined, original[place])
        into |= {f"{layer}.{kind}": t for kind, t in scaled.items()}
    return {**direct, **_split(joined, model, file)}


FIX = "name a file that was trained for this family, and its size"
OF_TEXT = re.compile(r"lora_te\d?_|text_encoder")  # how the names of text encoders' layers begin


def _foreign(name: str, file: Path, model: DiffusionModel, known: str) -> CheckpointError:
    """The fault of a layer that is none of what is trained."""
    if not OF_TEXT.match(name):
        return CheckpointError(f"{name} is no layer of {model.title}", where=str(file), expected=f"a layer such as {known}", fix=FIX)
    could = "model.train_text_encoders" in model.options and not model.config.train_text_encoders
    return CheckpointError(
        f"{name} is a layer of a text encoder, which {'stays as it is' if could else f'{model.name} does not train'}",
        where=str(file),
        expected=f"layers of the denoiser, such as {known}",
        fix=f"take such tensors out of the file{', or set model.train_text_encoders to true' if could else ''}",
    )


def form_of(file: Path, model: DiffusionModel) -> str:
    """Whose names an adapter file has: "diffusers", "comfyui" or "kohya"."""
    names = list(open_file(file))
    if any(n.startswith("lora_") for n in names):
        return "kohya"
    own, _ = _layer_names(model)
    diffusers = sum(any(spelling in own for spelling in _spellings(found[1], model)) for n in names if (found := WORD.match(n)))
    original = sum(n.startswith("diffusion_model.") for n in names)
    return "comfyui" if original or not diffusers else "diffusers"


def name_adapter(tensors: Mapping[str, Tensor], model: DiffusionModel, kind: str) -> dict[str, Tensor]:
    """Adapters by plain name, alpha inside, as a format writes them.

    Args:
        kind: "diffusers", "comfyui" or "kohya".

    Raises:
        DiffpipeError: when the format joins layers in a way that the adapter cannot follow.
    """
    if kind == "diffusers":
        return {model.qualified(name): t for name, t in tensors.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in _to_original(tensors, model).items():
        found = WORD.match(name)
        assert found is not None
        layer, word = found[1], found[2]
        if kind == "comfyui":
            named[f"{model.comfyui_layer(layer)}.{'dora_scale' if word == MAGNITUDE else word}"] = tensor
            continue
        word = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", MAGNITUDE: "dora_scale"}.get(word, word)
        named[f"{model.kohya_layer(layer)}.{word}"] = tensor
        if word in ("lora_down.weight", "lokr_w2_b"):
            named[f"{model.kohya_layer(layer)}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return named


def joined_layers(model: DiffusionModel, layers: Iterable[str]) -> list[str]:
    """Those of ``layers`` that the original format keeps in one tensor with others."""
    wanted = set(layers)
    names = model.original_names()
    return sorted(
        layer for pieces in names.values() if len(pieces) > 1 for p in pieces if (layer := p.name.removesuffix(".weight")) in wanted
    )


def merge_into(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], by: float, where: str) -> dict[str, Tensor]:
    """Weights with ``by`` times an adapter's update added; nothing is read yet.

    Args:
        weights: lazy tensors by diffusers name.
        adapter: by plain name, alpha inside.
        where: the adapter's file, for messages.
    """
    merged = dict(weights)
    for layer in sorted({_parted(name)[0] for name in adapter}):
        own = {_parted(name)[1]: t for name, t in adapter.items() if _parted(name)[0] == layer}
        name = f"{layer}.weight"
        if name not in merged:
            raise CheckpointError(f"{layer} has no weight to be merged into", where=where, fix=FIX)
        _check_size(own, layer, (merged[name].shape[0], merged[name][0].numel()), where)
        merged[name] = _merged(merged[name], own, by)
    return merged


def _check_size(own: Mapping[str, Tensor], layer: str, wanted: tuple[int, int], where: str) -> None:
    """Refuse an adapter whose update is not of the rows and columns of its layer."""
    if "lora_A.weight" in own:
        found = own["lora_B.weight"].shape[0], own["lora_A.weight"][0].numel()
    else:
        # Of a factor in two parts the second has the columns behind its rank.
        heights = [own[w if w in own else f"{w}_a"].shape[0] for w in ("lokr_w1", "lokr_w2")]
        widths = [own[w if w in own else f"{w}_b"][0].numel() for w in ("lokr_w1", "lokr_w2")]
        found = prod(heights), prod(widths)
    if found != wanted:
        raise CheckpointError(
            f"changes {layer} as a layer of {found[1]} to {found[0]}", where=where, expected=f"{wanted[1]} to {wanted[0]}", fix=FIX
        )


def _merged(weight: Tensor, own: dict[str, Tensor], by: float) -> Tensor:
    kept = torch.bfloat16 if weight.dtype.itemsize == 1 else weight.dtype  # most of the update would be lost in fp8

    def run() -> Tensor:
        base = realise(weight).float().flatten(1)
        parts = {kind: realise(t).float() for kind, t in own.items()}
        if "lora_A.weight" in parts:
            update = parts["lora_B.weight"].flatten(1) @ parts["lora_A.weight"].flatten(1)
        else:
            first, second = (parts[w] if w in parts else parts[f"{w}_a"] @ parts[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
            # Of a convolution the first factor has no extent in space.
            update = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)
        changed = base + update.reshape(base.shape)
        if MAGNITUDE in parts:
            changed = parts[MAGNITUDE].reshape(-1, 1) * changed / changed.norm(dim=1, keepdim=True)
        return (base + by * (changed - base)).reshape(weight.shape).to(kept)

    return lazily(weight.shape, kept, run)


def _parted(name: str) -> tuple[str, str]:
    found = WORD.match(name)
    assert found is not None
    return found[1], found[2]


def _scaled(tensors: dict[str, Tensor], name: str, file: Path, settings: Settings) -> dict[str, Tensor]:
    """A layer's tensors, what their product is scaled by multiplied into one of them.

    That is alpha / rank, by an ``alpha`` among the tensors or by peft's settings.
    """
    alpha = tensors.pop("alpha", None)
    wanted = ("lora_A.weight", "lora_B.weight") if any("lora" in kind for kind in tensors) else ()
    lacking = [w for w in wanted if w not in tensors]
    if lacking or not tensors:
        raise CheckpointError(f"{name} has no {lacking[0] if lacking else 'weights'}", where=str(file), fix="save the file again")
    plain = {kind: realise(t) for kind, t in tensors.items()}
    if MAGNITUDE in plain:
        if plain[MAGNITUDE].shape[0] == 1 < plain[MAGNITUDE].numel():
            raise CheckpointError(
                f"{name} has a magnitude for each of {plain[MAGNITUDE].numel()} inputs",
                where=str(file),
                expected="one for each output (LyCORIS' wd_on_output)",
                fix="name another file",
            )
        plain[MAGNITUDE] = plain[MAGNITUDE].flatten()
    target = next(k for k in ("lora_B.weight", "lokr_w1", "lokr_w1_a") if k in plain)
    inner = next((plain[k].shape[0] for k in ("lora_A.weight", "lokr_w2_b", "lokr_w1_b") if k in plain), None)
    by = _told_scale(name, settings)
    if alpha is not None:
        # A full Kronecker product has no rank that its alpha could be divided by, and readers take its scale to be 1.
        by = 1.0 if inner is None else realise(alpha).float().item() / inner
    if by != 1:
        plain[target] = plain[target] * by
    return plain


def _peft_settings(file: Path) -> Settings:
    """What peft was told of an adapter, by component: from diffusers' header, or ("") from what peft saves beside its own file."""
    told: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in parse_json(read_metadata(file).get("lora_adapter_metadata", "{}"), str(file)).items():
        component, _, setting = key.partition(".")
        told[component][setting] = value
    beside = file.with_name("adapter_config.json")
    if not told and file.stem == "adapter_model" and beside.is_file():
        told[""] = read_json(beside)
    return told


def _told_scale(name: str, settings: Settings) -> float:
    """What peft multiplies a layer's product by; 1 where nothing is told, as diffusers has it."""
    told = settings.get(name.partition(".")[0], settings.get("", {}))

    def own(key: str, otherwise: Any) -> Any:
        patterns: Mapping[str, Any] = told.get(f"{key}_pattern") or {}
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)

    alpha, rank = own("alpha", told.get("lora_alpha", told.get("alpha"))), own("rank", told.get("r"))
    if alpha is None or rank is None:
        return 1.0
    return alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)


def _spellings(name: str, model: DiffusionModel) -> list[str]:
    """A layer's name with and without what tools put before it, and its original one where ComfyUI has another."""
    found = [name]
    for prefix in PREFIXES:
        found += [n.removeprefix(prefix) for n in found if n.startswith(prefix)]
    return found + [model.original_name(f"{n}.weight").removesuffix(".weight") for n in found]


def _layer_names(model: DiffusionModel) -> tuple[dict[str, str], dict[str, str]]:
    """Every spelling of a diffusers layer, and of an original layer, to its name."""
    layers = [n.removesuffix(".weight") for n, shape in model.shapes.items() if n.endswith(".weight") and len(shape) > 1]
    own: dict[str, str] = {}
    for layer in layers:
        bare = layer.removeprefix(f"{model.component}.")
        own |= dict.fromkeys((layer, model.qualified(layer), layer.replace(".", "_"), bare, bare.replace(".", "_")), layer)
    original: dict[str, str] = {}
    for name in model.original_names() if model.originals is not None else ():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight"):
            spelled = (layer, layer.replace(".", "_"), model.comfyui_layer(layer), model.kohya_layer(layer))
            original |= dict.fromkeys(spelled, layer)
    return own, original


def _split(tensors: Mapping[str, Tensor], model: DiffusionModel, file: Path) -> dict[str, Tensor]:
    """Adapters of original layers as adapters of diffusers layers."""
    if not tensors:
        return {}
    names, shapes = model.original_names(), model.shapes
    for original, pieces in names.items():
        layer = original.removesuffix(".weight")
        if len(pieces) > 1 and f"{layer}.lora_A.weight" in tensors:
            own = {kind: tensors[f"{layer}.{kind}"] for kind in ("lora_A.weight", "lora_B.weight")}
            rows = sum(rows_of(torch.empty(shapes[p.name][0]), p).shape[0] for p in pieces)
            _check_size(own, layer, (rows, prod(shapes[pieces[0].name][1:])), str(file))
    result = lora_to_diffusers(tensors, names, shapes)
    for original, pieces in names.items():
        layer = original.removesuffix(".weight")
        lokr = [k for k in LOKR if f"{layer}.{k}" in tensors]
        if lokr and len(pieces) > 1:
            raise CheckpointError(
                f"{layer} is a LoKr over {len(pieces)} layers of diffusers' model", where=str(file), fix="name a file in diffusers names"
            )
        result |= {f"{pieces[0].name.removesuffix('.weight')}.{k}": tensors[f"{layer}.{k}"] for k in lokr}
        magnitude = tensors.get(f"{layer}.{MAGNITUDE}")
        begin = 0
        for piece in pieces if magnitude is not None else ():
            assert magnitude is not None
            size = rows_of(torch.empty(shapes[piece.name][0]), piece).shape[0]
            result[f"{piece.name.removesuffix('.weight')}.{MAGNITUDE}"] = magnitude[begin : begin + size]
            begin += size
    return result


def _to_original(tensors: Mapping[str, Tensor], model: DiffusionModel) -> dict[str, Tensor]:
    """Adapters of diffusers layers as adapters of original layers."""
    names, shapes = model.original_names(), model.shapes
    result = lora_to_original(tensors, names, shapes)
    for original, pieces in names.items():
        layers = [p.name.removesuffix(".weight") for p in pieces]
        layer = original.removesuffix(".weight")
        lokr = [k for k in LOKR if f"{layers[0]}.{k}" in tensors]
        if lokr and len(pieces) > 1:
            raise DiffpipeError(
                f"{layers[0]} is one of {len(pieces)} layers that the original format joins, which a LoKr cannot follow",
                where="export.formats",
                fix="export as diffusers, or take these layers out with adapter.exclude",
            )
        result |= {f"{layer}.{k}": tensors[f"{layers[0]}.{k}"] for k in lokr}
        magnitudes = [tensors.get(f"{one}.{MAGNITUDE}") for one in layers]
        if any(m is not None for m in magnitudes):
            if any(m is None for m in magnitudes):
                raise DiffpipeError(
                    f"{original} joins layers of which only some have a DoRA", where="export.formats", fix="adapt all of them, or none"
                )
            found = [rows_of(m, p) for m, p in zip(magnitudes, pieces, strict=True) if m is not None]
            result[f"{layer}.{MAGNITUDE}"] = torch.cat(found).unsqueeze(1)
    return result
