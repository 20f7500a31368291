"""The pictures of the testbed: a grid of cells on noisy texture, each empty or a marked shape.

A *scene* is what one run of frames shows: ``GRID`` × ``GRID`` cells of ``CELL`` pixels. A cell is
empty or holds a *mark*: a shape, in a colour, that carries a digit. One cell is one visual token
after a patch size of 14 and a 2 × 2 merge, so a mark is exactly one visual token.

Everything is drawn with :class:`numpy.random.RandomState`, whose streams are frozen: the same seed
gives the same pixels under every NumPy release.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.errors import OptionError

GRID = 2
CELL = 28
FRAME = GRID * CELL
EMPTY = -1

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white", "orange")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "hexagon", "heart")
DIGITS = tuple("0123456789")
SIZES = (len(COLOURS), len(SHAPES), len(DIGITS))

_RGB = np.array(
    [
        (0.88, 0.10, 0.12),
        (0.08, 0.66, 0.16),
        (0.16, 0.24, 0.92),
        (0.94, 0.88, 0.08),
        (0.10, 0.84, 0.86),
        (0.80, 0.14, 0.82),
        (0.96, 0.96, 0.96),
        (0.98, 0.54, 0.06),
    ],
    dtype=np.float32,
)

# Five by seven dots, a row a word; drawn at twice the size, because strokes of a single pixel do
# not survive the chroma subsampling and quantisation of a video encoder.
_GLYPHS = (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ..##. .#... #.... #####",
    "####. ....# ....# .###. ....# ....# ####.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. ..#.. .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)
_TEXTURES = 256
_TEXTURE_SEED = 20_250_601


def random_marks(shape: tuple[int, ...], rng: np.random.RandomState) -> NDArray[np.int64]:
    """Draw marks uniformly: an array of ``(*shape, 3)`` colour, shape and digit indices."""
    return np.stack([rng.randint(size, size=shape) for size in SIZES], axis=-1)


def random_cells(
    scenes: int, rng: np.random.RandomState, *, filled: float = 0.6
) -> NDArray[np.int64]:
    """Draw the cells of independent scenes.

    Parameters
    ----------
    scenes : int
        Number of scenes.
    rng : numpy.random.RandomState
        Source of randomness.
    filled : float
        Probability that a cell holds a mark.

    Returns
    -------
    ndarray of shape (scenes, GRID, GRID, 3)
        Colour, shape and digit index of each cell; all three are ``EMPTY`` in an empty cell.
    """
    marks = random_marks((scenes, GRID, GRID), rng)
    marks[rng.random_sample((scenes, GRID, GRID)) >= filled] = EMPTY
    return marks


def draw_frames(
    cells: NDArray[np.int64], rng: np.random.RandomState, *, hold: int = 1
) -> NDArray[np.uint8]:
    """Draw each scene for ``hold`` frames; the frames of a scene differ only in their noise.

    Parameters
    ----------
    cells : ndarray of shape (scenes, GRID, GRID, 3)
        Marks, as :func:`random_cells` returns them.
    rng : numpy.random.RandomState
        Source of texture, colour shade, place within the cell, and noise.
    hold : int
        Frames a scene lasts.

    Returns
    -------
    ndarray of shape (scenes * hold, FRAME, FRAME, 3), uint8
        RGB frames in time order.

    Raises
    ------
    OptionError
        If ``cells`` has another shape, or ``hold`` is not positive.
    """
    if cells.ndim != 4 or cells.shape[1:] != (GRID, GRID, 3):
        raise OptionError(
            f"cells must have the shape (scenes, {GRID}, {GRID}, 3), not {cells.shape}."
        )
    if hold < 1:
        raise OptionError(f"hold={hold}: a scene must last at least one frame.")
    pictures = _draw_cells(cells.reshape(-1, 3), rng, hold)
    scenes = cells.shape[0]
    grid = pictures.reshape(scenes, GRID, GRID, hold, CELL, CELL, 3)
    frames = grid.transpose(0, 3, 1, 4, 2, 5, 6).reshape(scenes * hold, FRAME, FRAME, 3)
    return np.round(frames * 255).astype(np.uint8)


def _draw_cells(
    marks: NDArray[np.int64], rng: np.random.RandomState, hold: int
) -> NDArray[np.float32]:
    """Draw cells ``(cells, 3)`` as pictures ``(cells, hold, CELL, CELL, 3)`` in [0, 1]."""
    count = marks.shape[0]
    colour, shape, digit = (marks[:, i].clip(min=0) for i in range(3))
    present = (marks[:, 0] != EMPTY).astype(np.float32)[:, None, None, None]
    shift = rng.randint(9, size=count)
    shade = _RGB[colour] + (rng.random_sample((count, 3)).astype(np.float32) - 0.5) * 0.1
    luma = shade @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    ink = np.where(luma > 0.45, 0.03, 0.97).astype(np.float32)[:, None, None, None]
    shape_mask = _SHAPE_MASKS[shape, shift][..., None] * present
    digit_mask = _DIGIT_MASKS[digit, shift][..., None] * present
    halo_mask = _HALO_MASKS[digit, shift][..., None] * present
    body = np.maximum(shape_mask, halo_mask)

    picture = _TEXTURE_BANK[rng.randint(_TEXTURES, size=count)]
    picture = picture + (shade[:, None, None, :] - picture) * body
    picture = picture + (ink - picture) * digit_mask
    noise = _NOISE_BANK[rng.randint(_TEXTURES, size=(count, hold))]
    drawn: NDArray[np.float32] = np.clip(picture[:, None] + noise, 0, 1)
    return drawn


def _shape_masks() -> NDArray[np.float32]:
    """Cover of the eight shapes, ``(8, CELL, CELL)``, supersampled five times."""
    over = 5
    axis = (np.arange(CELL * over) + 0.5) / over - CELL / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(y, x)

    def star(outer: float, inner: float) -> NDArray[np.bool_]:
        half = np.pi / 5
        bearing = np.abs((angle + np.pi / 2 + half) % (2 * half) - half)
        # A tip's edge runs from (outer, 0) to the notch at angle `half`: keep what lies inside it.
        notch = inner * np.cos(half), inner * np.sin(half)
        px, py = radius * np.cos(bearing), radius * np.sin(bearing)
        inside: NDArray[np.bool_] = (px - outer) * notch[1] < py * (notch[0] - outer)
        return inside

    lobes = (np.hypot(np.abs(x) - 5.2, y + 4.2) < 6.6) & (y < 3)
    heart = lobes | ((np.abs(x) + np.abs(y + 0.2) * 0.98 < 11.6) & (y > -3.2))
    cross = ((np.abs(x) < 4.4) & (np.abs(y) < 12.4)) | ((np.abs(y) < 4.4) & (np.abs(x) < 12.4))
    shapes = (
        radius < 11.4,
        (np.abs(x) < 10.4) & (np.abs(y) < 10.4),
        (y < 10.4) & (np.abs(x) * 1.8 < y + 13.4),
        star(13.4, 6.4),
        np.abs(x) + np.abs(y) < 13.4,
        cross,
        # Flattened, or it could hardly be told from the circle at this size.
        (np.abs(y) < 8.6) & (np.abs(x) + 0.58 * np.abs(y) < 13.6),
        heart,
    )
    fine = np.stack(shapes).astype(np.float32)
    cover: NDArray[np.float32] = fine.reshape(-1, CELL, over, CELL, over).mean(axis=(2, 4))
    return cover


def _digit_masks() -> NDArray[np.float32]:
    """Ink of the ten digits, ``(10, CELL, CELL)``, fourteen pixels high and ten wide."""
    masks = np.zeros((len(DIGITS), CELL, CELL), dtype=np.float32)
    for index, glyph in enumerate(_GLYPHS):
        dots = np.array([[dot == "#" for dot in row] for row in glyph.split()], dtype=np.float32)
        masks[index, 7:21, 9:19] = dots.repeat(2, axis=0).repeat(2, axis=1)
    return masks


def _shifted(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every mask moved by -1, 0 or 1 pixel each way: ``(masks, 9, CELL, CELL)``."""
    moves = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.stack([np.roll(masks, move, axis=(1, 2)) for move in moves], axis=1)


