"""What LoRA files say of themselves to programs that list models."""

import json

import pytest
import torch

from tests.model_lists import Entry, a1111, comfyui, header_of, lora_manager, swarmui
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.adapters.model_card import ModelCard, model_card, network_facts, of_mean, unheard
from utils.common.checkpoint_names import Checkpoint
from utils.media.thumbnail import thumbnail
from wan.configs import FAMILIES

A14B = FAMILIES["wan2.2-t2v-A14B"]
CARD = ModelCard(A14B, "/models/Wan2.2-T2V-A14B", (832, 480), {"foxes": 12, "stills": 3}, "ohwx fox, snow,ohwx fox,")
HIGH = Checkpoint(100, "high_noise", run_name="fox")


@pytest.fixture
def written(tmp_path):
    """A function that writes a small LoRA with this metadata under the name of a checkpoint."""

    def write(file: Checkpoint, metadata: dict[str, str]):
        pair = LoraPair(torch.ones(2, 4), torch.ones(6, 2), 2.0)
        write_lora(tmp_path / file.name, LoraFile({"blocks.0.self_attn.q": pair}, metadata=metadata))
        return tmp_path / file.name

    return write


def test_programs_that_list_models_show_a_name_a_base_a_picture_and_the_trigger(written):
    picture = thumbnail(torch.zeros(5, 3, 480, 832, dtype=torch.uint8))
    path = written(HIGH, model_card(CARD, HIGH, "2026-01-02", picture))
    words = ("ohwx fox", "snow")
    listed = Entry("fox, step 100, high noise", "wan-2_1-text2video-14b/lora", words, (256, 148))
    assert comfyui(path) == swarmui(path) == listed
    assert a1111(path) == Entry("fox-00000100_high_noise", "Wan2.2-T2V-A14B", words)
    assert lora_manager(path) == Entry("fox-00000100_high_noise", "Wan Video 2.2 T2V-A14B", words)
    metadata, _ = header_of(path)
    assert metadata["modelspec.date"] == "2026-01-02" and metadata["modelspec.resolution"] == "832x480"
    assert json.loads(metadata["ss_tag_frequency"])["foxes"] == {"ohwx fox": 12, "snow": 12}
    assert json.loads(metadata["trained_words"]) == ["ohwx fox", "snow"]
    required = {"sai_model_spec", "architecture", "implementation", "title"}
    assert all(metadata[f"modelspec.{name}"] for name in required)
    assert metadata["modelspec.implementation"] == "https://github.com/Wan-Video/Wan2.2"


def test_what_is_not_known_is_left_out():
    card = ModelCard(FAMILIES["wan2.1-t2v-1.3B"], ".", (64, 64), {"foxes": 1})
    said = model_card(card, Checkpoint(7, "lora", average=True))
    assert said["modelspec.title"] == "wan-lora, step 7, moving average"
    assert said["ss_sd_model_name"] == "wan2.1-t2v-1.3B"
    absent = ("date", "trigger_phrase", "timestep_range", "thumbnail")
    assert not {f"modelspec.{name}" for name in absent} & said.keys()
    assert not {"ss_tag_frequency", "trained_words"} & said.keys()


def test_each_expert_states_the_timesteps_that_it_was_trained_at():
    low = Checkpoint(100, "low_noise", run_name="fox")
    ranges = [model_card(CARD, file)["modelspec.timestep_range"] for file in (HIGH, low)]
    assert ranges == ["875,1000", "0,875"]
    assert model_card(CARD, low)["modelspec.title"] == "fox, step 100, low noise"


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_a_class_and_a_base_that_programs_know(name):
    said = model_card(ModelCard(FAMILIES[name], name, (64, 64), {}), Checkpoint(1, "lora"))
    size = "1_3b" if "1.3B" in name else "5b" if "5B" in name else "14b"
    assert said["modelspec.architecture"].split("-")[-1] == f"{size}/lora"
    base = said["ss_base_model_version"]
    assert base.startswith("Wan Video") and (" 2.2 " in base) == name.startswith("wan2.2")
    task = "TI2V" if "ti2v" in name else "T2V" if "t2v" in name else "I2V"
    assert task in base.upper() and said["family"] == name


def test_words_in_any_script_are_shown(written):
    card = ModelCard(A14B, "Wan", (64, 64), {"fuchs": 2}, "füchsin 狐")
    assert lora_manager(written(HIGH, model_card(card, HIGH))).words == ("füchsin 狐",)


def test_rank_and_alpha_are_stated_as_numbers():
    assert network_facts(16, 8.0) == {"ss_network_dim": "16", "ss_network_alpha": "8"}
    assert network_facts(4, 0.5)["ss_network_alpha"] == "0.5"


def test_the_mean_of_checkpoints_is_called_so_and_shows_no_picture():
    said = model_card(CARD, HIGH, "2026-01-02", "data:image/jpeg;base64,AAAA")
    mean = of_mean(said, 5)
    assert mean["modelspec.title"] == "fox, step 100, high noise, mean of 5 checkpoints"
    assert said.keys() - mean.keys() == {"modelspec.thumbnail"}
    assert of_mean({"steps": "6"}, 2) == {"steps": "6"}


def test_words_that_no_caption_holds_are_named():
    assert unheard("ohwx fox, snow", ["an OHWX fox in the sun", "two cats"]) == ["snow"]
    assert unheard("ohwx fox, snow", ["ohwx", "fox"]) == ["ohwx fox", "snow"]
    assert unheard("ohwx fox, snow", ["ohwx fox, snow"]) == [] == unheard("", ["a fox"])
