"""Files here have names alone, and descriptions where they matter."""

import unicodedata
from pathlib import Path

import pytest

from utils.common.errors import UserError
from utils.data.folders import Rules
from utils.data.pairing import MASK, Media, Pairing, find_pairings, find_unasked, match_start_pictures
from utils.media.description import ANIMATION, IMAGE, MediaInfo

MASKS = Pairing(MASK, "_mask")
IN_FOLDER = Pairing(MASK, "_mask", Path("masks"))
VIDEO_INFO = MediaInfo(64, 48, 9, 16.0)
STILL, MOVING = MediaInfo(64, 48, 1, None, IMAGE), MediaInfo(64, 48, 9, 16.0, ANIMATION)
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def paths(text: str) -> list[Path]:
    return [Path(name) for name in text.split()]


def matched(clips: str, others: str, pairing: Pairing = MASKS) -> dict[str, str]:
    found = pairing.match(paths(clips), paths(others)).of
    return {str(clip): " ".join(map(str, own)) for clip, own in found.items()}


@pytest.mark.parametrize(
    ("clips", "others", "expected"),
    [
        ("clip.mp4", "Clip_MASK.PNG", {"clip.mp4": "Clip_MASK.PNG"}),
        ("clip.mp4", "Clip_mask.png clip_mask.gif", {"clip.mp4": "clip_mask.gif"}),
        ("clip.mp4", "Clip_mask.png CLIP_mask.png", {"clip.mp4": "Clip_mask.png CLIP_mask.png"}),
        (f"{NFC}.mp4", f"{NFD}_mask.png", {f"{NFC}.mp4": f"{NFD}_mask.png"}),
        (f"{NFD.upper()}.mp4", f"{NFC}_mask.png", {f"{NFD.upper()}.mp4": f"{NFC}_mask.png"}),
        ("a.mp4 A.mp4", "a_mask.png A_mask.png", {"a.mp4": "a_mask.png", "A.mp4": "A_mask.png"}),
        ("a.mp4 A.mp4", "a_mask.png", {"a.mp4": "a_mask.png", "A.mp4": ""}),
        ("a.mp4 A.mp4", "a_MASK.png", {"a.mp4": "a_MASK.png", "A.mp4": "a_MASK.png"}),
        ("x/a.mp4 y/a.mp4", "x/A_mask.png", {"x/a.mp4": "x/A_mask.png", "y/a.mp4": ""}),
        ("stra\u00dfe.mp4", "STRASSE_mask.png", {"stra\u00dfe.mp4": "STRASSE_mask.png"}),
        ("\udcba\udcfc.mp4", "\udcba\udcfc_MASK.png", {"\udcba\udcfc.mp4": "\udcba\udcfc_MASK.png"}),
        ("clip.mp4", "_mask.png", {"clip.mp4": ""}),
    ],
)
def test_names_match_in_any_letter_case_and_form_the_exact_ones_first(clips, others, expected):
    assert matched(clips, others) == expected


def test_in_a_folder_of_their_own_names_are_the_same_as_their_clips():
    assert matched("x/a.mp4 y/B.mp4 c_mask.mp4", "masks/A.png masks/z/b.png masks/c.png", IN_FOLDER) == {
        **{"x/a.mp4": "masks/A.png", "y/B.mp4": "masks/z/b.png"},
        "c_mask.mp4": "",
    }
    assert matched("x/a.mp4 y/A.mp4", "masks/a.png", IN_FOLDER) == {"x/a.mp4": "masks/a.png", "y/A.mp4": ""}


def test_in_a_folder_of_their_own_files_are_called_by_their_paths():
    (clip,), others = paths("x/a.mp4"), paths("masks/a.png masks/z/a.png")
    media = Media({clip: VIDEO_INFO}, dict.fromkeys(others, "empty"))
    assert IN_FOLDER.match([clip], others).problems(clip, media) == [
        "it has several masks, a.png and z/a.png: keep one"
    ]
    assert IN_FOLDER.match([clip], others[1:]).problems(clip, media) == ["its mask z/a.png: empty"]


def test_only_what_the_rules_do_not_load_from_beside_the_clips_is_unasked():
    def named(**rules) -> list[tuple[str, str]]:
        return [(pairing.name, pairing.suffix) for pairing in find_unasked(Rules(**rules))]

    assert named() == [("control", "_control"), ("mask", "_mask")]
    assert named(load_control=True) == named(control_suffix="") == [("mask", "_mask")]
    assert named(load_mask=True, control_suffix="-c") == [("control", "-c")]
    assert named(mask_folder=Path("masks"), load_control=True) == [("mask", "_mask")]


def test_only_letter_case_is_worth_a_line():
    clips, others = paths(f"a.mp4 B.mp4 {NFC}.mp4"), paths(f"A_mask.png B_mask.png {NFD}_mask.png")
    assert MASKS.match(clips, others).respelled == {Path("A_mask.png"): Path("a.mp4")}
    assert IN_FOLDER.match(paths("a.mp4"), paths("masks/A.png")).respelled == {Path("masks/A.png"): Path("a.mp4")}


