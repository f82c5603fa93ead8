"""The [model] and [adapter] tables: which family, where its files lie, in which types it computes, and what trains."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpipe.errors import ConfigError
from diffpipe.migration.draft import Draft, Table
from diffpipe.migration.families import DTYPES, ELSEWHERE, FAMILIES, READ_BY, WAN_CLIP, Family

QUANTIZED = ("float8", "float8_e4m3fn", "float8_e5m2", "nf4")


def find_family(old: Table, file: str) -> tuple[Family, Table]:
    """The family of a config and its [model] table.

    Raises:
        ConfigError: when the type is not trained here, or is none at all.
    """
    if "model" not in old:
        raise old.fault("model", "a [model] table with type and dtype")
    table = Table(old["model"], "model.", file)
    kind = table.text("type")
    if kind in FAMILIES:
        return FAMILIES[kind], table
    near = difflib.get_close_matches(kind, FAMILIES, 1, 0.6)
    raise ConfigError(
        f"{kind!r} is not trained by diffpipe" if kind in ELSEWHERE else f"{kind!r} is no model type of diffusion-pipe",
        where=f"{file}: model.type",
        expected=", ".join(sorted(FAMILIES)),
        fix=f"did you mean {near[0]}?" if near and kind not in ELSEWHERE else "`diffpipe models` lists the families",
    )


def convert_model(draft: Draft, old: Table, family: Family, *, full: bool, controls: bool) -> None:
    """The [model] table.

    Args:
        full: whether there is no adapter.
        controls: whether the data has control pictures.

    Raises:
        ConfigError: for a value of another kind than it must be.
    """
    name = family.name
    if family.kind == "wan":
        name = _wan(old)
    elif family.kind == "flux" and controls:
        name = "flux-kontext"
    if name == family.kind:
        draft.carry(old, "type", "model.family")
    else:
        draft.change(old, "type", "model.family", name, "its data has control pictures" if name == "flux-kontext" else f"{name} here")
    for key, kinds in READ_BY.items():
        if family.kind not in kinds:
            draft.leave(old, key, f"diffusion-pipe reads it for {', '.join(kinds)} only; nothing to do")
    if old.text("dtype") not in DTYPES:
        raise old.fault("dtype", ", ".join(DTYPES))
    draft.carry(old, "dtype", "model.dtype")
    _places(draft, old, family, image=name == "wan-i2v")
    _objective(draft, _read(old, family))
    _precision(draft, _read(old, family), full)
    if family.kind == "sdxl":
        _sdxl(draft, old)
    for key, said in {
        "cache_text_embeddings": "captions are always encoded once and cached; nothing to do",
        "bypass_guidance_embedding": "a guidance embedding is always used; model.guidance sets its value",
        "first_frame_conditioning_p": "LTX-Video trains from text alone here; nothing to do",
        "text_encoder_fp8": "text encoders run once, before training, in model.dtype; nothing to do",
        "multiscale_loss_weight": "there is no such loss here",
    }.items():
        draft.leave(_read(old, family), key, said)


def _read(old: Table, family: Family) -> Table:
    """The keys that diffusion-pipe reads for the type."""
    return Table({k: v for k, v in old.values.items() if family.kind in READ_BY.get(k, (family.kind,))}, old.name, old.file)


def _wan(old: Table) -> str:
    """The family of a Wan checkpoint, by its folder's config or else by names; image to video has another one."""
    places = [old.text(key, "") for key in ("ckpt_path", "transformer_path")]
    told = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not here, or not told: names have to do
        told = str(json.loads((Path(places[0]) / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    kind = told or next((k for k in ("flf2v", "i2v") if any(k in re.sub("[^a-z0-9]", "", p.lower()) for p in places)), "t2v")
    if kind == "flf2v":
        raise ConfigError("Wan from first and last frame is not trained by diffpipe", where=f"{old.file}: model.ckpt_path")
    return "wan-i2v" if kind == "i2v" else "wan"


def _places(draft: Draft, old: Table, family: Family, image: bool) -> None:
    files: dict[str, str] = {}
    if family.kind == "ltx-video" and "single_file_path" in old:
        draft.carry(old, "single_file_path", "model.path")
        files |= _parts(draft, old, "diffusers_path", {"text_encoder": "text_encoder", "tokenizer": "tokenizer"})
    elif family.folder is not None:
        key, parts = family.folder
        if image:
            parts = {**parts, "image_encoder": WAN_CLIP}
        files |= _parts(draft, old, key, parts)
    else:
        for key in ("checkpoint_path", "diffusers_path"):
            if family.kind in READ_BY[key]:
                draft.carry(old, key, "model.path")
    for key, components in family.paths.items():
        if key in old:
            files |= dict.fromkeys(components, old.text(key))
            draft.tell(old, key, "carried", ", ".join(f"model.files.{c}" for c in components), "")
    if files:
        draft.put("model.files", files)


def _parts(draft: Draft, old: Table, key: str, parts: Mapping[str, str]) -> dict[str, str]:
    if key not in old:
        return {}
    root = old.text(key).rstrip("/\\")
    if not draft.told(old, key):
        draft.tell(old, key, "changed", "model.files", "each component by its place in that folder")
    return {component: f"{root}/{place}".rstrip("/") for component, place in parts.items()}


def _objective(draft: Draft, old: Table) -> None:
    method = old.text("timestep_sample_method", "logit_normal")
    if method not in ("logit_normal", "uniform"):
        raise old.fault("timestep_sample_method", "logit_normal or uniform")
    draft.carry(old, "timestep_sample_method", "objective.timesteps")
    draft.carry(old, "sigmoid_scale", "objective.scale")
    draft.carry(old, "min_t", "objective.min_t")
    draft.carry(old, "max_t", "objective.max_t")
    draft.carry(old, "guidance", "model.guidance")
    shift = old.number("shift", 0)
    if shift:
        draft.carry(old, "shift", "objective.shift")
    else:
        draft.change(old, "shift", "objective.shift", None, "0 is no shift, which is null here")
    for key in ("flux_shift", "lumina_shift"):
        if old.flag(key) and not shift:
            draft.change(old, key, "objective.shift", "resolution", "by the tokens of all frames")
        else:
            draft.leave(old, key, "shift overrides it; nothing to do" if shift else "false is what it is without; nothing to do")


def _precision(draft: Draft, old: Table, full: bool) -> None:
    key = "transformer_dtype"
    if key not in old:
        return
    kind = old.text(key)
    if kind == old.text("dtype"):
        draft.tell(old, key, "carried", "model.dtype", "the same")
    elif kind not in QUANTIZED:
        draft.leave(old, key, "the denoiser computes in model.dtype; set that, or memory.quantize")
    elif full:
        draft.leave(old, key, "weights that all train are not kept in few bits; add an adapter section, or leave it")
    elif kind == "nf4":
        draft.carry(old, key, "memory.quantize")
    elif kind == "float8_e5m2":
        draft.change(old, key, "memory.quantize", "fp8", "e5m2 is not kept; e4m3 with a scale for each row is more exact")
    else:
        said = "with memory.products false, as there; null multiplies in fp8 where the card can, which is faster"
        draft.change(old, key, "memory.quantize", "fp8-plain", said)
        draft.put("memory.products", False)


def _sdxl(draft: Draft, old: Table) -> None:
    draft.change(old, "v_pred", "objective.prediction", "v" if old.flag("v_pred") else "epsilon", "v has zero terminal SNR, as there")
    draft.carry(old, "min_snr_gamma", "objective.min_snr")
    key = "debiased_estimation_loss"
    if old.flag(key):
        draft.carry(old, key, "objective.debiased")
    else:
        draft.change(old, key, "objective.debiased", False, "diffusion-pipe takes false for true; to go on as it did, set true")
    rates = {"text_encoder_1_lr": "^text_encoder\\.", "text_encoder_2_lr": "^text_encoder_2\\.", "unet_lr": "^unet\\."}
    if any(fate.key == "force_constant_lr" for fate in draft.fates):
        for key in rates:
            draft.leave(old, key, "force_constant_lr overrides it; nothing to do")
        rates = {}
    given = {key: old.number(key) for key in rates if key in old}
    frozen = given.get("text_encoder_1_lr") == given.get("text_encoder_2_lr") == 0
    draft.put("model.train_text_encoders", not frozen)
    groups = []
    for key, lr in given.items():
        if frozen and key != "unet_lr":
            draft.tell(old, key, "changed", "model.train_text_encoders", "false: both rates are 0, so that captions are encoded once")
            continue
        groups.append({"match": rates[key], "lr": lr})
        draft.tell(old, key, "carried", "optimizer.groups", f"the group {rates[key]}")
    if groups:
        draft.put("optimizer.groups", groups)


def convert_adapter(draft: Draft, old: Table, family: Family) -> None:
    """The [adapter] table.

    Raises:
        ConfigError: for a kind of adapter that diffusion-pipe does not have.
    """
    if old.text("type") not in ("lora", "lokr"):
        raise old.fault("type", "lora or lokr")
    draft.carry(old, "type", "adapter.kind")
    rank = old.count("rank")
    if isinstance(old["rank"], float):
        draft.change(old, "rank", "adapter.rank", rank, "a whole number")
    else:
        draft.carry(old, "rank", "adapter.rank")
    draft.carry(old, "alpha", "adapter.alpha", "which diffusion-pipe refuses, and always has as rank")
    draft.carry(old, "dropout", "adapter.dropout")
    draft.carry(old, "decompose_factor", "adapter.decompose_factor")
    draft.leave(old, "rank_dropout", "LoKr's parts are dropped by adapter.dropout; set that")
    if "init_from_existing" in old:
        file = _adapter_file(old.text("init_from_existing"), family)
        draft.change(old, "init_from_existing", "adapter.init", file, "the file in that folder")
    if "fuse_adapters" in old:
        merged = [_fused(old, entry, family) for entry in old.entries("fuse_adapters")]
        said = "with the weight 1 that Chroma's have there" if family.kind == "chroma" else "each by its file"
        draft.change(old, "fuse_adapters", "model.merge", merged, said)
    if "exclude_modules" in old:
        _exclude(draft, old, family)


def _adapter_file(place: str, family: Family) -> str:
    folder = Path(place)
    if folder.suffix == ".safetensors":
        return place
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    saved = {"kohya": "lora.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}.get(family.format, "adapter_model.safetensors")
    return str(found[0]) if found else f"{place.rstrip('/')}/{saved}"


def _fused(old: Table, entry: Any, family: Family) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise old.fault("fuse_adapters", "tables with path and weight")
    return {"path": _adapter_file(entry["path"], family), "weight": 1.0 if family.kind == "chroma" else entry.get("weight", 1.0)}


def _exclude(draft: Draft, old: Table, family: Family) -> None:
    key, given = "exclude_modules", old["exclude_modules"]
    if family.kind not in ("flux", "sdxl"):
        said = "names are the original's there and diffusers' here; set adapter.exclude by the names that adapters are exported under"
        draft.leave(old, key, said)
        return
    if isinstance(given, str):
        patterns = [rf"^(?:unet\.|text_encoder\.|text_encoder_2\.)?(?:{given})$" if family.kind == "sdxl" else f"^(?:{given})$"]
    else:
        patterns = [rf"(?:^|\.){re.escape(str(suffix))}$" for suffix in old.entries(key)]
    draft.change(old, key, "adapter.exclude", patterns, "as regular expressions of the same names")
