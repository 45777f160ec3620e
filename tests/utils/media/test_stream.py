"""What packets, frames and FFmpeg's reports say of a stream."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.media import encode, video
from utils.media.description import MediaError
from utils.media.stream import Frames, Packets, Stream, harmful, read_stream
from utils.media.video import open_video


@dataclass
class Packet:
    pts: int | None
    is_keyframe: bool = False
    is_corrupt: bool = False
    is_discard: bool = False
    size: int = 100


def packets(*given: Packet) -> Packets:
    found = Packets()
    for packet in given:
        found.add(packet)
    return found


KEY, NEXT = Packet(10, is_keyframe=True), Packet(20)


@pytest.mark.parametrize(
    ("given", "starts_mid_group", "has_closed_groups"),
    [
        ((KEY, NEXT), False, True),
        ((NEXT, KEY), True, False),  # the file starts in the middle of a group
        ((KEY, Packet(5), NEXT), True, False),  # a leading picture
        ((KEY, NEXT, Packet(40, True), Packet(30)), False, False),  # an open group
        ((KEY, Packet(None)), False, False),
    ],
)
def test_packets_tell_where_a_file_was_cut_and_whether_groups_are_closed(given, starts_mid_group, has_closed_groups):
    found = packets(*given)
    assert (found.starts_mid_group, found.has_closed_groups) == (starts_mid_group, has_closed_groups)


def test_hidden_packets_do_not_count_and_empty_ones_repeat_a_picture():
    found = packets(KEY, Packet(15, is_discard=True), Packet(20, size=0), Packet(30, is_corrupt=True), Packet(40))
    assert (found.times, found.empty, found.corrupt, found.is_cut) == ([10, 30, 40], 1, [30], False)
    assert packets(KEY, Packet(20, is_corrupt=True)).is_cut


def test_times_are_those_of_frames_and_of_packets_where_no_frame_was_decoded():
    leading = Frames(times=[0, 5, 10])
    found = packets(KEY, Packet(0), Packet(5), Packet(40), Packet(20), Packet(30))
    assert Stream(found, leading, None, is_decoded=False).times == (0, 5, 10, 20, 30, 40)
    assert Stream(found, leading, None, is_decoded=True).times == (0, 5, 10)
    for times in ([0, 0, 10], [10, 5], [0, None]):
        stream = Stream(found, Frames(times=times), None, is_decoded=True)
        assert stream.times == stream.keyframes == () and stream.count == len(times)


def test_frames_that_cannot_be_decoded_at_the_start_are_counted_only_where_a_file_was_cut():
    assert Stream(packets(KEY, Packet(0), NEXT), Frames(times=[10, 20]), None, is_decoded=True).missing == 1
    assert Stream(packets(KEY, NEXT, Packet(30)), Frames(times=[10, 20]), None, is_decoded=True).missing == 0


@pytest.mark.parametrize(
    ("reported", "reason"),
    [
        ("", ""),
        (
            "[h264 @ 0x55d0] error while decoding MB 4 3, bytestream -11\n",
            "error while decoding MB 4 3, bytestream -11",
        ),
        ("[h264 @ 0x55d0] mmco: unref short failure\n", ""),
        ("[mjpeg @ 0x1] unable to decode APP fields: Invalid data\n[mjpeg @ 0x1] bad vlc 0\n", "bad vlc 0"),
        ("[matroska,webm @ 0x2] File ended prematurely at pos. 10 (0xa)\n", ""),
        ("[vp9 @ 0x3] \x1b[31mInvalid\x07 data\n", "[31mInvalid data"),
        ("some other program's line\n", ""),
    ],
)
def test_reports_about_pictures_are_damage_and_others_are_not(reported, reason):
    assert harmful(reported) == reason


def read(path: Path, full: bool, *reports: str) -> Stream:
    said = iter(("what was said before", *reports))
    with open_video(path) as opened:
        return read_stream(path, opened, full, lambda: next(said, ""), lambda position: None)


def test_a_report_while_decoding_is_damage_at_that_place(tmp_path):
    path = video(tmp_path / "a.mp4", frames=32)
    assert read(path, True).count == 32
    with pytest.raises(MediaError, match=r"damaged after \d\.\d\d s: concealing 80 errors"):
        read(path, True, *[""] * 30, "[h264 @ 0x1] concealing 80 errors")


def test_a_file_without_its_end_is_known_by_what_is_reported(tmp_path):
    path = video(tmp_path / "a.mp4", frames=9)
    assert not read(path, True).ends_early
    assert read(path, True, "[matroska,webm @ 0x2] File ended prematurely at pos. 10").ends_early


def test_every_frame_is_decoded_only_where_it_is_asked_for_or_packets_do_not_tell(tmp_path):
    plain = video(tmp_path / "a.mp4", frames=9)
    assert len(read(plain, True).frames.times) == 9 and 1 <= len(read(plain, False).frames.times) < 9
    assert read(plain, False).times == read(plain, True).times
    hidden = encode(tmp_path / "b.webm", "libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"})
    assert len(read(hidden, False).frames.times) == 30