def test_a_suffix_is_found_in_any_letter_case_and_an_empty_one_is_refused():
    assert MASKS.named(paths("a.mp4 a_Mask.mp4 _MASK.png mask.png")) == paths("a_Mask.mp4 _MASK.png")
    with pytest.raises(UserError, match="the mask suffix is empty"):
        Pairing(MASK, "").named([])


def test_files_that_match_no_clip_are_reported_beside_the_clips_alone():
    others = paths("a_mask.png A_mask.png _mask.png")
    assert MASKS.match(paths("a.mp4"), others).unmatched(others) == paths("A_mask.png _mask.png")
    assert IN_FOLDER.match(paths("a.mp4"), others).unmatched(others) == []


def problems(clip: MediaInfo | None, *others: tuple[str, MediaInfo | str], rival: str = "", **rules) -> list[str]:
    (pairing,) = find_pairings(Rules(**(rules or {"load_mask": True})))
    media = Media({Path("a.mp4"): clip} if clip else {}, {})
    for name, found in others:
        if isinstance(found, str):
            media.unusable[Path(name)] = found
        else:
            media.infos[Path(name)] = found
    matches = pairing.match(paths(f"a.mp4 {rival}"), [Path(name) for name, _ in others])
    return matches.problems(Path("a.mp4"), media)


def test_a_mask_or_control_must_be_one_and_fit():
    assert problems(VIDEO_INFO, ("a_mask.png", STILL)) == problems(VIDEO_INFO, ("a_mask.gif", MOVING)) == []
    assert problems(VIDEO_INFO) == ["it has no mask named a_mask.*"]
    assert problems(VIDEO_INFO, mask_folder=Path("m")) == ["it has no mask named a.* in m"]
    assert problems(VIDEO_INFO, ("a_mask.png", STILL), ("a_mask.gif", MOVING)) == [
        "it has several masks, a_mask.png and a_mask.gif: keep one"
    ]
    assert problems(VIDEO_INFO, ("a_MASK.png", STILL), rival="A.mp4") == [
        "its mask a_MASK.png may belong to A.mp4 too: give each clip its own"
    ]
    assert problems(STILL, ("a_mask.webp", MOVING)) == ["its mask a_mask.webp must be an image, like the file itself"]
    assert problems(VIDEO_INFO, ("a_mask.png", "it is empty")) == ["its mask a_mask.png: it is empty"]
    assert problems(None, ("a_mask.png", STILL)) == []
    controls = {"load_control": True}
    assert problems(MOVING, ("a_control.gif", MOVING), **controls) == []
    reason = "its control a_control.png must be a video, like the file itself"
    assert problems(MOVING, ("a_control.png", STILL), **controls) == [reason]


def test_sizes_and_rates_must_agree_but_for_rounding():
    reason = "its mask a_mask.mp4: it has 17 frames per second, not 16: frames must correspond"
    assert problems(VIDEO_INFO, ("a_mask.mp4", MediaInfo(64, 48, 9, 17.0))) == [reason]
    for delay, fits in ((0.06, True), (0.07, True), (0.05, False)):  # a GIF counts hundredths of a second
        found = problems(VIDEO_INFO, ("a_mask.gif", MediaInfo(64, 48, 9, 1 / delay, ANIMATION)))
        assert (found == []) == fits, delay
    assert problems(VIDEO_INFO, ("a_mask.mp4", MediaInfo(128, 97, 9, 16.1))) == []
    assert problems(VIDEO_INFO, ("a_mask.mp4", MediaInfo(64, 64, 9, 16.0))) == [
        "its mask a_mask.mp4: its aspect ratio differs: 64x64 and 64x48"
    ]


def starts(unreadable: str = "", **infos: MediaInfo) -> dict[str, str]:
    """By clip: the start picture. Dots in names are written as two underscores."""
    described = {Path(name.replace("__", ".")): info for name, info in infos.items()}
    files = [*described, *paths(unreadable)]
    found = match_start_pictures(files, files, Media(described, {}))
    return {str(clip): " ".join(map(str, own)) for clip, own in found.of.items() if own}


def test_a_start_picture_is_a_still_of_what_moves_whatever_the_suffix():
    assert starts(a__webp=MOVING, a_first__png=STILL) == {"a.webp": "a_first.png"}
    assert starts(a__webp=STILL, a_first__png=STILL) == {}
    assert starts(a__mp4=VIDEO_INFO, a_first__webp=MOVING) == {}
    assert starts(a__mp4=VIDEO_INFO, A_FIRST__PNG=STILL) == {"a.mp4": "A_FIRST.PNG"}
    assert starts(a__mp4=VIDEO_INFO, A__png=STILL, A_first__jpg=STILL) == {}
    assert starts("a.mp4 a_first.png") == {"a.mp4": "a_first.png"}
    assert starts("a.webp", a_first__png=STILL) == {}
