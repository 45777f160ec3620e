from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.encoders import encoders_of, family_encoders
from tests.media import image
from tests.tiny import tiny_vae
from utils.adapters.stated_steps import StatedSteps
from utils.common.errors import UserError
from utils.data.loading import Clip
from utils.diffusion.flow import seeded_noise
from utils.encoding.conditioning import Batch, Cond, collate, to_pixels
from utils.encoding.pictures import load_pictures
from utils.media.controls import ControlSignal
from utils.media.frames import save_image
from utils.training.preview import Preview, Previews, Request, Scenes, make_requests, read_prompts
from wan.configs import FAMILIES, Family
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


def test_the_noise_between_steps_is_that_of_the_request_in_every_preview(vae):
    asked = make_requests([("fox", text(1)), ("fox", text(1))], FREE, 7, encoders_of(vae))
    assert [request.seed for request in asked] == [7, 8]
    assert all(torch.equal(request.noise, seeded_noise(request.noise.shape, request.seed)) for request in asked)
    same_start = [replace(request, noise=asked[0].noise) for request in asked]
    preview = Preview(same_start, None, Sampler("lcm", 3, (1.0,), 5.0), 16, vae)
    (_, first), (_, second) = preview.generate(Model())
    assert not torch.equal(first, second)
    for (_, again), before in zip(preview.generate(Model()), (first, second), strict=True):
        assert torch.equal(again, before)


def test_a_brief_preview_is_the_largest_one_in_a_single_step(vae):
    small, large = (
        make_requests([(name, text(1))], Scenes(size), 0, encoders_of(vae))[0]
        for name, size in (("a", (16, 16, 1)), ("b", (32, 32, 5)))
    )
    preview = Preview([small, large], None, Sampler("unipc", 7, (3.0,), 5.0), 16, vae)
    model = Model()
    ((prompt, frames),) = preview.in_brief().generate(model)
    assert prompt == "b" and frames.shape == (5, 3, 32, 32)
    assert preview.in_brief().sampler == Sampler("unipc", 1, (3.0,), 5.0) and preview.sampler.steps == 7


@pytest.mark.parametrize("name", ["wan2.2-t2v-A14B", "wan2.2-i2v-A14B"])
@pytest.mark.parametrize("size", [(832, 480), (1280, 720)])
def test_a_brief_preview_asks_each_expert(name, size):
    family = FAMILIES[name]
    sampler = Sampler("unipc", 20, family.guidance, family.shift_at(*size), family.boundaries)
    request = Request("fox", torch.zeros(1, 4, 1, 2, 2), Cond(text(1)[None]))
    vae = SimpleNamespace(device=torch.device("cpu"), decode=lambda latents: torch.zeros(1, 3, 1, 16, 16))
    asked: list[float] = []

    def predict(latents: torch.Tensor, timestep: torch.Tensor, cond: Cond) -> torch.Tensor:
        asked.append(float(timestep[0]) / 1000)
        return torch.zeros_like(latents)

    Preview([request], text(0), sampler, 16, vae).in_brief().generate(predict)
    (boundary,) = family.boundaries
    assert {sigma >= boundary for sigma in asked} == {True, False}


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


# -------------------------------------------------------------------------------------------------------- given frames

T2V, I2V = FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.1-i2v-14B-480P"]
FLF2V, TI2V = FAMILIES["wan2.1-flf2v-14B-720P"], FAMILIES["wan2.2-ti2v-5B"]
GIVEN = pytest.mark.parametrize("family", [I2V, FLF2V, TI2V], ids=lambda family: family.task)


def family_clip(family: Family, control: ControlSignal | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 5, 32, 64), dtype=torch.uint8, generator=generator)
    return collate([family_encoders(family, control).encode(Clip(pixels, "a clip"), text(9))])


def same(one: Cond, other: Cond, but: tuple[str, ...] = ()) -> bool:
    pairs = [(part, getattr(other, name)) for name, part in vars(one).items() if name not in but]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@GIVEN
