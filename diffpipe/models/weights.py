"""Where weights lie: every tensor of a file known by name, shape and type, and read alone, only when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_map

from diffpipe.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")
# What files of scaled fp8 hold beside weights and their scales: scales of a layer's input as some sampling run met it, of no
# use to training, which scales each row by what it is; marks; and, last, the layer's format.
NOT_WEIGHTS = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")


class Lazy(Tensor):
    """A tensor that is its shape, its type and a recipe; operators on it extend the recipe.

    Splitting, joining and renaming whole checkpoints happens on these, so that afterwards each result can be made
    from just the tensors it needs.

    Attributes:
        codes: of a weight that a file has as e4m3 codes times scales, the lazy codes and a scale for each row. They follow
            their rows through splits and joins; what any other operator makes has none.
    """

    recipe: Callable[[], Tensor]
    codes: tuple[Lazy, ...] | None

    @staticmethod
    def __new__(cls, shape: Tensor, recipe: Callable[[], Tensor]) -> Lazy:
        tensor = torch.Tensor._make_subclass(cls, shape)
        tensor.recipe, tensor.codes = recipe, None
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*tree_map(_shape_of, args), **tree_map(_shape_of, kwargs))

        def run() -> Any:
            return func(*tree_map(realise, args), **tree_map(realise, kwargs))

        if isinstance(out, Tensor):
            made = Lazy(out, run)
            made.codes = _codes_of_rows(func, args, kwargs)
            return made
        if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
            return tuple(Lazy(o, lambda i=i: run()[i]) for i, o in enumerate(out))
        return out


def _codes_of_rows(func: Any, args: Any, kwargs: Any) -> tuple[Lazy, ...] | None:
    """What an operator on rows makes of its arguments' codes; None for other operators, and where any has none."""
    if func is torch.cat and len(args) == 1 and not kwargs:
        pairs = [getattr(x, "codes", None) for x in args[0]]
        return None if None in pairs else tuple(cast(Lazy, torch.cat(parts)) for parts in zip(*pairs, strict=True))
    if func is Tensor.__getitem__ and isinstance(args[1], slice) and args[0].codes is not None:
        return tuple(cast(Lazy, part[args[1]]) for part in args[0].codes)
    return None


def _shape_of(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Lazy) else x


def realise(x: Any) -> Any:
    """The tensor a recipe stands for; anything else as it is."""
    return x.recipe() if isinstance(x, Lazy) else x


def lazily(shape: Iterable[int], dtype: torch.dtype, recipe: Callable[[], Tensor]) -> Lazy:
    """A lazy tensor of that shape and type."""
    return Lazy(torch.empty(tuple(shape), dtype=dtype, device="meta"), recipe)


