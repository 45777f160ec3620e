import subprocess
import sys
from pathlib import Path

import pytest

from nano.text_encoder import write_tokenizer
from tests.tiny import VOCAB_SIZE, WORDS
from wan.modules.tokenizers import Tokenizer, clean_prompt, count_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("umt5-xxl")
    write_tokenizer(folder, WORDS)
    return folder


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\u6a21\u7cca\uff0c\u8fc7\u66dd\uff01", "\u6a21\u7cca,\u8fc7\u66dd!"),
        ("\u201ca cat\u2019s \ufb01sh\u201d", '"a cat\'s fish"'),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("<i> &amp;lt; 3", "<i> < 3"),
        ("  a \t cat\n\nwalks\u3000by\u00a0 ", "a cat walks by"),
        ("<p>a&nbsp;&nbsp;cat&nbsp;", "<p>a cat"),
        ("a\u0007 cat", "a cat"),
        ("", ""),
    ],
)
def test_a_prompt_is_cleaned_as_the_official_code_does(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_entities_are_resolved_after_the_repair():
    # ftfy leaves the entity beside a tag alone and would turn the full-width comma it stands for into an ASCII one.
    assert clean_prompt("<b>&#65292;") == "<b>\uff0c"


def test_entities_are_resolved_twice_and_not_more():
    assert clean_prompt("<b>&amp;amp;lt;") == "<b>&lt;"


PROMPTS = [
    "a red cat walks",
    "A red cat walks.",
    "a cat, a dog",
    "\u4e00\u53ea\u732b\u5728\u6f2b\u6b65",
    "\u4e00\u53ea\u72d7\u5728\u6f2b\u6b65",
    "\U0001f600 \u00e9",
    "",
]


def test_tokens_are_counted_as_the_text_encoder_gets_them_but_never_truncated(folder):
    assert count_tokens(folder, PROMPTS) == [len(ids) for ids in Tokenizer(folder, 512)(PROMPTS)]
    assert count_tokens(folder, ["a " * 600, "&amp;amp;"]) == [601, len(Tokenizer(folder, 512)(["&"])[0])]
    assert count_tokens(folder, []) == []
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        count_tokens(folder / "nowhere", ["a"])


def test_the_ids_are_those_of_the_tokenizer_file_itself(folder):
    from tokenizers import Tokenizer as TokenizerFile

    as_written = TokenizerFile.from_file(str(folder / "tokenizer.json"))
    assert Tokenizer(folder, text_len=64)(PROMPTS) == [as_written.encode(prompt).ids for prompt in PROMPTS]


def test_every_prompt_is_unpadded_and_ends_with_the_end_of_sequence(folder):
    ids = Tokenizer(folder, text_len=64)(PROMPTS)
    assert all(row[-1] == 1 and 1 not in row[:-1] and 0 not in row for row in ids)
    assert all(0 <= index < VOCAB_SIZE for row in ids for index in row)
    assert len(set(map(tuple, ids))) == len(PROMPTS)
    assert ids[PROMPTS.index("")] == [1]


def test_a_long_prompt_is_truncated_before_its_end_of_sequence(folder):
    long = "a cat " * 20
    (whole,), (cut,) = Tokenizer(folder, text_len=64)([long]), Tokenizer(folder, text_len=10)([long])
    assert cut == [*whole[:9], 1]


def test_prompts_are_cleaned_before_they_are_tokenised(folder):
    tokenizer = Tokenizer(folder, text_len=64)
    assert tokenizer(["a  cat\uff0c &amp;amp; dog "]) == tokenizer(["a cat, & dog"])


def test_no_prompts_give_no_ids(folder):
    assert Tokenizer(folder, text_len=64)([]) == []


def test_loading_and_tokenising_say_nothing(folder, capfd):
    Tokenizer(folder, text_len=8)(["a cat " * 2000])
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in .*empty"):
        Tokenizer(tmp_path / "empty", text_len=64)


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, wan.modules.tokenizers; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
