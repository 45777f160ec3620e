"""Which controls, masks and start pictures belong to which clips, by their names, and whether they fit.

Names in NFC and NFD are the same. A name in another letter case belongs to a clip where nothing has the exact one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from utils.common.errors import UserError
from utils.data.folders import Rules
from utils.data.names import differs_in_case, same_name
from utils.media.description import ANIMATION, MediaInfo
from utils.media.probing import is_image

CONTROL, MASK, START = "control", "mask", "start picture"
# Rounding accounts for differences up to these shares between a clip and what belongs to it, and of an animation, whose
# delays many programs write in hundredths of a second, up to these seconds.
ASPECT_TOLERANCE, RATE_TOLERANCE, DELAY_TOLERANCE = 0.05, 0.02, 0.0101


@dataclass(frozen=True)
class Media:
    """What inspection found: `infos` of every readable file, and why a file is `unusable`, readable or not."""

    infos: dict[Path, MediaInfo]
    unusable: dict[Path, str]

    def is_still(self, path: Path) -> bool:
        """Whether it is a single picture; of a file that cannot be read, whether it is named like one."""
        info = self.infos.get(path)
        return is_image(path) if info is None else info.is_image


@dataclass(frozen=True)
class Pairing:
    """How controls, or masks, are matched with clips: by a suffix beside them, or by name in a folder of their own.

    What `is_optional` belongs to the clips that have it: a picture beside a video. A file of such a name without a
    video is a clip like any other.
    """

    name: str
    suffix: str
    folder: Path | None = None
    is_optional: bool = False

    def named(self, files: Sequence[Path]) -> list[Path]:
        """The files that have the suffix. Raises `UserError` for an empty one."""
        if not self.suffix:
            raise UserError(f"the {self.name} suffix is empty: give what a {self.name} is named by, like _{self.name}")
        return [path for path in files if same_name(path.stem).endswith(same_name(self.suffix))]

    def match(self, clips: Sequence[Path], others: Sequence[Path]) -> "Matches":
        """Which of the `others` are named like which clip: exactly, or else alike and like no other clip exactly."""
        suffix = "" if self.folder else self.suffix
        alike: dict[tuple[Path | None, str], list[Path]] = defaultdict(list)
        for other in others:
            alike[self._place(other), same_name(other.stem)].append(other)
        exact = {(self._place(clip), clip.stem + suffix) for clip in clips}
        found = {}
        for clip in clips:
            place, wanted = self._place(clip), clip.stem + suffix
            of_clip = alike.get((place, same_name(wanted)), [])
            same = [other for other in of_clip if other.stem == wanted]
            found[clip] = same or [other for other in of_clip if (place, other.stem) not in exact]
        return Matches(self, found)

    def _place(self, path: Path) -> Path | None:
        return None if self.folder else path.parent


@dataclass(frozen=True)
class Matches:
    """The files of one pairing by the clip that they are named like."""

    pairing: Pairing
    of: dict[Path, list[Path]]

    @cached_property
    def clips(self) -> dict[Path, list[Path]]:
        """The clips of each file that has any."""
        found = defaultdict(list)
        for clip, others in self.of.items():
            for other in others:
                found[other].append(clip)
        return dict(found)

    @property
    def respelled(self) -> dict[Path, Path]:
        """A clip of each file whose letter case differs from the clip's."""
        suffix = "" if self.pairing.folder else self.pairing.suffix
        pairs = ((other, clips[0]) for other, clips in self.clips.items())
        return {other: clip for other, clip in pairs if differs_in_case(other.stem, clip.stem + suffix)}

    def unmatched(self, others: Sequence[Path]) -> list[Path]:
        """Files beside the clips that belong to none of them. A folder of its own may also serve other datasets."""
        return [] if self.pairing.folder else [other for other in others if other not in self.clips]

    def problems(self, clip: Path, media: Media) -> list[str]:
        """Why there is not exactly one control (mask) that fits the clip and no other; nothing if there is."""
        name, others = self.pairing.name, self.of[clip]
        if not others:
            folder, suffix = self.pairing.folder, self.pairing.suffix
            expected = f"{clip.stem}.* in {folder}" if folder else f"{clip.stem}{suffix}.*"
            return [] if self.pairing.is_optional else [f"it has no {name} named {expected}"]
        if len(others) > 1:
            names = " and ".join(map(self._called, others))
            return [f"it has several {name}s, {names}: keep one"]
        (other,) = others
        rivals = [rival for rival in self.clips[other] if rival.stem != clip.stem]
        if rivals:
            return [f"its {name} {self._called(other)} may belong to {rivals[0].name} too: give each clip its own"]
        return [f"its {name} {self._called(other)}{reason}" for reason in self._misfits(clip, other, media)]

    def _called(self, other: Path) -> str:
        """The name of a file beside its clip; the path in a folder of controls or masks, where names may repeat."""
        folder = self.pairing.folder
        return other.relative_to(folder).as_posix() if folder else other.name

    def _misfits(self, clip: Path, other: Path, media: Media) -> list[str]:
        own, info = media.infos.get(clip), media.infos.get(other)
        if info is None or other in media.unusable:
            return [f": {media.unusable[other]}"]
        if own is None:
            return []
        if own.is_image and not info.is_image:
            return [" must be an image, like the file itself"]
        if self.pairing.name == CONTROL and info.is_image and not own.is_image:
            return [" must be a video, like the file itself"]
        return [f": {reason}" for reason in _mismatches(info, own)]


