"""Where the tokenizer of a model is, and whether it is that of the text encoder."""

from pathlib import Path

from wan.checkpoints.errors import CheckpointError, shown
from wan.checkpoints.files import LOCAL_MODELS, existing, is_named, read_json, read_start, refuse_other_kinds
from wan.modules.tokenizers import probe

TOKENIZER = Path("google", "umt5-xxl")  # of every release; alone it is looked for below LOCAL_MODELS
_PLACES = ("", TOKENIZER, "tokenizer")  # below the folder of a model; the last one is that of diffusers
_FILE = "tokenizer.json"
_END = 1  # the id of </s>, which closes every text
_SPARE = 0.01  # of the rows of an embedding that may be no token's
_MULTIPLE = 128  # of rows, to which embeddings are padded: UMT5's has 256384 for 256300 tokens


def find_tokenizer_folder(given: Path | None, folder: Path | None) -> Path | None:
    """The folder of tokenizer.json: the given one, that of the given file, or below the folder of a model.

    None where there is none. Raises CheckpointError for what is given and is none.
    """
    if given is not None and given.name == _FILE:
        return given.parent
    if given is not None and given.is_file():
        raise CheckpointError(f"{given} is a file: a tokenizer is a folder with {_FILE}")
    roots = [given] if given else [*([folder] if folder else []), LOCAL_MODELS]
    for root in roots:
        known = [root / below for below in _PLACES]
        # A link to what is gone is that of this model: another tokenizer must not take its place unseen.
        for is_there in (Path.exists, is_named):
            if found := next((path for path in known if is_there(path / _FILE)), None):
                return found
    if given is not None:
        existing(given / _FILE, "it was given as tokenizer")
    return None


def check_tokenizer(folder: Path, rows: int) -> None:
    """Raises CheckpointError for a tokenizer that is damaged, or is not that of a text encoder with so many tokens."""
    path = folder / _FILE
    refuse_other_kinds(path, read_start(path), is_text=True)
    try:
        known, ids = probe(folder)
    except ValueError as error:
        read_json(path)  # one that is no JSON is told apart
        reason = shown(str(error).partition(": ")[2] or str(error))
        fault = f"{path} is JSON, but not a tokenizer file: {reason}"
        raise CheckpointError(f"{fault}\ndownload it again") from None
    padded = -(-known // _MULTIPLE) * _MULTIPLE
    if known > rows or (rows - known > rows * _SPARE and rows != padded):
        facts = f"{folder} has {known} tokens, but the text encoder has {rows}"
        raise CheckpointError(f"{facts}: it needs the tokenizer of UMT5")
    if not ids or ids[-1] != _END:
        fact = f"does not close a text with </s>, the token {_END}"
        raise CheckpointError(f"{folder} {fact}: the text encoder needs the tokenizer of UMT5")
