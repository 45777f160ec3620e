import numpy as np

from tests.media import moving
from utils.media.contact_sheet import CELL, GAP, column_sheet, contact_sheet


def test_a_contact_sheet_has_a_labelled_strip_per_video():
    rows = [("step 10: a cat\n" * 99, moving(13)), ("a lone image", moving(1, 64, 48)), ("wide", moving(5, 20, 90))]
    sheet = contact_sheet(rows)
    assert sheet.mode == "RGB" and 1900 < sheet.width < 2100 and 500 < sheet.height < 900
    label = np.asarray(sheet)[:24]
    assert (label < 100).any(), "the label is drawn"
    assert contact_sheet([("one", moving(1))]).width < 300


def test_a_column_sheet_has_the_same_frames_of_each_video_beside_each_other():
    videos = [("a" * 99, moving(13)), ("b", 255 - moving(13)), ("c", moving(13)), ("d", moving(13))]
    sheet = np.asarray(column_sheet(videos, rows=5)).astype(int)
    assert sheet.shape[1] == 4 * (CELL + GAP) + GAP
    first, second, third, fourth = (sheet[30:, GAP + n * (CELL + GAP) :][:, :CELL] for n in range(4))
    assert (first == third).all() and (third == fourth).all()
    inside = first[:100]
    assert abs(inside + second[:100] - 255).max() <= 2
    rows = [np.asarray(cell) for cell in np.array_split(sheet, 5)]
    assert len({row.tobytes() for row in rows}) == 5, "time runs down"
    assert all((sheet[:30, GAP + n * (CELL + GAP) :][:, :CELL] < 100).any() for n in range(4)), "labels are drawn"
    assert (sheet[:30, CELL + GAP : CELL + 2 * GAP] == 255).all(), "a long label is truncated"
