"""Adapters through peft (LoRA, DoRA, LoKr): which layers get one, what it starts from, and its tensors by layer name."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffpipe.config.schema import AdapterConfig
from diffpipe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from diffpipe.models.base import DiffusionModel

WeightOf = Callable[[str], Tensor]
ADAPTER = "default"
NAME = re.compile(rf"\.(lora_(A|B)\.{ADAPTER}\.weight|lora_magnitude_vector\.{ADAPTER}\.weight|lokr_w[12](_a|_b)?\.{ADAPTER})$")
MAGNITUDE = "lora_magnitude_vector"


def resolve_targets(model: DiffusionModel, module: nn.Module, config: AdapterConfig) -> dict[str, int]:
    """The linear layers that get an adapter, each with its rank.

    Raises:
        ConfigError: when a pattern finds no layer, or none is left.
    """
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    names = model.adapter_targets(module) if config.targets is None else matching(linear, config.targets, "adapter.targets")
    excluded = set(matching(linear, config.exclude, "adapter.exclude"))
    left = [name for name in names if name not in excluded]
    if not left:
        raise ConfigError("every layer is excluded", where="adapter.exclude", fix="exclude fewer")
    matching(left, list(config.ranks), "adapter.ranks")
    return {name: next((rank for pattern, rank in config.ranks.items() if re.search(pattern, name)), config.rank) for name in left}


def matching(names: Sequence[str], patterns: Sequence[str], key: str, kind: str = "linear layer") -> list[str]:
    """Those of the names that any of the patterns finds.

    Args:
        key: of the config, which has the patterns.
        kind: what is named.

    Raises:
        ConfigError: when a pattern finds none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if re.search(pattern, name)]
        if not hits:
            tails = sorted({name.rsplit(".", 1)[-1] for name in names} | {".".join(name.split(".")[-2:]) for name in names})
            near = difflib.get_close_matches(pattern, tails, 3, 0.4)
            raise ConfigError(f"{pattern!r} finds no {kind}", where=key, expected=f"part of a name such as {', '.join(near or tails[:3])}")
        found |= dict.fromkeys(hits)
    return [name for name in names if name in found]


def attach(module: nn.Module, ranks: Mapping[str, int], config: AdapterConfig, dtype: torch.dtype) -> None:
    """Put an adapter on each layer of ``ranks``; afterwards only adapters require gradients.

    The module may lie on meta; ``initialise`` gives the adapters their values after the cut.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    module.requires_grad_(False)
    with torch.device("meta"):
        inject_adapter_in_model(_peft_config(ranks, config), module, adapter_name=ADAPTER)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            # peft would bring activations to the adapter's type before autocast brings them back to the one they had.
            setattr(layer, "cast_input_dtype_enabled", False)  # noqa: B010 - its stub says Module


def _peft_config(ranks: Mapping[str, int], config: AdapterConfig) -> Any:
    from peft import LoKrConfig, LoraConfig

    exact = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != config.rank}
    # Without an alpha of its own every layer's is its rank, so that the scale is 1 whatever the rank.
    common: dict[str, Any] = {
        "r": config.rank,
        "target_modules": list(ranks),
        "rank_pattern": exact,
        "alpha_pattern": exact if config.alpha is None else {},
    }
    alpha: Any = config.alpha or config.rank
    if config.kind == "lokr":
        return LoKrConfig(
            **common, alpha=alpha, rank_dropout=config.dropout, decompose_factor=config.decompose_factor, init_weights="lycoris"
        )
    return LoraConfig(**common, lora_alpha=alpha, lora_dropout=config.dropout, use_dora=config.kind == "dora", init_lora_weights=False)


def scale_of(rank: int, config: AdapterConfig) -> float:
    """What the adapter's product is multiplied by: alpha / rank."""
    return 1.0 if config.alpha is None else config.alpha / rank


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return NAME.search(name) is not None


def base_name(name: str) -> str:
    """The diffusers name of a parameter that an adapter was wrapped around."""
    return name.replace(".base_layer.", ".")


