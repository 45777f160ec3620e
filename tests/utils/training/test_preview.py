import pytest
import torch

from tests.encoders import encoders_of
from tests.tiny import tiny_vae
from utils.common.errors import UserError
from utils.encoding.conditioning import Batch, Cond, to_pixels
from utils.training.preview import Preview, Scenes, make_requests, read_prompts
from wan.text2video import Sampler

SHAPE = (16, 2, 4, 4)
FREE = Scenes((32, 32, 5))  # videos of this shape that follow nothing


class Model:
    """Answers with a velocity that depends on the text, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []
        self.with_gradient = False

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, cond: Cond) -> torch.Tensor:
        word = cond.text[0, 0, 0].item()
        self.asked.append((timestep[0].item(), word))
        self.with_gradient |= torch.is_grad_enabled()
        return word * torch.ones_like(latents) + latents


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


def text(word: float) -> torch.Tensor:
    return torch.full((3, 8), float(word))


def clip(value: float) -> Batch:
    return Batch(torch.zeros(1, *SHAPE), Cond(text(9), torch.full((1, *SHAPE), value)))


def test_requests_differ_in_noise_by_their_place_and_are_the_same_each_time(vae):
    prompts = [("fox", text(1)), ("fox", text(1))]
    first, second = make_requests(prompts, FREE, 7, encoders_of(vae))
    again, _ = make_requests(prompts, FREE, 7, encoders_of(vae))
    assert first.noise.shape == (1, *SHAPE) and first.control is None
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, make_requests(prompts, FREE, 8, encoders_of(vae))[0].noise)


def test_requests_follow_the_clips_in_turn_and_show_what_they_follow(vae):
    clips = [clip(0.5), clip(-0.5)]
    requests = make_requests(
        [(name, text(1)) for name in "abc"], Scenes((16, 16, 1), clips), 0, encoders_of(vae, "tile")
    )
    assert [request.cond.channels.mean().item() for request in requests] == [0.5, -0.5, 0.5]
    assert all(request.noise.shape == (1, *SHAPE) for request in requests)
    (_, frames), *_ = Preview(requests, None, Sampler("euler", 1, (1.0,), 5.0), 16, vae).generate(Model())
    left, right = frames.chunk(2, dim=3)
    assert torch.equal(left, to_pixels(vae.decode(clips[0].cond.channels)[0])) and not torch.equal(left, right)


def test_a_preview_leaves_the_random_state_and_no_gradient(vae):
    requests = make_requests([("fox", text(1).requires_grad_())], FREE, 0, encoders_of(vae))
    state = torch.get_rng_state()
    model = Model()
    ((prompt, frames),) = Preview(requests, text(0.2), Sampler("unipc", 2, (3.0,), 5.0), 16, vae).generate(model)
    assert prompt == "fox" and frames.shape == (5, 3, 32, 32) and frames.dtype == torch.uint8
    assert torch.equal(state, torch.get_rng_state()) and model.asked and not model.with_gradient


def test_prompts_are_a_text_or_the_lines_of_a_text_file(tmp_path):
    (tmp_path / "Prompts.TXT").write_text("\ufeffa fox\n\n  a hare \n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "Prompts.TXT")) == ["a fox", "a hare"]
    assert read_prompts("a fox, running.") == ["a fox, running."]
    for long in ("fox " * 200, "\u72d0" * 100, "a\0b"):
        assert read_prompts(long) == [long]


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "is empty"), ("  ", "is empty"), ("{}/nowhere.txt", "nowhere.txt"), ("{}/list.md", "not a .txt file")],
)
def test_what_is_no_prompt_is_reported(tmp_path, given, message):
    (tmp_path / "list.md").write_text("a fox")
    with pytest.raises(UserError, match=message):
        read_prompts(given.format(tmp_path))
