"""The [optimizer] table, and the type that trained weights are kept in, which goes with it."""

from __future__ import annotations

from typing import Any

from diffpipe.errors import ConfigError
from diffpipe.migration.draft import Draft, Table
from diffpipe.optim.named import arguments

# By diffusion-pipe's name, in lower case: the kind here, and what its class takes where the table says nothing.
TORCH = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
OPTIMI = {"betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", TORCH),
    "adamw8bit": ("adamw8bit", TORCH),
    "adamw8bitkahan": ("adamw8bit-kahan", TORCH),
    "adamw_optimi": ("adamw", OPTIMI),
    "stableadamw": ("stableadamw", OPTIMI),
    "offload": ("adamw", TORCH),
    "automagic": ("adamw", {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}),
    "genericoptim": ("adamw", {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}),
}
OURS = ("adamw", "adamw8bit", "adamw8bit-kahan")
COMPENSATED = ("adamw_optimi", "automagic", "genericoptim")  # keep what 16-bit weights lose, by Kahan's summation
SAID = {
    "adamw_optimi": "Kahan's summation makes up there for 16-bit weights; here model.trainable_dtype float32 does, and where all weights"
    " train optimizer.rounding stochastic",
    "offload": "with optimizer.offload true",
    "automagic": "it is not here: adamw stands in its place, with a rate of its own; `prodigy` also finds its rate by itself",
}
LEFT = {
    "adamw8bitkahan": {"stabilize": "it compares gradients with quantised state there, and is off here; nothing to do"},
    "automagic": dict.fromkeys(
        ("lr", "min_lr", "max_lr", "lr_bump", "eps", "clip_threshold", "beta2", "do_paramiter_swapping", "paramiter_swapping_factor"),
        "it is automagic's own; set optimizer.lr, or optimizer.kind prodigy",
    ),
    "genericoptim": {
        **dict.fromkeys(("correct_bias", "correct_dim"), "adamw corrects its bias; nothing to do"),
        "skip_invalid_grads": "a gradient that is not finite ends the run, and --resume goes on; nothing to do",
        **dict.fromkeys(("momentum_type", "second_moment_type"), "averages are plain ones; `adafactor` and `came` factor the second"),
        **dict.fromkeys(("automagic", "min_lr", "max_lr", "lr_bump", "lr_decrease_factor"), "rates are not sought; `prodigy` seeks one"),
        **dict.fromkeys(("rank", "proj_type", "update_proj_gap"), "gradients are not projected; `galore` and `apollo` do"),
        "kahan_buffer_offload": "optimizer.offload moves all of the state; set that",
        "polar_express": "it is an option of optimizer.kind muon, ns_coeffs",
    },
}
NOTHING = "false is what it is without; nothing to do"
MUONS = ("muon", "adamuon", "normuon")


def convert_optimizer(draft: Draft, old: Table, *, batch: int, dtype: str, adapter: Table | None, clip: Table, forced: bool) -> None:
    """The [optimizer] table, gradient clipping, and adapter.dtype.

    Args:
        batch: samples a step, by which beta2_half_life counts.
        dtype: of the computation.
        clip: the table at the top.
        forced: whether a constant rate for all weights is set already.

    Raises:
        ConfigError: for a value of another kind than it must be, and where no rate is said.
    """
    name = old.text("type")
    kind, defaults = KINDS.get(name.lower()) or _named(draft, old, name)
    asked = name.lower()
    if asked == "genericoptim":
        kind = next((m for m in MUONS if old.flag(m)), kind)
        for key in (m for m in MUONS if m in old):
            if old.flag(key):
                draft.tell(old, key, "carried", "optimizer.kind", kind)
            else:
                draft.leave(old, key, NOTHING)
    if kind == name:
        draft.carry(old, "type", "optimizer.kind")
    else:
        draft.change(old, "type", "optimizer.kind", kind, SAID.get(asked, f"{kind} here"))
    for key, said in LEFT.get(asked, {}).items():
        draft.leave(old, key, said)
    known: dict[str, Any] = {"betas": None, "eps": None} if kind in OURS else arguments(kind)
    _rate(draft, old, defaults, forced)
    _averages(draft, old, known, defaults, batch)
    if "weight_decay" in old:
        said = "which acts, while there it does not" if asked == "adamw8bitkahan" else ""
        draft.carry(old, "weight_decay", "optimizer.weight_decay", said)
    else:
        draft.put("optimizer.weight_decay", defaults.get("weight_decay", known.get("weight_decay")) or 0.0)
    if asked == "offload":
        draft.put("optimizer.offload", True)
    draft.carry(old, "cpu_offload", "optimizer.offload")
    _release(draft, old, clip)
    _trainable(draft, adapter, asked, dtype)
    for key in old:
        if draft.told(old, key):
            continue
        if kind not in OURS and key in known:
            draft.carry(old, key, f"optimizer.options.{key}")
        else:
            draft.leave(old, key, f"{kind} has no such option here; take it out")
    if kind == "adafactor" and "relative_step" not in old:
        draft.put("optimizer.options.relative_step", True)  # the package's own default, by which it has no use for lr


