"""The frozen half of a pipeline: VAE and text encoders, loaded from a folder or a file, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpipe.errors import CheckpointError
from diffpipe.models.blueprint import CONFIGS, Blueprint, Component
from diffpipe.models.converters import NOT_NETWORK, own_tensors, to_library_names
from diffpipe.models.weights import open_file, open_folder, realise, unscale

SMALLEST = 128  # pixels along the side of a tile: what is smaller shows seams
ROLES = {"media": ("vae", "image_encoder", "image_processor"), "text": ("text_encoder", "tokenizer")}


@dataclass
class Encoders:
    """What turns media and captions into tensors.

    Attributes:
        pipeline: the diffusers pipeline without its denoiser; its own ``encode_prompt`` encodes text.
        device: where the encoders are.
    """

    pipeline: Any
    device: torch.device

    @property
    def vae(self) -> Any:
        return self.pipeline.vae


def diffusers_module() -> Any:
    """diffusers, without its own loading bars between ours."""
    import diffusers
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return diffusers


def halve_tiles(vae: Any) -> bool:
    """Have a VAE that works in tiles take them of half the sides; whether it can."""
    if (tile_side(vae) or 0) < 2 * SMALLEST:
        return False
    for name, side in _tile_sides(vae).items():
        setattr(vae, name, side // 2)
    return True


def tile_side(vae: Any) -> int | None:
    """Pixels along the shorter side of a tile; None where a VAE does not work in tiles."""
    return min((v for n, v in _tile_sides(vae).items() if n.startswith("tile_sample_min")), default=None)


def _tile_sides(vae: Any) -> dict[str, int]:
    return {n: v for n, v in vars(vae).items() if re.fullmatch(r"tile_\w+_(min|stride)_(size|height|width)", n)}


def load_components(blueprint: Blueprint, without: Collection[str], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Every component of a pipeline but ``without``: networks frozen, in evaluation mode, those of media in float32, others in ``dtype``.

    Raises:
        CheckpointError: when a component is missing or cannot be read.
    """
    diffusers_module()
    components: dict[str, Any] = {}
    for name, component in blueprint.items():
        if name in without:
            continue
        loaded = load_component(component, torch.float32 if name.startswith(ROLES["media"]) else dtype, blueprint)
        components[name] = loaded.requires_grad_(False).eval().to(device) if isinstance(loaded, torch.nn.Module) else loaded
    return components


def load_component(component: Component, dtype: torch.dtype, blueprint: Blueprint) -> Any:
    """One component, whatever it is.

    Raises:
        CheckpointError: when it is missing or cannot be read.
    """
    library = import_module(component.library)
    kind: Any = getattr(library, component.kind)
    if "image_processor" in component.name:
        # The one that resizes with Pillow, as when the models were released, whether torchvision is there or not.
        kind = getattr(library, f"{component.kind}Pil", kind)
    network = issubclass(kind, torch.nn.Module)
    try:
        if component.file is not None and network:
            return _from_file(component, kind, dtype)
        if component.folder is not None and "tokenizer" in component.name:
            return _tokenizer_of(component.folder, kind)
        if component.folder is not None:
            return kind.from_pretrained(component.folder, **({"dtype": dtype} if network else {}), local_files_only=True)
        if "tokenizer" in component.name:
            return _shipped_tokenizer(component, kind, blueprint)
        if not network:
            return kind(**component.config)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        said = (str(fault) or type(fault).__name__).splitlines()[0]
        raise CheckpointError(f"{component.name} ({component.kind}) cannot be loaded: {said}", where=component.origin) from fault
    raise nowhere(component)


def nowhere(component: Component, expected: str = "") -> CheckpointError:
    """The fault of a component that no key names."""
    return CheckpointError(
        f"nothing says where {component.name} ({component.kind}) lies",
        where="model.files",
        expected=expected,
        fix=f"name it as model.files.{component.name}, or the whole pipeline's folder as model.path",
    )


def file_tensors(component: Component) -> dict[str, Tensor]:
    """The tensors of a component's file under the names of its class, scales applied; none is read yet."""
    assert component.file is not None
    return to_library_names(component, unscale(open_file(component.file), str(component.file)))


def component_tensors(component: Component) -> dict[str, Tensor]:
    """The tensors of a component's file or folder, none read yet; in a folder they may have names that its class had earlier.

    Raises:
        CheckpointError: when they cannot be found.
    """
    if component.file is not None:
        return file_tensors(component)
    if component.folder is None:
        raise nowhere(component)
    found = open_folder(component.folder, component.library).tensors
    return {n: t for n, t in found.items() if not n.endswith(NOT_NETWORK)}


def file_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """The shapes of a component's file under the file's own names."""
    assert component.file is not None
    return {n: tuple(t.shape) for n, t in own_tensors(component, open_file(component.file)).items()}


