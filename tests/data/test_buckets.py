"""Which bucket a file lands in."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpipe.config.schema import DataConfig
from diffpipe.data.buckets import Bucket, Placed, make_buckets
from diffpipe.data.media import MediaInfo
from diffpipe.errors import MediaError
from diffpipe.models.base import Geometry

VIDEO = Geometry(spatial=8, temporal=4, fps=16.0)
IMAGE = Geometry(spatial=8)


def data(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"folders": [{"path": "."}], **settings})


def test_a_portrait_photo_lands_in_a_portrait_bucket() -> None:
    [placed] = make_buckets(data(), IMAGE).place(MediaInfo("image", 1000, 1500))
    bucket = placed.bucket
    assert bucket.height > bucket.width
    assert abs(math.log(bucket.height / bucket.width) - math.log(1.5)) < 0.15


def test_sides_are_multiples_of_what_the_family_needs_and_areas_near_the_resolution() -> None:
    for sizes, side in zip(make_buckets(data(resolutions=[512, 1024]), IMAGE).groups, (512, 1024), strict=True):
        assert len(sizes) == 7
        for height, width in sizes:
            assert height % 16 == width % 16 == 0
            assert abs(height * width / side**2 - 1) < 0.05


def test_one_aspect_makes_all_squares() -> None:
    buckets = make_buckets(data(aspect={"min": 1, "max": 1, "count": 1}), IMAGE)
    assert buckets.groups == ({(512, 512): ()},)


def test_a_file_has_one_bucket_for_each_resolution() -> None:
    buckets = make_buckets(data(resolutions=[256, 512]), IMAGE).place(MediaInfo("image", 800, 800))
    assert buckets == [Placed(Bucket(1, 256, 256)), Placed(Bucket(1, 512, 512))]


def test_a_clip_of_exactly_n_frames_fits_the_bucket_of_n_frames() -> None:
    buckets = make_buckets(data(frames=[1, 33, 65]), VIDEO)
    assert buckets.place(MediaInfo("video", 512, 512, 65, 16.0))[0].bucket.frames == 65
    # Containers that round times to milliseconds.
    assert buckets.place(MediaInfo("video", 512, 512, 65, 65 / 4.062))[0].bucket.frames == 65
    assert buckets.place(MediaInfo("video", 512, 512, 64, 16.0))[0].bucket.frames == 33


def test_frames_count_at_the_rate_of_the_model() -> None:
    buckets = make_buckets(data(frames=[33, 65]), VIDEO)
    assert buckets.place(MediaInfo("video", 512, 512, 122, 30.0))[0].bucket.frames == 65
    assert buckets.place(MediaInfo("video", 512, 512, 120, 30.0))[0].bucket.frames == 33


def test_frame_buckets_follow_the_family_rule() -> None:
    assert set(make_buckets(data(frames=[1, 32, 81]), VIDEO).groups[0].values()) == {(81, 29)}


def test_a_video_never_takes_the_bucket_of_images() -> None:
    with pytest.raises(MediaError, match="at least 33 frames"):
        make_buckets(data(frames=[1, 33]), VIDEO).place(MediaInfo("video", 512, 512, 20, 16.0))
    with pytest.raises(MediaError, match="no count above 1"):
        make_buckets(data(frames=[1]), VIDEO).place(MediaInfo("video", 512, 512, 100, 16.0))


def test_an_image_in_a_video_family_has_one_frame() -> None:
    assert make_buckets(data(frames=[33]), VIDEO).place(MediaInfo("image", 512, 512)) == [Placed(Bucket(1, 512, 512))]


# -- for any file and any config -------------------------------------------------------------------------------------

SIZES = st.integers(16, 4000)
COUNTS = st.lists(st.integers(2, 200), min_size=1, max_size=4)


@given(width=SIZES, height=SIZES, resolutions=st.lists(st.integers(64, 2048), min_size=1, max_size=3))
def test_any_picture_has_a_bucket_whose_sides_fit_the_family(width: int, height: int, resolutions: list[int]) -> None:
    for geometry in (IMAGE, VIDEO, Geometry(spatial=32, temporal=8, patch=1, fps=25.0)):
        placed = make_buckets(data(resolutions=resolutions), geometry).place(MediaInfo("image", width, height))
        assert 1 <= len(placed) <= len(set(resolutions))
        for one in placed:
            assert one.start is None and one.bucket.frames == 1
            assert one.bucket.height % geometry.multiple == one.bucket.width % geometry.multiple == 0


@given(width=SIZES, height=SIZES)
def test_no_bucket_is_nearer_in_shape_than_the_one_chosen(width: int, height: int) -> None:
    buckets = make_buckets(data(), IMAGE)
    [placed] = buckets.place(MediaInfo("image", width, height))
    aspect = math.log(width / height)
    chosen = abs(math.log(placed.bucket.width / placed.bucket.height) - aspect)
    assert all(chosen <= abs(math.log(w / h) - aspect) + 1e-12 for h, w in buckets.groups[0])


@given(frames=st.integers(1, 2000), rate=st.floats(5, 120), counts=COUNTS, clips=st.sampled_from(["first", "middle", "all", "cover"]))
def test_any_video_gives_clips_that_lie_inside_it_or_is_told_to_be_too_short(
    frames: int, rate: float, counts: list[int], clips: str
) -> None:
    buckets = make_buckets(data(frames=counts, clips=clips), VIDEO)
    info = MediaInfo("video", 640, 480, frames, rate)
    available = info.frames_at(16.0)
    valid = sorted({VIDEO.frames(n) for n in counts} - {1})
    if not valid or available < valid[0]:
        with pytest.raises(MediaError):
            buckets.place(info)
        return
    placed = buckets.place(info)
    ends = []
    for one in placed:
        assert one.start is not None and one.bucket.frames in valid
        assert one.start >= -1e-9 and one.start + one.bucket.frames / 16 <= available / 16 + 1e-6
        ends.append((round(one.start * 16), one.bucket.frames))
    longest = max(n for n in valid if n <= available)
    assert max(n for _, n in ends) == longest
    if clips == "cover":
        shown = {f for first, n in ends for f in range(first, first + n)}
        assert shown == set(range(available))
    if clips == "all":
        ordered = sorted(ends)
        assert all(a + n == b for (a, n), (b, _) in pairwise(ordered)), "side by side, without a gap"
        assert available - sum(ordered[-1]) < valid[0], "no clip that would fit is left at the end"


@given(seconds=st.floats(1, 60), start=st.floats(0, 59), length=st.floats(0.01, 20))
def test_a_part_of_a_video_never_gives_frames_beyond_it(seconds: float, start: float, length: float) -> None:
    buckets = make_buckets(data(frames=[5, 9, 33, 81], clips="all"), VIDEO)
    info = MediaInfo("video", 640, 480, round(seconds * 30), 30.0)
    try:
        placed = buckets.place(info, start, start + length)
    except MediaError:
        assert round(max(0.0, min(start + length, info.seconds) - start) * 16) < 5
        return
    for one in placed:
        assert one.start is not None
        assert start - 1e-9 <= one.start and one.start + one.bucket.frames / 16 <= min(start + length, info.seconds) + 0.5 / 16 + 1e-9


def test_explicit_sizes_replace_the_others() -> None:
    buckets = make_buckets(data(sizes=[[512, 768], [640, 480, 33], [768, 512, 1]], frames=[1, 17]), VIDEO)
    assert buckets.groups == ({(768, 512): (17,), (480, 640): (33,), (512, 768): ()},)
    assert buckets.place(MediaInfo("image", 700, 500)) == [Placed(Bucket(1, 480, 640))]
    assert buckets.place(MediaInfo("video", 640, 480, 80, 16.0)) == [Placed(Bucket(33, 480, 640), 0.0)]
    # The nearest shape wants 33 frames, so a shorter clip takes the next one.
    assert buckets.place(MediaInfo("video", 640, 480, 20, 16.0)) == [Placed(Bucket(17, 768, 512), 0.0)]


def test_aspect_ratios_may_be_listed() -> None:
    assert set(make_buckets(data(aspect=[1.0, 2.0]), IMAGE).groups[0]) == {(512, 512), (368, 720)}
