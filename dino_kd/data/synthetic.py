"""Generated, labelled images with object masks: something to learn from without a download.

`synthetic:textures`: a smooth random blob on a background of smooth low-contrast noise. The class
is the blob's texture, and nothing else tells it: place, size, shape, rotation, phase, scale,
polarity, contrast, background and tint are drawn for each image. A texture survives the
augmentations and shows in a local crop; aligned pixels do not repeat, so raw pixels say little.
Every image follows from (name, split, index) alone.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable

import numpy as np

from dino_kd.data.fingerprint import text_fingerprint
from dino_kd.errors import ConfigError, unknown_name

SIDE = 32  # pixels
DEFAULT_SIZES = {"train": 8000, "test": 1000}  # images
_MOST_IMAGES = 10_000_000
_TURN = 2 * np.pi
_LABEL_STREAM = 2**62  # beyond every image's index

# What varies from image to image, as (low, high) of uniform draws.
# Whatever is constant in an image and differs between images is learned instead of the texture:
# brightness and contrast vary little.
_BRIGHTNESS = (120.0, 136.0)  # of the blob, levels
_BACKGROUND_SHIFT = (-20.0, 20.0)  # background less blob, levels
_CONTRAST = (45.0, 55.0)  # deviation of the texture, levels
_TINT = (0.97, 1.03)  # factor of each channel: near grey, or colour is all that is learned
_PERIOD = (5.0, 6.0)  # of the texture, pixels
_BLOB_RADIUS = (8.0, 11.0)  # pixels
_BLOB_PARTS = 4
_ZONES = 3  # pieces of the blob with a rotation and phase of their own
_BACKGROUND_NOISE = 8.0  # levels, smooth
_SENSOR_NOISE = 4.0  # levels, per pixel

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]
_ROWS, _COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5


def _steep(wave: np.ndarray, slope: float = 3.0) -> np.ndarray:
    """A wave with nearly straight edges, -1..1."""
    return np.clip(slope * wave, -1, 1)


def _triangle(t: np.ndarray) -> np.ndarray:
    return 4 * np.abs(t - np.floor(t) - 0.5) - 1


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _steep(np.sin(_TURN * u))


def _fine_stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _stripes(1.9 * u, v)


def _wide_stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _stripes(0.5 * u, v)


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _steep(np.sin(0.7 * _TURN * u) * np.sin(0.7 * _TURN * v), 4)


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _steep(np.cos(_TURN * u) + np.cos(_TURN * v) - 0.7, 2)


def _zigzag(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _steep(np.sin(_TURN * (v + 0.45 * _triangle(0.5 * u))))


def _grid(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _steep(np.maximum(np.cos(0.8 * _TURN * u), np.cos(0.8 * _TURN * v)) - 0.6, 4)


def _grain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Black and white pixels, from a hash of the zones' coordinates."""
    scrambled = np.sin(12.9898 * u + 78.233 * v) * 43758.5453
    return np.sign(scrambled - np.floor(scrambled) - 0.5)


TEXTURES: dict[str, Texture] = {
    "fine_stripes": _fine_stripes,
    "stripes": _stripes,
    "wide_stripes": _wide_stripes,
    "checks": _checks,
    "dots": _dots,
    "zigzag": _zigzag,
    "grid": _grid,
    "grain": _grain,
}
NAMES = ("textures",)


def make_synthetic(rest: str) -> SyntheticImages:
    """Open ``NAME[:SPLIT[:SIZE]]``, what follows `synthetic:` in a spec.

    Raises ConfigError for an unknown name or split, or a size that is no number of images.
    """
    name, split, size = (*rest.split(":"), "", "")[:3]
    if name not in NAMES:
        raise unknown_name("synthetic data set", name, NAMES)
    split = split or "train"
    if split not in DEFAULT_SIZES:
        raise unknown_name("split", split, DEFAULT_SIZES, f"synthetic:{name}")
    if rest.count(":") > 2 or (size and not re.fullmatch(r"[1-9]\d*", size)):
        raise ConfigError(
            f"synthetic:{rest}: expected synthetic:NAME:SPLIT:SIZE with a whole number of images, "
            "such as synthetic:textures:train:4000"
        )
    count = int(size) if size else DEFAULT_SIZES[split]
    if count > _MOST_IMAGES:
        raise ConfigError(f"synthetic:{rest}: at most {_MOST_IMAGES:,} images, got {count:,}")
    return SyntheticImages(name, split, count)


