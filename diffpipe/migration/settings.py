"""The keys at the top of a diffusion-pipe config: how long, in which batches, when to save, and memory."""

from __future__ import annotations

from dataclasses import dataclass

from diffpipe.errors import ConfigError
from diffpipe.migration.draft import Draft, Table
from diffpipe.migration.families import DTYPES, Family

CARRIED = {
    "output_dir": ("output_dir", ""),
    "epochs": ("run.epochs", "what fills no batch is not dropped here but opens the next epoch, so an epoch may have a few steps more"),
    "max_steps": ("run.steps", ""),
    "gradient_accumulation_steps": ("batch.accumulate", ""),
    "pipeline_stages": ("mesh.stages", ""),
    "eval_every_n_epochs": ("eval.every_epochs", ""),
    "save_every_n_epochs": ("export.every_epochs", ""),
    "checkpoint_every_n_epochs": ("checkpoint.every_epochs", ""),
    "checkpoint_every_n_minutes": ("checkpoint.every_minutes", "the newest three are kept, see checkpoint.keep"),
    "caching_batch_size": ("data.encode_batch", ""),
    "compile": ("memory.compile", "block by block rather than the whole"),
    "logging_steps": ("metrics.every_steps", ""),
}
LEFT = {
    "image_micro_batch_size_per_gpu": "pictures and clips share batch.micro; set that to what the largest bucket allows",
    "disable_block_swap_for_eval": "blocks stream in evaluation as in training; nothing to do",
    "reentrant_activation_checkpointing": "recompute is never reentrant and needs no other kind with stages; nothing to do",
    "eval_micro_batch_size_per_gpu": "evaluation takes batch.micro and drops no sample; nothing to do",
    "eval_image_micro_batch_size_per_gpu": "evaluation takes batch.micro and drops no sample; nothing to do",
    "image_eval_micro_batch_size_per_gpu": "diffusion-pipe reads another name; evaluation takes batch.micro here; nothing to do",
    "eval_gradient_accumulation_steps": "evaluation shows every sample once at every quantile; nothing to do",
    "steps_per_print": "screen and TensorBoard have one cadence; set metrics.every_steps",
    "resume_from_checkpoint": "checkpoints of DeepSpeed are not read; go on with a run of diffpipe by `diffpipe train CFG --resume`",
    "regenerate_cache": "the cache knows what changed; `diffpipe cache CFG --rebuild` encodes all again",
    "x_axis_examples": "plots have steps; a step is batch.micro x batch.accumulate x mesh.replicate examples",
    "pseudo_huber_c": "there is no such loss (nor does diffusion-pipe read the key since April 2026); objective.loss smooth_l1 with "
    "objective.delta of the same value has its curvature at 0 and its slope far off",
}
WANDB = {"wandb_tracker_name": "metrics.wandb.project", "wandb_run_name": "metrics.wandb.name"}
CLIPS = {"single_beginning": "first", "single_middle": "middle", "multiple_overlapping": "cover"}


@dataclass(frozen=True)
class Scale:
    """What an old config does not say about its run.

    Attributes:
        gpus: it was started on; None is one a stage.
    """

    gpus: int | None = None


