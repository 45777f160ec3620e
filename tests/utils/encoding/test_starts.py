"""Batches of a student that starts from its own samples: a shape, a text, and what its model is given."""

from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

import utils.encoding.samples
from tests.adapted import fill
from tests.media import image, video
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer, write_model
from utils.adapters.attach import LoraAdapter
from utils.adapters.lora import adapter_parameters, add_lora, select_modules, speaking
from utils.common.errors import UserError
from utils.common.tensor_files import tensor_names
from utils.data.dataset import Dataset, open_dataset, open_prompts
from utils.data.folders import Folder, Rules
from utils.data.loading import load_clip, load_given
from utils.data.plan import Limits, make_plan
from utils.data.prompts import PromptOptions
from utils.encoding.conditioning import Batch
from utils.encoding.latent_cache import cached_bytes, format_cache_size
from utils.encoding.samples import CachedSamples, Caches, FreshSamples, LatentEncoding, Samples, open_samples
from utils.encoding.starts import BlankLatents, latent_shape, places_to_read
from utils.media.controls import ControlSignal
from utils.training.conditions import check_conditions
from utils.training.few_step import CRITIC, STUDENT, FewStep
from utils.training.memory import Memory, prepare
from wan.checkpoints import open_model
from wan.configs import FAMILIES, Family
from wan.modules.model import WanModel