START_PICTURES = Pairing(START, "_first", is_optional=True)


def find_pairings(rules: Rules) -> list[Pairing]:
    """What a folder's clips must have: controls and masks, as far as the rules ask for them."""
    pairings = [Pairing(CONTROL, rules.control_suffix, rules.control_folder)] if rules.reads_control else []
    return pairings + ([Pairing(MASK, rules.mask_suffix, rules.mask_folder)] if rules.reads_mask else [])


def find_unasked(rules: Rules) -> list[Pairing]:
    """Controls and masks that may lie beside their clips, and which the rules do not ask for."""
    pairings = [] if rules.load_control else [Pairing(CONTROL, rules.control_suffix, is_optional=True)]
    pairings += [] if rules.load_mask else [Pairing(MASK, rules.mask_suffix, is_optional=True)]
    return [pairing for pairing in pairings if pairing.suffix]


def match_start_pictures(clips: Sequence[Path], files: Sequence[Path], media: Media) -> Matches:
    """The pictures among the files that are named as start pictures of videos among the clips."""
    pictures = [path for path in START_PICTURES.named(files) if media.is_still(path)]
    matches = START_PICTURES.match(clips, pictures)
    return Matches(START_PICTURES, {clip: [] if media.is_still(clip) else found for clip, found in matches.of.items()})


def _mismatches(other: MediaInfo, clip: MediaInfo) -> list[str]:
    """Why the frames of a control or mask cannot correspond to the clip's."""
    reasons = []
    if abs(other.width * clip.height / (other.height * clip.width) - 1) > ASPECT_TOLERANCE:
        sizes = f"{other.width}x{other.height}", f"{clip.width}x{clip.height}"
        reasons.append("its aspect ratio differs: {} and {}".format(*sizes))
    if other.fps and clip.fps and not _same_rate(other, clip):
        reasons.append(f"it has {other.fps:.4g} frames per second, not {clip.fps:.4g}: frames must correspond")
    return reasons


def _same_rate(other: MediaInfo, clip: MediaInfo) -> bool:
    assert other.fps and clip.fps
    if ANIMATION in (other.kind, clip.kind) and abs(1 / other.fps - 1 / clip.fps) <= DELAY_TOLERANCE:
        return True
    return abs(other.fps / clip.fps - 1) <= RATE_TOLERANCE
