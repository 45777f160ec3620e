import shutil
from pathlib import Path

import pytest

from tests.tiny import write_model


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The folder of a small model. Not to be changed."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))
