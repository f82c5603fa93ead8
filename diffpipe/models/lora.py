"""Low-rank adapters through peft: where they go, what they start from, and their tensors by layer name."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffpipe.config.schema import AdapterConfig
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.models.base import DiffusionModel
from diffpipe.models.encoders import diffusers_module

ADAPTER = "default"
LORA = re.compile(rf"\.lora_(A|B)\.{ADAPTER}\.weight$")


def resolve_targets(model: DiffusionModel, module: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        ConfigError: when a pattern finds no layer, or none is left.
    """
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    names = model.lora_targets(module) if config.targets is None else _matching(linear, config.targets, "adapter.targets")
    excluded = set(_matching(linear, config.exclude, "adapter.exclude"))
    left = [name for name in names if name not in excluded]
    if not left:
        raise ConfigError("every layer is excluded", where="adapter.exclude", fix="exclude fewer")
    return left


def _matching(names: Sequence[str], patterns: Sequence[str], key: str) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            hits = [name for name in names if re.search(pattern, name)]
        except re.error as fault:
            raise ConfigError(f"{pattern!r} is no regular expression: {fault}", where=key) from fault
        if not hits:
            tails = sorted({name.rsplit(".", 1)[-1] for name in names} | {".".join(name.split(".")[-2:]) for name in names})
            near = difflib.get_close_matches(pattern, tails, 3, 0.4)
            raise ConfigError(
                f"{pattern!r} finds no linear layer", where=key, expected=f"part of a name such as {', '.join(near or tails[:3])}"
            )
        found |= dict.fromkeys(hits)
    return [name for name in names if name in found]


def attach_lora(module: nn.Module, names: Sequence[str], config: AdapterConfig, dtype: torch.dtype) -> None:
    """Put an adapter on each layer; afterwards only adapters require gradients.

    The module may lie on meta; ``init_lora`` gives the adapters their values after the cut.
    """
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    peft = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,  # pyright: ignore[reportArgumentType] - peft takes any number
        lora_dropout=config.dropout,
        target_modules=list(names),
        init_lora_weights=False,
    )
    with torch.device("meta"):
        inject_adapter_in_model(peft, module, adapter_name=ADAPTER)
    for name, parameter in module.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.to(dtype)


def is_lora(name: str) -> bool:
    return LORA.search(name) is not None


def base_name(name: str) -> str:
    """The diffusers name of a parameter that an adapter was wrapped around."""
    return name.replace(".base_layer.", ".")


def init_lora(module: nn.Module, model: DiffusionModel, config: AdapterConfig, seed: int, device: torch.device) -> None:
    """Give the adapters in ``module`` their first values: those of ``adapter.init``, else B zero and A as peft draws it.

    Each value depends only on the seed and the parameter's name, so any cut of a model starts equal.
    """
    given = read_lora(config.init, model, config) if config.init is not None else None
    for name, parameter in list(module.named_parameters()):
        if not is_lora(name):
            continue
        if given is None:
            value = _drawn(name, parameter, seed)
        elif name not in given or given[name].shape != parameter.shape:
            found = f"has {tuple(given[name].shape)} for it" if name in given else "has nothing for it"
            raise CheckpointError(
                f"{plain_name(name)} wants {tuple(parameter.shape)}, the file {found}",
                where=str(config.init),
                fix="set adapter.rank and adapter.targets to those of the file",
            )
        else:
            value = given[name]
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value.to(device, parameter.dtype), requires_grad=parameter.requires_grad))


def _drawn(name: str, parameter: Tensor, seed: int) -> Tensor:
    value = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def plain_name(name: str) -> str:
    """``<layer>.lora_A.weight`` for peft's ``<layer>.lora_A.default.weight``."""
    return name.replace(f".{ADAPTER}.weight", ".weight")


def lora_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The adapters of ``module`` by ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``."""
    return {plain_name(name): p.detach() for name, p in module.named_parameters() if is_lora(name)}


def read_lora(file: Path, model: DiffusionModel, config: AdapterConfig) -> dict[str, Tensor]:
    """A LoRA file's tensors by peft parameter name, alphas folded so that ``adapter.alpha`` gives the file's update.

    Raises:
        CheckpointError: when the file cannot be read or is no LoRA of this family.
    """
    pipeline = getattr(diffusers_module(), model.pipeline)
    try:
        state = pipeline.lora_state_dict(str(file), return_alphas=True, local_files_only=True) if file.is_file() else None
    except Exception as fault:  # diffusers raises whatever its converters stumble on
        raise CheckpointError(
            f"cannot be read as a LoRA: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}", where=str(file)
        ) from fault
    if state is None:
        raise CheckpointError("no such file", where=f"adapter.init: {file}")
    tensors, alphas = state if isinstance(state, tuple) else (state, None)
    scale = (config.alpha or config.rank) / config.rank
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.removeprefix("transformer.").rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise CheckpointError(f"{name} is no LoRA tensor of this family", where=str(file), expected="<layer>.lora_A.weight")
        if kind[0] == "B":
            alpha = (alphas or {}).get(f"transformer.{layer}.alpha")
            tensor = tensor * ((1.0 if alpha is None else float(alpha) / tensor.shape[1]) / scale)
        result[f"{layer}.lora_{kind[0]}.{ADAPTER}.weight"] = tensor
    return result
