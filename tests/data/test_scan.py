"""What is found in data folders, and what is said of the rest."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from diffpipe.config.schema import CaptionConfig, DataConfig
from diffpipe.data import captions
from diffpipe.data.captions import Span
from diffpipe.data.scan import Found, Remembered, scan
from diffpipe.errors import ConfigError, DiffpipeError
from tests.drawn import draw_clip, draw_image, together


def look(*folders: Path, takes_video: bool = True, memory: Path = Path("nowhere"), settings: dict | None = None, **more: object) -> Found:
    data = DataConfig.model_validate({"folders": [{"path": str(f), **(settings or {})} for f in folders]})
    return scan(data.folders, data.of, takes_video=takes_video, memory=Remembered(memory), **more)  # type: ignore[arg-type]


def reasons(found: Found) -> dict[str, str]:
    return {d.file.name: d.reason for d in found.dropped}


def test_images_and_videos_are_found_with_their_captions(tmp_path: Path) -> None:
    draw_image(tmp_path / "b.PNG", caption=" a fox \n")
    draw_clip(tmp_path / "a.mp4", 5, 16, caption="ein Fuchs läuft")
    found = look(tmp_path)
    assert [(c.file.name, c.info.kind, c.spans[0].texts[0]) for c in found.clips] == [
        ("a.mp4", "video", "ein Fuchs läuft"),
        ("b.PNG", "image", "a fox"),
    ]
    assert not found.dropped


def test_a_caption_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa fox")
    assert look(tmp_path).clips[0].spans[0].texts[0] == "a fox"


def test_bad_captions_are_faults_that_name_the_caption_file(tmp_path: Path) -> None:
    draw_image(tmp_path / "good.png")
    draw_image(tmp_path / "empty.png", caption=" \n")
    draw_image(tmp_path / "latin.png").with_suffix(".txt").write_bytes("schön".encode("latin-1"))
    found = look(tmp_path)
    assert [c.file.name for c in found.clips] == ["good.png"]
    told = reasons(found)
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
        "deeper": "a folder in a folder, searched only with recursive",
    }
    assert not any(d.fault for d in found.dropped)


def test_a_video_is_set_aside_for_a_family_of_images(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png")
    draw_clip(tmp_path / "b.mp4", 5, 16)
    [dropped] = look(tmp_path, takes_video=False).dropped
    assert dropped.file.name == "b.mp4" and "images only" in dropped.reason and not dropped.fault


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
    Remembered(memory).save(clips)
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert look(tmp_path / "media", memory=memory).clips == clips  # only its bytes tell, and they were not looked at
    draw_image(path, (32, 32))
    assert look(tmp_path / "media", memory=memory).clips[0].info.width == 32


def test_what_changes_or_goes_before_the_scan_is_remembered_is_seen_by_the_next(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_image(tmp_path / "media" / f"{name}.png")
    clips = look(tmp_path / "media").clips
    draw_image(tmp_path / "media" / "a.png", (32, 32))
    (tmp_path / "media" / "b.png").unlink()
    Remembered(tmp_path / "files.json").save(clips)
    assert [c.info.width for c in look(tmp_path / "media", memory=tmp_path / "files.json").clips] == [32]


def test_a_damaged_memory_costs_time_only(tmp_path: Path) -> None:
    draw_image(tmp_path / "media" / "a.png")
    (tmp_path / "files.json").write_text("{")
    assert len(look(tmp_path / "media", memory=tmp_path / "files.json").clips) == 1


def test_a_file_without_a_caption_trains_and_is_counted(tmp_path: Path) -> None:
    draw_image(tmp_path / "with.png")
    draw_image(tmp_path / "without.png", caption=None)
    found = look(tmp_path)
    assert [(c.file.name, c.spans[0].texts) for c in found.clips] == [("with.png", ("a drawing",)), ("without.png", ())]
    assert [f.name for f in found.captionless] == ["without.png"] and not found.dropped


def test_captions_come_from_lists_too_and_a_files_own_comes_first(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        draw_image(tmp_path / f"{name}.png", caption="beside" if name == "a" else None)
    draw_image(tmp_path / "in" / "e.png", caption=None)
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "listed", "b.png": ["one", "another"], "in/e.png": "deep"}))
    rows = '{"file_name": "c.png", "text": "a\u2028row"}\r\n\n{"file_name": "d.png", "caption": ["x", "y"]}\n'  # U+2028 ends no row
    (tmp_path / "metadata.jsonl").write_text(rows, encoding="utf-8", newline="")
    found = look(tmp_path, settings={"recursive": True})
    assert {c.file.name: c.spans[0].texts for c in found.clips} == {
        "a.png": ("beside",),
        "b.png": ("one", "another"),
        "c.png": ("a\u2028row",),
        "d.png": ("x", "y"),
        "e.png": ("deep",),
    }
    assert not found.dropped and not found.captionless


def test_a_list_speaks_of_its_own_folder_and_those_inside(tmp_path: Path) -> None:
    for folder in ("", "one", "two"):
        draw_image(tmp_path / folder / "a.png", caption=None)
    for folder in ("one", "two"):  # a line break that is none in JSON
        (tmp_path / folder / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "{folder}\u2028end"}}\r\n', encoding="utf-8")
    found = look(tmp_path, settings={"recursive": True})
    assert [(c.file.path.parent.name, c.spans) for c in found.clips[1:]] == [(f, (Span((f"{f}\u2028end",)),)) for f in ("one", "two")]
    assert [f.path.parent for f in found.captionless] == [tmp_path]


def test_rows_with_times_are_parts_of_a_video(tmp_path: Path) -> None:
    draw_clip(tmp_path / "a.mp4", 48, 16, caption=None)
    rows = [{"file_name": "a.mp4", "text": "first", "end": 1.0}, {"file_name": "a.mp4", "text": "second", "start": 1.5, "end": 2.5}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [clip] = look(tmp_path).clips
    assert clip.spans == (Span(("first",), None, 1.0), Span(("second",), 1.5, 2.5))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("captions.json", "[1]", "holds no file names"),
        ("captions.json", '{"a.png": 3}', "the caption of a.png is 3"),
        ("captions.json", '{"a.png": ["x", " "]}', "none of them empty"),
        ("captions.json", '{"a.png"', "not valid JSON"),
        ("metadata.jsonl", '{"text": "x"}', "line 1 has no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{', "not valid JSON, line 2"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "start": 3, "end": 2}', "before it starts"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "start": "soon"}', "no time"),
    ],
)
def test_a_list_that_cannot_be_read_stops_rather_than_training_without_captions(tmp_path: Path, name: str, text: str, told: str) -> None:
    draw_image(tmp_path / "a.png", caption=None)
    (tmp_path / name).write_text(text)
    with pytest.raises(DiffpipeError, match=told):
        look(tmp_path)


@pytest.mark.parametrize("extension", [".caption", ".Caption"])
def test_the_ending_of_caption_files_is_a_choice(tmp_path: Path, extension: str) -> None:
    draw_image(tmp_path / "a.png", caption="not this").with_suffix(extension).write_text("this")
    found = look(tmp_path, settings={"captions": {"extension": extension}})
    assert found.clips[0].spans[0].texts == ("this",)


@pytest.mark.parametrize(("delimiter", "between"), [(",", ", "), (", ", ", "), ("\n", "\n")])
def test_shuffled_tags_have_one_space_or_what_was_asked_for_between_them(delimiter: str, between: str) -> None:
    config = CaptionConfig(shuffle=1, delimiter=delimiter, keep=2)
    assert captions.variants(between.join("abc"), config) == [between.join("abc")]


def test_files_that_share_one_caption_are_both_told(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png")
    draw_image(tmp_path / "a.jpg")
    draw_image(tmp_path / "b.png")
    found = look(tmp_path)
    assert [c.file.name for c in found.clips] == ["b.png"]
    assert reasons(found)["a.png"].startswith("shares its caption a.txt with a.jpg") and "a.png" in reasons(found)["a.jpg"]


def test_folders_inside_are_searched_once_even_through_a_loop_of_links(tmp_path: Path) -> None:
    draw_image(tmp_path / "top.png")
    draw_image(tmp_path / "in" / "deep" / "a.png")
    (tmp_path / "in" / "back").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(tmp_path / "in" / "deep", target_is_directory=True)
    for name in ("self", "self.png"):
        (tmp_path / name).symlink_to(name)
    found = look(tmp_path, settings={"recursive": True})
    assert sorted(c.file.name for c in found.clips) == ["a.png", "top.png"]
    assert "cannot be read: " in reasons(found)["self.png"] and reasons(found)["self"] == "not media"


def test_tar_shards_are_read_in_place_with_their_captions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    draw_image(plain / "000.jpg", caption="zero")
    draw_image(plain / "001.png", caption=None)
    (plain / "001.json").write_text('{"caption": "one", "width": 3}')
    draw_image(plain / "002.png", caption=None)
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for path in sorted(plain.iterdir()):
            tar.add(path, path.name)
    (folder / "bad.tar").write_bytes(b"no tar at all")
    found = look(folder)
    assert [(str(c.file), c.spans[0].texts) for c in found.clips] == [
        (f"{folder}/shard-0.tar/000.jpg", ("zero",)),
        (f"{folder}/shard-0.tar/001.png", ("one",)),
        (f"{folder}/shard-0.tar/002.png", ()),
    ]
    assert [(d.file.name, d.fault) for d in found.dropped] == [("bad.tar", True)]


def test_masks_go_with_the_pictures_of_their_stems(tmp_path: Path) -> None:
    draw_image(tmp_path / "data" / "a.jpg")
    draw_image(tmp_path / "data" / "b.jpg")
    draw_image(tmp_path / "masks" / "a.png", caption=None)
    found = look(tmp_path / "data", settings={"masks": str(tmp_path / "masks")})
    assert [c.mask[0].name if c.mask else None for c in found.clips] == ["a.png", None]
    assert [f.name for f in found.maskless] == [found.clips[1].file.name]
    with pytest.raises(ConfigError, match="folder of masks"):
        look(tmp_path / "data", settings={"masks": str(tmp_path / "nowhere")})


def test_masks_in_folders_go_with_pictures_in_folders_of_that_name_and_are_no_pictures_themselves(tmp_path: Path) -> None:
    for name in ("one/a.jpg", "two/a.jpg", "three/b.jpg", "masks/one/a.png", "masks/b.png", "masks/a/one.png"):
        draw_image(tmp_path / name, caption=None)
    found = look(tmp_path, settings={"masks": str(tmp_path / "masks"), "recursive": True})
    assert {str(c.file.path.relative_to(tmp_path)): c.mask and str(c.mask[0].path.relative_to(tmp_path)) for c in found.clips} == {
        str(Path("one/a.jpg")): str(Path("masks/one/a.png")),
        str(Path("two/a.jpg")): None,
        str(Path("three/b.jpg")): str(Path("masks/b.png")),
    }
    assert reasons(found) == {"one.png": "a mask without media"}


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_forbidden_file_is_a_fault(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png").chmod(0)
    draw_image(tmp_path / "b.png")
    found = look(tmp_path)
    assert [c.file.name for c in found.clips] == ["b.png"] and "Permission" in reasons(found)["a.png"]
    (tmp_path / "in").mkdir(0)
    with pytest.raises(ConfigError, match="in: the folder cannot be read"):
        look(tmp_path, settings={"recursive": True})
