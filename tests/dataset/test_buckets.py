"""Laws of sizes: buckets keep area and aspect, crops cover and are centred."""

import math

from hypothesis import given
from hypothesis import strategies as st

from dataset.buckets import bucket_size, bucket_sizes, cover_crop

sides = st.integers(16, 3000)


@given(sides, sides, sides, sides)
def test_a_crop_covers_its_size_at_the_source_aspect_and_is_centred(source_height, source_width, height, width):
    crop = cover_crop(source_height=source_height, source_width=source_width, height=height, width=width)
    assert (crop.height, crop.width) == (height, width)
    assert crop.resized_height == height or crop.resized_width == width
    assert crop.resized_height >= height and crop.resized_width >= width
    scale = max(height / source_height, width / source_width)
    assert abs(crop.resized_height - source_height * scale) <= 0.5 + 1e-6
    assert abs(crop.resized_width - source_width * scale) <= 0.5 + 1e-6
    assert 0 <= crop.resized_height - height - 2 * crop.top <= 1
    assert 0 <= crop.resized_width - width - 2 * crop.left <= 1


def test_a_frame_of_the_right_size_is_left_alone():
    crop = cover_crop(source_height=192, source_width=320, height=192, width=320)
    assert (crop.resized_height, crop.resized_width, crop.top, crop.left) == (192, 320, 0, 0)


@given(st.sampled_from([16, 32]), st.integers(128, 1280), st.integers(128, 1280))
def test_buckets_are_multiples_of_the_step_below_the_area(step, height, width):
    sizes = bucket_sizes(area=height * width, step=step)
    assert sizes
    assert all(h % step == 0 and w % step == 0 and h * w <= height * width for h, w in sizes)


@given(sides, sides)
def test_the_bucket_has_the_nearest_aspect(source_height, source_width):
    height, width = bucket_size(source_height=source_height, source_width=source_width, area=544 * 960, step=16)

    def distance(size):
        return abs(math.log(size[1] / size[0]) - math.log(source_width / source_height))

    assert distance((height, width)) == min(map(distance, bucket_sizes(area=544 * 960, step=16)))


@given(sides, sides)
def test_no_upscale_never_enlarges(source_height, source_width):
    size = bucket_size(source_height=source_height, source_width=source_width, area=480 * 832, step=16, no_upscale=True)
    height, width = size
    assert height <= source_height and width <= source_width
    assert height % 16 == 0 and width % 16 == 0 and height * width <= 480 * 832


def test_turning_a_source_turns_its_bucket():
    landscape = bucket_size(source_height=1080, source_width=1920, area=480 * 832, step=16)
    portrait = bucket_size(source_height=1920, source_width=1080, area=480 * 832, step=16)
    assert landscape[1] > landscape[0] and portrait[0] > portrait[1]


def test_what_is_smaller_than_a_step_fits_nowhere():
    assert bucket_size(source_height=10, source_width=90, area=480 * 832, step=16, no_upscale=True) is None
    assert bucket_size(source_height=480, source_width=832, area=100, step=16) is None