def test_previews_start_from_the_frames_of_the_clips_whatever_validation_holds(family):
    clip = family_clip(family)
    held = replace(clip, cond=replace(clip.cond, held=torch.tensor([False])))
    (request,) = make_requests([("fox", text(1))], Scenes((64, 32, 5), [held]), 0, family_encoders(family))
    assert same(request.cond, clip.cond, but=("text",)) and request.cond.held is None
    assert torch.equal(request.cond.text, text(1)[None]) and request.noise.shape == clip.latents.shape


def noisy(folder: Path, seed: int) -> Path:
    """A picture unlike that of another seed."""
    pixels = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    save_image(folder / f"{seed}.png", Image.fromarray(pixels.numpy()))
    return folder / f"{seed}.png"


@pytest.mark.parametrize("control", [None, ControlSignal("tile")])
@GIVEN
def test_pictures_take_the_place_of_the_clips_frames_and_a_control_stays(tmp_path, family, control):
    encoders, clip = family_encoders(family, control), family_clip(family, control)
    others, paths = ([noisy(tmp_path, 10 * n + place) for place in family.given] for n in (1, 2))
    scenes = Scenes((64, 32, 5), [clip] if control else [], [others, paths])
    _, request = make_requests([("hare", text(2)), ("fox", text(1))], scenes, 0, encoders)
    expected = encoders.condition(text(1), load_pictures(paths, family, 64, 32), 5)
    if control is not None:
        followed = clip.cond.channels[0, -family.out_dim :]
        given = [expected.channels] if expected.channels is not None else []
        expected = replace(expected, channels=torch.cat([*given, followed]))
    batched = Cond(**{name: part if part is None else part[None] for name, part in vars(expected).items()})
    assert same(request.cond, batched)
    assert (request.control is None) == (control is None)
    if control is not None:
        assert torch.equal(request.control, to_pixels(encoders.vae.decode(followed[None])[0]))


def test_a_preview_of_the_5b_shows_the_first_frame_that_it_is_given():
    clip, vae = family_clip(TI2V), family_encoders(TI2V).vae
    requests = make_requests([("fox", text(1))], Scenes((64, 32, 5), [clip]), 0, family_encoders(TI2V))
    ((_, frames),) = Preview(requests, None, Sampler("unipc", 2, (1.0,), 5.0), 24, vae).generate(Model())
    assert torch.equal(frames[:1], to_pixels(vae.decode(clip.cond.first)[0]))


def previews(*images: str, prompts: Path) -> Previews:
    return Previews(sample_prompts=str(prompts), sample_images=images)


