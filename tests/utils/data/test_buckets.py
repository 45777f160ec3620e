import math

import pytest

from tests.limits import GRID
from utils.common.errors import UserError
from utils.data.buckets import Shapes, bucket_size, count_tokens, max_frames, picture_size, round_up_frames, seen_share
from utils.media.description import MediaInfo
from wan.configs import FAMILIES
from wan.configs.grid import Grid

LARGER = Shapes(enlarge=True)


def test_bucket_sizes_are_the_released_ones():
    table = {
        624: [(832, 480), (704, 544), (624, 624), (544, 704), (480, 832)],
        960: [(1280, 720), (1088, 832), (960, 960), (832, 1088), (720, 1280)],
        1024: [(1344, 768), (1184, 896), (1024, 1024), (896, 1184), (768, 1344)],
    }
    pictures = [(1920, 1080), (640, 480), (500, 500), (480, 640), (1080, 1920)]
    for base_res, sizes in table.items():
        assert [bucket_size(*picture, base_res, GRID, LARGER) for picture in pictures] == sizes


def test_bucket_cuts_fall_exactly_where_they_should():
    around = {1529: (832, 480), 1528: (704, 544), 1151: (704, 544), 1150: (624, 624), 885: (624, 624)}
    around |= {884: (544, 704), 670: (544, 704), 669: (480, 832)}
    for width, size in around.items():
        assert bucket_size(width, 1000, 624, GRID, LARGER) == size, width


def test_any_multiple_of_16_gets_three_ratios_of_about_equal_area():
    for base_res in range(256, 2049, 16):
        for picture, ratio in (((16, 9), 16 / 9), ((4, 3), 4 / 3), ((1, 1), 1.0), ((9, 16), 9 / 16)):
            width, height = bucket_size(*picture, base_res, GRID, LARGER)
            assert width % 16 == height % 16 == 0
            assert abs(width * height / base_res**2 - 1) < 0.07
            assert abs(width / height / ratio - 1) < 0.08
    for wrong in (0, -16, 100):
        with pytest.raises(UserError, match="multiple of 16"):
            bucket_size(16, 9, wrong, GRID, LARGER)


def test_another_grid_moves_sizes_onto_its_tokens():
    grid = Grid(frame=4, side=32)
    assert bucket_size(16, 9, 960, grid, LARGER) == (1280, 704)
    assert bucket_size(1, 1, 624, grid, LARGER) == (640, 640)
    assert count_tokens(1280, 704, 121, grid) == 40 * 22 * 31


def test_the_token_limit_is_inclusive_and_an_impossible_one_names_both_numbers():
    assert count_tokens(832, 480, 81, GRID) == 52 * 30 * 21
    assert max_frames(832, 480, 1560 * 17, GRID) == 65
    assert max_frames(832, 480, 1560 * 17 - 1, GRID) == 61
    assert max_frames(832, 480, 1560, GRID) == 1
    with pytest.raises(UserError, match=r"1560 tokens.*1559"):
        max_frames(832, 480, 1559, GRID)


def test_a_small_picture_gets_the_largest_size_within_it_unless_it_may_be_enlarged():
    assert bucket_size(640, 360, 624, GRID) == (624, 352)
    assert bucket_size(854, 480, 624, GRID) == (832, 480)
    assert bucket_size(720, 480, 624, GRID) == (624, 480)
    assert bucket_size(640, 360, 624, GRID, LARGER) == (832, 480)
    assert bucket_size(9, 9, 624, GRID) == (16, 16)
    for buckets in ("wan", "fine"):
        for width in range(100, 900, 37):
            for height in range(100, 900, 41):
                size = bucket_size(width, height, 624, GRID, Shapes(buckets))
                assert size[0] % 16 == size[1] % 16 == 0 and size[0] <= width and size[1] <= height
                assert size[0] * size[1] <= 1.02 * 624**2 + 16 * 832


def test_what_is_seen_of_a_picture_is_the_share_of_its_area_that_a_crop_leaves():
    assert seen_share(1920, 1080, (832, 468)) == 1
    assert seen_share(1280, 64, (112, 64)) == pytest.approx(0.0875)
    assert seen_share(64, 1280, (480, 832)) == pytest.approx(64 * 832 / (480 * 1280))
    assert seen_share(100, 100, (200, 100)) == seen_share(100, 100, (100, 200)) == 0.5


def test_fine_buckets_are_evenly_spaced_ratios_of_about_equal_area():
    shapes = Shapes("fine", min_ar=0.5, max_ar=2.0)
    sizes = {
        bucket_size(round(1000 * 2 ** (step / 40)), 1000, 480, GRID, Shapes("fine", 0.5, 2.0, True))
        for step in range(-60, 61)
    }
    ratios = sorted(width / height for width, height in sizes)
    assert len(sizes) == 9 and abs(ratios[0] - 0.5) < 0.03 and abs(ratios[-1] - 2) < 0.1
    steps = [math.log(after / before) for before, after in zip(ratios, ratios[1:], strict=False)]
    assert max(steps) < 2.2 * min(steps)
    assert all(abs(width * height / 480**2 - 1) < 0.06 for width, height in sizes)
    assert bucket_size(4000, 1000, 480, GRID, shapes) == bucket_size(2000, 1000, 480, GRID, shapes)


def test_a_number_of_frames_is_rounded_up_to_one_that_the_model_takes():
    assert [round_up_frames(frames, GRID) for frames in (1, 2, 5, 8, 9, 16, 17)] == [1, 5, 5, 9, 9, 17, 17]
    assert [round_up_frames(frames, Grid(frame=8, side=16)) for frames in (1, 2, 9, 10)] == [1, 9, 9, 17]


def official_size(width: int, height: int, area: int) -> tuple[int, int]:
    """The lines of image2video.py."""
    aspect_ratio = height / width
    lat_h = round(math.sqrt(area * aspect_ratio) // 8 // 2 * 2)
    lat_w = round(math.sqrt(area / aspect_ratio) // 8 // 2 * 2)
    return lat_w * 8, lat_h * 8


def test_a_video_has_the_shape_of_the_picture_that_it_starts_from():
    for area in (832 * 480, 1280 * 720):
        for width in range(90, 3000, 231):
            for height in range(70, 2600, 233):
                expected = official_size(width, height, area)
                assert picture_size(MediaInfo(width, height, 1, None), area, GRID) == expected
    for family in FAMILIES.values():  # a picture of the size itself keeps it, on every grid
        for size in (family.size, family.size[::-1]):
            assert picture_size(MediaInfo(*size, 1, None), math.prod(size), family.grid) == size


def test_the_longest_picture_still_has_a_token_in_each_direction():
    assert picture_size(MediaInfo(100_000, 10, 1, None), 480 * 480, GRID)[1] == 16
    assert picture_size(MediaInfo(10, 100_000, 1, None), 480 * 480, GRID)[0] == 16
