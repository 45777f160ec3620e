"""What programs that list models show of a LoRA file, each by its own rules, from the bytes of the file alone.

Sources: comfyModelStore of ComfyUI's frontend; T2IModelHandler of SwarmUI; network.py and ui_edit_user_metadata.py of
A1111; lora_metadata.py, model_utils.py and file_utils.py of ComfyUI LoRA Manager.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

# What LoRA Manager takes for another model wherever it occurs in the name of the base.
OTHER_BASES = ("sd_1.5", "sd-v1-5", "sd-v2-1", "sdxl", "sd-v2", "flux1", "flux.1 d", "illustrious", "il", "pony")


@dataclass(frozen=True)
class Entry:
    """A line of a list; what a program does not show is empty."""

    title: str = ""
    base: str = ""
    words: tuple[str, ...] = ()
    picture: tuple[int, int] | None = None  # its size


def header_of(path: Path) -> tuple[dict[str, str], bytes]:
    """A file's metadata, and all that follows its header."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end]).get("__metadata__", {})
    assert all(isinstance(value, str) for value in metadata.values())
    return metadata, content[end:]


def comfyui(path: Path) -> Entry:
    metadata, _ = header_of(path)
    words = split(metadata.get("modelspec.trigger_phrase", ""))
    title, base = metadata.get("modelspec.title", ""), metadata.get("modelspec.architecture", "")
    return Entry(title, base, words, size_of(metadata.get("modelspec.thumbnail", "")))


def swarmui(path: Path) -> Entry:
    """Its picture has to be a data URI of at most 8 MB, and its resolution two numbers."""
    metadata, content = header_of(path)
    picture = metadata.get("modelspec.thumbnail", "")
    assert len(picture) <= 8 * 1024**2 and picture.startswith(("data:image/", ""))
    assert all(int(side) > 0 for side in metadata["modelspec.resolution"].split("x", 1))
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content).hexdigest()}"
    return comfyui(path)


def a1111(path: Path) -> Entry:
    metadata, _ = header_of(path)
    tags = json.loads(metadata.get("ss_tag_frequency", "{}"))
    counts = {tag: 0 for folder in tags.values() for tag in folder}
    for folder in tags.values():
        for tag, count in folder.items():
            counts[tag.strip()] += int(count)
    words = tuple(sorted(counts, key=lambda tag: -counts[tag]))
    return Entry(metadata.get("ss_output_name", path.stem), metadata.get("ss_sd_model_name", ""), words)


def lora_manager(path: Path) -> Entry:
    metadata, content = header_of(path)
    base = metadata.get("ss_base_model_version", "Unknown")
    assert not any(other in base.lower() for other in OTHER_BASES)
    stated = metadata.get("sshs_model_hash") or metadata.get("modelspec.hash_sha256", "")
    assert stated.removeprefix("0x")[:12].lower() == hashlib.sha256(content).hexdigest()[:12]
    tags = json.loads(metadata.get("ss_tag_frequency", "{}"))
    words = next(iter(tags.values()), {})
    return Entry(path.stem, base, tuple(sorted(words, key=words.get, reverse=True)))


def split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def size_of(picture: str) -> tuple[int, int] | None:
    """The size of a picture in a data URI; None for no picture."""
    if not picture:
        return None
    kind, _, content = picture.partition(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(BytesIO(base64.b64decode(content, validate=True)))
    image.load()
    return image.size
