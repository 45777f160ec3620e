"""From HDR and wide colours to BT.709, by arithmetic that is the same on every machine and for every decoder.

Light is linear and relative to SDR white, which is 1. Letters in shapes: `H` height, `W` width.

- PQ (SMPTE ST 2084): the light of a code in cd/m2, divided by 203 cd/m2, the white of graphics in ITU-R BT.2408.
- HLG (ITU-R BT.2100): the scene's light of a code, divided by that of 75 %, the white of BT.2408. BT.2100 makes a
  display's light of it with a gamma of 1.2 + 0.42 log10(peak / 1000 cd/m2), which is 1 for a peak of 334 cd/m2, such
  as SDR displays have: light of the scene is light of the display.
- Primaries: matrices of ITU-R BT.2087 (BT.2020) and SMPTE EG 432-1 (P3 with D65), to BT.709. Negative light is 0.
- Light above KNEE is rolled off towards 1 by the largest of red, green and blue, so that hues stay:
  KNEE + (1 - KNEE) * x / (1 + x), where x = (light - KNEE) / (1 - KNEE).
- Codes are the light to the power of 1 / 2.4, the inverse of a display's transfer function in ITU-R BT.1886.
"""

import functools

import numpy as np

from utils.media.description import Look

# By the numbers of ITU-T H.273, which containers and codecs use.
HDR_TRANSFERS = {16: "pq", 18: "hlg"}
WIDE_PRIMARIES = {9: "bt2020", 11: "p3", 12: "p3"}

WHITE_PQ = 203.0  # cd/m2
WHITE_HLG = 0.75  # of the code
DISPLAY_GAMMA = 2.4
KNEE = 0.7
PIXELS = 2**15  # at a time: what is computed of them stays in a core's cache
STEPS = 2**12  # of the root of light, in the table of codes

TO_BT709 = {
    "bt2020": (
        (1.6604910, -0.5876411, -0.0728499),
        (-0.1245505, 1.1328999, -0.0083494),
        (-0.0181508, -0.1005789, 1.1187297),
    ),
    "p3": ((1.2249402, -0.2249402, 0.0), (-0.0420570, 1.0420570, 0.0), (-0.0196376, -0.0786361, 1.0982736)),
}


def to_sdr(pixels: np.ndarray, look: Look) -> np.ndarray:
    """BT.709 codes, uint8 (H, W, 3), of uint16 (H, W, 3) with the transfer characteristics and primaries of `look`."""
    light_of, codes = _light_of_codes(look.transfer), _codes_of_roots()
    flat = pixels.reshape(-1, 3)
    result = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), PIXELS):
        part = flat[start : start + PIXELS]
        red, green, blue = _to_bt709([light_of[part[:, channel]] for channel in range(3)], look.primaries)
        if look.transfer:
            gain = _roll_off(np.maximum(np.maximum(red, green), blue))
            red, green, blue = red * gain, green * gain, blue * gain
        for channel, light in enumerate((red, green, blue)):
            roots = np.sqrt(np.minimum(light, np.float32(1)))
            result[start : start + PIXELS, channel] = codes[np.rint(roots * np.float32(STEPS)).astype(np.int32)]
    return result.reshape(pixels.shape)


def _to_bt709(light: list[np.ndarray], primaries: str) -> list[np.ndarray]:
    rows = TO_BT709.get(primaries)
    if rows is None:
        return light
    red, green, blue = light
    weights = [[np.float32(weight) for weight in row] for row in rows]
    mixed = (red * row[0] + green * row[1] + blue * row[2] for row in weights)
    return [np.maximum(channel, np.float32(0)) for channel in mixed]


def _roll_off(peak: np.ndarray) -> np.ndarray:
    """The factor for each pixel by which its light decreases, by the largest of its three channels."""
    knee, room = np.float32(KNEE), np.float32(1 - KNEE)
    above = np.maximum(peak - knee, np.float32(0)) / room
    rolled = knee + room * (above / (np.float32(1) + above))
    return np.where(peak > knee, rolled / np.maximum(peak, knee), np.float32(1))


@functools.cache
def _light_of_codes(transfer: str) -> np.ndarray:
    """The light of each 16-bit code: float32 (65536,)."""
    code = np.arange(2**16) / (2**16 - 1)
    if transfer == "pq":
        light = _pq_light(code) / WHITE_PQ
    elif transfer == "hlg":
        light = _hlg_light(code) / _hlg_light(np.array(WHITE_HLG))
    else:
        light = code**DISPLAY_GAMMA
    return light.astype(np.float32)


@functools.cache
def _codes_of_roots() -> np.ndarray:
    """The 8-bit code of the light whose square root is each multiple of 1 / STEPS: uint8 (STEPS + 1,)."""
    roots = np.arange(STEPS + 1) / STEPS
    return np.rint(255 * roots ** (2 / DISPLAY_GAMMA)).astype(np.uint8)


def _pq_light(code: np.ndarray) -> np.ndarray:
    """cd/m2 of PQ codes in 0..1, equation 4.1 of ST 2084."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = code ** (1 / m2)
    return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _hlg_light(code: np.ndarray) -> np.ndarray:
    """The scene's light in 0..1 of HLG codes in 0..1: the inverse OETF of BT.2100."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