def blank_component(component: Component) -> Any:
    """A network of diffusers with its parameters on meta, in float32; buffers, which no file need hold, are made."""
    from accelerate import init_empty_weights

    kind: Any = getattr(import_module(component.library), component.kind)
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return kind.from_config(component.config)


def _from_file(component: Component, kind: Any, dtype: torch.dtype) -> Any:
    assert component.file is not None
    tensors = file_tensors(component)
    state = {n: _cast(realise(t), dtype) for n, t in tensors.items()}
    if component.library == "transformers":
        # Its own loader also knows the names that its classes had in earlier versions.
        module, told = kind.from_pretrained(
            None, config=kind.config_class.from_dict(component.config), state_dict=state, dtype=dtype, output_loading_info=True
        )
        missing, extra = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
        wrong = [str(m[0]) for m in told["mismatched_keys"]]
    else:
        module = blank_component(component)
        wanted = module.state_dict()
        missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        wrong = [n for n, t in wanted.items() if n in state and state[n].shape != t.shape]
        if not (missing or extra or wrong):
            module.load_state_dict(state, assign=True)
            module.to(dtype)
    for told, names in (("lacks", missing), ("has another shape of", wrong), ("has, beside those the model knows,", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{told} {names[0]}{more}",
                where=str(component.file),
                expected=f"the weights of a {component.kind}",
                fix=f"check {component.name}",
            )
    return module


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


# -- tokenizers ------------------------------------------------------------------------------------------------------


def _tokenizer_of(folder: Path, kind: Any) -> Any:
    """The tokenizer in a folder.

    A class may make parts of it anew instead of reading them: transformers 5's LlamaTokenizer gives Llama 3's vocabulary
    the splitting of Llama 2, and other tokens without a word. Its AutoTokenizer knows, where the folder says enough.
    """
    from transformers import AutoTokenizer

    chosen = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else kind
    return chosen.from_pretrained(folder, local_files_only=True)


def _shipped_tokenizer(component: Component, kind: Any, blueprint: Blueprint) -> Any:
    """A tokenizer that comes with diffpipe, or inside the file of its text encoder."""
    given = dict(component.config)
    vocabulary = given.pop("vocabulary", None)
    if vocabulary == "clip":
        merges = (CONFIGS / "tokenizers" / "clip-merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        pairs = [tuple(line.split()) for line in merges if line]
        return kind(vocab=_clip_vocabulary(pairs), merges=pairs, **given)
    if vocabulary == "t5":
        return _from_sentences((CONFIGS / "tokenizers" / "t5-spiece.model").read_bytes(), kind, given)
    encoder = blueprint.get(component.name.replace("tokenizer", "text_encoder"))
    if encoder is not None and encoder.file is not None:
        tensors = open_file(encoder.file)
        # ComfyUI's files of UMT5 and Gemma carry their sentencepiece model as bytes.
        sentences = next((t for n, t in tensors.items() if n.endswith("spiece_model")), None)
        if sentences is not None:
            return _from_sentences(bytes(realise(sentences).tolist()), kind, given)
    raise nowhere(component, "a folder with tokenizer.json or spiece.model")


def _from_sentences(model: bytes, kind: Any, given: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("spiece.model", "tokenizer.model"):  # which of them is read differs by class
            (Path(folder) / name).write_bytes(model)
        return kind.from_pretrained(folder, **given)


def _clip_vocabulary(merges: list[tuple[str, ...]]) -> dict[str, int]:
    """Token numbers of CLIP: the 256 bytes as printable characters, the same ending a word, the merges, the two marks."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


# -- identity --------------------------------------------------------------------------------------------------------


def fingerprint(blueprint: Blueprint, role: str, without: Collection[str]) -> str:
    """A hash of a role's components but ``without``: their configs, and names, sizes and evenly spaced pieces of their files.

    Pieces rather than every byte: reading a 20 GB text encoder at every start would take longer than encoding a
    small data set, and weights that were trained further differ everywhere.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, component in blueprint.items():
        if name in without or not name.startswith(ROLES[role]):
            continue
        digest.update(f"{name} {component.kind} {json.dumps(component.config, sort_keys=True)}".encode())
        if component.file is not None:
            _sample(component.file, digest.update)
        elif component.folder is not None:
            for file in sorted(p for p in component.folder.rglob("*") if p.is_file()):
                digest.update(file.relative_to(component.folder).as_posix().encode())
                _sample(file, digest.update)
    return digest.hexdigest()


def _sample(file: Path, take: Callable[[bytes], None], samples: int = 64, chunk: int = 1 << 16) -> None:
    size = file.stat().st_size
    take(f":{size};".encode())
    with open(file, "rb") as stream:
        for begin in _places(size, samples, chunk):
            stream.seek(begin)
            take(stream.read(chunk if size > samples * chunk else -1))


def _places(size: int, samples: int, chunk: int) -> Iterator[int]:
    for i in range(samples if size > samples * chunk else 1):
        yield i * max(0, size - chunk) // max(1, samples - 1)
