import importlib
import importlib.util
import sys

import pytest

from utils.common.imports import hidden


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch) -> None:
    """A package named `shy` that can be imported."""
    (tmp_path / "shy.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shy", raising=False)


def test_a_hidden_package_is_neither_found_nor_imported_until_the_block_ends():
    with hidden("shy"):
        assert importlib.util.find_spec("shy") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("shy")
    assert importlib.util.find_spec("shy") is not None
    importlib.import_module("shy")


def test_one_that_is_loaded_already_is_the_same_afterwards_even_after_an_error():
    loaded = importlib.import_module("shy")
    with pytest.raises(ModuleNotFoundError), hidden("shy", "unheard_of"):
        importlib.import_module("shy")
    assert importlib.import_module("shy") is loaded and "unheard_of" not in sys.modules
