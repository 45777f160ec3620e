"""The rates of cards are what their comments say."""

from dataclasses import replace

import pytest

from utils.training.cards import CARDS, GIB, card_like, find_card


def test_the_rates_of_the_two_cards_that_others_have_measured_are_theirs():
    ada, hopper = CARDS["4090"], CARDS["h200"]
    rates = [rate / 1e12 for card in (ada, hopper) for rate in (card.products, card.attention, card.bandwidth)]
    assert rates == pytest.approx([150, 121, 0.87, 700, 545, 3.9], rel=0.01)


@pytest.mark.parametrize("name", CARDS)
def test_rates_are_plausible(name):
    card = CARDS[name]
    assert 12 <= card.memory / GIB <= 141
    assert 10e12 < card.fp32 < card.products and card.attention < card.products
    assert card.bandwidth / 100 < card.link < card.bandwidth / 10


def test_names_are_short_and_what_they_stand_for_is_said():
    for name, card in CARDS.items():
        assert name.islower() or name.isdigit()
        assert name.removesuffix("ti") in card.name.lower()


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA GeForce RTX 4060 Ti", "4060ti"),
        ("NVIDIA GeForce RTX 4070", "4070"),
        ("NVIDIA GeForce RTX 4080", "4080"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200"),
    ],
)
def test_a_card_is_found_by_the_name_that_cuda_gives_it(name, card):
    assert find_card(name) is CARDS[card]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "NVIDIA GeForce GTX 1080",
            "NVIDIA RTX 6000 Ada Generation",
            "NVIDIA L40",
            "NVIDIA GeForce RTX 4060",
            "",
            "GPU",
        ),
        *("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA GH200 480GB"),  # with another memory
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 4070 Ti SUPER"),
    ],
)
def test_what_is_not_listed_is_not_taken_for_what_is(name):
    assert find_card(name) is None


def test_an_unknown_card_has_the_rates_of_the_one_with_the_most_similar_memory():
    found = card_like("Some GPU", 25e9)
    assert found.name == "Some GPU, at the rates of an RTX 3090"
    assert replace(found, name=CARDS["3090"].name) == CARDS["3090"]


def test_the_published_peak_is_more_than_what_is_reached():
    assert CARDS["4090"].peak == 165e12 and CARDS["h100"].peak == 989e12
    assert all(card.products < card.peak for card in CARDS.values())
