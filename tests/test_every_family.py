"""Every family of Wan by the command line: checked, cached, trained, killed, resumed, sampled and converted.

A release for each way in which they differ, on a small model. Run by `make families-check`. Clips are made, and where
WAN_TEST_CLIPS names a folder of others, every story is run on those too.
"""

import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkout import run, start, write_checkout
from tests.families import RELEASES, common_name, lora_files, picture_flags, trainables, turns
from tests.loras import metadata_of
from tests.media import OTHER_CLIPS, decode_all, image
from tests.runs import scalars
from tests.tiny import write_clips, write_model
from utils.adapters.lora_file import delta
from utils.adapters.lora_reader import read_lora
from utils.common.tensor_files import read_tensors
from utils.media.probing import probe
from utils.runs.state import read_state
from wan.configs import FAMILIES, Family

pytestmark = pytest.mark.families

TRAIN, SAMPLE, CONVERT = "train_wan_lora.py", "test_wan_control_lora.py", "convert_lora_to_comfy.py"
SMALL = "--base_res 64 --token_limit 60 --num_workers 1 --learning_rate 1e-3 --lora_rank 4".split()
PREVIEW = "--sample_prompts fox --sample_every 1000 --sample_steps 2".split()
SIZES = "--prompt fox --width 64 --height 64 --frames 5 --steps 2".split()
PHASE = 8  # steps
STEPS = 2 * PHASE  # of each expert; of a model without experts as many as of both
MADE, OTHER = "made", "other"