def _named(draft: Draft, old: Table, name: str) -> tuple[str, dict[str, Any]]:
    """An optimizer of pytorch-optimizer by its class, and what that takes where the table says nothing.

    Raises:
        ConfigError: when there is none of that name, or it cannot be used here.
    """
    try:
        known = arguments(name.lower())
    except ConfigError as fault:
        raise ConfigError(
            f"{name!r}: {fault.found}",
            where=f"{old.file}: optimizer.type",
            expected=f"{', '.join(KINDS)}, or a class of pytorch-optimizer that works here",
            fix="name another one; optimizer.kind in configs/reference.yaml tells which",
        ) from None
    return name.lower(), {k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if k in ("lr", "weight_decay")}


def _rate(draft: Draft, old: Table, defaults: dict[str, Any], forced: bool) -> None:
    if forced:
        draft.leave(old, "lr", "force_constant_lr overrides it; nothing to do")
    elif "lr" in old and not draft.told(old, "lr"):
        draft.carry(old, "lr", "optimizer.lr")
    elif defaults.get("lr"):
        draft.put("optimizer.lr", defaults["lr"])
    else:
        raise old.fault("lr", "a learning rate")


def _averages(draft: Draft, old: Table, known: dict[str, Any], defaults: dict[str, Any], batch: int) -> None:
    """Decay rates of the averages, and what is added to the denominator."""
    betas = list(old.entries("betas")) or defaults.get("betas")
    if "beta2_half_life" in old and "betas" in known:
        half = old.number("beta2_half_life")
        if not half > 0:
            raise old.fault("beta2_half_life", "a number above 0")
        beta2 = 0.5 ** (batch / half)
        betas = [(betas or [0.9])[0], beta2]
        draft.change(old, "beta2_half_life", "optimizer.betas", betas, f"0.5 ** ({batch} examples a step / {half:g}) is {beta2:.6g}")
    if "betas" in old:
        if "betas" not in known:
            draft.leave(old, "betas", "it has none here; see its options")
        else:
            draft.tell(old, "betas", "carried", "optimizer.betas" if len(betas or []) == 2 else "optimizer.options.betas", "")
    if betas and "betas" in known:
        draft.put("optimizer.betas" if len(betas) == 2 else "optimizer.options.betas", betas)
    if draft.told(old, "eps"):
        return
    if "eps" in old and "eps" not in known:
        draft.leave(old, "eps", "it has none here; see its options")
    elif "eps" in old:
        draft.carry(old, "eps", "optimizer.eps")
    elif defaults.get("eps") and "eps" in known:
        draft.put("optimizer.eps", defaults["eps"])


def _release(draft: Draft, old: Table, top: Table) -> None:
    key = "gradient_release"
    released = old.flag(key)
    if released:
        said = "stepped once for all microbatches rather than at each, with betas as they are; it does not clip"
        draft.change(old, key, "optimizer.release", True, said)
        draft.put("optimizer.clip", None)
        draft.leave(top, "gradient_clipping", "gradient_release turns it off; nothing to do")
        return
    draft.leave(old, key, NOTHING)
    if top.number("gradient_clipping", 1.0) == 0:
        draft.change(top, "gradient_clipping", "optimizer.clip", None, "0 does not clip, which is null here")
    else:
        draft.carry(top, "gradient_clipping", "optimizer.clip")


def _trainable(draft: Draft, adapter: Table | None, asked: str, dtype: str) -> None:
    """The type of trained weights: that of the adapter, or of all weights."""
    wanted = adapter.text("dtype", dtype) if adapter is not None else dtype
    kept, said = wanted, ""
    if asked in COMPENSATED and wanted != "float32" and adapter is not None:
        kept, said = "float32", "holds in 4 bytes what 16-bit weights and Kahan's compensation hold in 2 + 2"
    elif wanted not in ("float32", dtype):
        kept, said = "float32", f"weights train in float32 or in {dtype}"
    elif asked in COMPENSATED and wanted == "bfloat16" and draft.raw["optimizer"]["kind"] == "adamw":
        # All weights: float32 would take twice the memory.
        draft.put("optimizer.rounding", "stochastic")
    elif asked in COMPENSATED and wanted == "float16":
        kept = "float32"
    if adapter is not None and "dtype" in adapter:
        draft.tell(adapter, "dtype", "changed" if said else "carried", "model.trainable_dtype", said)
    draft.put("model.trainable_dtype", kept)
