"""Two encoders have the same fingerprint only if they compute the same."""

from dataclasses import replace

import torch

from tests.damage import edit_pth, refused
from tests.tiny import tiny_transformer, write_clip, write_transformer
from wan.checkpoints import (
    TRANSFORMER,
    open_model,
    text_encoder_fingerprint,
    transformer_fingerprint,
    vae_fingerprint,
    vision_fingerprint,
)
from wan.checkpoints.weights import read_weights

FP32, BF16 = torch.float32, torch.bfloat16


def test_the_fingerprint_is_of_the_content_and_not_of_the_path(whole, folder):
    expected = text_encoder_fingerprint(open_model(whole), FP32)
    assert text_encoder_fingerprint(open_model(folder), FP32) == expected
    assert text_encoder_fingerprint(open_model(folder.parent / "." / folder.name), FP32) == expected
    assert vae_fingerprint(open_model(whole), FP32) == vae_fingerprint(open_model(folder), FP32)


def test_the_fingerprint_changes_with_weights_tokenizer_length_and_dtype(folder):
    files = open_model(folder)
    seen = [text_encoder_fingerprint(files, FP32), text_encoder_fingerprint(files, BF16)]
    seen.append(text_encoder_fingerprint(replace(files, text_len=files.text_len - 1), FP32))
    edit_pth(files.text_encoder.path, lambda s: s["norm.weight"][0].add_(1))
    seen.append(text_encoder_fingerprint(files, FP32))
    with (files.tokenizer / "tokenizer.json").open("a") as file:
        file.write("\n")
    seen.append(text_encoder_fingerprint(files, FP32))
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_a_vae_changes_with_weights_and_dtype(folder):
    files = open_model(folder)
    seen = [vae_fingerprint(files, FP32), vae_fingerprint(files, BF16)]
    edit_pth(files.vae.path, lambda s: s["conv2.bias"][0].add_(1))
    seen.append(vae_fingerprint(files, FP32))
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_a_vision_encoder_changes_with_weights_and_dtype(whole, tmp_path):
    files = replace(open_model(whole), clip=read_weights(write_clip(tmp_path), "clip"))
    seen = [vision_fingerprint(files, FP32), vision_fingerprint(files, BF16)]
    edit_pth(files.clip.path, lambda s: s["visual.pre_norm.bias"][0].add_(1))
    seen.append(vision_fingerprint(files, FP32))
    assert len(set(seen)) == len(seen)
    refused("has no vision encoder", vision_fingerprint, replace(files, clip=None), FP32)


def test_the_fingerprint_of_a_large_file_sees_its_beginning_and_its_end(folder):
    files, seen = open_model(folder), set()
    for position in (None, 0, 2**25 + 99):
        content = bytearray(2**25 + 100)
        if position is not None:
            content[position] = 1
        files.text_encoder.path.write_bytes(content)
        seen.add(text_encoder_fingerprint(files, FP32))
    assert len(seen) == 3


def test_the_fingerprint_of_a_transformer_is_of_its_content_alone(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_transformer(tmp_path / name, tiny_transformer())
    expected = transformer_fingerprint(read_weights(tmp_path / "one", "transformer"))
    assert len(expected) == 16 and transformer_fingerprint(read_weights(tmp_path / "other", "transformer")) == expected
    renamed = (tmp_path / "other" / TRANSFORMER).rename(tmp_path / "fox.safetensors")
    assert transformer_fingerprint(read_weights(renamed, "transformer")) == expected
    write_transformer(tmp_path / "other", tiny_transformer(seed=1))
    assert transformer_fingerprint(read_weights(tmp_path / "other", "transformer")) != expected


def test_the_fingerprint_of_shards_is_of_all_of_them_whatever_their_names(tmp_path):
    seen = []
    for seed, shards in ((0, 2), (0, 2), (1, 2), (0, 3)):
        folder = tmp_path / f"{len(seen)}"
        folder.mkdir()
        write_transformer(folder, tiny_transformer(seed=seed), shards)
        seen.append(transformer_fingerprint(read_weights(folder, "transformer")))
    assert seen[0] == seen[1] and len(set(seen)) == 3
    index = tmp_path / "0" / f"{TRANSFORMER}.index.json"
    text = index.read_text()
    for number, name in ((1, "z"), (2, "a")):  # the other way round
        (tmp_path / "0" / TRANSFORMER.replace(".", f"-{number:05d}-of-00002.")).rename(
            tmp_path / "0" / f"{name}.safetensors"
        )
        text = text.replace(TRANSFORMER.replace(".", f"-{number:05d}-of-00002."), f"{name}.safetensors")
    index.write_text(text)
    assert transformer_fingerprint(read_weights(tmp_path / "0", "transformer")) == seen[0]
