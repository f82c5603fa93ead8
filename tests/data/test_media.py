"""What is read from real image and video files."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from diffpipe.data import media
from diffpipe.data.buckets import Bucket
from diffpipe.data.files import File, members
from diffpipe.data.media import MediaInfo, kind_of
from diffpipe.errors import MediaError
from tests.conftest import ROOT
from tests.drawn import draw_clip, draw_image

SQUARE = Bucket(1, 32, 32)
WIDE = Bucket(1, 48, 64)


def probe(path: Path) -> MediaInfo:
    return media.probe(File(path))


def read(path: Path, bucket: Bucket, fps: float | None = None, start: float = 0.0) -> torch.Tensor:
    return media.read(File(path), bucket, fps, start)


def colours(path: Path, bucket: Bucket = SQUARE) -> torch.Tensor:
    """The mean colour, 0 to 255."""
    return (read(path, bucket).mean((1, 2, 3)) + 1) * 127.5


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif", ".ppm", ".tga", ".avif", ".jp2", ".JPEG"])
def test_every_common_format_gives_the_same_picture(tmp_path: Path, suffix: str) -> None:
    pixels = read(draw_image(tmp_path / f"a{suffix}"), WIDE)
    assert pixels.shape == (3, 1, 48, 64) and pixels.dtype == torch.float32
    exact = read(draw_image(tmp_path / "exact.png"), WIDE)
    assert (pixels - exact).abs().mean() < (0.25 if suffix == ".gif" else 0.05)


def test_pixels_span_minus_one_to_one(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (0, 255, 128)).save(tmp_path / "a.png")
    low, high, middle = read(tmp_path / "a.png", SQUARE)[:, 0, 0, 0].tolist()
    assert (low, high) == (-1.0, 1.0) and abs(middle) < 0.01


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.open(draw_image(tmp_path / "upright.png", (64, 32)))
    # The transposition that undoes what the tag asks a viewer to do.
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = tmp_path / f"a{suffix}"
    stored.save(photo, exif=exif)
    assert probe(photo) == MediaInfo("image", 64, 32)
    bucket = Bucket(1, 32, 64)
    assert torch.equal(read(photo, bucket), read(tmp_path / "upright.png", bucket))


def test_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (32, 32), 3)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=3)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "keyed.png", transparency=(9, 9, 9))
    for name in ("clear", "grey", "palette", "keyed"):
        assert colours(tmp_path / f"{name}.png").tolist() == [255, 255, 255], name
    assert torch.allclose(colours(tmp_path / "half.png"), torch.tensor(127.0), atol=1)


def test_an_opaque_palette_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    assert torch.allclose(colours(tmp_path / "a.png"), torch.tensor([200.0, 100.0, 50.0]), atol=1)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = colours(tmp_path / "a.jpg").tolist()
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(tmp_path / f"a{suffix}")
    assert torch.allclose(colours(tmp_path / f"a{suffix}"), torch.tensor(128.0), atol=1)


def test_float_images_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "a.tiff")
    assert torch.allclose(colours(tmp_path / "a.tiff"), torch.tensor(128.0), atol=1)


def test_one_bit_images_are_read(tmp_path: Path) -> None:
    Image.new("1", (32, 32), 1).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png").tolist() == [255, 255, 255]


def test_an_image_covers_its_bucket_and_is_cropped_around_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png").tolist() == [255, 255, 255]


def test_a_small_image_is_scaled_up(tmp_path: Path) -> None:
    assert read(draw_image(tmp_path / "a.png", (7, 5)), WIDE).shape == (3, 1, 48, 64)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tiff"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_never_used(tmp_path: Path, suffix: str, kept: float) -> None:
    whole = draw_image(tmp_path / f"a{suffix}", (256, 256)).read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(MediaError, match="not a readable image") as told:
        probe(tmp_path / f"b{suffix}")
        read(tmp_path / f"b{suffix}", SQUARE)
    assert f"b{suffix}" in told.value.where


def test_text_that_calls_itself_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("a.jpg", "empty.png"):
        with pytest.raises(MediaError):
            probe(tmp_path / name)


def test_a_picture_that_claims_to_be_vast_is_refused_unread(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png", (8, 8))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in its first chunk, IHDR, whose checksum follows
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(MediaError, match="too large to open safely"):
        probe(tmp_path / "bomb.png")


def test_what_a_file_is_follows_from_its_suffix() -> None:
    assert kind_of(Path("a.JPG")) == kind_of(Path("a.webp")) == "image"
    assert kind_of(Path("a.MP4")) == kind_of(Path("a.mkv")) == kind_of(Path("a.mpg")) == "video"
    assert kind_of(Path("a.txt")) is kind_of(Path("a.npz")) is kind_of(Path("a.pdf")) is kind_of(Path("a")) is None


# -- videos ----------------------------------------------------------------------------------------------------------


def greys(path: Path, frames: int, fps: float) -> list[int]:
    """Which source frame each frame shows: draw_clip paints frame i in grey 4 * i."""
    pixels = read(path, Bucket(frames, 48, 64), fps)
    assert pixels.shape == (3, frames, 48, 64)
    return [round(v) for v in ((pixels.mean((0, 2, 3)) + 1) * 127.5 / 4).tolist()]


@pytest.mark.parametrize("suffix,fps", [(".mp4", 16), (".mkv", 16), (".mkv", 24), (".mov", 30), (".avi", 16), (".ts", 25)])
def test_a_video_is_counted_in_frames(tmp_path: Path, suffix: str, fps: int) -> None:
    info = probe(draw_clip(tmp_path / f"a{suffix}", 33, fps))
    assert (info.kind, info.width, info.height, info.frames) == ("video", 64, 48, 33)
    assert info.fps == pytest.approx(fps, rel=0.01)
    assert info.frames_at(fps) == 33


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_video_at_the_rate_of_the_model_is_taken_frame_by_frame(tmp_path: Path, suffix: str) -> None:
    assert greys(draw_clip(tmp_path / f"a{suffix}", 33, 16), 33, 16.0) == list(range(33))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_of_twice_the_rate_gives_every_second_frame(tmp_path: Path, suffix: str) -> None:
    assert greys(draw_clip(tmp_path / f"a{suffix}", 60, 32), 29, 16.0) == list(range(0, 58, 2))


@pytest.mark.parametrize(
    "suffix,codec", [(".mp4", "libx264"), (".mp4", "libx265"), (".webm", "libvpx-vp9"), (".avi", "mpeg4"), (".mov", "prores_ks")]
)
def test_frames_are_the_right_ones_in_every_codec(tmp_path: Path, suffix: str, codec: str) -> None:
    # Key frames every 12, so that a reader that jumps has places to land on.
    path = draw_clip(
        tmp_path / f"a{suffix}",
        60,
        30,
        codec=codec,
        encoding={"g": "12", "keyint_min": "12", "x265-params": "keyint=12:log-level=none", "b": "8M"},
    )
    picked = greys(path, 29, 15.0)
    assert all(abs(frame - 2 * i) <= 1 for i, frame in enumerate(picked))


def test_frames_are_picked_by_time(tmp_path: Path) -> None:
    picked = greys(draw_clip(tmp_path / "a.mp4", 60, 30), 29, 16.0)
    assert all(abs(frame - (i + 0.5) / 16 * 30) <= 1 for i, frame in enumerate(picked))
    slow = greys(draw_clip(tmp_path / "b.mp4", 16, 8), 29, 16.0)
    assert slow[:6] == [0, 0, 1, 1, 2, 2]


def test_frames_of_uneven_length_are_picked_by_time(tmp_path: Path) -> None:
    draw_clip(tmp_path / "even.mkv", 20, 16)
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    # The first ten frames last 1/16 s, the others 1/4 s.
    late = "setpts='if(lt(N,10),N,10+(N-10)*4)/16/TB'"
    command = [ffmpeg, "-i", tmp_path / "even.mkv", "-vf", late, "-fps_mode", "vfr", "-c:v", "libx264", "-crf", "1", tmp_path / "a.mkv"]
    subprocess.run(command, check=True, capture_output=True)
    picked = greys(tmp_path / "a.mkv", 29, 16.0)
    assert picked == [*range(10), *(10 + i // 4 for i in range(19))]


@pytest.mark.parametrize("turn,size", [(90, (48, 64)), (180, (64, 48)), (270, (48, 64))])
def test_a_phone_video_is_seen_upright(tmp_path: Path, turn: int, size: tuple[int, int]) -> None:
    draw_clip(tmp_path / "flat.mp4", 5, 16)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-display_rotation",
        str(turn),
        "-i",
        tmp_path / "flat.mp4",
        "-c",
        "copy",
        tmp_path / "a.mp4",
    ]
    subprocess.run(command, check=True, capture_output=True)
    info = probe(tmp_path / "a.mp4")
    assert info.width / info.height == pytest.approx(size[0] / size[1], rel=0.03)
    assert read(tmp_path / "a.mp4", Bucket(5, 64, 48), 16.0).shape == (3, 5, 64, 48)


@pytest.mark.parametrize("width", [16, 32, 34, 48, 50, 66, 100])
def test_narrow_videos_are_read(tmp_path: Path, width: int) -> None:
    info = probe(draw_clip(tmp_path / "a.mp4", 5, 16, (width, 40)))
    assert info.width / info.height == pytest.approx(width / 40, rel=0.03)
    levels = read(tmp_path / "a.mp4", Bucket(5, 48, 64), 16.0).mean((0, 2, 3)) * 127.5 + 127.5
    assert torch.allclose(levels, torch.tensor([0.0, 4.0, 8.0, 12.0, 16.0]), atol=2.1)


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_a_truncated_video_is_never_used(tmp_path: Path, options: dict[str, str], kept: float) -> None:
    whole = draw_clip(tmp_path / "a.mp4", 60, 16, options=options).read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(MediaError, match="video") as told:
        probe(tmp_path / "b.mp4")
        read(tmp_path / "b.mp4", Bucket(57, 48, 64), 16.0)
    assert "b.mp4" in told.value.where


def test_text_that_calls_itself_a_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(MediaError, match="not a readable video"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "suffix,codec",
    [(".mp4", "libx264"), (".mp4", "libx265"), (".webm", "libvpx-vp9"), (".mkv", "libx264"), (".avi", "mpeg4"), (".ts", "libx264")],
)
@pytest.mark.parametrize("start", [0.0, 1.0, 2.5, 3.0, 7.3])
def test_a_clip_from_the_middle_is_frame_exact(tmp_path: Path, suffix: str, codec: str, start: float) -> None:
    path = numbered_clip(tmp_path / f"a{suffix}", 160, 16, codec)
    pixels = read(path, Bucket(9, 48, 64), 16.0, start)
    assert [number_in(pixels[:, i]) for i in range(9)] == [round(start * 16) + i for i in range(9)]


def test_a_clip_from_the_middle_of_a_video_that_times_few_frames_is_frame_exact(tmp_path: Path) -> None:
    path = numbered_clip(tmp_path / "a.mpg", 200, 25, "mpeg2video", bf="2")
    for start in (3.0, 5.2):
        pixels = read(path, Bucket(9, 48, 64), 25.0, start)
        assert [number_in(pixels[:, i]) for i in range(9)] == [round(start * 25) + i for i in range(9)]


def numbered_clip(path: Path, frames: int, fps: int, codec: str, depth: str = "yuv420p", **options: str) -> Path:
    """Frame i shows i in binary, as eight black or white columns; B-frames and open groups as the encoder likes them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, depth
        stream.options = {"g": "24", "crf": "18", "preset": "medium", "x265-params": "keyint=24:log-level=none", "b": "4M", **options}
        for i in range(frames):
            columns = np.repeat([255 * (i >> bit & 1) for bit in range(8)], 8).astype(np.uint8)
            picture = np.broadcast_to(columns[None, :, None], (48, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


def number_in(frame: torch.Tensor) -> int:
    bright = frame.mean((0, 1)).view(8, 8).mean(1) > 0
    return sum(1 << bit for bit in range(8) if bright[bit])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_moving_picture_is_a_video(tmp_path: Path, suffix: str) -> None:
    greys_of = [Image.new("RGB", (64, 48), (i * 20,) * 3) for i in range(10)]
    path = tmp_path / f"a{suffix}"
    greys_of[0].save(path, save_all=True, append_images=greys_of[1:], duration=[100] * 5 + [200] * 5, lossless=True)
    info = probe(path)
    assert (info.kind, info.width, info.height, info.frames) == ("video", 64, 48, 10)
    assert info.seconds == pytest.approx(1.5, rel=0.01)
    pixels = read(path, Bucket(15, 48, 64), 10.0)
    shown = [round(v / 20) for v in ((pixels.mean((0, 2, 3)) + 1) * 127.5).tolist()]
    assert shown == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    late = read(path, Bucket(4, 48, 64), 10.0, 0.5)
    assert [round(v / 20) for v in ((late.mean((0, 2, 3)) + 1) * 127.5).tolist()] == [5, 5, 6, 6]


def test_sound_beside_the_picture_changes_nothing(tmp_path: Path) -> None:
    draw_clip(tmp_path / "silent.mp4", 33, 16)
    sound = ["-f", "lavfi", "-i", "sine=frequency=440:duration=5"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "silent.mp4", *sound, "-c:v", "copy", "-c:a", "aac", tmp_path / "a.mp4"]
    subprocess.run(command, check=True, capture_output=True)
    info = probe(tmp_path / "a.mp4")
    assert info.frames == 33 and info.frames_at(16.0) == 33
    assert greys(tmp_path / "a.mp4", 33, 16.0) == list(range(33))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", tmp_path / "a.mp4"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(MediaError, match="no video stream"):
        probe(tmp_path / "a.mp4")


def test_pixels_that_are_not_square_are_seen_in_their_shape(tmp_path: Path) -> None:
    draw_clip(tmp_path / "flat.mp4", 5, 16, (64, 48))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "flat.mp4", "-vf", "setsar=2", "-c:v", "libx264", tmp_path / "a.mp4"]
    subprocess.run(command, check=True, capture_output=True)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height) == (128, 48)


