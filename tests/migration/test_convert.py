"""A diffusion-pipe config becomes one of ours: every key is carried, changed by a rule that is told, or left out with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from diffpipe.config.load import load_config
from diffpipe.config.schema import Config, ScheduleConfig
from diffpipe.errors import ConfigError
from diffpipe.migration import Converted, convert
from diffpipe.migration.families import ELSEWHERE, FAMILIES
from diffpipe.migration.settings import Scale
from diffpipe.models.unet import unet_units
from diffpipe.optim import check_optimizer, factor
from tests.conftest import Command
from tests.migration.keys import LEFT, ROWS, Row

# What a config cannot do without, by table.
LEAST = {
    "": "dataset = 'data.toml'\nepochs = 10",
    "model.": "type = '{kind}'\ndtype = 'bfloat16'",
    "adapter.": "type = 'lora'\nrank = 16",
    "optimizer.": "type = 'adamw'\nlr = 1e-4",
    "monitoring.": "",
    "dataset: ": "resolutions = [512]",
    "dataset: directory.0.": "path = 'pictures'",
}


def joined(*texts: str) -> str:
    """TOML lines, of which later ones replace earlier ones with the same key."""
    lines = {line.partition("=")[0].strip(): line for text in texts for line in text.splitlines() if line}
    return "\n".join(lines.values())


def written(folder: Path, row: Row) -> Path:
    """A main config and its dataset config with the row's key in them."""
    tables = {name: text.format(kind=row.kind) for name, text in LEAST.items()}
    tables[""] = joined(tables[""], row.top)
    tables[row.table] = joined(tables[row.table], row.more, row.text)
    named = "\n".join(f"[{name[:-1]}]\n{tables[name]}" for name in ("model.", "adapter.", "optimizer.", "monitoring."))
    (folder / "old.toml").write_text(f"{tables['']}\n{named}\n", encoding="utf-8")
    directory = "" if row.key == "directory" else f"[[directory]]\n{tables['dataset: directory.0.']}\n"
    (folder / "data.toml").write_text(f"{tables['dataset: ']}\n{directory}", encoding="utf-8")
    return folder / "old.toml"


def at(config: Config, key: str) -> Any:
    place: Any = config.model_dump(mode="json")
    for name in key.split("."):
        place = place[int(name)] if isinstance(place, list) else place[name]
    return place


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind} {row.table}{row.text}")
def test_every_key_is_carried_changed_or_left_out_with_a_reason(tmp_path: Path, row: Row) -> None:
    made = convert(written(tmp_path, row), Scale())
    (fate,) = [fate for fate in made.fates if fate.key == row.table + row.key]
    assert fate.outcome == row.outcome
    assert (fate.outcome == LEFT) == (fate.to == ""), "a key that is left out has no key here, any other has"
    assert fate.outcome == "carried" or len(fate.said) > 5
    for key, value in row.here.items():
        found = at(made.config, key)
        assert found == (list(value) if isinstance(value, tuple) else value), key
    for name in fate.to.split(", ") if fate.outcome != LEFT else ():
        keys = {k for k, v in flat(made.config.model_dump())}
        assert any(key == name or key.startswith(f"{name}.") for key in keys), f"{name} is a key of ours"


def flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Keys without places in lists."""
    if isinstance(value, dict):
        return [(key, value), *(pair for name, inner in value.items() for pair in flat(inner, f"{key}.{name}".strip(".")))]
    if isinstance(value, list):
        return [(key, value), *(pair for inner in value for pair in flat(inner, key))]
    return [(key, value)]


def test_the_file_is_a_config_that_holds_and_tells_what_is_left_out(tmp_path: Path, command: Command) -> None:
    row = Row("", "steps_per_print = 5", LEFT)
    source, target = written(tmp_path, row), tmp_path / "new folder" / "neu ü.yaml"
    target.parent.mkdir()
    told = command("convert", source, "-o", target).stdout
    assert "not carried over: 1 key\n  steps_per_print: " in told
    assert "#   steps_per_print: " in target.read_text(encoding="utf-8")
    assert load_config(target).model.family == "flux"
    again = command("convert", source, "-o", target, check=False)
    assert again.exit_code == 1 and "is there already" in again.stderr
    printed = command("convert", source)
    assert Config.model_validate(yaml.safe_load(printed.stdout)) == load_config(target) and "steps_per_print" in printed.stderr


def test_no_key_of_a_tracker_is_shown_or_kept(tmp_path: Path) -> None:
    made = convert(written(tmp_path, Row("monitoring.", "wandb_api_key = 'sesame'", LEFT)), Scale())
    assert any(f.key == "monitoring.wandb_api_key" for f in made.fates)
    assert "sesame" not in made.text + repr(made.fates)


def test_a_misspelt_key_is_told_of_wherever_it_stands(tmp_path: Path) -> None:
    for table in LEAST:
        made = convert(written(tmp_path, Row(table, "micro_bach = 1", LEFT)), Scale())
        (fate,) = [fate for fate in made.fates if fate.key == f"{table}micro_bach"]
        assert fate.outcome == LEFT and any(part in fate.said for part in ("misspelling", "no such option", "Weights"))


# -- meanings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_warm_up_rises_as_there(tmp_path: Path, steps: int) -> None:
    made = convert(written(tmp_path, Row("", f"warmup_steps = {steps}", "")), Scale())
    for k in range(1, 2 * steps + 2):
        theirs = 1 / steps + (1 - 1 / steps) * (k - 1) / steps if k <= steps else 1.0
        assert abs(factor(ScheduleConfig(warmup=made.config.schedule.warmup), k, 10**6) - theirs) <= 1 / (steps * (steps + 1)) + 1e-12


def test_the_samples_of_a_step_and_counts_of_examples_follow_from_the_gpus(tmp_path: Path) -> None:
    top = "micro_batch_size_per_gpu = 2\ngradient_accumulation_steps = 3\npipeline_stages = 2\n"
    row = Row("", "save_every_n_examples = 100", "", top=top)
    config = convert(written(tmp_path, row), Scale(gpus=8)).config
    assert (config.mesh.stages, config.mesh.replicate) == (2, 4)
    assert config.export.every_steps == 100 // (2 * 3 * 4)
    with pytest.raises(ConfigError, match="7 GPUs for 2 pipeline stages"):
        convert(written(tmp_path, row), Scale(gpus=7))


def test_layers_of_sdxl_are_counted_as_units() -> None:
    shape = {
        "block_out_channels": (1, 2, 3),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    units, counts = list(unet_units(shape)), FAMILIES["sdxl"].units
    assert sum(counts) == len(units) and len(counts) == 23
    begins = [units[sum(counts[:layer])] for layer in range(1, 22)]
    assert not any(".attentions." in unit for unit in begins if not unit.startswith("mid_block")), "a layer begins with its resnet"
    assert begins[8:11] == ["mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0"]


def test_full_fine_tuning_keeps_16_bit_weights_and_does_not_swap(tmp_path: Path) -> None:
    source = written(tmp_path, Row("", "blocks_to_swap = 4", ""))
    text = source.read_text(encoding="utf-8").replace("[adapter]\ntype = 'lora'\nrank = 16\n", "").replace("'adamw'", "'adamw_optimi'")
    source.write_text(text, encoding="utf-8")
    made = convert(source, Scale())
    assert made.config.adapter is None and made.config.memory.swap == 0 and made.config.export.formats == ["comfyui"]
    assert (made.config.model.trainable_dtype, made.config.optimizer.rounding) == ("bfloat16", "stochastic")
    assert any(f.key == "blocks_to_swap" and "optimizer.clip null" in f.said for f in made.fates)


def test_what_all_folders_share_stands_once_and_what_differs_in_each(tmp_path: Path) -> None:
    text = (
        "resolutions = [1024]\ncaption_prefix = 'a '\n[[directory]]\npath = 'one'\n"
        "[[directory]]\npath = 'two'\nresolutions = [512]\ncaption_prefix = ''\n"
    )
    source = written(tmp_path, Row("", "eval_datasets = ['held.toml']", ""))
    (tmp_path / "data.toml").write_text(text)
    (tmp_path / "held.toml").write_text("resolutions = [1024]\nframe_buckets = [1]\n[[directory]]\npath = 'three'\n")
    config = convert(source, Scale()).config
    held = config.eval.sets[0].folders[0]
    one, two = (config.data.of(folder) for folder in config.data.folders)
    assert (one.resolutions, two.resolutions, config.data.of(held).resolutions) == ([1024], [512], [1024])
    assert (one.captions.prefix, two.captions.prefix, config.data.of(held).captions.prefix) == ("a ", "", "")
    assert config.data.aspect == [1.0] and held.aspect is None
    assert config.eval.quantiles == [n / 10 for n in range(1, 10)]


def test_a_folder_without_controls_beside_those_with_is_left_out(tmp_path: Path) -> None:
    source = written(tmp_path, Row("", "max_steps = 5", ""))
    pair = "[[directory]]\npath = 'after'\ncontrol_path = 'before'\n"
    (tmp_path / "data.toml").write_text(f"resolutions = [512]\n{pair}[[directory]]\npath = 'plain'\n")
    made = convert(source, Scale())
    assert made.config.model.family == "flux-kontext" and [f.path for f in made.config.data.folders] == ["after"]
    assert any(f.key == "dataset: directory.1.path" and f.outcome == LEFT for f in made.fates)


@pytest.mark.parametrize(
    "kind", ["adamw", "adamw_optimi", "adamw8bit", "AdamW8bitKahan", "stableadamw", "sgd", "offload", "Prodigy", "Lion"]
)
def test_the_optimizer_works_here(tmp_path: Path, kind: str) -> None:
    check_optimizer(convert(written(tmp_path, Row("optimizer.", f"type = '{kind}'", "")), Scale()).config.optimizer)


# -- the kinds of config that its repository has as examples -----------------------------------------------------------------

EXAMPLES = {
    "a video LoRA in fp8 from single files": (
        "hunyuan-video",
        "activation_checkpointing = true\nvideo_clip_mode = 'single_middle'\ngradient_accumulation_steps = 4",
        "transformer_path = 'm/t.safetensors'\nvae_path = 'm/v.safetensors'\nllm_path = 'm/llama'\nclip_path = 'm/clip'\n"
        "transformer_dtype = 'float8'",
        "type = 'adamw_optimi'\nlr = 1e-5\nbetas = [0.9, 0.98]\neps = 1e-9",
        "resolutions = [640]\nenable_ar_bucket = true\nmin_ar = 0.6\nmax_ar = 1.7\nnum_ar_buckets = 5\nframe_buckets = [1, 3, 25, 49]",
        [],
    ),
    "a large video model in little memory": (
        "wan",
        "activation_checkpointing = 'unsloth'\nblocks_to_swap = 28\nwarmup_steps = 20\nsave_dtype = 'bfloat16'",
        "ckpt_path = 'm/Wan2.1-T2V-14B'\ntransformer_path = 'm/wan.safetensors'\ntransformer_dtype = 'float8'",
        "type = 'AdamW8bitKahan'\nlr = 3e-5\nstabilize = false",
        "resolutions = [480]\nframe_buckets = [81]",
        ["optimizer.stabilize"],
    ),
    "pictures at two sizes with a prefix": (
        "lumina_2",
        "micro_batch_size_per_gpu = 2",
        "transformer_path = 'm/t.safetensors'\nllm_path = 'm/g.safetensors'\nvae_path = 'm/v.safetensors'\nlumina_shift = true",
        "type = 'adamw8bitkahan'\nlr = 4e-6\ngradient_release = true",
        "resolutions = [640, 960]\ncaption_prefix = 'Draw this: '\nenable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 9",
        [],
    ),
    "sizes of buckets one by one": (
        "cosmos",
        "eval_datasets = [{name = 'same', config = 'data.toml'}]\neval_every_n_steps = 40",
        "transformer_path = 'm/t.pt'\nvae_path = 'm/v.safetensors'\ntext_encoder_path = 'm/t5.safetensors'",
        "type = 'Prodigy'\nlr = 1",
        "size_buckets = [[960, 960, 1], [704, 1280, 1]]\nnum_repeats = 10",
        [],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kinds_of_config_that_its_examples_show_become_ours(tmp_path: Path, name: str) -> None:
    kind, top, model, optimizer, data, left = EXAMPLES[name]
    source = written(tmp_path, Row("model.", model.splitlines()[0], "", more=model, kind=kind, top=top))
    source.write_text(source.read_text(encoding="utf-8").replace(LEAST["optimizer."], optimizer), encoding="utf-8")
    (tmp_path / "data.toml").write_text(f"{data}\n[[directory]]\npath = 'media'\n", encoding="utf-8")
    made = convert(source, Scale())
    assert [f.key for f in made.fates if f.outcome == LEFT] == left
    assert made.config.model.files and made.config.adapter is not None


# -- faults ------------------------------------------------------------------------------------------------------------


def fault_of(path: Path) -> str:
    with pytest.raises(ConfigError) as fault:
        convert(path, Scale())
    return str(fault.value)


def test_bad_toml_and_missing_files_are_named(tmp_path: Path) -> None:
    assert "no such file" in fault_of(tmp_path / "none.toml")
    source = written(tmp_path, Row("", "max_steps = 5", ""))
    (tmp_path / "data.toml").write_text("resolutions = [512")
    assert "data.toml: not valid TOML" in fault_of(source)
    (tmp_path / "data.toml").unlink()
    told = fault_of(source)
    assert "data.toml is not there" in told and "old.toml: dataset" in told
    source.write_bytes(b"\xff\xfe")
    assert "cannot be read" in fault_of(source)


def test_a_dataset_named_from_the_folder_of_diffusion_pipe_is_found(tmp_path: Path) -> None:
    source = written(tmp_path, Row("", "dataset = 'inner/data.toml'", ""))
    (tmp_path / "inner").mkdir()
    (tmp_path / "data.toml").rename(tmp_path / "inner" / "data.toml")
    moved = source.rename(tmp_path / "inner" / "old.toml")
    assert convert(moved, Scale()).config.data.folders[0].path == "pictures"


@pytest.mark.parametrize("kind", [*ELSEWHERE, "fluxx"])
def test_a_model_that_is_not_trained_here_is_named(tmp_path: Path, kind: str) -> None:
    told = fault_of(written(tmp_path, Row("", "max_steps = 5", "", kind=kind)))
    assert f"'{kind}' is no" in told and "old.toml: model.type" in told
    assert ("did you mean flux?" in told) == (kind == "fluxx")


@pytest.mark.parametrize(
    ("table", "text", "told"),
    [
        ("", "pipeline_stages = 0", "pipeline_stages: 0\n  expected: a whole number from 1 on"),
        ("", "gradient_accumulation_steps = inf", "gradient_accumulation_steps: inf\n  expected: a whole number from 1 on"),
        ("", "blocks_to_swap = 'many'", "blocks_to_swap: 'many'\n  expected: a number"),
        ("", "activation_checkpointing = 'all'", "activation_checkpointing"),
        ("", "video_clip_mode = 'last'", "single_beginning"),
        ("", "eval_datasets = [3]", "eval_datasets"),
        ("", "micro_batch_size_per_gpu = [[512, 0]]", "pairs of a side and a number"),
        ("optimizer.", "beta2_half_life = 0", "beta2_half_life: 0\n  expected: a number above 0"),
        ("model.", "dtype = 'int8'", "model.dtype: 'int8'"),
        ("adapter.", "type = 'loha'", "adapter.type: 'loha'"),
        ("optimizer.", "type = 'AdamV'", "optimizer.type"),
        ("optimizer.", "type = 'ScheduleFreeAdamW'", "optimizer.type"),
        ("dataset: ", "resolutions = ['big']", "resolutions"),
        ("dataset: ", "directory = 3", "directory: 3"),
        ("dataset: directory.0.", "path = 3", "directory.0.path: 3"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(tmp_path: Path, table: str, text: str, told: str) -> None:
    message = fault_of(written(tmp_path, Row(table, text, "")))
    assert told in message and ".toml" in message


def test_converted_is_what_the_command_prints(tmp_path: Path) -> None:
    made = convert(written(tmp_path, Row("", "max_steps = 5", "")), Scale())
    assert isinstance(made, Converted) and Config.model_validate(yaml.safe_load(made.text)) == made.config
