"""The pictures: every mark looks different from every other, and the same seed draws the same."""

import numpy as np
import pytest

from flexselect.core.errors import OptionError
from flexselect.testbed import scenes

CELLS = [[-1, -1, -1], [-1, -1, -1], [0, 0, 5], [0, 0, 8], [-1, -1, -1], [-1, -1, -1]]
MEANS = [
    [[92.67, 86.99, 85.56], [106.2, 89.14, 97.47]],
    [[127.1, 87.51, 91.07], [136.61, 118.77, 109.42]],
]


def grid_of(mark):
    cells = np.full((1, scenes.GRID, scenes.GRID, 3), scenes.EMPTY)
    cells[0, 0, 0] = mark
    return cells


def test_the_same_seed_draws_the_same_pixels_under_any_numpy():
    rng = np.random.RandomState([7, 1])
    cells = scenes.random_cells(6, rng)
    frames = scenes.draw_frames(cells, rng, hold=2)
    assert frames.shape == (12, 56, 56, 3)
    assert frames.dtype == np.uint8
    assert cells.reshape(-1, 3)[:6].tolist() == CELLS
    # Coarse means, not a hash of the pixels: the last bit of a float may differ between machines.
    means = frames.reshape(12, 2, 28, 2, 28, 3).mean(axis=(0, 2, 4))
    assert np.abs(means - np.array(MEANS)).max() < 0.05


def test_a_scene_is_held_with_fresh_noise_only():
    rng = np.random.RandomState(3)
    frames = scenes.draw_frames(scenes.random_cells(4, rng, filled=1.0), rng, hold=3).astype(int)
    same = np.abs(frames[0] - frames[1])
    assert 0 < same.mean() < 10
    assert np.abs(frames[2] - frames[3]).mean() > 3 * same.mean()


@pytest.mark.parametrize("attribute", range(3))
def test_marks_that_differ_in_one_attribute_look_different(attribute):
    base = [2, 3, 4]
    pictures = []
    for value in range(scenes.SIZES[attribute]):
        mark = list(base)
        mark[attribute] = value
        frames = scenes.draw_frames(grid_of(mark), np.random.RandomState(0))
        pictures.append(frames[0, : scenes.CELL, : scenes.CELL].astype(int))
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            changed = np.abs(first - second).max(axis=-1) > 60
            assert changed.sum() >= 16, (attribute, i)


def test_the_digit_stands_out_in_brightness_so_that_chroma_subsampling_leaves_it():
    for colour in range(len(scenes.COLOURS)):
        blank, marked = (
            scenes.draw_frames(grid_of([colour, 1, digit]), np.random.RandomState(1))[0]
            for digit in (1, 8)
        )
        luma = np.array([0.299, 0.587, 0.114])
        contrast = np.abs(blank.astype(float) @ luma - marked.astype(float) @ luma)
        assert contrast.max() > 90, scenes.COLOURS[colour]


def test_the_share_of_filled_cells_is_as_asked():
    cells = scenes.random_cells(4000, np.random.RandomState(0), filled=0.6)
    assert abs((cells[..., 0] != scenes.EMPTY).mean() - 0.6) < 0.02
    assert ((cells == scenes.EMPTY).all(-1) == (cells == scenes.EMPTY).any(-1)).all()


@pytest.mark.parametrize(
    ("cells", "hold"), [(np.zeros((2, 3, 2, 3), int), 1), (grid_of([0] * 3), 0)]
)
def test_wrong_shapes_and_holds_are_refused(cells, hold):
    with pytest.raises(OptionError):
        scenes.draw_frames(cells, np.random.RandomState(0), hold=hold)
