"""What the pages tell a person to type, to write and to read is what the program takes, has and says."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from diffpipe.cli import app
from diffpipe.cli.console import fill_bare_resume
from diffpipe.config.load import validate
from diffpipe.config.schema import Config, Section
from tests.conftest import ROOT, Command

GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
# Guides whose commands run as they stand, in the order in which one goes on with another's run.
RUN = ["first-lora", "video", "resume", "comfyui", "diffusion-pipe"]
FREE = "# needs nothing"
EXAMPLE = "runs/20261127-101500"  # a run folder on a page
PROGRAM = re.compile(r"(?:^|.*\s)(?:\S*/)?(?:-m )?diffpipe (?=[a-z])")
# What a block of YAML may leave to the rest of a config.
LEAST: dict[str, Any] = {"run": {"steps": 1}, "model": {"family": "wan"}, "data": {"folders": [{"path": "data"}]}}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def typed(block: str) -> Iterator[list[str]]:
    """The arguments of diffpipe in every command of a block."""
    for line in block.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if "diffpipe" in [Path(word).name for word in words]:
                at = [Path(word).name for word in words].index("diffpipe")
                yield words[at + 1 :]


def told(page: Path) -> Iterator[list[str]]:
    """The same of commands in the text of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for command in re.findall(r"`(?:python -m |torchrun [^`]*-m )?diffpipe ([^`]+)`", text):
        yield shlex.split(command.replace("[", "").replace("]", ""))


def parse(arguments: list[str], whole: bool) -> None:
    """Have the command line read arguments, and run nothing.

    Args:
        whole: whether what a command cannot do without must be there.
    """
    group = typer.main.get_command(app)
    name, *rest = fill_bare_resume(arguments)
    command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        context = command.make_context(name, rest)
    except Exception as fault:
        if not whole and type(fault).__name__ == "MissingParameter":
            return
        raise
    known = set(keys_of(Config))
    for setting in context.params.get("overrides") or []:
        assert setting.partition("=")[0] in known or setting == "KEY=VALUE", setting


def keys_of(section: type[Section], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield above + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from keys_of(kind, f"{above}{name}.")


@cache
def messages() -> list[str]:
    """All text of the program, with … for what differs."""

    def text(node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)  # pyright: ignore[reportReturnType, reportCallIssue, reportArgumentType]
        return None

    files = [*(ROOT / "diffpipe").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [found for node in nodes if isinstance(node, ast.expr) and (found := text(node)) is not None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_the_docs_name_is_in_the_schema(page: Path) -> None:
    known = set(keys_of(Config))
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    named = set(re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)\b", page.read_text(encoding="utf-8")))
    assert named and named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_there_is(page: Path) -> None:
    for block in blocks(page, "sh"):
        for arguments in typed(block):
            parse(arguments, whole=True)
    for arguments in told(page):
        parse(arguments, whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (page.parent / link).exists()] == []
    configs = re.findall(r"\b(configs/[\w/-]+\.yaml)", text)
    assert [config for config in configs if not (ROOT / config).is_file()] == []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_part_of_a_config_holds(page: Path) -> None:
    for block in blocks(page, "yaml"):
        raw = yaml.safe_load(block)
        data = {"data": LEAST["data"] | raw["data"]} if "data" in raw else {}
        validate(LEAST | raw | data, page.name)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_block_of_commands_says_what_it_needs_and_when_it_last_ran(page: Path) -> None:
    for block in blocks(page, "sh"):
        first = next(line for line in block.splitlines() if not line.startswith("#!"))
        assert first == FREE or re.fullmatch(r"# needs .+; last run: (not yet|\d{4}-\d\d-\d\d.*)", first), first
        assert first != FREE or page.stem in RUN


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configs of the checkout in it."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("*.json"))
    return folder


@pytest.mark.parametrize("name", RUN)
def test_the_commands_that_need_nothing_run(name: str, desk: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    page = ROOT / f"docs/{name}.md"
    for block in blocks(page, "toml"):
        (desk / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    free = [block for block in blocks(page, "sh") if block.startswith(FREE)]
    assert free
    for block in free:
        for arguments in typed(block):
            runs = sorted(desk.glob("runs/2*/config.yaml"))
            newest = str(runs[-1].parent.relative_to(desk)) if runs else ""
            command(*fill_bare_resume([argument.replace(EXAMPLE, newest) for argument in arguments]))


def test_every_message_of_the_troubleshooting_page_is_one_of_the_program() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", page, re.M)
    assert len(headings) == page.count("\n### ") > 20
    for heading in headings:
        assert any(heading in message for message in messages()), heading
