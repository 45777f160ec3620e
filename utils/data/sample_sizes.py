"""Sizes of samples as VideoX-Fun's guides name them: from a smallest to a largest side, and frames by pixels.

Source: its guide to distilled LoRAs of Wan, whose examples are tests. Its code differs: a video of 49 frames at 512
gets 13 at 1024 there, which is more than the budget.
"""

from dataclasses import dataclass

from utils.common.errors import UserError
from utils.common.options import option
from utils.data.buckets import SIZE_STEP

STEP = 128  # pixels between the sides that are drawn
LEAST_ADAPTED = 512  # the smallest side of --random_hw_adapt, unless that of videos is smaller


@dataclass(frozen=True)
class SampleSizes:
    """sizes by VideoX-Fun's names, in place of --base_res and --token_limit (also for each folder)"""

    video_sample_size: int | None = option(
        None, "side in pixels of a square of a video's area; needs --max_frames", minimum=SIZE_STEP
    )
    image_sample_size: int | None = option(
        None,
        "the same of an image (default: that of videos)",
        minimum=SIZE_STEP,
        requires="video_sample_size",
    )
    random_hw_adapt: bool = option(
        False,
        f"draw a side per sample, in steps of {STEP}: from {LEAST_ADAPTED}, or the size of videos if that is smaller, "
        "up to the size of videos, or of images",
        requires="video_sample_size",
    )
    training_with_video_token_length: bool = option(
        False,
        "draw a side per sample from the size of videos up to that of images; a larger one has fewer frames",
        requires="token_sample_size",
    )
    token_sample_size: int | None = option(
        None,
        "the largest side at which a video has all of --max_frames; beyond it the pixels stay the same",
        minimum=SIZE_STEP,
        requires="training_with_video_token_length",
    )

    @property
    def has_sizes(self) -> bool:
        """Whether samples have these sizes, and not those of --base_res."""
        return self.video_sample_size is not None

    def sample_sides(self, is_image: bool) -> tuple[int, ...]:
        """The sides in pixels of the squares whose area a clip may have, ascending. Only where there are sizes."""
        low, high = self._range(is_image)
        return (*range(low, high, STEP), high)

    def frames_of_area(self, area: int, most: int, step: int) -> int:
        """The most frames, a multiple of `step` plus 1, of a video whose frames have so many pixels; `most` at most."""
        if not self.training_with_video_token_length or self.token_sample_size is None:
            return most
        frames = min(most, most * self.token_sample_size**2 // area)
        return (frames - 1) // step * step + 1

    def check_sizes(self, max_frames: int) -> None:
        """Raises UserError for sizes that no sample can have, and for options that would be ignored."""
        given = {"video_sample_size": self.video_sample_size, "image_sample_size": self.image_sample_size}
        given["token_sample_size"] = self.token_sample_size
        flags = {name: True for name in ("random_hw_adapt", "training_with_video_token_length") if getattr(self, name)}
        if not self.has_sizes:
            for name in [name for name, side in (given | flags).items() if side]:
                raise UserError(f"--{name} requires --video_sample_size")
            return
        if self.training_with_video_token_length != (self.token_sample_size is not None):
            raise UserError("--training_with_video_token_length and --token_sample_size need each other")
        for name, side in given.items():
            if side is not None and side % SIZE_STEP:
                below = side // SIZE_STEP * SIZE_STEP
                raise UserError(f"--{name} {side} is not a multiple of {SIZE_STEP}: try {below}")
        if not max_frames:
            raise UserError("--video_sample_size needs --video_sample_n_frames: the most frames of a video")
        low, high = self._range(is_image=True)
        if low > high:
            raise UserError(f"--image_sample_size {high} is below {low}, the smallest side of images here: raise it")
        if self.token_sample_size is not None and max_frames * self.token_sample_size**2 < high**2:
            fewer = f"--token_sample_size {self.token_sample_size} leaves no frame at {high}x{high}"
            raise UserError(f"{fewer}: raise it, or lower --image_sample_size")

    def _range(self, is_image: bool) -> tuple[int, int]:
        """The smallest and the largest side."""
        video = self.video_sample_size or 0
        image = self.image_sample_size or video
        largest = image if is_image else video
        if self.training_with_video_token_length:
            return video, image
        return min(video, LEAST_ADAPTED) if self.random_hw_adapt else largest, largest