def copy_other_clips(folder: Path) -> None:
    """Clips of the user's: the last one is held out, and those without a caption get one."""
    for index, clip in enumerate(OTHER_CLIPS):
        copy = folder / ("val" if clip is OTHER_CLIPS[-1] else "train") / f"{index:03d}.mp4"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip, copy)
        caption = clip.with_suffix(".txt")
        copy.with_suffix(".txt").write_text(caption.read_text() if caption.exists() else f"clip {index}")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The program with a small model of every family, and the clips."""
    folder = write_checkout(tmp_path_factory.mktemp("families"))
    for release in RELEASES:
        write_model(folder / "models" / release, FAMILIES[release])
    write_clips(folder / MADE)
    if OTHER_CLIPS:
        copy_other_clips(folder / OTHER)
    for index, name in enumerate(("first", "last")):
        image(folder / f"{name}.png", caption=None, size=(80 + 20 * index, 64))
    return folder


@dataclass(frozen=True)
class Case:
    """A release in the checkout, and the dataset that it is trained on."""

    checkout: Path
    release: str
    clips: str = MADE

    @property
    def family(self) -> Family:
        return FAMILIES[self.release]

    @property
    def last(self) -> int:
        """The last step of a run."""
        return 2 * STEPS

    @property
    def flags(self) -> list[str]:
        """The options of every run but its length."""
        base = ["--dataset", self.clips, "--pretrained_model_name_or_path", self.release]
        caches = ["--cache_dir", f"caches/{self.release}-{self.clips}"]
        return [*base, *SMALL, *caches, *f"--val_samples 1 --val_steps {PHASE}".split()]

    @property
    def length(self) -> list[str]:
        """The options of a run's length, where experts take turns of PHASE steps."""
        return ["--max_train_steps", str(self.last // len(self.family.experts)), *turns(self.family, PHASE)]

    def output(self, name: str) -> Path:
        return self.checkout / "runs" / f"{self.release}-{self.clips}" / name

    def train(self, name: str, *more: str, length: Sequence[str] | None = None) -> str:
        """What a run printed."""
        length = self.length if length is None else length
        result = run(TRAIN, *self.flags, *length, "--output_dir", self.output(name), *more, cwd=self.checkout)
        return result.stdout + result.stderr

    def run(self, name: str) -> Path:
        (folder,) = self.output(name).iterdir()
        return folder

    def loras(self, name: str, step: int | None = None) -> list[dict[str, torch.Tensor]]:
        """The tensors of a run's LoRA files, from high noise to low."""
        return [load_file(file) for file in lora_files(self.run(name), self.family, step or self.last)]

    @property
    def pictures(self) -> list[str]:
        """The flags that give the model its frames."""
        return picture_flags(self.family, Path("first.png"), Path("last.png"))

    def sample(self, name: str, *arguments: object) -> tuple[Path, str]:
        """A video, and what the test script printed."""
        given = [*map(str, arguments), *self.pictures, *SIZES, "--output_dir", str(self.output(name))]
        result = run(SAMPLE, *given, cwd=self.checkout)
        (video,) = self.output(name).glob("*.mp4")
        return video, result.stdout


def assert_equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------- a family's story


@pytest.fixture(scope="module", params=[(name, clips) for clips in (MADE, OTHER) for name in RELEASES], ids="-".join)
def story(request, checkout) -> Case:
    """A release whose clips were checked and encoded, and that was trained from the cache without a break."""
    if request.param[1] == OTHER and not OTHER_CLIPS:
        pytest.skip("WAN_TEST_CLIPS names no folder of clips")
    case = Case(checkout, *request.param)
    table = case.train("unused", "--check_dataset")
    assert "held out, ok" in table or "held out, will play" in table
    assert "loading the text encoder" in case.train("unused", "--cache_embeddings", *PREVIEW)
    cached = case.train("unused", "--cache_latents", "1", "--cache_only")
    assert "text: 0 to encode" in cached or "text: 1 to encode" in cached  # the prompt of previews is not needed here
    assert not case.output("unused").exists()
    trained = case.train("straight", "--cache_latents", "1", *PREVIEW)
    assert "text: 0 to encode" in trained and "latents: 0 to encode" in trained
    return case


def test_a_run_writes_losses_previews_and_a_lora_for_each_expert(story):
    folder = story.run("straight")
    tags = scalars(folder)
    for part, file in zip(trainables(story.family), lora_files(folder, story.family, story.last), strict=True):
        prefix, val = ("train", "val") if part == "lora" else (part, f"val/{part}")
        assert len(tags[f"{prefix}/loss"]) == story.last // len(story.family.experts)
        assert list(tags[f"{val}/loss"]) == list(range(0, story.last + 1, PHASE))
        assert tags[f"{val}/loss"][story.last] < tags[f"{val}/loss"][0]
        assert metadata_of(file).get("expert", "lora") == part and metadata_of(file)["base_model"] == story.release
    for step in (0, story.last):
        assert probe(folder / "samples" / f"{step:08d}-01.mp4").fps == story.family.fps


def newest_state(folder: Path) -> int:
    """The last step that a run has saved."""
    return max((int(path.stem.split("-")[1]) for path in folder.glob("*/checkpoints/state-*.safetensors")), default=0)


def kill_after(story: Case, step: int, *more: str) -> None:
    """Starts or resumes the run that is killed, and kills it once it has saved this step, inside the same phase."""
    folder = story.output("killed")
    process = start(TRAIN, *story.flags, *story.length, "--output_dir", folder, *more, cwd=story.checkout)
    while process.poll() is None and newest_state(folder) < step:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert step <= newest_state(folder) < (step // PHASE + 1) * PHASE


def test_a_run_that_is_killed_inside_its_phases_ends_as_an_unbroken_one(story):
    saving = ["--cache_latents", "1", *PREVIEW, "--checkpointing_steps", "1"]
    resuming = [*saving, "--resume_from_checkpoint", "latest"]
    kill_after(story, 3, *saving)
    kill_after(story, PHASE + 2, *resuming)
    story.train("killed", *resuming)
    assert_equal(story.loras("killed"), story.loras("straight"))
    states = [
        story.run(name) / "checkpoints" / f"state-{story.last:08d}.safetensors" for name in ("killed", "straight")
    ]
    assert_equal(*([read_tensors(path)[0]] for path in states))
    assert read_state(states[0]).step == story.last


@pytest.fixture(scope="module")
def fresh(story) -> Case:
    """With a short run from fresh clips, whose previews start from pictures where the model is given any."""
    pictures = {0: [], 1: ["--sample_images", "first.png"], 2: ["--sample_images", "first.png,last.png"]}
    steps = ["--max_train_steps", str(2 // len(story.family.experts)), *turns(story.family, 1)]
    story.train("fresh", *PREVIEW, *pictures[len(story.family.given)], *steps)
    return story


def test_fresh_clips_train_too(fresh):
    assert all(tensor.isfinite().all() for lora in fresh.loras("fresh", 2) for tensor in lora.values())
    assert (fresh.run("fresh") / "samples" / "00000002.png").exists()


def test_a_lora_is_sampled_by_its_name_and_by_its_files_and_beside_another(fresh):
    run, other = fresh.run("straight"), common_name(fresh.run("fresh"), 2)
    by_name, said = fresh.sample("by_name", "--lora_path", common_name(run, fresh.last), "--compare")
    assert "without the LoRA | with the LoRA" in said
    info = probe(by_name)
    assert (info.width, info.height, info.frames, info.fps) == (128, 64, 5, fresh.family.fps)
    frames = decode_all(by_name)
    assert (frames[:, :, :64] != frames[:, :, 64:]).any()
    files = lora_files(run, fresh.family, fresh.last)
    by_files, _ = fresh.sample("by_files", "--lora_path", *files, "--compare")
    assert (decode_all(by_files) == frames).all()
    beside, _ = fresh.sample("beside", "--lora_path", *files, "--also_lora", f"{other}:5", "--compare")
    assert (decode_all(beside) != frames).any()


def test_converted_files_load_again_and_give_the_same_weights(story):
    run_folder, files = story.run("straight"), lora_files(story.run("straight"), story.family, story.last)
    name = common_name(run_folder, story.last)
    run(CONVERT, "--input_lora", name, "--to", "diffusers", cwd=story.checkout)
    back = run_folder / "back.safetensors"
    converted = name.with_stem(f"{name.stem}_diffusers")
    run(CONVERT, "--input_lora", converted, "--output_lora", back, cwd=story.checkout)
    for part, file in zip(trainables(story.family), files, strict=True):
        ours = read_lora(file).pairs
        again = back if part == "lora" else back.with_stem(f"back_{part}")
        for path in (file.with_stem(f"{file.stem}_diffusers"), again):
            theirs = read_lora(path).pairs
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(delta(ours[module]), delta(theirs[module])) for module in ours)
        assert_equal([load_file(file)], [load_file(again)])


# ---------------------------------------------------------------------------------------- what only some families have


SHORT = "--max_train_steps 2".split()


@pytest.mark.parametrize(
    ("release", "inputs"),
    [
        ("wan2.1-t2v-1.3B", 16 + 16),
        ("wan2.1-i2v-14B-480P", 36 + 16),
        ("wan2.2-i2v-A14B", 36 + 16),
        ("wan2.2-ti2v-5B", 48 + 48),
    ],
)
def test_a_control_lora_reads_the_control_in_its_last_inputs_and_follows_it(checkout, release, inputs):
    case = Case(checkout, release)
    last = 2 * len(case.family.experts)
    case.train("control", *PREVIEW, *SHORT, *"--control_lora --control_inject_noise 0.3".split())
    for lora in case.loras("control", last):
        assert lora["diffusion_model.patch_embedding.reshape_weight"].tolist() == [48, inputs, 1, 2, 2]
        columns = lora["diffusion_model.patch_embedding.lora_A.weight"].flatten(1).shape[1]
        assert columns == inputs * 4
    followed = ["--input_video", next((checkout / MADE / "val").glob("*.mp4")), "--compare"]
    video, said = case.sample("follow", "--lora_path", common_name(case.run("control"), last), *followed)
    assert "control | without the LoRA | with the LoRA" in said and probe(video).width == 3 * 64


def test_a_control_lora_of_a_text_model_starts_from_a_picture(checkout):
    case = Case(checkout, "wan2.1-t2v-1.3B")
    case.train("start", *SHORT, "--control_lora", "--control_i2v")
    lora, video = common_name(case.run("start"), 2), next((checkout / MADE / "val").glob("*.mp4"))
    follow = ["--lora_path", lora, "--input_video", video]
    first, _ = case.sample("from_first", *follow, "--image", "first.png")
    other, _ = case.sample("from_clip", *follow, "--image", video)
    assert (decode_all(first) != decode_all(other)).any()
    message = run(SAMPLE, *follow, *SIZES, cwd=checkout, code=2).stderr
    assert "trained with --control_i2v: pass the picture to start from as --image" in message


@pytest.mark.parametrize("release", ["wan2.1-i2v-14B-480P", "wan2.2-ti2v-5B"])
def test_a_start_picture_is_cached_and_given_instead_of_the_first_frame(checkout, release):
    case = Case(checkout, release, "pictured")
    shutil.copytree(checkout / MADE, checkout / "pictured", dirs_exist_ok=True)
    image(checkout / "pictured" / "train" / "a_first.png", caption=None, size=(160, 96))
    always = ["--i2v_probability", "1"] if release.endswith("5B") else []
    unused = case.train("own", "--cache_latents", "1", *SHORT, *always)
    assert "--load_first_frame" in unused  # says that the picture is not used
    case.train("given", "--cache_latents", "1", "--load_first_frame", *"--max_train_steps 8".split(), *always)
    case.train("own_longer", "--cache_latents", "1", *"--max_train_steps 8".split(), *always)
    given, own = (scalars(case.run(name))["train/loss"] for name in ("given", "own_longer"))
    assert sum(given[step] != own[step] for step in own) >= 1


def test_one_expert_is_trained_alone_and_previewed_and_sampled_beside_the_base_of_the_other(checkout):
    case = Case(checkout, "wan2.2-t2v-A14B")
    case.train("high", *PREVIEW, "--expert", "high", length=["--max_train_steps", "3"])
    run_folder = case.run("high")
    names = sorted(path.name for path in (run_folder / "checkpoints").glob("wan-lora*"))
    assert names == ["wan-lora-00000003_high_noise.safetensors"]
    tags = scalars(run_folder)
    assert "val/high_noise/loss" in tags and not [tag for tag in tags if "low_noise" in tag]
    assert probe(run_folder / "samples" / "00000003-01.mp4").fps == 16
    _, said = case.sample("high_alone", "--lora_path", run_folder / "checkpoints" / names[0])
    assert "no LoRA for the low_noise expert: it runs as the base" in said


def test_options_of_one_expert_are_its_own(checkout):
    case = Case(checkout, "wan2.2-i2v-A14B")
    own = "--low_lora_rank 2 --low_lora_alpha 3 --low_learning_rate 2e-3 --low_max_train_steps 3".split()
    case.train("low", "--boundary_type", "low", *own, length=[])
    (file,) = (case.run("low") / "checkpoints").glob("wan-lora*")
    assert file.name == "wan-lora-00000003_low_noise.safetensors"
    assert (metadata_of(file)["rank"], metadata_of(file)["alpha"]) == ("2", "3")
    assert {pair.rank for pair in read_lora(file).pairs.values()} == {2}
    rates = scalars(case.run("low"))["low_noise/learning_rate"]
    assert list(rates) == [1, 2, 3] and rates[1] == pytest.approx(2e-3)


def test_experts_with_unequal_steps_take_turns_until_both_are_done(checkout):
    case = Case(checkout, "wan2.2-t2v-A14B")
    unequal = "--high_max_train_steps 5 --low_max_train_steps 2 --expert_phase_steps 2".split()
    case.train("unequal", length=unequal)
    tags = scalars(case.run("unequal"))
    assert list(tags["high_noise/loss"]) == [1, 2, 5, 6, 7] and list(tags["low_noise/loss"]) == [3, 4]
    assert all(file.exists() for file in lora_files(case.run("unequal"), case.family, 7))


@pytest.mark.parametrize("release", ["wan2.1-i2v-14B-480P", "wan2.2-t2v-A14B"])
def test_epochs_and_most_frames_decide_how_long_runs_and_samples_are(checkout, release):
    case = Case(checkout, release, "short")
    shutil.copytree(checkout / MADE, checkout / "short", dirs_exist_ok=True)
    flags = [*case.flags, *case.length]
    at = flags.index("--max_train_steps")
    del flags[at : at + 2]
    limits = "--epochs 1 --max_frames 4".split()
    said = run(TRAIN, *flags, "--output_dir", case.output("epoch"), *limits, cwd=checkout).stdout
    assert "80x48x5" in said and "80x48x9" not in said
    assert lora_files(case.run("epoch"), case.family, 5 * len(case.family.experts))[-1].exists()


def test_the_share_of_given_first_frames_decides_what_the_5b_learns(checkout):
    case = Case(checkout, "wan2.2-ti2v-5B")
    for share in ("0", "1"):
        case.train(f"share{share}", *SHORT, "--i2v_probability", share)
    never, always = (scalars(case.run(f"share{share}")) for share in "01")
    assert never["val/loss"][0] != always["val/loss"][0]
    assert never["train/loss"] != always["train/loss"]  # of steps with a picture alone both are equal