def plain_name(name: str) -> str:
    """An adapter parameter's name without peft's own parts: ``<layer>.lora_A.weight``, ``<layer>.lokr_w1`` …"""
    return name.replace(f".{MAGNITUDE}.{ADAPTER}.weight", f".{MAGNITUDE}").replace(f".{ADAPTER}", "")


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The adapters of ``module`` by plain name."""
    return {plain_name(name): p.detach() for name, p in module.named_parameters() if is_adapter(name)}


def initialise(
    module: nn.Module, config: AdapterConfig, seed: int, device: torch.device, given: Mapping[str, Tensor] | None, weight_of: WeightOf
) -> None:
    """Give the adapters in ``module`` their first values: those of ``given``, else such that nothing changes yet.

    Each value depends only on the seed and the parameter's name, so any cut of a model starts equal.

    Args:
        given: tensors by plain name, alpha / rank inside them; None draws new ones.
        weight_of: reads a layer's frozen weight, whose rows' norms are where DoRA's magnitudes start.

    Raises:
        CheckpointError: when ``given`` does not fit the config.
    """
    for name, parameter in list(module.named_parameters()):
        if not is_adapter(name):
            continue
        plain = plain_name(name)
        if given is None:
            value = _drawn(name, parameter, seed) if MAGNITUDE not in name else weight_of(plain.removesuffix(f".{MAGNITUDE}")).norm(dim=1)
        else:
            value = _unscaled(plain, _fitting(plain, parameter, config, given), module, config)
        owner, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(value.to(device, parameter.dtype), requires_grad=parameter.requires_grad)
        place: Any = module.get_submodule(owner)
        if isinstance(place, nn.ParameterDict):
            place[leaf] = fresh
        else:
            setattr(place, leaf, fresh)


def check_given(module: nn.Module, config: AdapterConfig, given: Mapping[str, Tensor]) -> None:
    """Find out whether a file fits the adapters of a whole module, all of it.

    Raises:
        CheckpointError: when it lacks a tensor, has one of another shape, or one that has no place.
    """
    wanted = adapter_tensors(module)
    for name, parameter in wanted.items():
        _fitting(name, parameter, config, given)
    if surplus := sorted(given.keys() - wanted.keys()):
        raise CheckpointError(
            f"has {surplus[0]}{f' and {len(surplus) - 1} more tensors' if len(surplus) > 1 else ''}, which the adapter has no place for",
            where=str(config.init),
            expected=f"the {len(wanted)} tensors of a {config.kind} on the layers that adapter.targets and adapter.exclude leave",
            fix=LIKE_FILE,
        )


LIKE_FILE = "set adapter.kind, adapter.rank (or adapter.ranks) and adapter.targets to those of the file"


def _fitting(plain: str, parameter: Tensor, config: AdapterConfig, given: Mapping[str, Tensor]) -> Tensor:
    if plain not in given or given[plain].shape != parameter.shape:
        found = f"has {tuple(given[plain].shape)} for it" if plain in given else "has nothing for it"
        raise CheckpointError(f"{plain} wants {tuple(parameter.shape)}, the file {found}", where=str(config.init), fix=LIKE_FILE)
    return given[plain]


def folded(tensors: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Adapters with alpha / rank multiplied into one factor, for readers that know no alpha."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scale = scale_of(_rank(name, tensors, config), config) if name.endswith(FOLDED) else 1.0
        result[name] = tensor if scale == 1 else tensor * scale
    return result


FOLDED = (".lora_B.weight", ".lokr_w1", ".lokr_w1_a")  # of each adapter the one factor that takes the scale


def _rank(name: str, tensors: Mapping[str, Tensor], config: AdapterConfig) -> int:
    layer = name.rpartition(".lo")[0]
    if name.endswith(".lora_B.weight"):
        return tensors[name].shape[1]
    return next((rank for pattern, rank in config.ranks.items() if re.search(pattern, layer)), config.rank)


def _unscaled(plain: str, value: Tensor, module: nn.Module, config: AdapterConfig) -> Tensor:
    scale = scale_of(_rank(plain, {plain: value}, config), config) if plain.endswith(FOLDED) else 1.0
    return value if scale == 1 else value / scale


def _drawn(name: str, parameter: Tensor, seed: int) -> Tensor:
    """New values: lora_B and lokr_w2 (or its second factor) are zero, the others are drawn as peft draws them."""
    value = torch.zeros(parameter.shape)
    if not re.search(r"\.(lora_B|lokr_w2|lokr_w2_b)\.", name):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value
