"""A config's faults are reported together, and its reference is generated."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diffpipe.config.load import load_config
from diffpipe.config.reference import json_schema, reference_yaml
from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError
from tests.conftest import ROOT


def written(folder: Path, text: str) -> Path:
    file = folder / "cfg.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_all_faults_are_in_one_report_with_what_was_probably_meant(tmp_path: Path) -> None:
    text = (
        "run: {stesp: 3}\nbatch: {micro: no}\nmodel: {family: flux, path: x}\ndata: {folders: [{path: a, repeat: 2}]}\noptimiser: {lr: 1}\n"
    )
    with pytest.raises(ConfigError) as fault:
        load_config(written(tmp_path, text))
    told = str(fault.value)
    for part in ("run.stesp: there is no such key; did you mean steps?", "batch.micro", "did you mean repeats?", "did you mean optimizer?"):
        assert part in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: [1", "line 1"),
        ("- 1", "not keys and values"),
        ("run: {steps: 1}\nrun: {steps: 2}", "written twice"),
        ("? [run]\n: 1", "line 1.*no name for a key"),
        ("# run: {steps: 1}", "holds nothing"),
        ('output_dir: "D:\\data"', r"line 1: .*escape[\s\S]*write / for"),
        ("run:\n\tsteps: 1", r"line 2[\s\S]*indent with spaces"),
        ("run: {steps: 1}", "model: is missing"),
        (
            "run: {steps: 1}\ndata: {folders: [{path: x}]}\nmodel: {family: flux, dtype: float32, trainable_dtype: bfloat16}",
            "trainable_dtype is bfloat16, must be float32 or that of the computation, float32",
        ),
        ("optimizer: {groups: [{match: '*attn'}]}", r"optimizer.groups.0.match: '\*attn' is no regular expression: nothing to repeat"),
        ("adapter: {ranks: {'(': 4}}", r"adapter.ranks.*'\(' is no regular expression"),
    ],
)
def test_a_file_that_is_no_config_says_why(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(written(tmp_path, text))


SHORT = "run: {steps: 1}\nmodel: {family: flux, path: x}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("memory: {swap: on}", "memory.swap: true (on, yes) found, a number expected"),
        (
            "memory: {swap: al}",
            "memory.swap: 'al' found, input should be a valid integer, unable to parse string as an integer; or 'all' or 'auto'",
        ),
        ("data: {folders: [{path: x}], aspect: {cout: 3}}", "data.aspect.cout: there is no such key; did you mean count?"),
        ("data: {folders: [{path: x}], aspect: {min: 2, max: 1}}", "data.aspect: min 2.0 is above max 1.0"),
        (
            "preview: {seed: 18446744073709551616}",
            "preview.seed: 18446744073709551616 found, input should be less than 18446744073709551616",
        ),
        (
            r'output_dir: "D:\runs"',
            r"output_dir: 'D:\runs' holds what \ and a letter mean in double quotes; write / for \, or single quotes",
        ),
        ("optimizer: {lr: .inf}", "optimizer.lr: inf found, input should be a finite number"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: 1 found, input should be less than 1"),
        ("mesh:", "mesh: nothing found, keys below it expected; take it out where all have their defaults"),
        ("mesh: auto", "mesh: 'auto' found, input should be keys and values"),
    ],
)
def test_a_key_at_fault_has_one_line(tmp_path: Path, text: str, told: str) -> None:
    data = "" if text.startswith("data") else "data: {folders: [{path: x}]}\n"
    with pytest.raises(ConfigError) as fault:
        load_config(written(tmp_path, SHORT + data + text))
    assert str(fault.value).splitlines()[1:-1] == [f"  {told}"]


def test_what_yaml_has_its_own_ways_with_is_read_as_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folders = "data:\n  folders:\n    - &first {path: ~/one, repeats: 2}\n    - {<<: *first, path: ~/two}\n"
    config = load_config(
        written(
            tmp_path, SHORT + folders + "output_dir: ~/runs\noptimizer: {kind: prodigy, options: {d0: 1e-6, betas: [0.9, 1E-3], name: a1e}}"
        )
    )
    assert [(f.path, f.repeats) for f in config.data.folders] == [(str(tmp_path / "one"), 2), (str(tmp_path / "two"), 2)]
    assert config.output_dir == tmp_path / "runs"
    assert config.optimizer.options == {"d0": 1e-6, "betas": [0.9, 1e-3], "name": "a1e"}


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_overrides_reach_any_key() -> None:
    settings = ["optimizer.lr=5e-4", "data.folders.0.path=elsewhere", "adapter.rank=8", "memory.recompute=none"]
    config = load_config(ROOT / "configs/quickstart.yaml", settings)
    assert config.optimizer.lr == 5e-4
    assert config.data.folders[0].path == "elsewhere"
    assert config.adapter is not None
    assert config.adapter.rank == 8
    assert load_config(ROOT / "configs/quickstart_video_lora.yaml", ["adapter=null"]).adapter is None


@pytest.mark.parametrize("override", ["nothing", "data.folders.7.path=x"])
def test_a_bad_override_is_a_clear_error(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(ROOT / "configs/quickstart.yaml", [override])


def test_the_reference_and_the_schema_are_those_of_the_code() -> None:
    assert (ROOT / "configs/reference.yaml").read_text(encoding="utf-8") == reference_yaml()
    assert (ROOT / "configs/schema.json").read_text(encoding="utf-8") == json_schema()


def test_the_reference_is_a_valid_config() -> None:
    Config.model_validate(yaml.safe_load(reference_yaml()))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.name)
def test_every_shipped_config_is_valid(file: Path) -> None:
    load_config(file)


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["cache"], ["export"], ["init"], ["doctor"], ["convert"], ["models"], ["schema"]],
    ids=lambda c: " ".join(c) or "diffpipe",
)
def test_help_is_quick_and_fits_a_screen(command: list[str]) -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "diffpipe", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - begun < 5, "a busy machine may be slow, but torch alone would take longer"
    assert len(done.stdout.splitlines()) <= 24


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; sys.argv = ['diffpipe', '--help']\nimport runpy\ntry:\n    runpy.run_module('diffpipe', run_name='__main__')\n"
    program += "except SystemExit:\n    pass\nassert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)


def test_a_wrong_command_line_exits_with_2() -> None:
    assert subprocess.run([sys.executable, "-m", "diffpipe", "trian"], cwd=ROOT, capture_output=True).returncode == 2
