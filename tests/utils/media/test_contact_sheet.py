import numpy as np

from tests.media import moving
from utils.media.contact_sheet import contact_sheet


def test_a_contact_sheet_has_a_labelled_strip_per_video():
    rows = [("step 10: a cat\n" * 99, moving(13)), ("a lone image", moving(1, 64, 48)), ("wide", moving(5, 20, 90))]
    sheet = contact_sheet(rows)
    assert sheet.mode == "RGB" and 1900 < sheet.width < 2100 and 500 < sheet.height < 900
    label = np.asarray(sheet)[:24]
    assert (label < 100).any(), "the label is drawn"
    assert contact_sheet([("one", moving(1))]).width < 300
