"""What two LoRAs have in common is computed from their factors as from whole matrices."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.loras import change_of as dense
from tests.loras import make_loha, make_lokr, make_pair
from utils.adapters import overlap
from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.overlap import Overlap, Product, Shares, changed, overlaps

OUT, IN = 24, 20
NAME = "blocks.0.self_attn.q"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def of(lora: LoraFile, strength: float = 1.0) -> Chosen:
    return Chosen(lora, strength, Path("lora.safetensors"))


def pair(rank: int = 3, alpha: float | None = 3.0) -> LoraPair:
    return make_pair((OUT, IN), rank, alpha)


def alone(first: LoraFile, second: LoraFile, strengths: tuple[float, float] = (1.0, 1.0)) -> Overlap:
    """Of two LoRAs of one weight."""
    ((_, found),) = overlaps(of(first, strengths[0]), of(second, strengths[1]))
    return found


def projector(matrix: Tensor) -> Tensor:
    """Onto the columns of a matrix, by its pseudoinverse."""
    return matrix @ torch.linalg.pinv(matrix, rtol=1e-12)


def expected(first: Tensor, second: Tensor) -> Overlap:
    """From whole matrices (out, in), fp64."""
    rank = int(torch.linalg.matrix_rank(second, rtol=1e-12))
    columns, rows = projector(second), projector(second.T)
    whole = first.square().sum()
    shares = [(part.square().sum() / whole).item() for part in (columns @ first @ rows, first @ rows, columns @ first)]
    inner = (first * second).sum().item()
    return Overlap(first.norm().item(), second.norm().item(), inner, Shares(*shares, rank**2 / second.numel()))


def assert_close(found: Overlap, wanted: Overlap, rel: float = 1e-9) -> None:
    assert (found.first, found.second) == pytest.approx((wanted.first, wanted.second), rel=rel)
    assert found.inner == pytest.approx(wanted.inner, rel=rel, abs=rel * wanted.first * wanted.second)
    assert (found.shares is None) == (wanted.shares is None)
    if found.shares is not None and wanted.shares is not None:
        assert tuple(vars(found.shares).values()) == pytest.approx(tuple(vars(wanted.shares).values()), abs=rel)


@pytest.mark.parametrize(("ranks", "alpha"), [((3, 5), 2.0), ((1, 1), None), ((8, 20), 0.1), ((30, 40), 4.0)])
def test_pairs_are_compared_as_whole_matrices_would_be(ranks, alpha):
    first, second = pair(ranks[0], alpha), pair(ranks[1])
    found = alone(LoraFile({NAME: first}), LoraFile({NAME: second}), (0.7, -1.5))
    assert_close(found, expected(0.7 * dense(first, (OUT, IN)), -1.5 * dense(second, (OUT, IN))))
    assert found.cosine == pytest.approx(found.inner / (found.first * found.second))


def test_no_whole_matrix_is_made_of_pairs(monkeypatch):
    monkeypatch.setattr(overlap, "delta", None)
    monkeypatch.setattr(LoraPair, "product", None)
    assert alone(LoraFile({NAME: pair()}), LoraFile({NAME: pair()})).in_both


def test_a_lora_has_all_in_common_with_itself_and_its_opposite():
    lora = LoraFile({NAME: pair()})
    for strength in (2.0, -0.5):
        found = alone(lora, lora, (1.0, strength))
        assert found.cosine == pytest.approx(math.copysign(1.0, strength))
        assert found.shares is not None
        assert (found.shares.inside, found.shares.inputs, found.shares.outputs) == pytest.approx((1, 1, 1))


def test_what_reads_other_inputs_has_nothing_in_common_but_what_it_writes():
    first, second = pair(2), pair(2)
    first.down[:, :10], second.down[:, 10:] = 0, 0
    found = alone(LoraFile({NAME: first}), LoraFile({NAME: replace(second, up=first.up)}))
    assert found.cosine == pytest.approx(0, abs=1e-12) and found.shares is not None
    assert (found.shares.inside, found.shares.inputs, found.shares.outputs) == pytest.approx((0, 0, 1), abs=1e-12)


def test_directions_that_a_lora_of_high_rank_does_not_have_are_not_counted():
    thin = pair(2)
    same_twice = replace(thin, up=torch.cat([thin.up, thin.up], dim=1), down=torch.cat([thin.down, thin.down]), alpha=6)
    first = LoraFile({NAME: pair(4)})
    assert_close(
        alone(first, LoraFile({NAME: same_twice})),
        expected(dense(first.pairs[NAME], (OUT, IN)), dense(thin, (OUT, IN)) * 2),
    )


def test_a_change_of_nothing_has_nothing_in_common():
    untrained = replace(pair(), up=torch.zeros(OUT, 3))
    for first, second in ((untrained, pair()), (pair(), untrained)):
        found = alone(LoraFile({NAME: first}), LoraFile({NAME: second}))
        assert not found.in_both and found.cosine == 0 and found.shares is None
    outputs, inputs = Product(torch.zeros(OUT, 3).double(), torch.ones(3, IN).double()).directions()
    assert outputs.shape == (OUT, 0) and inputs.shape == (IN, 0)


@pytest.mark.parametrize("other", [make_loha((OUT, IN)), make_lokr((OUT, IN), "both")])
def test_other_factors_are_compared_as_the_matrices_that_they_are(other):
    plain, special = LoraFile({NAME: pair()}), LoraFile({}, lycoris={NAME: other})
    matrices = [0.5 * dense(plain.pairs[NAME], (OUT, IN)), 2 * dense(other, (OUT, IN))]
    assert_close(alone(special, plain, (2.0, 0.5)), expected(*reversed(matrices)), rel=1e-5)
    assert_close(alone(plain, special, (0.5, 2.0)), replace(expected(*matrices), shares=None), rel=1e-5)
    assert alone(special, special).cosine == pytest.approx(1, rel=1e-5)


def test_full_changes_of_matrices_and_vectors_are_compared():
    names = [NAME, f"{NAME} (bias)", "blocks.0.modulation", "blocks.0.norm3"]
    keys = [f"{NAME}.diff", f"{NAME}.diff_b", "blocks.0.modulation.diff", "blocks.0.norm3.diff"]
    shapes = [(OUT, IN), (OUT,), (1, 6, OUT), (OUT,)]
    first, second = ({key: torch.randn(shape) for key, shape in zip(keys, shapes, strict=True)} for _ in range(2))
    found = dict(overlaps(of(LoraFile({}, first), 2.0), of(LoraFile({}, second))))
    assert found.keys() == changed(LoraFile({}, first)) == {*names}
    for name, key in zip(names, keys, strict=True):
        left, right = 2 * first[key].double().flatten(), second[key].double().flatten()
        wanted = expected(left[:, None], right[:, None])
        assert_close(found[name], replace(wanted, shares=None) if name == NAME else wanted, rel=1e-5)


def test_a_weight_with_a_pair_and_a_full_change_is_changed_by_both():
    both = LoraFile({NAME: pair()}, {f"{NAME}.diff": torch.randn(OUT, IN)})
    matrix = dense(both.pairs[NAME], (OUT, IN)) + both.diffs[f"{NAME}.diff"]
    plain = LoraFile({NAME: pair()})
    assert_close(alone(both, plain, (0.5, 1.0)), expected(0.5 * matrix, dense(plain.pairs[NAME], (OUT, IN))), rel=1e-5)


def test_kernels_are_flattened_and_further_inputs_of_a_control_are_compared_with_nothing():
    wide, narrow = make_pair((OUT, 8, 1, 2, 2), 2), make_pair((OUT, 4, 1, 2, 2), 3)
    padded = torch.zeros(OUT, 8, 1, 2, 2).double()
    padded[:, :4] = dense(narrow, (OUT, 4, 1, 2, 2))
    matrices = [dense(wide, (OUT, 8, 1, 2, 2)).flatten(1), padded.flatten(1)]
    first, second = LoraFile({"patch_embedding": wide}), LoraFile({"patch_embedding": narrow})
    assert_close(alone(first, second), expected(*matrices))
    assert_close(alone(second, first), expected(*reversed(matrices)))


def test_what_one_lora_changes_alone_is_listed_with_its_size():
    first = LoraFile({NAME: pair(), "head.head": pair()})
    second = LoraFile({NAME: pair(), "blocks.1.ffn.0": pair()})
    found = dict(overlaps(of(first), of(second)))
    assert [*found] == ["blocks.0.self_attn.q", "blocks.1.ffn.0", "head.head"]
    assert {name: each.in_both for name, each in found.items()} == {
        NAME: True, "blocks.1.ffn.0": False, "head.head": False
    }  # fmt: skip
    assert found["head.head"].second == found["blocks.1.ffn.0"].first == 0 < found["head.head"].first


def test_chance_is_what_unrelated_loras_have_in_common():
    found = [alone(LoraFile({NAME: pair(2)}), LoraFile({NAME: pair(6)})) for _ in range(200)]
    inside = [each.shares.inside for each in found if each.shares]
    assert sum(inside) / len(inside) == pytest.approx(6 * 6 / (OUT * IN), rel=0.1)
