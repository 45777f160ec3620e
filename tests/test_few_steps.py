"""LoRAs that were distilled into few steps are sampled so by the test script, which tries others beside them, too."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import test_wan_control_lora
from tests.chosen import A14B
from tests.documents import ROOT, read
from tests.tiny import TINY_SHAPE, write_model
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.media.contact_sheet import CELL, GAP
from utils.media.probing import probe
from wan.configs import FAMILIES
from wan.utils.fm_solvers import listed_grid

FOUR = {"denoising_steps": "1000 750 500 250", "shift": "6"}
SIZE = "--embedding fox.safetensors --negative_embedding fox.safetensors --width 32 --height 32 --frames 5"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "one")
    write_model(folder / "two", A14B)
    return folder


def random_lora(seed: int, *layers: str, size: float = 0.1) -> LoraFile:
    generator, width = torch.Generator().manual_seed(seed), TINY_SHAPE.dim
    drawn = {layer: [size * torch.randn(4, width, generator=generator) for _ in range(2)] for layer in layers}
    return LoraFile({layer: LoraPair(down, up.T.contiguous(), 4.0) for layer, (down, up) in drawn.items()})


@pytest.fixture
def work(models, tmp_path, monkeypatch) -> Path:
    """A folder with LoRAs: "fox" and its pair of two experts, and "fast", distilled into four steps."""
    monkeypatch.chdir(tmp_path)
    save_file({"context": torch.ones(3, TINY_SHAPE.text_dim)}, tmp_path / "fox.safetensors")
    layers = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o")
    fast = random_lora(1, layers[0], "blocks.0.self_attn.k", "time_embedding.2", size=0.2)
    write_lora(tmp_path / "style.safetensors", random_lora(0, *layers))
    write_lora(tmp_path / "plain.safetensors", random_lora(2, layers[0]))
    write_lora(tmp_path / "apart.safetensors", replace(random_lora(3, "blocks.1.self_attn.v"), metadata=FOUR))
    write_lora(tmp_path / "fast.safetensors", replace(fast, metadata=FOUR))
    write_lora(tmp_path / "faster.safetensors", replace(fast, metadata=FOUR | {"denoising_steps": "1000 500"}))
    write_lora(tmp_path / "broken.safetensors", replace(fast, metadata={"denoising_steps": "4 steps"}))
    for seed, expert in enumerate(("high_noise", "low_noise")):
        write_lora(tmp_path / f"pair_{expert}.safetensors", random_lora(5 + seed, *layers))
    write_lora(tmp_path / "accelerator_high_noise.safetensors", replace(fast, metadata=FOUR))
    return tmp_path


@pytest.fixture
def asked(models, work, monkeypatch, capsys) -> Callable[..., tuple[str, list[list[int]]]]:
    """What the test script says with these options, and the timesteps at which the model is asked for each video.

    Only with `answers` does the model answer, which takes long.
    """

    def run(flags: str, model: str = "one", answers: bool = False) -> tuple[str, list[list[int]]]:
        seen: list[list[int]] = []
        sample, transformers = test_wan_control_lora.sample, test_wan_control_lora.Transformers

        def watched(*given):
            seen.append([])
            return sample(*given)

        class Watched(transformers):
            def predict(self, latents, timestep, cond):
                seen[-1].append(round(timestep[0].item()))
                return super().predict(latents, timestep, cond) if answers else torch.zeros_like(latents)

        with monkeypatch.context() as patch:
            patch.setattr(test_wan_control_lora, "sample", watched)
            patch.setattr(test_wan_control_lora, "Transformers", Watched)
            base = f"--pretrained_model_name_or_path {models / model} {SIZE}"
            test_wan_control_lora.main(f"{flags} {base}".split())
        return capsys.readouterr().out, seen

    return run


def shifted(*steps: float, shift: float = 6.0) -> list[int]:
    return [round(1000 * shift * s / (1000 + (shift - 1) * s)) for s in steps]


def test_a_lora_that_states_its_steps_is_sampled_in_them_and_the_base_beside_it_as_ever(asked):
    said, (base, few) = asked("--lora_path fast.safetensors --compare")
    assert few == shifted(1000, 750, 500, 250) and len(base) == 2 * 50
    assert "fast.safetensors was distilled into 4 steps (1000 750 500 250) at shift 6" in said
    assert "5 frames, 4 steps of lcm, guidance 1, shift 6, seed 42" in said
    assert "\nwithout the LoRA: 50 steps of unipc, guidance 5, shift 5\n" in said


def test_an_accelerator_beside_a_lora_decides_too_and_options_decide_before_it(asked):
    both = "--lora_path style.safetensors --also_lora fast.safetensors:0.5"
    assert asked(both)[1] == [shifted(1000, 750, 500, 250)]
    assert asked(f"{both} --steps 2 --shift 3")[1] == [shifted(1000, 500, shift=3)]
    said, (timesteps,) = asked(f"{both} --solver euler --guidance 2")
    assert "4 steps of euler, guidance 2, shift 6" in said and len(timesteps) == 8


def test_accelerators_that_disagree_and_broken_ones_are_refused_by_name(asked):
    two = "--lora_path fast.safetensors --also_lora faster.safetensors"
    with pytest.raises(UserError, match=r"fast\.safetensors was .*faster\.safetensors was .*(.|\n)*--steps"):
        asked(two)
    assert asked(f"{two} --steps 3")[1] == [shifted(1000, 667, 334)]
    with pytest.raises(UserError, match=r"broken\.safetensors: the metadata denoising_steps is '4 steps'"):
        asked("--lora_path broken.safetensors")


def test_a_check_says_what_both_loras_change_and_shows_four_videos_beside_each_other(asked, work):
    flags = "--lora_path style.safetensors --also_lora fast.safetensors --check_lora"
    said, (base, lora, other, both) = asked(flags, answers=True)
    assert len(base) == len(lora) == 2 * 50 and other == both == shifted(1000, 750, 500, 250)
    assert re.search(r"block 0 +1 +0 +1 ", said) and re.search(r"other layers +0 +0 +1 ", said)
    assert "style.safetensors changes the weights 0.2" in said
    assert "5 frames, 4 steps of lcm, guidance 1, shift 6" in said and "\nbase: 50 steps of unipc" in said
    assert "states no steps" not in said
    (video,) = (work / "outputs" / "samples").glob("*.mp4")
    assert video.name == "style_check_seed42.mp4" and probe(video).width == 4 * 32
    sheet = np.asarray(Image.open(video.with_suffix(".png")))
    assert sheet.shape[1] == 4 * (CELL + GAP) + GAP
    columns = [sheet[40:, GAP + n * (CELL + GAP) :][:, :CELL].tobytes() for n in range(4)]
    assert len(set(columns)) == 4


def test_the_options_of_a_check_are_for_what_has_the_other_lora(asked):
    flags = "--also_lora plain.safetensors --check_lora --steps 2 --solver lcm --guidance 1 --shift 4"
    said, (base, lora, other, both) = asked(f"--lora_path style.safetensors {flags}")
    assert other == both == shifted(1000, 500, shift=4) and len(base) == len(lora) == 2 * 50
    assert "states no steps" not in said


def test_a_check_with_a_lora_that_states_no_steps_says_so(asked):
    said, videos = asked("--lora_path style.safetensors --also_lora plain.safetensors --check_lora")
    assert "note: the LoRA of --also_lora states no steps" in said and {len(each) for each in videos} == {100}


def test_a_check_of_loras_that_have_no_module_in_common_says_so(asked):
    said, _ = asked("--lora_path plain.safetensors --also_lora apart.safetensors --check_lora")
    assert "plain.safetensors and apart.safetensors change no weight in common" in said


def test_a_check_compares_the_loras_of_each_expert(asked):
    accelerator = "--also_lora accelerator_high_noise.safetensors"
    said, videos = asked(f"--lora_path pair.safetensors {accelerator} --check_lora", "two")
    assert "the high_noise expert\n" in said
    assert "the low_noise expert: not both LoRAs are for it, so there is nothing to compare" in said
    assert [len(each) for each in videos] == [80, 80, 4, 4]


def test_the_page_has_the_levels_and_the_step_at_which_experts_change():
    rows = re.findall(r"^\| ([\d ]+) \| (\d+) \| ([\d. ]+) \| (\d) \| (\d) \|$", read(ROOT / "docs/few_steps.md"), re.M)
    assert len(rows) == 4
    for steps, shift, levels, *changes in rows:
        found = listed_grid([float(step) for step in steps.split()], float(shift))
        assert levels == " ".join(f"{level:.3f}" for level in found)
        for change, name in zip(changes, ("wan2.2-t2v-A14B", "wan2.2-i2v-A14B"), strict=True):
            (boundary,) = FAMILIES[name].boundaries
            assert int(change) == sum(level >= boundary for level in found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--check_lora requires --also_lora"),
        ("--also_lora fast.safetensors plain.safetensors", "compares with one LoRA of --also_lora"),
        ("--also_lora fast.safetensors --compare", "leave out --compare"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused(asked, flags, message):
    with pytest.raises(UserError, match=message):
        asked(f"--lora_path style.safetensors --check_lora {flags}")
