"""Dataset configs: folders with what holds for them, and what all have alike said once."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from diffpipe.config.schema import CaptionConfig, MediaConfig
from diffpipe.migration.draft import Draft, Table

# What becomes of each key that is there, whichever table it stands in.
FATES: dict[str, tuple[Literal["carried", "changed", "left out"], str, str]] = {
    "directory": ("carried", "folders", ""),
    "path": ("carried", "folders.path", ""),
    "mask_path": ("carried", "folders.masks", ""),
    "control_path": ("carried", "folders.controls", ""),
    "min_ar": ("carried", "aspect.min", ""),
    "max_ar": ("carried", "aspect.max", ""),
    "num_ar_buckets": ("carried", "aspect.count", ""),
    "frame_buckets": ("carried", "frames", ""),
    "size_buckets": ("carried", "sizes", ""),
    "num_repeats": ("carried", "folders.repeats", "a fraction shows each sample in its turn rather than the first ones always"),
    "shuffle_tags": ("changed", "captions.shuffle", "1 variant of each caption"),
    "cache_shuffle_num": ("changed", "captions.shuffle", "and folders.repeats times as much: each variant is an example there"),
    "cache_shuffle_delimiter": ("changed", "captions.delimiter", "without the space that follows it"),
    "caption_prefix": ("carried", "captions.prefix", ""),
    "subsample_ratio": ("changed", "folders.repeats", "times that share: as many showings an epoch, of every sample in its turn"),
    "default_mask_file": ("left out", "", "a picture without a mask trains whole; put a mask beside the others"),
    "control_paths": ("left out", "", "one control picture is taken for each picture; name one folder as folders.controls"),
    "online_captions": ("left out", "", "captions are encoded once and cached; an edited one alone is encoded again; nothing to do"),
    "shuffle_metadata": ("left out", "", "every epoch has an order of its own; nothing to do"),
}
SKIP = "a file without a caption trains with the empty one; `diffpipe inspect CFG` lists those: take them out"


def convert_data(draft: Draft, old: Table, train: Table, held_out: list[tuple[str, Table]], clips: str, takes_controls: bool) -> None:
    """Training and held-out folders.

    Args:
        old: the table at the top.
        train: the dataset config.
        held_out: names and dataset configs of the sets to evaluate.
        clips: what of a longer video trains.
        takes_controls: whether the family has a use for control pictures.

    Raises:
        ConfigError: for a value of another kind than it must be.
    """
    dropout = old.number("uncond_fraction", 0.0)
    if "uncond_fraction" in old:
        draft.tell(old, "uncond_fraction", "carried", "data.captions.dropout", "")
    folders = _folders(draft, train, "data.", clips, dropout, takes_controls)
    sets = []
    for name, table in held_out:
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "eval"
        sets.append({"name": plain, "folders": _folders(draft, table, f"eval.sets.{plain}.", clips, dropout, takes_controls)})
    everywhere = [*folders, *(f for s in sets for f in s["folders"])]
    for key in MediaConfig.model_fields:
        if key in folders[0] and all(f.get(key) == folders[0][key] for f in everywhere):
            if folders[0][key]:
                draft.put(f"data.{key}", folders[0][key])
            for folder in everywhere:
                del folder[key]
    draft.put("data.folders", folders)
    if sets:
        draft.put("eval.sets", sets)


def _folders(draft: Draft, top: Table, to: str, clips: str, dropout: float, takes_controls: bool) -> list[dict[str, Any]]:
    given = top.entries("directory")
    if not given:
        raise top.fault("directory", "a [[directory]] with a path")
    _tell(draft, top, to, takes_controls)
    folders = []
    for number, values in enumerate(given):
        own = Table(values, f"{top.name}directory.{number}.", top.file)
        if takes_controls and "control_path" not in own:
            draft.leave(own, "path", "a folder without control pictures, which the other ones have: train it apart, as the family flux")
        else:
            folders.append(_folder(top.beside(own), clips, dropout, takes_controls))
        _tell(draft, own, to, takes_controls)
    if not folders:
        raise top.fault("directory", "at least one with control_path, as the training data has")
    return folders


def _tell(draft: Draft, table: Table, to: str, takes_controls: bool) -> None:
    _tell_sizes(draft, table, to)
    for key, (outcome, here, said) in FATES.items():
        if draft.told(table, key):
            continue
        if key == "control_path" and not takes_controls:
            draft.leave(table, key, "this family takes no control pictures; nothing to do")
        elif outcome == "left out":
            draft.leave(table, key, said)
        elif key in table:
            draft.tell(table, key, outcome, to + here, said)
    if table.values.get("skip_empty_caption", True) is True:
        draft.leave(table, "skip_empty_caption", SKIP)
    else:
        draft.tell(table, "skip_empty_caption", "carried", f"{to}captions", "as always: it trains with the empty caption")
    draft.finish(table)


def _tell_sizes(draft: Draft, table: Table, to: str) -> None:
    pairs = {"resolutions": "the side sqrt(w h), rounded", "ar_buckets": "the ratio w / h"}
    for key, said in pairs.items():
        if key in table:
            paired = any(isinstance(entry, list) for entry in table.entries(key))
            here = f"{to}{'resolutions' if key == 'resolutions' else 'aspect'}"
            draft.tell(table, key, "changed" if paired else "carried", here, f"a pair [w, h] is {said}" if paired else "")
    if "enable_ar_bucket" in table:
        square = not table.flag("enable_ar_bucket")
        draft.tell(table, "enable_ar_bucket", "changed" if square else "carried", f"{to}aspect", "the square alone" if square else "")


def _folder(table: Table, clips: str, dropout: float, takes_controls: bool) -> dict[str, Any]:
    """A folder with all that holds for it."""
    variants = table.count("cache_shuffle_num", 0, least=0) or int(table.flag("shuffle_tags"))
    repeats = table.number("num_repeats", 1) * max(1, variants) * table.number("subsample_ratio", 1)
    folder: dict[str, Any] = {"path": table.text("path")}
    if repeats != 1:
        folder["repeats"] = repeats
    if "mask_path" in table:
        folder["masks"] = table.text("mask_path")
    if "control_path" in table and takes_controls:
        folder["controls"] = table.text("control_path")
    if table.entries("size_buckets"):
        folder["sizes"] = table.entries("size_buckets")
    else:
        if not table.entries("resolutions"):
            raise table.fault("resolutions", "sides such as [512], or size_buckets")
        folder["resolutions"] = sorted({_side(table, r) for r in table.entries("resolutions")})
        folder["aspect"] = _aspect(table)
    folder["frames"] = table.entries("frame_buckets") or [1]
    folder["clips"] = clips
    delimiter = table.text("cache_shuffle_delimiter", ", ")
    captions = {
        "prefix": table.text("caption_prefix", ""),
        "shuffle": variants,
        "delimiter": delimiter.strip() or delimiter,
        "dropout": dropout,
    }
    plain = CaptionConfig().model_dump()
    folder["captions"] = {name: value for name, value in captions.items() if value != plain[name]}
    return folder


def _side(table: Table, given: Any) -> int:
    if isinstance(given, list) and len(given) == 2 and all(isinstance(n, int | float) for n in given):
        return round(math.sqrt(given[0] * given[1]))
    if isinstance(given, int | float) and not isinstance(given, bool):
        return round(given)
    raise table.fault("resolutions", "sides such as 512, or pairs such as [1280, 720]")


def _aspect(table: Table) -> Any:
    if not table.flag("enable_ar_bucket"):
        return [1.0]
    ratios = table.entries("ar_buckets")
    if not ratios:
        return {"min": table.number("min_ar"), "max": table.number("max_ar"), "count": table.count("num_ar_buckets")}
    try:
        return [r[0] / r[1] if isinstance(r, list) else float(r) for r in ratios]
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        raise table.fault("ar_buckets", "ratios such as 1.5, or pairs such as [448, 576]") from None
