"""Wan-Nano's text encoder: a UMT5 with random weights, and a tokenizer that knows the world's words.

Random weights suffice: the rows of different words are far apart, and the transformer learns what they mean.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from wan.modules.t5 import UMT5Encoder

SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0, 1, 2, 3, as in umt5-xxl
WIDTH = 64


def write_tokenizer(folder: Path, words: Sequence[str]) -> int:
    """Writes a Unigram tokenizer and returns the size of its vocabulary.

    It knows the given words, ASCII characters, and bytes for everything else. Special tokens, the class in its config
    and the files are those of google/umt5-xxl, without spiece.model.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [(token, 0.0) for token in SPECIAL_TOKENS]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    pieces += [(character, -8.0) for character in map(chr, range(33, 127))]
    pieces += [("\u2581", -4.0)] + [(f"\u2581{word}", -5.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL_TOKENS.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = names | {"tokenizer_class": "T5Tokenizer", "model_max_length": int(1e30)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2), encoding="utf-8")
    return len(pieces)


def make_encoder(vocab_size: int, seed: int) -> UMT5Encoder:
    """A frozen encoder of two layers with random weights. Word vectors have length sqrt(width); layers keep the scale.

    T5 does not scale attention by the head size, so the queries' weights are smaller.
    """
    encoder = UMT5Encoder(vocab_size, WIDTH, dim_attn=WIDTH, dim_ffn=2 * WIDTH, num_heads=4, num_layers=2)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
            continue
        deviation = 1.0
        if parameter.ndim > 1 and "embedding" not in name:
            deviation = 1 / math.sqrt(parameter.shape[1])
        if name.endswith(("attn.q.weight", "attn.o.weight", "fc2.weight")):
            deviation /= 2
        parameter.data.normal_(0, deviation, generator=generator)
    return encoder.eval().requires_grad_(False)
