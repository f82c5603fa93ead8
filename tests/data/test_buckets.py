"""Which bucket a file lands in."""

from __future__ import annotations

import math

import pytest

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
