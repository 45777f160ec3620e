"""Control signals keep shape and range, and lose detail."""

import pytest
import torch

from utils.media.controls import CONTROL_TYPES, FROM_FILE, make_control, tile


def make_video(frames: int = 3, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("control_type", [*CONTROL_TYPES, FROM_FILE])
@pytest.mark.parametrize("shape", [(1, 48, 64), (5, 16, 16), (2, 50, 34)])
def test_a_control_has_the_shape_and_range_of_the_video(control_type, shape):
    video = make_video(*shape)
    control = make_control(video, control_type)
    assert control.shape == video.shape and control.dtype == torch.float32
    assert control.min() >= -1 and control.max() <= 1


def test_a_control_file_is_used_unchanged():
    video = make_video()
    assert torch.equal(make_control(video, FROM_FILE), video)


def test_an_unknown_control_type_is_named_in_the_error():
    with pytest.raises(ValueError, match="'depth'; known: tile, file"):
        make_control(make_video(), "depth")


def test_tile_keeps_plain_areas_and_slow_changes():
    flat = torch.full((3, 2, 48, 64), 0.25)
    torch.testing.assert_close(tile(flat), flat)
    ramp = torch.linspace(-1, 1, 128).expand(3, 1, 64, 128)
    inside = (..., slice(16, -16))
    torch.testing.assert_close(tile(ramp)[inside], ramp[inside], rtol=0, atol=1e-2)


def test_tile_removes_detail():
    checkered = ((torch.arange(48)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).expand(3, 1, 48, 64)
    assert tile(checkered).abs().max() < 0.1
    striped = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(16).expand(3, 1, 48, 64)
    assert tile(striped).abs().max() < 0.2
    noise = make_video()
    assert tile(noise).std() < noise.std() / 4


def test_frames_do_not_mix():
    video = make_video(frames=3)
    changed = video.clone()
    changed[:, 1] = 0
    before, after = tile(video), tile(changed)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]]) and not torch.equal(before[:, 1], after[:, 1])


def test_the_video_itself_is_not_changed():
    video = make_video()
    tile(video)
    assert torch.equal(video, make_video())
