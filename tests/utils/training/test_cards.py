"""The rates of cards are what their comments say."""

import pytest

from utils.training.cards import CARDS, GIB


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