class WeightSource:
    """Named tensors on disk.

    Args:
        tensors: lazy tensors by diffusers name.
        origin: the folder or file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: Path) -> None:
        self.tensors, self.origin = tensors, origin

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._find(name).shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU in memory of its own, cast to ``dtype``.

        Raises:
            CheckpointError: when the file has no such tensor.
        """
        tensor = realise(self._find(name))
        return tensor.to(dtype or tensor.dtype, copy=True).contiguous()

    def has_codes(self, name: str) -> bool:
        """Whether the tensor is kept as e4m3 codes, each row times a scale or none of them scaled."""
        found = self._find(name)
        return found.dtype == torch.float8_e4m3fn or getattr(found, "codes", None) is not None

    def codes(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The tensor's e4m3 codes as they are in the file and a float32 scale for each row; None when it is kept otherwise."""
        if not self.has_codes(name):
            return None
        found: Any = self._find(name)
        if found.dtype == torch.float8_e4m3fn:
            return self.read(name), torch.ones(found.shape[0])
        codes, scale = (realise(t).clone() for t in found.codes)
        return codes, scale

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Find out before anything is read that the tensors are those of a model.

        Args:
            wanted: the model's shapes by name.

        Raises:
            CheckpointError: when a tensor is missing, too many or of another shape.
        """
        missing = sorted(wanted.keys() - self.tensors.keys())
        extra = sorted(self.tensors.keys() - wanted.keys())
        wrong = [n for n, shape in wanted.items() if n in self.tensors and tuple(self.tensors[n].shape) != shape]
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{name} is {self.shape(name)}" + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""),
                where=str(self.origin),
                expected=f"{wanted[name]}, as the config says",
                fix="name a checkpoint of the same model as model.path, or change model.family",
            )
        if missing or extra:
            told = [f"lacks {len(missing)} tensors, such as {missing[0]}"] if missing else []
            told += [f"has {len(extra)} that the model does not know, such as {extra[0]}"] if extra else []
            raise CheckpointError(
                " and ".join(told),
                where=str(self.origin),
                expected=f"the {len(wanted)} tensors of the model",
                fix="name a checkpoint of the same model as model.path, or change model.family",
            )

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"has no tensor {name}", where=str(self.origin), expected="all weights of the model's denoiser")
        return self.tensors[name]


def open_file(file: Path) -> dict[str, Lazy]:
    """Lazy tensors of a checkpoint file under its own names: safetensors, the index of several such files, or a pickle that holds nothing
    but tensors.

    Raises:
        CheckpointError: when it is missing, truncated, or a pickle that would run code.
    """
    if not file.is_file():
        raise CheckpointError("no such file", where=str(file), fix="check model.files and model.path")
    if file.suffix.lower() == ".gguf":
        raise CheckpointError(
            "a GGUF file, whose quantised weights are not read",
            where=str(file),
            expected="safetensors",
            fix="name the model in bf16 or fp8",
        )
    if file.name.endswith(INDEX):
        return open_files(_indexed(file))
    if file.suffix.lower() in PICKLES:
        return _open_pickle(file)
    return open_files([file])


PICKLES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".safetensors.index.json"  # how the name of a list of files ends that hold one component together


def open_files(files: Iterable[Path]) -> dict[str, Lazy]:
    """Lazy tensors of safetensors files, under the files' own names.

    Raises:
        CheckpointError: when a file is missing, truncated or no safetensors file.
    """
    tensors: dict[str, Lazy] = {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
        except (OSError, SafetensorError) as fault:
            raise CheckpointError(
                f"cannot be read as safetensors: {fault}",
                where=str(file),
                fix="download it again, or name another file; it must be complete and end in .safetensors",
            ) from fault
        for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{name} is of type {view.get_dtype()}",
                    where=str(file),
                    expected=f"one of {', '.join(DTYPES)}",
                    fix="name another file",
                )
            tensors[name] = lazily(view.get_shape(), DTYPES[view.get_dtype()], lambda handle=handle, name=name: handle.get_tensor(name))
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says about it; a pickle has none."""
    open_file(file)  # tells what is wrong with it
    if file.suffix.lower() in PICKLES:
        return {}
    with safe_open(file, "pt") as handle:
        return dict(handle.metadata() or {})


def _open_pickle(file: Path) -> dict[str, Lazy]:
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as fault:  # torch raises whatever the file makes it stumble on
        raise CheckpointError(
            f"a pickle that cannot be loaded as plain tensors: {(str(fault) or type(fault).__name__).splitlines()[0]}",
            where=str(file),
            expected="tensors alone: a pickle may hold code, which is never run",
            fix="convert it to .safetensors, or download that format",
        ) from fault
    while isinstance(loaded, dict) and len(loaded) <= 3 and (inner := next((loaded[k] for k in WRAPPERS if k in loaded), None)) is not None:
        loaded = inner
    if not isinstance(loaded, dict) or not any(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError("holds no named tensors", where=str(file), expected="a state dict")
    tensors = {n: t for n, t in loaded.items() if isinstance(t, Tensor)}
    if any(t.dtype in FP8 for t in tensors.values()) and not any(n.endswith(SCALES) for n in tensors):
        # As Tencent's fp8 files are: the scales are a pickle of their own.
        raise CheckpointError("holds fp8 weights without their scales", where=str(file), expected="weights that one file tells", fix=FIX)
    return {n: lazily(t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()}


WRAPPERS = ("state_dict", "module", "model", "model_state_dict")  # what training programs put a state dict into


STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # what each library calls a component's weights


def open_folder(folder: Path, library: str = "diffusers") -> WeightSource:
    """The weights of one component of a diffusers folder, sharded or not.

    Raises:
        CheckpointError: when the folder holds no safetensors weights.
    """
    index = folder / f"{STEMS[library]}{INDEX}"
    files = _indexed(index) if index.is_file() else _present([folder / f"{STEMS[library]}.safetensors"])
    return WeightSource(open_files(files), folder)


def file_in(folder: Path) -> Path | None:
    """The safetensors file of a folder that has one, or the index of those of a folder that has several."""
    found = list(folder.glob(f"*{INDEX}")) or list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


def _indexed(index: Path) -> list[Path]:
    """The files that an index lists, beside it."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError("is no index of weights", where=str(index), expected="JSON with a weight_map", fix="download it again")
    return _present([index.parent / name for name in sorted(set(listed.values()))])


def _present(files: list[Path]) -> list[Path]:
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(
            f"lacks {', '.join(missing[:3])}", where=str(files[0].parent), expected="a component with safetensors weights, all of them"
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file beside weights says.

    Raises:
        CheckpointError: when it is no JSON of keys and values.
    """
    return parse_json(file.read_text(encoding="utf-8", errors="replace"), str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """``read_json`` of a text that lies ``where`` is said."""
    try:
        held = json.loads(text)
    except ValueError as fault:
        raise CheckpointError(f"cannot be read as JSON: {fault}", where=where, fix="download it again") from fault
    if not isinstance(held, dict):
        raise CheckpointError(f"holds {type(held).__name__}", where=where, expected="JSON of keys and values", fix="download it again")
    return held


def within(tensors: Mapping[str, Lazy], prefixes: Iterable[str]) -> dict[str, Lazy]:
    """The tensors of one part of a larger file, without the first of ``prefixes`` that any name begins with; all where none does."""
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in tensors)), "")
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def unscale(tensors: Mapping[str, Lazy], origin: str) -> dict[str, Lazy]:
    """Multiply scaled fp8 weights by their scales, which diffusers' converters would drop without a word.

    Raises:
        CheckpointError: when a file that says its weights are scaled lacks a scale, or they are quantised otherwise.
    """
    plain = {n: t for n, t in tensors.items() if not n.endswith((*SCALES, *NOT_WEIGHTS))}
    for name, blob in tensors.items():
        if name.endswith(".comfy_quant"):
            kind = json.loads(bytes(realise(blob).tolist())).get("format")
            if kind not in ("float8_e4m3fn", "float8_e5m2"):
                raise CheckpointError(
                    f"{name.removesuffix('.comfy_quant')} is quantised as {kind}", where=origin, expected="fp8, bf16, fp16 or fp32 weights"
                )
    scaled = False
    for name, scale in tensors.items():
        suffix = next((s for s in SCALES if name.endswith(s)), None)
        weight = name.removesuffix(suffix) + ".weight" if suffix else ""
        if weight in plain:
            plain[weight], scaled = _scaled(plain[weight], scale, f"{origin}: {name}"), True
    if scaled or any(n.endswith("scaled_fp8") for n in tensors):
        bare = next((n for n, t in plain.items() if t.dtype in FP8 and n.endswith(".weight") and t.ndim > 1), None)
        if bare is not None:
            raise CheckpointError(
                f"{bare} is scaled fp8 without its scale", where=origin, expected=bare.removesuffix("weight") + "scale_weight", fix=FIX
            )
    return plain


def _scaled(stored: Lazy, scale: Lazy, where: str) -> Lazy:
    """A weight times its scale, which is one number or one for each row."""
    rows = stored.shape[0]
    if scale.numel() not in (1, rows) or any(n not in (1, rows) for n in scale.shape):
        raise CheckpointError(f"is {tuple(scale.shape)}", where=where, expected=f"one number, or one for each of {rows} rows", fix=FIX)
    by = scale.float().reshape(-1)
    weight = cast(Lazy, (stored.float() * by.reshape(-1, *[1] * (stored.ndim - 1))).to(torch.bfloat16))
    if stored.dtype == torch.float8_e4m3fn:
        weight.codes = stored, cast(Lazy, by.expand(rows))
    return weight


FIX = "download the file again, or name one in bf16"