@pytest.mark.parametrize("suffix,codec,depth", [(".mov", "prores_ks", "yuv422p10le"), (".mp4", "libx265", "yuv420p10le")])
def test_ten_bits_are_read(tmp_path: Path, suffix: str, codec: str, depth: str) -> None:
    path = numbered_clip(tmp_path / f"a{suffix}", 40, 16, codec, depth)
    pixels = read(path, Bucket(17, 48, 64), 16.0, 1.0)
    assert [number_in(pixels[:, i]) for i in range(17)] == list(range(16, 33))


def test_a_member_of_a_tar_file_is_read_in_place(tmp_path: Path) -> None:
    draw_image(tmp_path / "plain" / "a.png", seed=3)
    draw_clip(tmp_path / "plain" / "b.mp4", 20, 16)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("a.png", "b.mp4"):
            tar.add(tmp_path / "plain" / name, f"deep/{name}")
    inside = {f.name: f for f in members(tmp_path / "shard.tar")}
    assert str(inside["a.png"]) == f"{tmp_path}/shard.tar/deep/a.png"
    for name, fps, bucket in (("a.png", None, SQUARE), ("b.mp4", 16.0, Bucket(9, 48, 64))):
        outside = File(tmp_path / "plain" / name)
        assert media.probe(inside[name]) == media.probe(outside)
        assert inside[name].digest() == outside.digest()
        assert torch.equal(media.read(inside[name], bucket, fps), media.read(outside, bucket, fps))