def convert_settings(draft: Draft, old: Table, family: Family, scale: Scale) -> int:
    """Everything at the top but the data and the tables.

    Returns:
        Samples a step: micro batch x accumulation x replicas.

    Raises:
        ConfigError: for a value of another kind than it must be, and for GPUs that make no whole replicas.
    """
    if "epochs" not in old and "max_steps" not in old:
        raise old.fault("epochs", "a number of passes over the data")
    for key, (to, said) in CARRIED.items():
        draft.carry(old, key, to, said)
    batch = _micro(draft, old) * old.count("gradient_accumulation_steps", 1) * _replicas(draft, old, scale)
    _schedule(draft, old)
    _losses(draft, old)
    _evaluation(draft, old, batch)
    _saving(draft, old, batch)
    _memory(draft, old, family)
    _partition(draft, old, family)
    if "map_num_proc" in old:
        gpus = scale.gpus or old.count("pipeline_stages", 1)
        each = max(1, old.count("map_num_proc") // gpus)
        draft.change(old, "map_num_proc", "data.encode_workers", each, f"processes for each of {gpus} GPUs rather than for all")
    draft.put("data.on_error", "skip")  # as diffusion-pipe does with files that it cannot read
    for key, said in LEFT.items():
        draft.leave(old, key, said)
    if "monitoring" in old:
        _monitoring(draft, Table(old["monitoring"], "monitoring.", old.file))
    return batch


def _monitoring(draft: Draft, table: Table) -> None:
    draft.leave(table, "wandb_api_key", "no config keeps a key; set the environment variable WANDB_API_KEY")
    if "enable_wandb" in table and table.flag("enable_wandb"):
        draft.put("metrics.wandb", {})
        draft.tell(table, "enable_wandb", "carried", "metrics.wandb", "needs pip install 'diffpipe[wandb]'")
        for key, to in WANDB.items():
            draft.carry(table, key, to)
    for key in ("enable_wandb", *WANDB):
        if not draft.told(table, key):
            draft.leave(table, key, "Weights & Biases is not enabled there; nothing to do")
    draft.finish(table)


def _micro(draft: Draft, old: Table) -> int:
    key = "micro_batch_size_per_gpu"
    if not isinstance(old.values.get(key, 1), list):
        draft.carry(old, key, "batch.micro")
        return old.count(key, 1)
    pairs = old.entries(key)
    if not pairs or not all(isinstance(p, list) and len(p) == 2 and isinstance(p[1], int) and p[1] >= 1 for p in pairs):
        raise old.fault(key, "a number, or pairs of a side and a number")
    least = min(size for _, size in pairs)
    draft.change(old, key, "batch.micro", least, "one number holds for all buckets: the least, which fits all; batch.accumulate makes up")
    return least


def _replicas(draft: Draft, old: Table, scale: Scale) -> int:
    stages = old.count("pipeline_stages", 1)
    gpus = scale.gpus or stages
    if gpus % stages:
        raise ConfigError(
            f"{gpus} GPUs for {stages} pipeline stages", where="--gpus", expected=f"a multiple of pipeline_stages, such as {stages}"
        )
    if gpus > stages:
        draft.put("mesh.replicate", gpus // stages)
    return gpus // stages


def _schedule(draft: Draft, old: Table) -> None:
    forced = "force_constant_lr" in old
    if forced:
        draft.change(
            old, "force_constant_lr", "optimizer.lr", old.number("force_constant_lr"), "the rate of all weights, without warm-up or decay"
        )
        for key in ("warmup_steps", "lr_scheduler"):
            draft.leave(old, key, "force_constant_lr overrides it; nothing to do")
        return
    steps = old.count("warmup_steps", 0, least=0)
    if steps > 1:
        draft.change(
            old,
            "warmup_steps",
            "schedule.warmup",
            steps + 1,
            f"step k rises as k/{steps + 1} here; there from 1/{steps} at step 1 to 1 at step {steps + 1}, never further off than "
            f"{1 / (steps * (steps + 1)):.2g} of the rate",
        )
    else:
        draft.carry(old, "warmup_steps", "schedule.warmup")
    kind = old.text("lr_scheduler", "constant")
    if kind not in ("constant", "linear", "cosine"):
        raise old.fault("lr_scheduler", "constant, linear or cosine")
    ends = "falls to 0 over the run's own steps behind the warm-up; there over all epochs, warm-up and max_steps not counted"
    draft.carry(old, "lr_scheduler", "schedule.kind", "" if kind == "constant" else ends)


def _losses(draft: Draft, old: Table) -> None:
    huber = "huber_delta" in old
    for key, loss in (("smooth_l1_beta", "smooth_l1"), ("huber_delta", "huber")):
        if key not in old:
            continue
        if huber and loss != "huber":
            draft.leave(old, key, "huber_delta overrides it; nothing to do")
            continue
        draft.put("objective.loss", loss)
        draft.change(old, key, "objective.delta", old.number(key), f"with objective.loss {loss}; for every family rather than for some")


def _evaluation(draft: Draft, old: Table, batch: int) -> None:
    if old.entries("eval_datasets"):
        draft.put("eval.quantiles", [n / 10 for n in range(1, 10)])
    draft.carry(old, "eval_every_n_steps", "eval.every_steps")
    _by_examples(draft, old, "eval_every_n_examples", "eval.every_steps", batch)
    draft.carry(old, "eval_before_first_step", "eval.at_start")


def _saving(draft: Draft, old: Table, batch: int) -> None:
    draft.carry(old, "save_every_n_steps", "export.every_steps")
    _by_examples(draft, old, "save_every_n_examples", "export.every_steps", batch)
    if "save_dtype" in old:
        if old.text("save_dtype") in DTYPES:
            draft.carry(old, "save_dtype", "export.dtype")
        else:
            draft.leave(old, "save_dtype", f"weights are exported in {', '.join(DTYPES)}; set export.dtype to one of them")


def _by_examples(draft: Draft, old: Table, key: str, to: str, batch: int) -> None:
    if key not in old:
        return
    count = old.count(key)
    if count < batch:
        draft.leave(old, key, f"{count} examples are less than the {batch} of a step, which diffusion-pipe cannot count; set {to}")
        return
    draft.change(old, key, to, count // batch, f"{count} examples // {batch} a step")


def _memory(draft: Draft, old: Table, family: Family) -> None:
    key = "activation_checkpointing"
    kind = old.values.get(key, False)
    if kind not in (True, False, "unsloth"):
        raise old.fault(key, "true, false or 'unsloth'")
    recompute = "block" if kind else "none"
    if key not in old:
        draft.put("memory.recompute", recompute)
    elif kind == "unsloth":
        said = "with memory.offload true, which moves what goes into a block to host memory from memory.offload_threshold on"
        draft.change(old, key, "memory.recompute", recompute, said)
        draft.put("memory.offload", True)
    else:
        draft.change(old, key, "memory.recompute", recompute, "what goes into a block is kept" if kind else "all is kept")
    key = "blocks_to_swap"
    count = old.count(key, 0, least=0)
    if count and "adapter" not in old:
        draft.leave(old, key, "diffusion-pipe refuses it for full fine-tuning; here it needs optimizer.clip null, then set memory.swap")
    elif count and old.number("pipeline_stages", 1) > 1:
        draft.leave(old, key, "diffusion-pipe refuses it with several stages; here memory.swap counts the blocks of each stage: set that")
    elif count:
        streamed = family.streamed(count)
        draft.change(
            old, key, "memory.swap", streamed, f"all blocks that {count} leaves in host memory, of each kind, are counted: {streamed}"
        )
    else:
        draft.carry(old, key, "memory.swap")


def _partition(draft: Draft, old: Table, family: Family) -> None:
    method = old.text("partition_method", "parameters")
    split = old.entries("partition_split")
    if method == "parameters":
        if "partition_method" in old:
            draft.carry(old, "partition_method", "mesh.split")
        draft.leave(old, "partition_split", "diffusion-pipe reads it with partition_method manual only; nothing to do")
        return
    if method != "manual":
        draft.leave(old, "partition_method", "stages are balanced by what mesh.split says, or begin where it does; set that")
        draft.leave(old, "partition_split", "diffusion-pipe reads it with partition_method manual only; nothing to do")
        return
    if not all(isinstance(layer, int) for layer in split):
        raise old.fault("partition_split", "numbers of layers")
    units = [sum(family.units[:layer]) for layer in split]
    if len(units) != old.count("pipeline_stages", 1) - 1 or sorted(set(units)) != units or (units and units[0] < 1):
        draft.leave(old, "partition_method", "its partition_split makes no stages")
        draft.leave(old, "partition_split", f"its layers make the units {units}, which are no beginnings of stages; set mesh.split")
        return
    draft.tell(old, "partition_method", "carried", "mesh.split", "stages begin where that says")
    draft.change(old, "partition_split", "mesh.split", units, "units are counted rather than layers, of which the first is no unit")
