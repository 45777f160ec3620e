"""From a prompt to the token ids of the text encoder, the way Wan was trained: cleaned, closed by </s>, truncated."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy


def clean_prompt(text: str) -> str:
    """The text as Wan's text encoder expects it: repaired by ftfy, HTML entities resolved, whitespace single.

    Full-width punctuation becomes ASCII, curly quotes straight. The order is that of the official code; entities are
    resolved twice because scraped captions often carry them escaped twice.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def probe(folder: Path) -> tuple[int, list[int]]:
    """How many tokens the tokenizer in `folder` knows, and the ids of a short text: what tells whose tokenizer it is.

    Raises ValueError for a file that is no tokenizer.
    """
    reader = _read(folder)
    return reader.get_vocab_size(), reader.encode("a").ids


def count_tokens(folder: Path, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has for the tokenizer in `folder`, cleaned and closed by </s>, but not truncated.

    Raises ValueError for a file that is no tokenizer.
    """
    reader = _read(folder)
    return [len(encoding.ids) for encoding in reader.encode_batch([clean_prompt(prompt) for prompt in prompts])]


def _read(folder: Path) -> Any:
    """The tokenizer in `folder`, without truncation and padding.

    It is that of the library which transformers uses too, and which takes less time to import.
    """
    from tokenizers import Tokenizer as Reader

    path = folder / "tokenizer.json"
    try:
        reader = Reader.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer file: {error}") from None
    reader.no_truncation()
    reader.no_padding()
    return reader


class Tokenizer:
    """The UMT5 tokenizer in `folder` (google/umt5-xxl of a Wan checkpoint), for prompts of up to `text_len` tokens.

    Raises FileNotFoundError if the folder holds no tokenizer.json, and ValueError if that is none.
    """

    def __init__(self, folder: Path, text_len: int) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer.json in {folder}\nDownload the folder google/umt5-xxl of the Wan checkpoint to there."
            )
        from transformers import PreTrainedTokenizerFast

        # The file alone. AutoTokenizer would follow the folder's config to T5Tokenizer, which in some versions rebuilds
        # the tokenizer by T5's rules (another id for unknown text, no bytes): other ids, and no error.
        try:
            self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer file: {error}") from None
        self.text_len = text_len

    def __call__(self, prompts: list[str]) -> list[list[int]]:
        """The token ids of each prompt, which is cleaned first: unpadded, at most `text_len`, always ending in </s>."""
        if not prompts:
            return []
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        return self._tokenizer(cleaned, truncation=True, max_length=self.text_len).input_ids