def test_a_tar_file_cut_short_is_told(tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png", (256, 256))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    [inside] = members(tmp_path / "shard.tar")
    (tmp_path / "shard.tar").write_bytes((tmp_path / "shard.tar").read_bytes()[:900])
    with pytest.raises(MediaError, match="ends inside it"):
        media.read(inside, SQUARE)
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(MediaError, match="not a readable tar file"):
        members(tmp_path / "text.tar")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_mask_is_cropped_as_its_picture_and_averaged_over_latent_cells(tmp_path: Path, kind: type[np.integer]) -> None:
    wide = np.zeros((32, 96), kind)
    wide[:, 32:48] = np.iinfo(kind).max  # the left half of the square in the middle
    wide[:, 48:64] = np.iinfo(kind).max // 5
    Image.fromarray(wide).save(tmp_path / "mask.png")
    mask = media.read_mask(File(tmp_path / "mask.png"), SQUARE, 8, (96, 32))
    torch.testing.assert_close(mask, torch.tensor([1.0, 1.0, 0.2, 0.2]).expand(1, 4, 4))
    with pytest.raises(MediaError, match="a mask of 96x32 for a picture of 64x32"):
        media.read_mask(File(tmp_path / "mask.png"), SQUARE, 8, (64, 32))


def test_a_long_videos_frames_are_never_all_in_memory(tmp_path: Path) -> None:
    path = draw_clip(tmp_path / "a.mp4", 400, 25, (640, 480), encoding={"crf": "30", "preset": "ultrafast"})
    program = (
        "import resource, sys, torch\nfrom pathlib import Path\n"
        "from diffpipe.data.buckets import Bucket\nfrom diffpipe.data.files import File\nfrom diffpipe.data.media import probe, read\n"
        "read(File(Path(sys.argv[1])), Bucket(5, 48, 64), 25.0)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nprobe(File(Path(sys.argv[1])))\n"
        "read(File(Path(sys.argv[1])), Bucket(5, 48, 64), 25.0, 15.0)\n"
        "read(File(Path(sys.argv[1])), Bucket(320, 48, 64), 20.0)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000, "400 frames of 640 x 480 would be 368 MB"
