"""What of a LoRA's metadata is for its user alone: the options of its run, and where its base model is.

LoRA files are given to others. They have neither where `--metadata full` does not ask for it, and files that earlier
versions wrote lose both where they are converted.
"""

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

from utils.adapters.provenance import FUSED_KEY, OPTIONS_KEY, read_records, to_metadata
from utils.setup.download import HUB_NAME
from utils.setup.model import BASE_MODEL

STANDARD, EVERYTHING = "standard", "full"  # what --metadata takes


def shareable(metadata: Mapping[str, str], source: Path) -> dict[str, str]:
    """The metadata without the options of the run, and with the name of the base model in place of its path.

    Which LoRA was fused is kept, where only the options say so.
    """
    kept = {key: value for key, value in metadata.items() if key != OPTIONS_KEY}
    if OPTIONS_KEY in metadata and FUSED_KEY not in metadata and (records := read_records(metadata, source)):
        kept |= to_metadata(records)
    name = metadata.get(BASE_MODEL, "")
    if name and not HUB_NAME.fullmatch(name):
        parts = (PureWindowsPath(part).name or part for part in name.split(" + "))  # knows both separators
        kept[BASE_MODEL] = " + ".join(parts)
    return kept
