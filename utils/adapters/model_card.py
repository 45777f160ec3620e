"""What a LoRA file says of itself to programs that list models: a name, a picture, its base, the words that call it.

    modelspec.*     ModelSpec 1.0 (github.com/Stability-AI/ModelSpec), read by ComfyUI's model library and SwarmUI
    ss_*            kohya's keys: ComfyUI LoRA Manager reads the base model and the tags, A1111 and Forge show the
                    output name
    trained_words   what Civitai calls the trigger

Sources: T2IModelHandler and T2IModelClassSorter of SwarmUI, whose architectures have one LoRA class for each width;
comfyModelStore of ComfyUI's frontend; lora_metadata and the base models in constants of ComfyUI LoRA Manager, which are
Civitai's names; network.py of A1111.

Captions and prompts are not in here, nor is any path.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from utils.adapters.pairs import FAMILY_KEY
from utils.common.checkpoint_names import Checkpoint
from utils.common.tensor_files import CONTENT_HASH
from wan.configs import Family

TITLE, THUMBNAIL = "modelspec.title", "modelspec.thumbnail"
TIMESTEPS = 1000  # of noise level 1
MANY = "{name}, mean of {count} checkpoints"

# SwarmUI's class of a LoRA by the width of its base: those of image-to-video models and of experts have none of their
# own. A 5B LoRA is recognised by this name alone.
_ARCHITECTURES = {
    1536: "wan-2_1-text2video-1_3b/lora",
    5120: "wan-2_1-text2video-14b/lora",
    3072: "wan-2_2-ti2v-5b/lora",
}
# Civitai's names of base models. It has none for first-and-last-frame and Fun models, which are given frames as these.
_BASES = {
    "wan2.1-t2v-1.3B": "Wan Video 1.3B t2v",
    "wan2.1-t2v-14B": "Wan Video 14B t2v",
    "wan2.1-i2v-14B-480P": "Wan Video 14B i2v 480p",
    "wan2.1-i2v-14B-720P": "Wan Video 14B i2v 720p",
    "wan2.1-flf2v-14B-720P": "Wan Video 14B i2v 720p",
    "wan2.1-fun-14B-InP": "Wan Video 14B i2v 480p",
    "wan2.2-t2v-A14B": "Wan Video 2.2 T2V-A14B",
    "wan2.2-i2v-A14B": "Wan Video 2.2 I2V-A14B",
    "wan2.2-fun-A14B-InP": "Wan Video 2.2 I2V-A14B",
    "wan2.2-ti2v-5B": "Wan Video 2.2 TI2V-5B",
}


@dataclass(frozen=True)
class ModelCard:
    """What the files of a run have in common.

    `base_model` names the base, of which the last part is shown. `samples` are the numbers of clips by the names of the
    dataset's folders. `trigger` holds words that call the LoRA, separated by commas, or nothing.
    """

    family: Family
    base_model: str
    size: tuple[int, int]  # (width, height) of the largest clips, in pixels
    samples: Mapping[str, int]
    trigger: str = ""

    @property
    def words(self) -> list[str]:
        """The trigger's words or phrases, each once."""
        return words_of(self.trigger)


def words_of(trigger: str) -> list[str]:
    """The words or phrases of a trigger, which are separated by commas, each once."""
    return list(dict.fromkeys(word.strip() for word in trigger.split(",") if word.strip()))


def unheard(trigger: str, captions: Iterable[str]) -> list[str]:
    """The words of a trigger that no caption holds, so that they are not trained."""
    together = "\n".join(captions).lower()
    return [word for word in words_of(trigger) if word.lower() not in together]


def model_card(card: ModelCard, file: Checkpoint, day: str = "", thumbnail: str = "") -> dict[str, str]:
    """The metadata of a file of the run, all but what its adapter says.

    `day` is a date in ISO 8601, `thumbnail` a data URI; each is left out where it is empty. The hash is that of the
    content, which `write_tensors` fills in.
    """
    family, words = card.family, ", ".join(card.words)
    expert = next((expert for expert in family.experts if expert.name == file.trainable), None)
    of_expert = "" if expert is None else f", {expert.name.replace('_', ' ')}"
    of_average = ", moving average" if file.average else ""
    optional = {
        "modelspec.date": day,
        "modelspec.trigger_phrase": words,
        "modelspec.timestep_range": "" if expert is None else ",".join(f"{TIMESTEPS * s:g}" for s in expert.sigmas),
        THUMBNAIL: thumbnail,
    }
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[family.shape.dim],
        "modelspec.implementation": f"https://github.com/Wan-Video/{family.name.split('-')[0].title()}",
        TITLE: f"{file.run_name}, step {file.step}{of_expert}{of_average}",
        "modelspec.description": f"A LoRA for {family.name}{of_expert}, trained for {file.step} steps",
        "modelspec.resolution": "x".join(map(str, card.size)),
        CONTENT_HASH: "",
        **{key: value for key, value in optional.items() if value},
        FAMILY_KEY: family.name,
        "ss_base_model_version": _BASES[family.name],
        "ss_sd_model_name": PurePath(card.base_model).name or family.name,
        "ss_output_name": PurePath(file.name).stem,
        **_trigger_tags(card),
    }


def network_facts(rank: int, alpha: float) -> dict[str, str]:
    """The metadata that states a LoRA's rank and alpha."""
    return {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}


def of_mean(metadata: Mapping[str, str], count: int) -> dict[str, str]:
    """The metadata of the mean of so many checkpoints, from that of the last one, whose picture does not show it."""
    kept = {key: value for key, value in metadata.items() if key != THUMBNAIL}
    return kept | ({TITLE: MANY.format(name=kept[TITLE], count=count)} if TITLE in kept else {})


def _trigger_tags(card: ModelCard) -> dict[str, str]:
    """The trigger as the tag of every sample; without one nothing, because other tags are captions."""
    if not card.words:
        return {}
    tags = {folder: dict.fromkeys(card.words, count) for folder, count in card.samples.items()}
    return {
        "ss_tag_frequency": json.dumps(tags),
        "trained_words": json.dumps(card.words),
    }
