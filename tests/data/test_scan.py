"""What is found in data folders, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffpipe.config.schema import FolderConfig
from diffpipe.data.scan import Found, Remembered, scan
from diffpipe.errors import ConfigError, DiffpipeError
from tests.drawn import draw_clip, draw_image, together


def look(*folders: Path, takes_video: bool = True, memory: Path = Path("nowhere"), **more: object) -> Found:
    return scan([FolderConfig(path=str(f)) for f in folders], takes_video=takes_video, memory=Remembered(memory), **more)  # type: ignore[arg-type]


def reasons(found: Found) -> dict[str, str]:
    return {d.path.name: d.reason for d in found.dropped}


def test_images_and_videos_are_found_with_their_captions(tmp_path: Path) -> None:
    draw_image(tmp_path / "b.PNG", caption=" a fox \n")
    draw_clip(tmp_path / "a.mp4", 5, 16, caption="ein Fuchs läuft")
    found = look(tmp_path)
    assert [(c.path.name, c.info.kind, c.caption) for c in found.clips] == [
        ("a.mp4", "video", "ein Fuchs läuft"),
        ("b.PNG", "image", "a fox"),
    ]
    assert not found.dropped


def test_a_caption_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa fox")
    assert look(tmp_path).clips[0].caption == "a fox"


def test_bad_captions_are_faults_that_name_the_caption_file(tmp_path: Path) -> None:
    draw_image(tmp_path / "good.png")
    draw_image(tmp_path / "missing.png", caption=None)
    draw_image(tmp_path / "empty.png", caption=" \n")
    draw_image(tmp_path / "latin.png").with_suffix(".txt").write_bytes("schön".encode("latin-1"))
    found = look(tmp_path)
    assert [c.path.name for c in found.clips] == ["good.png"]
    told = reasons(found)
    assert "missing.txt" in told["missing.png"] and "no caption" in told["missing.png"]
    assert "empty" in told["empty.png"]
    assert "byte 3" in told["latin.png"] and "UTF-8" in told["latin.png"]
    assert all(d.fault for d in found.dropped)


def test_other_files_are_counted_and_hidden_ones_ignored(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "lonely.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    draw_image(tmp_path / "deeper" / "b.png")
    found = look(tmp_path)
    assert reasons(found) == {
        "notes.md": "not media",
        "lonely.txt": "a caption without media",
        "deeper": "a folder in a data folder is not searched",
    }
    assert not any(d.fault for d in found.dropped)


def test_a_video_is_set_aside_for_a_family_of_images(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png")
    draw_clip(tmp_path / "b.mp4", 5, 16)
    [dropped] = look(tmp_path, takes_video=False).dropped
    assert dropped.path.name == "b.mp4" and "images only" in dropped.reason and not dropped.fault


def test_unreadable_files_are_faults(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png")
    for name in ("b.jpg", "c.mp4"):
        (tmp_path / name).write_bytes(b"not what it says")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    found = look(tmp_path)
    assert len(found.clips) == 1
    assert "not a readable image" in reasons(found)["b.jpg"]
    assert "not a readable video" in reasons(found)["c.mp4"]


def test_no_media_and_no_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DiffpipeError, match="no image or video"):
        look(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        look(tmp_path / "nowhere")


def test_ranks_share_the_work_and_agree(tmp_path: Path) -> None:
    for i in range(7):
        draw_image(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "4.png").write_bytes(b"broken")
    alone = look(tmp_path)
    for found in together(3, lambda rank, exchange: look(tmp_path, rank=rank, world=3, exchange=exchange)):
        assert found == alone


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    path = draw_image(tmp_path / "media" / "a.png")
    memory = tmp_path / "files.json"
    clips = look(tmp_path / "media").clips
    Remembered(memory).save((c.path, c.info, c.digest) for c in clips)
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert look(tmp_path / "media", memory=memory).clips == clips  # only its bytes tell, and they were not looked at
    draw_image(path, (32, 32))
    assert look(tmp_path / "media", memory=memory).clips[0].info.width == 32


def test_a_damaged_memory_costs_time_only(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png")
    (tmp_path / "files.json").write_text("{")
    assert len(look(tmp_path / "media", memory=tmp_path / "files.json").clips) == 1
