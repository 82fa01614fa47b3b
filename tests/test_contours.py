"""Outlines: filling against points in polygons, areas, distances, pieces and holes, crossings, round trips."""

import numpy as np
import pytest

from hf_xent.metrics.contours import (
    area,
    contour,
    crossings,
    dice,
    fill,
    hausdorff,
    lines,
    pieces_and_holes,
    resampled,
)

SQUARE = np.array([[1, 1], [5, 1], [5, 4], [1, 4]])
BOW_TIE = np.array([[0, 0], [4, 4], [4, 0], [0, 4]])


def inside(x, y, rings):
    """Whether a ray to the right crosses edges an odd number of times, one edge after the other."""
    odd = False
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, 0), strict=True):
            if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
                odd = not odd
    return odd


def star(draw, n=9, middle=(10.0, 8.0)):
    """A ring that does not cross itself, partly beyond the border of an image of 17 x 21."""
    angle = np.sort(draw.random(n)) * 2 * np.pi
    return np.stack([np.cos(angle), np.sin(angle)], 1) * draw.uniform(2, 14, n)[:, None] + middle


@pytest.mark.parametrize("seed", range(5))
def test_filling_is_the_even_odd_rule(seed):
    draw = np.random.default_rng(seed)
    rings = [star(draw), draw.uniform(-3, 22, (7, 2))]  # the second crosses itself and the first
    for several in (rings, rings[:1]):
        expected = [[inside(j + 0.5, i + 0.5, several) for j in range(21)] for i in range(17)]
        assert (fill(several, (17, 21)) == expected).all()
    assert (fill(rings[0], (17, 21)) == fill([rings[0]], (17, 21))).all()


def test_areas():
    assert area(SQUARE) == 12 and area(SQUARE[::-1]) == -12 and area(BOW_TIE) == 0
    assert fill(SQUARE, (6, 7)).sum() == 12 and fill(SQUARE, (6, 7))[1:4, 1:5].all()
    ring = star(np.random.default_rng(0))
    fine = 40
    counted = fill((ring + 20) * fine, (50 * fine, 50 * fine)).sum() / fine**2
    assert counted == pytest.approx(area(ring), rel=1e-3)
    hole = fill([SQUARE, [[2, 2], [4, 2], [4, 3], [2, 3]]], (6, 7))
    assert hole.sum() == 10 and pieces_and_holes(hole) == (1, 1)


@pytest.mark.parametrize(
    ("ring", "number"),
    [
        (SQUARE, 0),
        (BOW_TIE, 1),
        ([[0, 0], [4, 0], [0, 1]], 0),
        ([[0, 0], [4, 0], [2, 0], [2, 3]], 0),  # it touches itself
        ([[0, 3], [6, 3], [5, 0], [4, 5], [3, 0], [2, 5], [1, 0]], 4),
        ([[np.cos(a), np.sin(a)] for a in np.arange(5) * 4 * np.pi / 5], 5),  # a pentagram
    ],
)
def test_crossings(ring, number):
    for start in range(len(ring)):
        assert crossings(np.roll(ring, start, 0)) == number
        assert crossings(np.roll(ring, start, 0)[::-1]) == number


def test_pieces_and_holes():
    mask = np.zeros((9, 9), bool)
    assert pieces_and_holes(mask) == (0, 0) and pieces_and_holes(~mask) == (1, 0)
    mask[1:6, 1:6] = True
    mask[2:4, 2:4] = False
    mask[6, 6] = True  # touches by a corner
    mask[8, 0] = True
    assert pieces_and_holes(mask) == (2, 1)
    mask[5, 3] = mask[4, 3] = False  # the hole is open
    assert pieces_and_holes(mask) == (2, 0)
    corner = np.ones((5, 5), bool)
    corner[1, 1] = corner[2, 2] = corner[0, 0] = False  # background that touches by a corner is apart
    assert pieces_and_holes(corner) == (1, 2)


