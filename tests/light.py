"""Light as codes of HDR and of wide colours, by formulas of their own: what tests of colours encode with."""

import numpy as np

from utils.media.description import Look

# Columns are the primaries in CIE XYZ, for white D65: BT.709, BT.2020 and P3, from their chromaticities.
CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)


def to_xyz(name: str) -> np.ndarray:
    lifted = np.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES[name]]).T
    white = np.array((D65[0] / D65[1], 1, (1 - sum(D65)) / D65[1]))
    return lifted * np.linalg.solve(lifted, white)


def in_primaries(light: np.ndarray, name: str) -> np.ndarray:
    """Light of BT.709, (..., 3), by other primaries."""
    return light @ (np.linalg.inv(to_xyz(name)) @ to_xyz("bt709")).T


def pq(light: np.ndarray) -> np.ndarray:
    """PQ codes of light whose white is 203 cd/m2."""
    power = np.clip(light * 203 / 10000, 0, 1) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    """HLG codes of light whose white has the code 0.75."""
    scene = np.maximum(light, 0) * 0.26496256
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def gamma(light: np.ndarray) -> np.ndarray:
    return np.clip(light, 0, 1) ** (1 / 2.4)


CURVES = {"pq": pq, "hlg": hlg, "": gamma}


def encoded(light: np.ndarray, look: Look) -> np.ndarray:
    """16-bit codes, (..., 3), of light of BT.709, (..., 3)."""
    codes = CURVES[look.transfer](in_primaries(light, look.primaries) if look.primaries else light)
    return np.rint(np.clip(codes, 0, 1) * 65535).astype(np.uint16)
