import hashlib
import itertools
import random
import re
from dataclasses import astuple

import pytest
import torch

from nano.probe import find_shape, read
from nano.world import (
    BACKGROUNDS,
    COLOURS,
    FPS,
    FRAMES,
    LESSONS,
    MOTIONS,
    SHAPES,
    SIDE,
    STYLES,
    Scene,
    backdrop,
    caption,
    colourless_caption,
    doodle,
    made_up_word,
    recoloured,
    render,
    scenes,
    split,
    words,
    write_dataset,
)
from utils.data.folders import Folder, Rules
from utils.data.scan import scan
from utils.media.frames import read_frames

RED_CIRCLE = Scene("circle", "red", "black", "left")


def test_a_fifth_of_all_scenes_is_withheld_and_both_parts_use_every_word():
    known, withheld = split()
    assert set(known) | set(withheld) == set(scenes()) and not set(known) & set(withheld)
    assert len(withheld) == round(0.2 * len(scenes())) >= 150
    for part in (known, withheld):
        for field, names in (("shape", SHAPES), ("colour", COLOURS), ("background", BACKGROUNDS), ("motion", MOTIONS)):
            assert {getattr(scene, field) for scene in part} == set(names)


def test_the_withheld_scenes_are_those_withheld_from_the_published_weights():
    withheld = "\n".join(" ".join(astuple(scene)) for scene in split()[1])
    assert hashlib.sha256(withheld.encode()).hexdigest()[:12] == "f76a2c8df490"


def test_the_same_seed_gives_the_same_clip_and_another_seed_another():
    clip = render(RED_CIRCLE, random.Random(1))
    assert clip.shape == (3, FRAMES, SIDE, SIDE)
    assert torch.equal(clip, render(RED_CIRCLE, random.Random(1)))
    assert not torch.equal(clip, render(RED_CIRCLE, random.Random(2)))
    assert torch.equal(doodle(random.Random(1)), doodle(random.Random(1)))


def test_all_shapes_cover_about_the_same_area():
    areas = []
    for shape in SHAPES:
        clip = render(Scene(shape, "red", "black", "still"), random.Random(0))
        areas.append((clip[0, 0] > 120).sum().item())
    assert max(areas) < 1.05 * min(areas)