class SyntheticImages:
    """One split of a generated data set. Draws from generators of its own.

    Attributes:
        spec: ``synthetic:NAME:SPLIT:SIZE``.
        labels: int64 [N]; every class equally often, in random order. A longer split begins with
            the images of a shorter one.
        class_names: one name for each texture.
    """

    def __init__(self, name: str, split: str, num_images: int) -> None:
        self.spec = f"synthetic:{name}:{split}:{num_images}"
        self.class_names: list[str] | None = list(TEXTURES)
        self._key = (zlib.crc32(name.encode()), list(DEFAULT_SIZES).index(split))
        self.labels: np.ndarray | None = self._draw_labels(num_images)
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # 4 kB an image

    def __len__(self) -> int:
        assert self.labels is not None
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [32, 32, 3]."""
        return self._image_and_mask(index)[0]

    def mask(self, index: int) -> np.ndarray:
        """Where the object of image `index` is: bool [32, 32]."""
        return self._image_and_mask(index)[1]

    def path(self, index: int) -> str:
        """The data set and the number of the image in it."""
        return f"{self.spec}[{index}]"

    def fingerprint(self) -> str:
        """The spec, and the first pixels: another version may draw other pictures."""
        drawn = (self.read(index).tobytes() for index in range(min(8, len(self))))
        return text_fingerprint(self.spec, *(hashlib.sha256(d).hexdigest() for d in drawn))

    def _draw_labels(self, num_images: int) -> np.ndarray:
        """Blocks that hold each class once, each block shuffled."""
        rng = np.random.default_rng((*self._key, _LABEL_STREAM))
        blocks = -(-num_images // len(TEXTURES))
        return rng.random((blocks, len(TEXTURES))).argsort(axis=1).ravel()[:num_images]

    def _image_and_mask(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        index = int(index)
        if index not in self._drawn:
            assert self.labels is not None
            rng = np.random.default_rng((*self._key, index))
            self._drawn[index] = draw(list(TEXTURES.values())[self.labels[index]], rng)
        return self._drawn[index]


def draw(texture: Texture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image uint8 [32, 32, 3] and the mask of its object, bool [32, 32]."""
    field = _blob(rng)
    mask = field > 0.5
    surface = _surface(texture, rng)
    surface = (surface - surface[mask].mean()) / (surface[mask].std() + 0.15)
    brightness = rng.uniform(*_BRIGHTNESS)
    background = brightness + rng.uniform(*_BACKGROUND_SHIFT) + _BACKGROUND_NOISE * _smooth(rng)
    blob = brightness + rng.uniform(*_CONTRAST) * surface
    alpha = np.clip((field - 0.5) * 4 + 0.5, 0, 1)  # soft edge
    image = background + alpha * (blob - background)
    image = image[..., None] * rng.uniform(*_TINT, size=3)
    image += rng.normal(size=(SIDE, SIDE, 1)) * _SENSOR_NOISE
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _blob(rng: np.random.Generator) -> np.ndarray:
    """A few overlapping bumps [32, 32]; the object is where their sum exceeds 0.5."""
    center = rng.uniform(9, SIDE - 9, 2)
    radius = rng.uniform(*_BLOB_RADIUS)
    rows, columns = center[:, None] + rng.normal(size=(2, _BLOB_PARTS)) * radius * 0.8
    rows[0], columns[0] = center  # the object is never outside the image
    widths = radius * rng.uniform(0.5, 1.0, _BLOB_PARTS)
    distance = (_ROWS - rows[:, None, None]) ** 2 + (_COLUMNS - columns[:, None, None]) ** 2
    return np.exp(-distance / (widths**2)[:, None, None]).sum(axis=0)


def _surface(texture: Texture, rng: np.random.Generator) -> np.ndarray:
    """The texture [32, 32], each zone turned, shifted and scaled by itself, bright or dark."""
    seeds = rng.uniform(0, SIDE, (2, _ZONES))
    distance = (_ROWS - seeds[0][:, None, None]) ** 2 + (_COLUMNS - seeds[1][:, None, None]) ** 2
    zone = distance.argmin(axis=0)  # [H, W]
    angle, period = rng.uniform(0, _TURN, _ZONES), rng.uniform(*_PERIOD, _ZONES)
    shift = rng.uniform(0, 8, (2, _ZONES))
    cos, sin = (np.cos(angle) / period)[zone], (np.sin(angle) / period)[zone]
    u = cos * _COLUMNS + sin * _ROWS + shift[0][zone]
    v = -sin * _COLUMNS + cos * _ROWS + shift[1][zone]
    return texture(u, v) * rng.choice([-1.0, 1.0])


def _smooth(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise [32, 32] of deviation about 1: normal values on a coarse grid, interpolated."""
    knots = _SPREAD.shape[1]
    return _SPREAD @ rng.standard_normal((knots, knots)) @ _SPREAD.T


def _interpolation(size: int, knots: int) -> np.ndarray:
    """[size, knots]: smoothstep weights of the two knots around each pixel."""
    place = np.linspace(0, knots - 1 - 1e-6, size)
    left = place.astype(int)
    weight = (place - left) ** 2 * (3 - 2 * (place - left))
    matrix = np.zeros((size, knots))
    matrix[np.arange(size), left] = 1 - weight
    matrix[np.arange(size), left + 1] += weight
    return matrix


_SPREAD = _interpolation(SIDE, 5)