CPU = torch.device("cpu")
NAMES = ("wan2.1-t2v-1.3B", "wan2.2-ti2v-5B", "wan2.1-i2v-14B-480P", "wan2.2-i2v-A14B", "wan2.1-flf2v-14B-720P")
T2V, TI2V, I2V, I2V_A14B, FLF2V = (FAMILIES[name] for name in NAMES)
GIVEN = pytest.mark.parametrize("family", [TI2V, I2V, I2V_A14B, FLF2V], ids=lambda family: family.name)
SMALL = Rules(base_res=(64,), max_frames=9, enlarge=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model of a family, written once."""

    @cache
    def written(family: Family) -> Path:
        return write_model(tmp_path_factory.mktemp("model"), family)

    return written


def text_of(caption: str) -> Tensor:
    """Its embedding, longer than others where the caption is longer."""
    generator = torch.Generator().manual_seed(len(caption))
    return torch.randn(3 + len(caption) % 3, TINY_SHAPE.text_dim, generator=generator)


def limits_of(family: Family, batch_size: int = 1) -> Limits:
    return Limits(10_000, batch_size, family.grid)


def prompts(folder: Path, family: Family, batch_size: int = 1, rules: Rules = SMALL) -> Dataset:
    (folder / "prompts.txt").write_text("a red fox\na hare in the snow\nan owl\n", encoding="utf-8")
    return open_prompts(PromptOptions(folder / "prompts.txt"), rules, limits_of(family, batch_size), family)


def pictures(folder: Path, family: Family, rules: Rules = SMALL) -> Dataset:
    """Pictures and a video, or for a model that is given the last frame videos alone."""
    for name in "ab" if -1 not in family.given else "":
        image(folder / "clips" / f"{name}.png", size=(96, 64 + ord(name) - 97))
    video(folder / "clips" / "c.mp4", frames=9, size=(96, 64), darkest=40)
    return open_dataset([Folder(folder / "clips", rules)], limits_of(family), family.fps, student=family)


def opened(files, data: Dataset, folder: Path, has_frames: bool = True, num_workers: int = 0, **caches) -> Samples:
    encoding = LatentEncoding(files, CPU, places=places_to_read(files.family, has_frames))
    plan = make_plan(data.train, limits_of(files.family), 0, caches.get("cache_latents", 0))
    windows = plan.fixed_windows or plan.largest_batch
    return open_samples(Caches(**caches), encoding, windows, text_of, folder / "cache", num_workers)


def same(one: Batch, other: Batch) -> bool:
    conds = [vars(batch.cond) for batch in (one, other)]
    return torch.equal(one.latents, other.latents) and all(
        (conds[0][name] is conds[1][name] is None) or torch.equal(conds[0][name], conds[1][name]) for name in conds[0]
    )


# -------------------------------------------------------------------------------------------------------- what is read


def test_only_the_frames_that_a_model_is_given_are_read_and_for_a_control_all():
    assert [places_to_read(family) for family in (T2V, TI2V, I2V, FLF2V)] == [(), (0,), (0,), (0, -1)]
    assert places_to_read(TI2V, has_frames=False) == ()
    assert places_to_read(T2V, has_control=True) is places_to_read(I2V, has_control=True) is None


@pytest.mark.parametrize("frames", [1, 9])
def test_of_a_clip_its_own_first_and_last_frames_are_read_and_of_an_image_the_image(tmp_path, frames):
    data = pictures(tmp_path, I2V, Rules(base_res=(64,), max_frames=frames))
    for window in data.windows:
        whole = load_clip(window)
        for places in ((0,), (0, -1)):
            clip = load_given(window, places)
            assert clip.length == window.frames == frames and clip.caption == window.caption
            assert torch.equal(clip.pixels[:, 0], whole.pixels[:, 0])
            assert torch.equal(clip.pixels[:, -1], whole.pixels[:, places[-1]])
            assert clip.pixels.shape[1] == min(len(places), frames)


def test_a_start_picture_is_read_and_masks_are_not(tmp_path):
    image(tmp_path / "clips" / "c_first.png", caption=None, size=(96, 64))
    video(tmp_path / "clips" / "c_mask.mp4", frames=9, size=(96, 64), caption=None)
    rules = Rules(base_res=(64,), enlarge=True, load_first_frame=True, load_mask=True)
    (window,) = pictures(tmp_path, FLF2V, rules).windows
    clip = load_given(window, (0,))
    assert torch.equal(clip.first, load_clip(window).first) and window.source.mask and clip.mask is None


@pytest.mark.parametrize("family", [T2V, TI2V], ids=lambda family: family.task)
def test_the_shape_of_latents_is_that_of_the_vae(tmp_path, model, family):
    vae = LatentEncoding(open_model(model(family)), CPU).load().vae
    for window in prompts(tmp_path, family, rules=Rules(base_res=(64, 96), max_frames=13)).windows:
        assert latent_shape(family, window) == vae.latent_shape(window.frames, window.height, window.width)


# -------------------------------------------------------------------------------------------------------- prompts alone


@pytest.mark.parametrize("family", [T2V, TI2V], ids=lambda family: family.task)
def test_batches_of_prompts_are_texts_and_a_shape_and_load_no_encoder(tmp_path, model, family, monkeypatch):
    files, data = open_model(model(family)), prompts(tmp_path, family, batch_size=2)
    loads, load_vae = [], utils.encoding.samples.load_vae
    monkeypatch.setattr(utils.encoding.samples, "load_vae", lambda *args: loads.append(args) or load_vae(*args))
    samples = opened(files, data, tmp_path, has_frames=False)
    plan = make_plan(data.train, limits_of(family, batch_size=2), 3, 0)
    planned = [*plan.epoch(0), *plan.epoch(1), *plan.epoch(2)]
    with closing(samples.stream(plan, start_batch=1)) as stream:
        for windows, batch in zip(planned[1:], islice(stream, len(planned) - 1), strict=True):
            assert batch.latents.shape == (len(windows), *latent_shape(family, windows[0])) and not batch.latents.any()
            assert batch.cond.channels is batch.cond.first is batch.cond.image is batch.mask is None
            for window, text in zip(windows, batch.cond.text, strict=True):
                own = text_of(window.caption)
                assert torch.equal(text[: len(own)], own) and not text[len(own) :].any()
            assert same(batch, samples.load_batch(windows))
    assert samples.hold(planned[0]) is None and not loads and not (tmp_path / "cache").exists()
    assert samples.open_encoders().family == family and len(loads) == 1  # for previews


def test_what_would_encode_nothing_is_refused():
    for name, value in (("cache_latents", 1), ("overlap_encoding", True)):
        for places in (None, (0,)):
            Caches(**{name: value}).check_encoding(places)
        with pytest.raises(UserError, match=f"--{name} has no effect: this run starts from noise and texts"):
            Caches(**{name: value}).check_encoding(())
    Caches().check_encoding(())


# ------------------------------------------------------------------------------------------------------------- pictures


@GIVEN
def test_what_a_model_is_given_is_what_it_is_given_of_the_whole_clip(tmp_path, model, family):
    files, data = open_model(model(family)), pictures(tmp_path, family)
    fresh, cached = (opened(files, data, tmp_path, cache_latents=count) for count in (0, 1))
    assert isinstance(fresh, FreshSamples) and isinstance(cached, CachedSamples)
    whole = FreshSamples(fresh.encoders, text_of)
    windows = make_plan(data.train, limits_of(family), 0, 1).fixed_windows
    assert {window.frames for window in windows} == {9}
    for window in windows:
        found, expected = (samples.load_batch([window]) for samples in (fresh, whole))
        assert same(found, cached.load_batch([window]))
        assert found.latents.shape == expected.latents.shape and not found.latents.any()
        for name, part in vars(expected.cond).items():
            own = getattr(found.cond, name)
            assert (own is part is None) or torch.allclose(own, part, atol=1e-5), name


@GIVEN
def test_the_cache_holds_what_is_given_and_no_latents(tmp_path, model, family, monkeypatch):
    files, data = open_model(model(family)), pictures(tmp_path, family)
    cached, names = opened(files, data, tmp_path, cache_latents=1), {"channels": {"channels"}, "latents": {"first"}}
    expected = names[family.given_as] | ({"image"} if family.clip else set())
    stored = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert len(stored) == len(data.train) and all(tensor_names(path) == expected for path in stored)
    small, windows = (
        replace(family, shape=tiny_shape(family)),
        make_plan(data.train, limits_of(family), 0, 1).fixed_windows,
    )
    told = cached_bytes(windows, small, has_control=False, given_alone=True)
    assert told <= sum(path.stat().st_size for path in stored) <= told + 1000 * len(stored)
    for name in ("load_vae", "load_vision_encoder"):
        monkeypatch.setattr(utils.encoding.samples, name, None)
    again = opened(files, data, tmp_path, cache_latents=1)
    window = data.windows[0]
    assert same(cached.load_batch([window]), again.load_batch([window]))


def test_the_line_about_caches_counts_what_is_cached(tmp_path):
    for family, places, expected in (
        (T2V, (), "each of 3 texts"),
        (T2V, None, "takes N times"),
        (TI2V, (0,), "N times"),
    ):
        line = format_cache_size(prompts(tmp_path, family), limits_of(family), family, False, places)
        assert line.startswith("on disk: ") and expected in line and ("--cache_latents" in line) == (places != ())


def test_a_single_frame_has_no_first_one_that_could_be_cached(tmp_path, model):
    files, data = open_model(model(TI2V)), pictures(tmp_path, TI2V, Rules(base_res=(64,), max_frames=1))
    for samples in (opened(files, data, tmp_path, cache_latents=count) for count in (0, 1)):
        batch = samples.load_batch(data.windows[:1])
        assert batch.latents.shape == (1, *latent_shape(TI2V, data.windows[0])) and batch.cond.first is None
    assert isinstance(samples.latents, BlankLatents) and not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_pictures_are_loaded_ahead_by_other_processes(tmp_path, model):
    files, data = open_model(model(TI2V)), pictures(tmp_path, TI2V)
    plan = make_plan(data.train, limits_of(TI2V), 1, 0)
    taken = []
    for count in (0, 1):
        with closing(opened(files, data, tmp_path, num_workers=count).stream(plan)) as stream:
            taken.append(list(islice(stream, 4)))
    assert all(same(one, other) for one, other in zip(*taken, strict=True))


def test_a_control_is_never_made_of_given_frames_alone(tmp_path, model):
    encoding = LatentEncoding(open_model(model(T2V)), CPU, ControlSignal("tile"))
    with pytest.raises(ValueError, match="a control is made of every frame"):
        encoding.load().encode(load_given(pictures(tmp_path, T2V).windows[0], (0,)), text_of(""))


# ------------------------------------------------------------------------------------------------------------ training


def two_adapters(family: Family) -> WanModel:
    model = tiny_transformer(tiny_shape(family))

    def attach(model: WanModel) -> None:
        for seed, name in enumerate((STUDENT, CRITIC)):
            add_lora(model, select_modules(model, ["attn"]), rank=2, alpha=2, adapter=name)
            fill(adapter_parameters(model, name).values(), seed=seed)

    prepare(model, Memory("none"), attach)
    return model


@pytest.mark.parametrize("family", [T2V, TI2V, I2V, I2V_A14B, FLF2V], ids=lambda family: family.name)
@pytest.mark.parametrize("from_prompts", [True, False], ids=["prompts", "pictures"])
def test_a_student_and_its_critic_learn_from_such_batches(tmp_path, model, family, from_prompts):
    if from_prompts and family.given_as == "channels":
        return
    data = prompts(tmp_path, family) if from_prompts else pictures(tmp_path, family)
    samples = opened(open_model(model(family)), data, tmp_path, has_frames=not from_prompts)
    plan, shared = make_plan(data.train, limits_of(family), 0, 0), two_adapters(family)
    negative = text_of("blurry")
    losses = FewStep(shared, [1.0, 0.8], (0.1, 1.0), 3.0, 4.0, negative, held_share=0.5, rolls_out=True)
    check_conditions(LoraAdapter(shared, STUDENT), samples.load_batch(plan.largest_batch), 0.9, family.given, False)
    parameters = {name: [*adapter_parameters(shared, name).values()] for name in (STUDENT, CRITIC)}
    before = {name: [matrix.detach().clone() for matrix in matrices] for name, matrices in parameters.items()}
    optimizers = {name: torch.optim.SGD(matrices, lr=0.01) for name, matrices in parameters.items()}
    with closing(samples.stream(plan)) as stream:
        for batch in islice(stream, 3):
            for name, loss_of in ((STUDENT, losses.student_loss), (CRITIC, losses.critic_loss)):
                with speaking(shared, name):
                    loss = loss_of(batch).value
                    loss.backward()
                assert loss.isfinite() and all(matrix.grad.any() for matrix in parameters[name])
                optimizers[name].step()
                shared.zero_grad()
    for name, matrices in before.items():
        assert not any(map(torch.equal, matrices, parameters[name]))
