"""GPUs: how much memory they have, and the rates that a training step reaches on them. Nominal: nothing is measured."""

from dataclasses import dataclass, replace

# What a training step reaches of a published peak, on two cards for which others have published their measurements:
# products, attention (forward and backward together), and memory. RTX 4090: 150, 121 of 165 TFLOP/s, 0.87 of 1.01 TB/s.
# H200: 700, 545 of 989 TFLOP/s, 3.9 of 4.8 TB/s. All other cards are assumed to be as efficient as the nearer of them.
ADA = 0.91, 0.73, 0.86
HOPPER = 0.71, 0.55, 0.81
PCIE4_X8, PCIE4, PCIE5 = 12.5e9, 25e9, 50e9  # bytes per second each way, from and to page-locked memory
GIB = 1 << 30
# Words of a name that do not say which card it is.
MAKES = {"nvidia", "geforce", "pcie", "sxm", "sxm4", "sxm5", "nvl", "hbm3"}


@dataclass(frozen=True)
class Card:
    """A GPU. Rates are those that are reached, but for the peak, in operations and bytes per second."""

    name: str
    memory: float  # bytes
    products: float  # bf16, added up in fp32
    attention: float  # the same
    bandwidth: float  # of its memory
    link: float  # to main memory, each way
    fp32: float  # products and attention in fp32, without TF32
    peak: float  # bf16 products, as published


def _card(
    name: str, gib: float, peak: float, bandwidth: float, fp32: float, link: float = PCIE4, efficiency: tuple = ADA
) -> Card:
    """From published figures: dense bf16 and fp32 TFLOP/s, GB/s."""
    products, attention, memory = efficiency
    flops = (products * peak * 1e12, attention * peak * 1e12)
    return Card(name, gib * GIB, *flops, memory * bandwidth * 1e9, link, products * fp32 * 1e12, peak * 1e12)


CARDS = {
    "3060": _card("RTX 3060", 12, 25.6, 360, 12.8),
    "3090": _card("RTX 3090", 24, 71, 936, 35.6),
    "4060ti": _card("RTX 4060 Ti", 16, 44, 288, 22, PCIE4_X8),
    "4070": _card("RTX 4070", 12, 58.3, 504, 29.1),
    "4080": _card("RTX 4080", 16, 97.5, 717, 48.7),
    "4090": _card("RTX 4090", 24, 165, 1008, 82.6),
    "5090": _card("RTX 5090", 32, 209.5, 1792, 104.8, PCIE5),
    "a6000": _card("RTX A6000", 48, 154.8, 768, 38.7),
    "l40s": _card("L40S", 45, 362, 864, 91.6),
    "a100": _card("A100 80 GB", 80, 312, 2039, 19.5),
    "h100": _card("H100 80 GB", 80, 989, 3350, 67, PCIE5, HOPPER),
    "h200": _card("H200", 140, 989, 4800, 67, PCIE5, HOPPER),
}


def find_card(name: str) -> Card | None:
    """The card of the name that CUDA gives it, such as "NVIDIA A100-SXM4-80GB"; None for one that is not listed.

    Neither is a variant, such as "RTX 4090 Laptop GPU": it has other rates, and often less memory.
    """
    words = set(name.lower().replace("-", " ").replace("gb", " gb").split()) - MAKES
    return next((card for card in CARDS.values() if words in _names(card)), None)


def card_like(name: str, memory: float) -> Card:
    """A card that is not listed, at the rates of the one whose memory is the most similar."""
    similar = min(CARDS.values(), key=lambda card: abs(card.memory - memory))
    return replace(similar, name=f"{name}, at the rates of an {similar.name}")


def _names(card: Card) -> tuple[set[str], set[str]]:
    """The words of its name, with its memory and without."""
    words = set(card.name.lower().split())
    return words, words - {"80", "gb"}
