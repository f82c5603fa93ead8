"""`diffpipe cache`: what it encodes, and the three ways to mend what lies there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Command
from tests.drawn import draw_image


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for i in range(4):
        draw_image(tmp_path / "media" / f"{i}.png", (64, 64), f"picture {i}", seed=i)
    path = tmp_path / "cfg.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'out'}\nrun: {{steps: 1}}\nmodel: {{family: flux, path: 'toy:flux'}}\n"
        f"data: {{folders: [{{path: {tmp_path / 'media'}}}], resolutions: [64], encode_workers: 0, cache_dir: {tmp_path / 'cache'}}}\n"
    )
    return path


def shards(config: Path) -> list[Path]:
    return sorted((config.parent / "cache").glob("*.safetensors"))


def test_it_tells_how_far_it_is_and_what_became_of_the_files(command: Command, config: Path) -> None:
    (config.parent / "media" / "4.png").write_bytes(b"no picture")
    told = command("cache", config, "--set", "data.on_error=skip").stdout
    assert "encode media 4 of 4" in told and "encode captions 4 of 4" in told
    assert "files 4, samples 4, buckets 1; 8 entries encoded, 0 found in the cache" in told
    assert f"left out: {config.parent / 'media' / '4.png'}: not a readable image" in told
    assert "0 entries encoded, 8 found in the cache" in command("cache", config, "--set", "data.on_error=skip").stdout


def test_verify_finds_a_flipped_byte_and_encodes_what_it_spoilt(command: Command, config: Path) -> None:
    command("cache", config)
    (shard,) = shards(config)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert "8 found in the cache" in command("cache", config).stdout
    told = command("cache", config, "--verify").stdout
    assert f"damaged, removed: {shard}" in told and "8 entries encoded, 0 found in the cache" in told
    assert "8 found in the cache" in command("cache", config, "--verify").stdout


def test_rebuild_encodes_everything_again(command: Command, config: Path) -> None:
    command("cache", config)
    assert "8 entries encoded, 0 found in the cache" in command("cache", config, "--rebuild").stdout


def test_prune_removes_what_the_config_does_not_use(command: Command, config: Path) -> None:
    command("cache", config)
    (config.parent / "media" / "0.png").unlink()
    (config.parent / "media" / "0.txt").unlink()
    told = command("cache", config, "--prune").stdout
    assert "0 entries encoded, 6 found in the cache" in told and "that this config does not use" in told
    draw_image(config.parent / "media" / "0.png", (64, 64), "picture 0", seed=0)
    assert "2 entries encoded, 6 found in the cache" in command("cache", config).stdout
