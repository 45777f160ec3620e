import re

import pytest
import torch
from torch import Tensor

from tests.manifests import load_manifest
from tests.tiny import VOCAB_SIZE, tiny_text_encoder, write_text_encoder
from wan.modules.t5 import RMSNorm, TextEncoder, UMT5Encoder, relative_buckets
from wan.modules.tokenizers import Tokenizer

TRANSFORMERS_NAMES = [
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    return tiny_text_encoder()


@pytest.fixture(scope="module")
def reference(encoder: UMT5Encoder):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    weights = {transformers_name(name): tensor for name, tensor in encoder.state_dict().items()}
    # In a checkpoint the two are one tensor; loading only the first would leave the second random.
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})
    return model


def transformers_name(name: str) -> str:
    """The name in UMT5EncoderModel of a parameter of UMT5Encoder."""
    for pattern, replacement in TRANSFORMERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(4, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(5))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_rows_equal_those_of_transformers(encoder, reference, batch, length):
    ids = random_ids(batch, length)
    assert relative_error(encoder(ids), reference(input_ids=ids).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("lengths", [[5], [5, 12], [12, 1]])
def test_the_rows_equal_those_of_transformers_behind_a_padding_mask(encoder, reference, lengths):
    ids = random_ids(len(lengths), 12)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative_error(encoder(ids, mask), expected) <= 1e-5
    assert torch.equal(encoder(ids, mask.bool()), encoder(ids, mask))


def test_unpadded_ids_give_the_rows_of_padded_ones(encoder):
    ids = random_ids(1, 9)
    padded = torch.nn.functional.pad(ids, (0, 23))
    mask = (torch.arange(32) < 9)[None]
    assert relative_error(encoder(padded, mask)[:, :9], encoder(ids)) <= 1e-5


def test_the_released_encoder_has_exactly_the_names_and_shapes_of_its_checkpoint():
    with torch.device("meta"):
        encoder = UMT5Encoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == load_manifest("t5_umt5_xxl_enc")
    assert encoder.blocks[0].attn.num_heads == 64


def test_offsets_fall_into_the_buckets_of_the_official_code():
    buckets = relative_buckets(400, num_buckets=32)
    offsets = [-399, -128, -20, -16, -8, -7, -1, 0, 1, 7, 8, 16, 20, 127, 399]
    assert buckets[200, 201] == 17
    assert [buckets[max(0, -offset), max(0, offset)].item() for offset in offsets] == [
        *[15, 15, 10, 10, 8, 7, 1, 0, 17, 23, 24, 26, 26, 31, 31]
    ]


def test_every_offset_falls_into_the_bucket_of_transformers(reference):
    attention = reference.encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(600)
    expected = attention._relative_position_bucket(positions[None, :] - positions[:, None])
    assert torch.equal(relative_buckets(600, num_buckets=32), expected)


def test_the_forward_pass_never_waits_for_the_device():
    on_meta = tiny_text_encoder().to("meta")
    # A tensor on the meta device has no values: reading one on the host would raise.
    rows = on_meta(torch.empty(2, 7, dtype=torch.long, device="meta"), torch.ones(2, 7, device="meta"))
    assert rows.shape == (2, 7, 32)


def test_a_prompt_whose_keys_are_all_hidden_still_gives_numbers(encoder):
    assert encoder(random_ids(1, 3), torch.zeros(1, 3)).isfinite().all()


def test_the_norm_rounds_before_the_weight_multiplies():
    norm = RMSNorm(64).bfloat16()
    norm.weight.data = torch.linspace(0.3, 1.7, 64).bfloat16()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6)).bfloat16() * 1e-3
    normalised = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), normalised.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (normalised * norm.weight.double()).bfloat16())


def test_in_bf16_the_softmax_is_taken_in_fp32(monkeypatch):
    seen, softmax = [], Tensor.softmax

    def watched(x: Tensor, dim: int) -> Tensor:
        seen.append(x.dtype)
        return softmax(x, dim)

    monkeypatch.setattr(Tensor, "softmax", watched)
    rows = tiny_text_encoder().bfloat16()(random_ids(1, 7))
    assert rows.dtype == torch.bfloat16
    assert seen == [torch.float32] * 2


@pytest.fixture(scope="module")
def text_encoder(encoder, tmp_path_factory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_text_encoder(folder, encoder)
    return TextEncoder(encoder, Tokenizer(folder / "google" / "umt5-xxl", text_len=64))


def test_each_prompt_gets_the_rows_of_its_own_tokens_in_order(text_encoder):
    prompts = ["a red cat walks slowly", "", "\u4e00\u53ea\u732b"]
    rows = text_encoder.encode(prompts)
    for ids, prompt_rows in zip(text_encoder.tokenizer(prompts), rows, strict=True):
        assert torch.equal(prompt_rows, text_encoder.encoder(torch.tensor([ids]))[0])
    assert [len(prompt_rows) for prompt_rows in rows] == [6, 1, 11]


def test_no_prompts_give_no_rows(text_encoder):
    assert text_encoder.encode([]) == []


def test_the_rows_may_enter_autograd_even_if_encoded_in_inference_mode(text_encoder):
    with torch.inference_mode():
        (rows,) = text_encoder.encode(["a cat"])
    weight = torch.ones(32, requires_grad=True)
    (rows * weight).sum().backward()
    assert torch.equal(weight.grad, rows.sum(0))


def test_prompts_that_are_the_same_once_cleaned_are_encoded_alike(text_encoder):
    plain, spaced = text_encoder.encode(["a cat, a dog", " a\u00a0cat\uff0c  a dog\n"])
    assert torch.equal(plain, spaced)


@pytest.mark.parametrize("prompts", [["a cat", "a dog"], ["a cat", "a red cat walks"], ["a cat", ""]])
def test_an_embedding_table_of_zeros_is_noticed(text_encoder, prompts):
    broken = tiny_text_encoder()
    broken.token_embedding.weight.zero_()
    with pytest.raises(ValueError, match="weights are broken"):
        TextEncoder(broken, text_encoder.tokenizer).encode(prompts)


def test_prompts_that_begin_alike_are_not_mistaken_for_broken_weights(text_encoder):
    short, long = text_encoder.encode(["a cat", "a cat walks"])
    assert not torch.equal(short, long[:3])