def test_dice_and_hausdorff():
    masks = np.zeros((3, 4, 4), bool)
    other = masks.copy()
    masks[0, :2], other[0, 1:3] = True, True  # 8 and 8 pixels, 4 in common
    masks[1, 0] = True
    assert dice(masks, other).tolist() == [0.5, 0, 1] and dice(masks[0], masks[0]) == 1
    a, b = [[0, 0], [1, 0]], [[0, 0], [1, 0], [1, 5]]
    assert hausdorff(a, b) == hausdorff(b, a) == 5
    assert hausdorff(a, []) == np.inf and hausdorff([], []) == 0


def test_outlines_of_a_rectangle():
    mask = np.zeros((8, 9), bool)
    mask[2:6, 3:7] = True
    ring = contour(mask, 16)
    # it cuts corners of half a pixel: from (3, 2.5) to (3.5, 2); the middle of the upper edge is at 5
    assert ring[0, 1] == 2 and area(ring) > 0 and crossings(ring) == 0
    steps = np.hypot(*(np.roll(ring, -1, 0) - ring).T)
    assert steps.max() <= (4 * 3 + 4 * np.sqrt(0.5)) / 16 + 1e-9, "equal along the outline, shorter across corners"
    assert (fill(ring, mask.shape) == mask).all()
    [line] = lines(mask)
    assert area(line) == pytest.approx(16 - 4 / 8) or area(line) == pytest.approx(-(16 - 4 / 8))
    whole = contour(np.ones((4, 6)), 40)
    assert whole.min() >= 0 and (whole.max(0) <= [6, 4]).all() and fill(whole, (4, 6)).all()


def test_outlines_of_a_disc():
    """Of a grey image, the outline is a circle; holes and smaller pieces are not seen."""
    y, x = np.mgrid[:40, :50] + 0.5
    disc = 12 - np.hypot(x - 24, y - 20)
    ring = contour(disc, 60, level=0)
    assert abs(np.hypot(*(ring - [24, 20]).T) - 12).max() < 0.02
    assert ring[0] == pytest.approx([24, 8], abs=0.6) and ring[15] == pytest.approx([36, 20], abs=0.6)
    mask = disc > 0
    mask[18:22, 20:26], mask[36:39, 2:4] = False, True
    assert len(lines(mask)) == 3 and pieces_and_holes(mask) == (2, 1)
    filled = fill(contour(mask, 200), mask.shape)
    assert dice(filled, disc > 0) > 0.995 and pieces_and_holes(filled) == (1, 0)
    assert (fill(lines(mask), mask.shape) == mask).all(), "all outlines by the even-odd rule"


def test_resampling():
    assert resampled(SQUARE, 7).tolist() == pytest.approx(
        np.array([[1, 1], [3, 1], [5, 1], [5, 3], [4, 4], [2, 4], [1, 3]])
    )
    twice = np.repeat(SQUARE, 2, 0)  # edges without a length
    np.testing.assert_allclose(resampled(twice, 14), resampled(SQUARE, 14))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fill([[0, 0], [1, 1]], (3, 3)), r"ring has the shape \(2, 2\)"),
        (lambda: area([[0, 0, 0]] * 3), r"ring has the shape \(3, 3\)"),
        (lambda: crossings([[0, 0], [1, np.nan], [1, 1]]), "not finite"),
        (lambda: contour(np.zeros((3, 3))), "nothing above the level 0.5"),
        (lambda: contour(np.eye(3), 2), "points"),
        (lambda: lines(np.zeros(3)), r"mask has the shape \(3,\)"),
        (lambda: lines([[0, np.inf]]), "finite"),
        (lambda: dice(np.ones((2, 2)), np.ones((2, 3))), r"predictions has the shape \(2, 3\)"),
        (lambda: pieces_and_holes(np.ones(4)), r"mask has the shape \(4,\)"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