def _textures() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Dim textures and the frame noise, each ``(_TEXTURES, CELL, CELL, 3)``."""
    rng = np.random.RandomState(_TEXTURE_SEED)
    base = 0.2 + 0.35 * rng.random_sample((_TEXTURES, 1, 1, 3))
    coarse = rng.standard_normal((_TEXTURES, 5, 5, 3)) * 0.06
    at = np.linspace(0, 4, CELL)
    low = np.minimum(at.astype(int), 3)
    blend = np.zeros((CELL, 5))
    blend[np.arange(CELL), low] = 1 - (at - low)
    blend[np.arange(CELL), low + 1] += at - low
    smooth = np.einsum("yi,xj,tijc->tyxc", blend, blend, coarse)
    grain = rng.standard_normal((_TEXTURES, CELL, CELL, 3)) * 0.03
    texture = np.clip(base + smooth + grain, 0, 1).astype(np.float32)
    noise = (rng.standard_normal((_TEXTURES, CELL, CELL, 3)) * 0.02).astype(np.float32)
    return texture, noise


_SHAPE_MASKS = _shifted(_shape_masks())
_DIGIT_MASKS = _shifted(_digit_masks())
# A rim of the mark's own colour keeps a digit readable where it stands out over the shape.
_HALO_MASKS = np.stack(
    [np.roll(_DIGIT_MASKS, (dy, dx), axis=(2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
).max(axis=0)
_TEXTURE_BANK, _NOISE_BANK = _textures()