def test_prompts_and_every_picture_may_be_in_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "p.txt").write_text("a fox", encoding="utf-8")
    assert read_prompts("~/p.txt") == ["a fox"] and read_prompts("~") == ["~"]
    for name in ("first.png", "last.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    previews = Previews(sample_prompts="a fox", sample_images=("~/first.png, ~/last.png",))
    paths = [tmp_path / "first.png", tmp_path / "last.png"]
    assert previews.preview_images(FLF2V, 9) == [paths]


def test_previews_have_a_set_of_pictures_each_or_one_for_all(tmp_path):
    a, b = (str(image(tmp_path / f"{name}.png", None)) for name in "ab")
    (tmp_path / "two.txt").write_text("a fox\na hare")
    two = tmp_path / "two.txt"
    assert previews(prompts=two).preview_images(I2V, 5) == []
    assert previews(a, prompts=two).preview_images(I2V, 5) == [[Path(a)]] * 2
    assert previews(a, b, prompts=two).preview_images(TI2V, 5) == [[Path(a)], [Path(b)]]
    assert previews(f"{a}, {b}", prompts=two).preview_images(FLF2V, 5) == [[Path(a), Path(b)]] * 2


@pytest.mark.parametrize(
    ("entries", "family", "message"),
    [
        (("a", "a", "a"), I2V, "--sample_images has 3 entries for 2 prompts: give one, or one for each"),
        (("a,a",), I2V, "--sample_images has 2 pictures, but this model is given the first frame"),
        (("a",), FLF2V, "--sample_images has 1 picture, but this model is given the first frame and last frame"),
        (("a",), T2V, "--sample_images: this model is not given any frame of a video"),
        (("nowhere",), I2V, r"nowhere\.png"),
    ],
)
def test_pictures_that_no_preview_could_start_from_are_refused(tmp_path, entries, family, message):
    image(tmp_path / "a.png", None)
    (tmp_path / "two.txt").write_text("a fox\na hare")
    files = [",".join(f"{tmp_path}/{name}.png" for name in entry.split(",")) for entry in entries]
    with pytest.raises(UserError, match=message):
        previews(*files, prompts=tmp_path / "two.txt").preview_images(family, 5)


def test_previews_are_sampled_as_their_family_is_unless_options_say_otherwise():
    a14b = FAMILIES["wan2.2-t2v-A14B"]
    sampler = Previews(sample_steps=7).preview_sampler(a14b, a14b.size, distilled=False)
    assert sampler == Sampler("unipc", 7, (4.0, 3.0), 12.0, (0.875,))
    assert Previews(sample_solver="lcm").preview_sampler(a14b, a14b.size, distilled=False).solver == "lcm"
    assert Previews().preview_sampler(a14b, a14b.size, distilled=True).guidance == (1.0,)
    assert Previews(sample_guidance=(2.0,)).preview_sampler(a14b, a14b.size, distilled=True).guidance == (2.0,)
    assert Previews(sample_guidance=(0.0,)).preview_sampler(I2V, I2V.size, distilled=False).guidance == (0.0,)
    assert Previews(sample_guidance=(5.0, 2.0)).preview_sampler(a14b, a14b.size, distilled=False).guidance == (5.0, 2.0)
    with pytest.raises(UserError, match="--sample_guidance has 2 values, but the model 1 expert"):
        Previews(sample_guidance=(5.0, 2.0)).preview_sampler(I2V, I2V.size, distilled=False)


def test_previews_are_sampled_as_a_lora_distilled_into_few_steps_states_unless_options_say_otherwise():
    a14b = FAMILIES["wan2.2-t2v-A14B"]
    stated = [StatedSteps((1000, 750, 500, 250), 5.0, "fast.safetensors")]

    def found(distilled: bool = False, **options: object) -> Sampler:
        return Previews(**options).preview_sampler(a14b, a14b.size, distilled, stated)

    expected = Sampler("lcm", 4, (1.0,), 5.0, (0.875,), timesteps=(1000, 750, 500, 250))
    assert found() == found(distilled=True) == found(sample_steps=4) == found(sample_solver="lcm") == expected
    assert found(sample_steps=8) == replace(expected, steps=8, timesteps=())
    assert found(sample_shift=12.0) == replace(expected, shift=12.0)
    assert found(sample_guidance=(4.0, 3.0)) == replace(expected, guidance=(4.0, 3.0))
    stated.append(StatedSteps((1000, 500), 5.0, "faster.safetensors"))
    with pytest.raises(UserError, match="say how to sample with --sample_steps"):
        found()
    assert found(sample_steps=4) == replace(expected, timesteps=())


def test_a_brief_preview_of_listed_steps_is_brief(vae):
    requests = make_requests([("fox", text(1))], FREE, 0, encoders_of(vae))
    sampler = Sampler("lcm", 6, (1.0,), 5.0, timesteps=(1000, 900, 800, 700, 600, 500))
    assert Preview(requests, None, sampler, 16, vae).in_brief().sampler == replace(sampler, steps=1, timesteps=())


def test_previews_of_a_model_for_two_sizes_are_sampled_with_the_shift_of_theirs():
    shifts = [Previews().preview_sampler(I2V, size, False).shift for size in ((832, 480), (480, 832), (1280, 720))]
    assert shifts == [3.0, 3.0, 5.0]
