"""Which captions are longer than what a model reads: reported before anything is encoded."""

from collections.abc import Sequence
from pathlib import Path

from utils.common.console import say
from utils.common.formatting import counted
from utils.data.scan import Source
from wan.modules.tokenizers import count_tokens

SHOWN = 10  # captions, each in a line of its own


def say_cut_captions(tokenizer: tuple[Path, int] | None, sources: Sequence[Source]) -> None:
    """Prints the captions of which a model reads only the beginning.

    `tokenizer` is its folder, and how many tokens the model reads. Prints nothing without one, or for a damaged one:
    that is an error where texts are encoded.
    """
    if tokenizer is None:
        return
    folder, limit = tokenizer
    captions = dict.fromkeys((source.path, text) for source in sources for text in source.captions)
    long = [(path, text) for path, text in captions if _may_exceed(text, limit)]
    if not long:
        return
    try:
        counts = count_tokens(folder, [text for _, text in long])
    except ValueError:
        return
    cut = [(path, count) for (path, _), count in zip(long, counts, strict=True) if count > limit]
    for path, count in cut[:SHOWN]:
        say(f"text: the caption of {path.name} has {count} tokens, but the model reads {limit}: the rest has no effect")
    if len(cut) > SHOWN:
        say(f"text: {counted(len(cut) - SHOWN, 'more caption')} of more than {limit} tokens")


def _may_exceed(text: str, limit: int) -> bool:
    """False for most captions, so that no tokenizer has to be loaded: an ASCII character is at most one token."""
    return not text.isascii() or len(text) + 2 > limit  # a space in front and </s> at the end are tokens too
