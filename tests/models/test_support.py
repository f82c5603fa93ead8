"""What the table of families says is what the families do, and the README has the table."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from diffpipe.cli import app
from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import ConfigError
from diffpipe.models import MODELS, make_model, model_class, support
from tests.conftest import ROOT

ROWS, ALIKE = support.support()


def row(family: str) -> dict[str, str]:
    return {**ALIKE, **next(r for r in ROWS if r["model.family"] == family)}


def test_the_readme_has_the_table_that_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["models", "--markdown"])
    assert printed.exit_code == 0
    found = re.search(r"<!-- diffpipe models --markdown -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert found is not None
    assert found[1] == f"\n{printed.stdout}\n", "python -m diffpipe models --markdown prints what belongs between the marks"


def test_the_command_names_every_family() -> None:
    printed = CliRunner().invoke(app, ["models"]).stdout
    assert all(re.search(rf"^{re.escape(family)} +{re.escape(model_class(family).title)}", printed, re.M) for family in MODELS)


def test_rows_say_what_is_known_of_released_models() -> None:
    wan, flux = row("wan"), row("flux")
    assert (wan["media"], wan["frames"], wan["size multiple"], wan["objective"]) == (
        "images, videos",
        "4k+1 at 16 fps",
        "16",
        "rectified flow",
    )
    assert (flux["media"], flux["frames"], flux["size multiple"]) == ("images", "1", "16")
    assert wan["written"] == flux["written"] == "diffusers, comfyui, kohya (adapters)"
    assert {f: row(f)["objective"] for f in ("cosmos", "sdxl")} == {"cosmos": "EDM", "sdxl": "DDPM"}
    assert row("sdxl")["trains"] == "denoiser, text encoders"
    assert [row(family)["previews"] for family in ("cosmos", "flux", "wan")] == [
        "not yet",
        "distilled guidance",
        "classifier-free guidance",
    ]
    assert wan["trained as"] == "LoRA, DoRA, LoKr, all weights"


@pytest.mark.parametrize("family", sorted(MODELS))
def test_only_families_that_say_so_take_the_key_that_trains_text_encoders(family: str) -> None:
    config = ModelConfig(family=family, path="unused", train_text_encoders=True)
    if "text encoders" in row(family)["trains"]:
        make_model(config, ObjectiveConfig())
    else:
        with pytest.raises(ConfigError, match=r"model\.train_text_encoders"):
            make_model(config, ObjectiveConfig())
