"""What export tests share: a config on a tiny checkpoint of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffpipe.config.schema import Config
from diffpipe.models import MODELS
from diffpipe.toy import materialize
from tests.export.tiny import MakeConfig


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def make_config(home: Path) -> MakeConfig:
    def make(family: str, adapter: dict[str, Any] | None = None, export: dict[str, Any] | None = None) -> Config:
        config = Config.model_validate(
            {
                "output_dir": home,
                "run": {"steps": 1},
                "model": {"family": family, "path": f"toy:{family}", "dtype": "float32"},
                "data": {"folders": [{"path": "unused"}]},
                "adapter": adapter,
                "export": export or {},
            }
        )
        return materialize(config)

    return make


@pytest.fixture(params=sorted(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param
