"""Components come from folders, files and the hub, and nothing is asked of the hub unless the config names a revision of it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.models import MODELS, make_model
from diffpipe.models.blueprint import Component, shipped
from diffpipe.models.encoders import load_component
from tests.conftest import ROOT
from tests.families import CPU, encoded, encoders_of

Toys = Callable[[str], Path]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_every_shipped_config_makes_its_class(family: str) -> None:
    blueprint = shipped(family)
    model = make_model(ModelConfig(family=family), ObjectiveConfig())
    assert model.component in blueprint and blueprint[model.component].kind == model.denoiser
    for component in blueprint.values():
        kind = getattr(import_module(component.library), component.kind)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            continue
        with torch.device("meta"):
            made = kind.from_config(component.config) if component.library == "diffusers" else kind(kind.config_class(**component.config))
        assert sum(p.numel() for p in made.parameters()) > 1e7


def test_the_shipped_tokenizers_give_the_released_token_numbers() -> None:
    blueprint = shipped("flux")
    clip = load_component(blueprint["tokenizer"], torch.float32, blueprint)
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(clip) == 49408
    t5 = load_component(blueprint["tokenizer_2"], torch.float32, blueprint)
    assert t5("Hello world").input_ids == [8774, 296, 1]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_components_from_single_files_encode_as_the_folder_does(toys: Toys, tmp_path: Path, family: str) -> None:
    folder = toys(family)
    whole = make_model(ModelConfig(family=family, path=str(folder), dtype="float32"), ObjectiveConfig())
    files: dict[str, Path] = {}
    for name, component in whole.blueprint.items():
        part = getattr(encoders_of(whole).pipeline, name, None)
        if name != whole.component and isinstance(part, torch.nn.Module):
            files[name] = tmp_path / f"{name}.safetensors"
            # As their own classes name them: what other programs write is the converters' business.
            save_file({n: t.clone().contiguous() for n, t in part.state_dict().items()}, files[name])
        elif component.folder is not None and "tokenizer" in name:
            files[name] = component.folder
    apart = make_model(ModelConfig(family=family, path=str(folder), files=files, dtype="float32"), ObjectiveConfig())
    ours, theirs = encoded(apart), encoded(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert apart.identity("media") != whole.identity("media")
    assert apart.identity("text") == make_model(apart.config, ObjectiveConfig()).identity("text")


def test_a_component_that_nothing_names_is_told_with_its_key() -> None:
    for name, told in (("vae", r"model\.files\.vae"), ("text_encoder_2", r"model\.files\.text_encoder_2")):
        with pytest.raises(CheckpointError, match=told):
            load_component(shipped("flux")[name], torch.float32, shipped("flux"))
    with pytest.raises(CheckpointError, match=r"model\.files\.tokenizer"):
        load_component(shipped("wan")["tokenizer"], torch.float32, shipped("wan"))


def test_a_file_that_is_another_component_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t5.safetensors"
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}, file)
    for name in ("vae", "text_encoder"):
        component = shipped("flux")[name]
        small = Component(name, component.library, component.kind, component.config, file=file)
        with pytest.raises(CheckpointError, match=r"t5\.safetensors: (lacks|has)"):
            load_component(small, torch.float32, shipped("flux"))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: (cannot be read as JSON|holds list)"):
        _ = make_model(ModelConfig(family="wan", files={"transformer": tmp_path}), ObjectiveConfig()).blueprint


def test_an_unknown_component_is_told_with_what_was_meant(toys: Toys, tmp_path: Path) -> None:
    file = tmp_path / "ae.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match=r"no component 'text_encoder2'.*did you mean text_encoder_2\?"):
        _ = make_model(ModelConfig(family="flux", path=str(toys("flux")), files={"text_encoder2": file}), ObjectiveConfig()).blueprint


@pytest.mark.parametrize("path", ["hf:owner/name", "hf:owner/name@", "hf:name@main"])
def test_the_hub_is_asked_for_a_revision_only(path: str) -> None:
    with pytest.raises(ConfigError, match=r"hf:OWNER/NAME@REVISION"):
        _ = make_model(ModelConfig(family="flux", path=path), ObjectiveConfig()).blueprint


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs, over a folder."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[str]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        if self.path.startswith(f"/api/models/owner/name/revision/{self.commit}"):
            files = [{"rfilename": str(p.relative_to(self.folder))} for p in sorted(self.folder.rglob("*")) if p.is_file()]
            self.give(json.dumps({"id": "owner/name", "sha": self.commit, "siblings": files}).encode(), "application/json", body)
            return
        if self.path.startswith(f"/api/models/owner/name/tree/{self.commit}"):
            files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
            tree = [{"type": "file", "oid": "0", "size": p.stat().st_size, "path": str(p.relative_to(self.folder))} for p in files]
            self.give(json.dumps(tree).encode(), "application/json", body)
            return
        start = f"/owner/name/resolve/{self.commit}/"
        file = self.folder / self.path.removeprefix(start)
        if self.path.startswith(start) and file.is_file():
            if body:
                self.asked.append(self.path.removeprefix(start))
            self.give(file.read_bytes(), "application/octet-stream", body)
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound" if "/owner/name" not in self.path else "RevisionNotFound")
        self.end_headers()

    def give(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(toys: Toys) -> Iterator[tuple[str, list[str]]]:
    handler = type("OneHub", (Hub,), {"folder": toys("flux"), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
        server.shutdown()


def ask(endpoint: str, home: Path, path: str, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = (
        "import json, sys\nfrom diffpipe.config.schema import ModelConfig, ObjectiveConfig\nfrom diffpipe.models import make_model\n"
        "model = make_model(ModelConfig(family='flux', path=sys.argv[1], files=json.loads(sys.argv[2])), ObjectiveConfig())\n"
        "print(sorted(model.blueprint), model.identity('media'))\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, path, json.dumps(files)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_repository_is_downloaded_at_its_revision_without_what_files_give(hub: tuple[str, list[str]], toys: Toys, tmp_path: Path) -> None:
    endpoint, asked = hub
    weights = str(toys("flux") / "transformer" / "diffusion_pytorch_model.safetensors")
    done = ask(endpoint, tmp_path / "home", f"hf:owner/name@{Hub.commit}", {"transformer": weights})
    assert done.returncode == 0, done.stderr
    assert "text_encoder_2" in done.stdout
    assert "transformer/config.json" in asked and "vae/diffusion_pytorch_model.safetensors" in asked
    assert "transformer/diffusion_pytorch_model.safetensors" not in asked
    begun = len(asked)
    again = ask(endpoint, tmp_path / "home", f"hf:owner/name@{Hub.commit}", {"transformer": weights})
    assert again.stdout == done.stdout and len(asked) == begun, "what was downloaded is not asked for again"


def test_a_repository_that_is_not_there_is_told(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = ask(hub[0], tmp_path / "home", f"hf:nobody/nothing@{Hub.commit}", {})
    assert "CheckpointError: model.path: nobody/nothing at 0123" in done.stderr


def test_encoders_of_a_folder_are_on_the_device_and_frozen(toys: Toys) -> None:
    model = make_model(ModelConfig(family="flux", path=str(toys("flux")), dtype="bfloat16"), ObjectiveConfig())
    encoders = model.load_encoders(CPU)
    assert encoders.vae.dtype == torch.float32, "a VAE in bfloat16 loses detail"
    assert encoders.pipeline.text_encoder_2.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in encoders.pipeline.text_encoder_2.parameters())
