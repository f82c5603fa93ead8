"""Where a denoiser's weights lie, under diffusers names: each tensor is read alone, and only when asked for."""

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
# What ComfyUI and others put before the names of a denoiser inside a larger file.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALES = (".scale_weight", ".weight_scale")
NOT_WEIGHTS = (".scale_input", ".input_scale", "scaled_fp8")


class Lazy(Tensor):
    """A tensor that is its shape, its type and a recipe; operators on it extend the recipe.

    diffusers' converters split, join and swap tensors. On these they do it to recipes, so that afterwards each
    result can be made from just the tensors it needs.
    """

    recipe: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: Tensor, recipe: Callable[[], Tensor]) -> Lazy:
        tensor = torch.Tensor._make_subclass(cls, shape)
        tensor.recipe = recipe
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*tree_map(_shape_of, args), **tree_map(_shape_of, kwargs))

        def run() -> Any:
            return func(*tree_map(realise, args), **tree_map(realise, kwargs))

        if isinstance(out, Tensor):
            return Lazy(out, run)
        if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
            return tuple(Lazy(o, lambda i=i: run()[i]) for i, o in enumerate(out))
        return out


def _shape_of(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Lazy) else x


def realise(x: Any) -> Any:
    """The tensor a recipe stands for; anything else as it is."""
    return x.recipe() if isinstance(x, Lazy) else x


class WeightSource:
    """Named tensors on disk.

    Args:
        tensors: lazy tensors by diffusers name.
        origin: the folder or file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Lazy], origin: Path) -> None:
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

    def _find(self, name: str) -> Lazy:
        if name not in self.tensors:
            raise CheckpointError(f"has no tensor {name}", where=str(self.origin), expected="all weights of the model's denoiser")
        return self.tensors[name]


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
            shape = torch.empty(view.get_shape(), dtype=DTYPES[view.get_dtype()], device="meta")
            tensors[name] = Lazy(shape, lambda handle=handle, name=name: handle.get_tensor(name))
    return tensors


def open_folder(folder: Path) -> WeightSource:
    """The weights of one component of a diffusers folder, sharded or not.

    Raises:
        CheckpointError: when the folder holds no safetensors weights.
    """
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["diffusion_pytorch_model.safetensors"]
    files = [folder / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(
            f"lacks {', '.join(missing[:3])}", where=str(folder), expected="a diffusers component with safetensors weights"
        )
    return WeightSource(open_files(files), folder)


def open_single(file: Path) -> dict[str, Lazy]:
    """The denoiser's tensors of a single-file checkpoint under the original names, fp8 scales applied."""
    tensors = open_files([file])
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), "")
    return unscale({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})


def unscale(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """Multiply scaled fp8 weights by their scales, which diffusers' converters would drop without a word."""
    plain = {n: t for n, t in tensors.items() if not n.endswith((*SCALES, *NOT_WEIGHTS))}
    for name, scale in tensors.items():
        suffix = next((s for s in SCALES if name.endswith(s)), None)
        weight = name.removesuffix(suffix) + ".weight" if suffix else ""
        if weight in plain:
            stored = plain[weight]
            by = scale.float().reshape(scale.shape + (1,) * (stored.ndim - scale.ndim) if scale.numel() > 1 else ())
            plain[weight] = cast(Lazy, (stored.float() * by).to(torch.bfloat16))
    return plain


def convert(tensors: Mapping[str, Lazy], denoiser: str, config: Mapping[str, Any], origin: Path) -> WeightSource:
    """A single file's tensors under diffusers names, through diffusers' own converter.

    Raises:
        CheckpointError: when the converter does not know the file's names.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    mapping = SINGLE_FILE_LOADABLE_CLASSES[denoiser]["checkpoint_mapping_fn"]
    try:
        converted = mapping(checkpoint=dict(tensors), config=dict(config))
    except (KeyError, RuntimeError, ValueError, IndexError) as fault:
        raise CheckpointError(f"its tensors are not those of a {denoiser}: {fault}", where=str(origin)) from fault
    return WeightSource(converted, origin)
