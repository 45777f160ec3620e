"""TensorBoard shows what was logged; a disk that fills up does not end a run."""

import itertools

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import scalars
from utils.runs.tensorboard import TensorBoardLog


def test_numbers_and_pictures_are_logged(tmp_path):
    log = TensorBoardLog(tmp_path, 0, print)
    log.scalar("loss", 0.5, 3)
    log.image("samples", Image.new("RGB", (4, 2), "teal"), 3)
    log.close()
    assert scalars(tmp_path) == {"loss": {3: 0.5}}
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("samples")
    assert (image.step, image.width, image.height) == (3, 4, 2)


def test_what_was_logged_beyond_the_step_of_a_resumed_run_is_gone(tmp_path, monkeypatch):
    # Files are read in the order of their names: the second in which they were made, then a number without zeros.
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))
    for start, steps in ((0, (1, 2, 3)), (1, (2,))):
        log = TensorBoardLog(tmp_path, start, print)
        for step in steps:
            log.scalar("loss", float(10 * start + step), step)
        log.close()
    assert scalars(tmp_path)["loss"] == {1: 1.0, 2: 12.0}
