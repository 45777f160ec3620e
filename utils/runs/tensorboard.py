"""TensorBoard's event files. Where they can no longer be written, the run continues without them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog:
    """Numbers and pictures of a run that starts at `step`; `say` reports once that no more will be written."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        # What was logged beyond the step that a run resumes from is purged: the run writes it again.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._say = say
        self._broken = False

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(lambda: self._writer.add_scalar(name, value, step))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._write(lambda: self._writer.add_image(name, np.asarray(image), step, dataformats="HWC"))

    def close(self) -> None:
        self._write(self._writer.close)

    def _write(self, write: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            write()
        except OSError as error:
            self._broken = True
            self._say(f"cannot write TensorBoard events, the run continues without them: {error}")
