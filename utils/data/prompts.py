"""Clips without pixels: prompts, and images that stand for videos.

A student that starts from its own samples needs no video, only what it is conditioned on, a size and a length. So a
prompt is a source whose file is the list that it stands in, and an image one with as many frames as the video that
begins with it. Plans, tables and fingerprints treat both as clips.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from utils.common.errors import UserError
from utils.common.options import option
from utils.data.buckets import ASPECTS, round_up_frames
from utils.data.caption_files import UnusableError, read_text, split_lines
from utils.data.folders import DatasetOptions, Rules, check_ignored
from utils.data.scan import Problem, Scan, Source
from utils.media.description import MediaInfo
from wan.configs import Family

NEEDED = "--few_step with --distill_input rollout"
# The rules that prompts follow; all others are about clips.
_RULES = (
    *("base_res", "buckets", "min_ar", "max_ar", "max_frames", "random_frame_length", "repeats"),
    *("caption_prefix", "caption_dropout"),
)
# What only a folder of clips has.
_OF_FOLDERS = ("dataset", "dataset_config", "skip_bad_files", "decode_check")


@dataclass(frozen=True)
class PromptOptions:
    """prompts alone"""

    prompts: Path | None = option(
        None, f".txt file with one prompt per line, instead of clips: for {NEEDED}", affects_training=False
    )
    prompt_shape: str = option("16:9", "shape of the videos of --prompts", choices=ASPECTS, requires="prompts")


def check_prompts(
    options: PromptOptions, dataset: DatasetOptions, rules: Rules, few_step: bool, rolls_out: bool
) -> None:
    """Raises UserError where prompts are given to a run that needs clips, or beside what would be ignored.

    `few_step` says whether the run distils a student, `rolls_out` whether that starts from its own samples.
    """
    if options.prompts is None:
        return
    if not (few_step and rolls_out):
        raise UserError(f"--prompts requires {NEEDED}: everything else is trained on clips, see --dataset")
    for name in _OF_FOLDERS:
        if getattr(dataset, name) != getattr(DatasetOptions, name):
            raise UserError(f"--{name} has no effect with --prompts: give one of them")
    for spec in fields(Rules):
        if spec.name not in _RULES and getattr(rules, spec.name) != spec.default:
            raise UserError(f"--{spec.name} has no effect with --prompts: there are no clips")
    check_ignored(rules, _RULES)


def prompt_sources(options: PromptOptions, rules: Rules, family: Family) -> list[Source]:
    """A source for each line of --prompts: a video of its shape with `--max_frames` frames, or those of the family.

    The folder of such a source is the list itself, which is a run's dataset. Raises UserError as `read_prompt_list`
    does, and for a model that is always given frames.
    """
    path = options.prompts
    if path is None:
        raise ValueError("no prompts are given")
    if family.given_as == "channels":
        has_them = "videos" if -1 in family.given else "pictures"
        raise UserError(
            "--prompts: this model is given frames of every video, and a prompt has none:\n"
            f"give a folder of {has_them} with captions instead, with --dataset"
        )
    width, height = map(int, options.prompt_shape.split(":"))
    frames = video_frames(rules, family)
    info = MediaInfo(width, height, frames, float(family.fps))
    rules = replace(_from_the_start(rules), enlarge=True)  # the shape counts, at any size
    prompts = read_prompt_list(path)
    return [Source(path, (rules.caption_prefix + prompt,), info, range(frames), path, rules) for prompt in prompts]


def read_prompt_list(path: Path) -> list[str]:
    """The lines of a .txt file, in order, without those that show nothing.

    Raises UserError for a file of another kind, one that is missing or not UTF-8, and one without a prompt.
    """
    if path.suffix.lower() != ".txt":
        raise UserError(f"--prompts {path} is not a .txt file with one prompt per line")
    try:
        text = read_text(path)
    except UnusableError as error:
        raise UserError(f"--prompts: {path} {error}") from None
    prompts = list(split_lines(text, per_line=True))
    if not prompts:
        raise UserError(f"--prompts: {path} holds no prompt: write one per line")
    return prompts


def stand_for_videos(found: Scan, family: Family) -> Scan:
    """The scan, in which an image stands for a video of its shape, with `--max_frames` frames or those of the family.

    A model that is given the first frame of a video is given the image. One that is given the last frame too cannot use
    images: they are problems. Videos stay what they are.
    """
    kept, problems = [], list(found.problems)
    for source in found.sources:
        if source.info.is_image and -1 in family.given:
            reason = "an image has no last frame, which this model is given too: only videos can be used"
            problems.append(Problem(source.path, reason, source.folder))
        else:
            kept.append(_as_video(source, family) if source.info.is_image else source)
    return replace(found, sources=kept, problems=problems)


def _as_video(image: Source, family: Family) -> Source:
    frames = range(video_frames(image.rules, family))
    return replace(image, frame_indices=frames, rules=_from_the_start(image.rules))


def _from_the_start(rules: Rules) -> Rules:
    """These rules for a video that is not there: a sample takes its beginning, as any other part would be the same."""
    return replace(rules, frame_sampling="head", max_frame_stride=1)


def video_frames(rules: Rules, family: Family) -> int:
    """How many frames a video without pixels has, before the token limit: as many as the model takes at once."""
    return round_up_frames(rules.max_frames or family.frames, family.grid)