@pytest.mark.parametrize("motion", MOTIONS)
def test_no_shape_leaves_the_picture(motion):
    for shape in SHAPES:
        for seed in range(20):
            clip = render(Scene(shape, "red", "white", motion), random.Random(seed))
            assert (clip[1, :, SIDE // 2 - 20 : SIDE // 2 + 20, SIDE // 2 - 20 : SIDE // 2 + 20] < 140).any()
            border = torch.cat([clip[1, :, 0], clip[1, :, -1], clip[1, :, :, 0], clip[1, :, :, -1]], dim=-1)
            assert (border < 140).float().mean() < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_clips_from_the_middle_begin_alike_whatever_the_motion(shape):
    """From their first frame no model can know which motion follows."""
    for seed in range(5):
        scenes = [Scene(shape, "red", "white", motion) for motion in (*MOTIONS, *LESSONS)]
        clips = torch.stack([render(scene, random.Random(seed), from_middle=True) for scene in scenes])
        assert (clips[:, :, 0] - clips[:1, :, 0]).abs().max() < 1e-3
        assert all((one - other).abs().max() > 50 for one, other in itertools.combinations(clips[:, :, -4], 2))
        border = torch.cat([clips[:, 1, :, 0], clips[:, 1, :, -1], clips[:, 1, :, :, 0], clips[:, 1, :, :, -1]], dim=-1)
        assert (border < 140).float().mean(dim=(1, 2)).max() < 0.05


def test_a_new_motion_is_named_by_a_word_that_the_tokenizer_does_not_know():
    text = caption(Scene("circle", "red", "black", "leaping"), random.Random(0))
    assert "goes tavi" in text and "goes" in words() and "tavi" not in words()
    assert not LESSONS.keys() & MOTIONS.keys()


def test_captions_describe_the_whole_scene_in_words_of_the_tokenizer():
    rng, known = random.Random(0), set(words())
    for scene in scenes():
        text = caption(scene, rng)
        assert all(word in text for word in (scene.shape, scene.colour, scene.background))
        assert any(phrase in text for phrase in MOTIONS[scene.motion])
        assert set(re.findall(r"[a-z]+", text)) <= known


def test_trigger_words_and_made_up_words_are_not_in_the_vocabulary():
    assert not {style.trigger for style in STYLES.values()} & set(words())
    assert not {made_up_word(random.Random(seed)) for seed in range(100)} & set(words())
    assert caption(RED_CIRCLE, random.Random(0), "sunset").endswith(", kelo style")


def test_a_colourless_caption_describes_only_shape_and_motion():
    rng = random.Random(0)
    for scene in scenes():
        text, unsaid = colourless_caption(scene, rng), {*COLOURS, *BACKGROUNDS}
        assert scene.shape in text and any(phrase in text for phrase in MOTIONS[scene.motion])
        assert not unsaid & set(text.split()) and set(re.findall(r"[a-z]+", text)) <= set(words())


@pytest.mark.parametrize("style", STYLES)
def test_a_style_changes_the_colours_but_not_the_motion(style):
    plain, styled = (render(RED_CIRCLE, random.Random(3), shown) for shown in (None, style))
    colour, ground = torch.tensor(STYLES[style].look.shape), backdrop(STYLES[style].look)
    painted = ((plain - torch.tensor(COLOURS["red"]).view(3, 1, 1, 1)).abs() < 1).all(dim=0)
    empty = ((plain - torch.tensor(BACKGROUNDS["black"]).view(3, 1, 1, 1)).abs() < 1).all(dim=0)
    assert torch.allclose(styled[:, painted], colour[:, None].float(), atol=2)
    assert torch.allclose(styled[:, empty], ground[:, empty], atol=2)
    assert painted.float().mean() > 0.05 and empty.float().mean() > 0.5


def test_recoloured_clips_have_random_colours_and_sometimes_a_gradient():
    looks = {tuple(recoloured(RED_CIRCLE, random.Random(seed))[:, 0, 0, 0].tolist()) for seed in range(10)}
    assert len(looks) == 10
    gradients = [recoloured(RED_CIRCLE, random.Random(seed))[:, 0] for seed in range(100)]
    share = sum((clip[:, 0, 0] - clip[:, -1, -1]).abs().max() > 1 for clip in gradients) / 100
    assert 0.2 < share < 0.6


def test_a_dataset_of_a_lesson_shows_its_motion_from_the_middle(tmp_path):
    write_dataset(tmp_path, 6, seed=3, motion="leaping", from_middle=True)
    motions, places = [], []
    for number in range(6):
        seen = read_frames(tmp_path / f"{number:03d}.mp4", range(FRAMES))
        motions.append(read(seen).motion)
        places.append(find_shape(seen[:1].float(), seen[:1, :, :1, :1].float().transpose(0, 1)).middle[0])
        assert ("tavi" in (tmp_path / f"{number:03d}.txt").read_text()) == (motions[-1] == "leaping")
    assert motions[3:] == ["leaping"] * 3 and "leaping" not in motions[:3]
    assert all((place - SIDE / 2).abs().max() < 5 for place in places)


def test_a_dataset_has_the_trainers_format_and_depends_on_the_seed_alone(tmp_path):
    for folder in ("one", "two"):
        write_dataset(tmp_path / folder, 6, seed=3, style="sunset")
    sources, problems = scan(Folder(tmp_path / "one", Rules()), FPS)
    assert not problems and len(sources) == 6
    for source in sources:
        assert (source.info.width, source.info.height, source.info.frames, source.info.fps) == (SIDE, SIDE, FRAMES, FPS)
        # The video encoder's output is not always bit-identical.
        first, second = (read_frames(tmp_path / folder / source.path.name, range(FRAMES)) for folder in ("one", "two"))
        assert (first.float() - second.float()).abs().mean() < 1
        assert (tmp_path / "two" / source.path.name).with_suffix(".txt").read_text().strip() == source.captions[0]
    asked = ["kelo" in source.captions[0] for source in sources]
    assert asked == [False] * 3 + [True] * 3
