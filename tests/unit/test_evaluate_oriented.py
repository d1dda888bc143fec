"""Oriented boxes: the overlap equals clipping by half planes, boxes survive their encoding, the head learns directions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import UsageError
from pipeline.evaluate.boxes import Detector, records_of, train_detector
from pipeline.evaluate.items import Boxes
from pipeline.evaluate.metrics import Records, value_of
from pipeline.evaluate.oriented import corners_of, decode, encode, rotated_iou, rotated_nms, turned_of
from pipeline.evaluate.registry import row_named
from tests import published
from tests.polygons import clipped_iou


def boxes(rng: np.random.Generator, number: int, span: float = 60.0) -> Tensor:
    """Random [n, 6], float64."""
    centre, sides = rng.random((number, 2)) * span, 4 + rng.random((number, 2)) * 30
    twice = rng.random(number) * 2 * math.pi
    sides = np.sort(sides, 1)[:, ::-1]
    return torch.from_numpy(np.column_stack([centre, sides, np.sin(twice), np.cos(twice)]))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_overlap_equals_clipping_by_half_planes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (corners_of(boxes(rng, n)).numpy() for n in (4, 5))
    b[0] = a[0]  # the very same box
    b[1] = a[1][[2, 3, 0, 1]]  # from another corner on
    b[2] = a[2][::-1]  # the other way round
    found = rotated_iou(a, b)
    expected = [[clipped_iou(one.tolist(), other.tolist()) for other in b] for one in a]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.diag(found)[:3] == pytest.approx([1, 1, 1])


def test_overlap_known_by_hand_and_of_nothing() -> None:
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], float)
    turned = np.array([[1, 1 - math.sqrt(2)], [1 + math.sqrt(2), 1], [1, 1 + math.sqrt(2)], [1 - math.sqrt(2), 1]])
    octagon = 8 * (math.sqrt(2) - 1)  # a square of side 2 turned by 45 degrees in itself
    line = np.array([[0, 0], [1, 1], [2, 2], [1, 1]], float)
    beside = [square + np.array([shift, 0]) for shift in (1, 2)]
    found = rotated_iou(square[None], np.stack([turned, *beside, line]))
    assert found[0] == pytest.approx([octagon / (8 - octagon), 1 / 3, 0, 0])
    assert rotated_iou(np.zeros((0, 4, 2)), square[None]).shape == (0, 1)
    assert rotated_iou(square[None], np.zeros((0, 4, 2))).shape == (1, 0)


def test_of_boxes_over_each_other_the_best_of_its_class_stays() -> None:
    corners = corners_of(boxes(np.random.default_rng(0), 1)).numpy().repeat(4, 0)
    corners[3] += 300
    scores, labels = np.array([0.2, 0.9, 0.5, 0.1]), np.array([0, 0, 1, 0])
    assert rotated_nms(corners, scores, labels, 0.1).tolist() == [1, 2, 3]


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_boxes_survive_corners_and_encoding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    turned = boxes(rng, 6)
    torch.testing.assert_close(turned_of(corners_of(turned)), turned)
    proposals = torch.from_numpy(np.column_stack([rng.random((6, 2)) * 40, 50 + rng.random((6, 2)) * 40]))
    torch.testing.assert_close(decode(encode(turned, proposals), proposals), turned)


def bars(number: int, side: int = 64) -> tuple[list[list[Tensor]], list[Boxes]]:
    """Maps (as of a pyramid at strides 4, 8, 16) of images of one bar, and its box."""
    rng = np.random.default_rng(0)
    maps, truths = [], []
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    for i in range(number):
        angle, centre = math.pi * i / number, 24 + rng.random(2) * 16
        u = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
        v = (y - centre[1]) * math.cos(angle) - (x - centre[0]) * math.sin(angle)
        image = ((u.abs() < 18) & (v.abs() < 4)).float()
        channels = torch.stack([image, image * u / 18, image * v / 4, x / side, y / side])[None]
        maps.append([torch.nn.functional.avg_pool2d(channels, s) for s in (4, 8, 16)])
        turned = torch.tensor([[*centre, 36, 8, math.sin(2 * angle), math.cos(2 * angle)]], dtype=torch.float32)
        corners = corners_of(turned).numpy()
        truths.append(Boxes(np.concatenate([corners.min(1), corners.max(1)], 1), np.array([0]), corners))
    return maps, truths


def test_the_head_learns_which_way_objects_lie() -> None:
    """Bars of 36 x 8 pixels: their upright hulls overlap them by less than a half, whatever the place, so directions must be read."""
    maps, truths = bars(6)
    torch.manual_seed(0)
    detector = Detector([5, 5, 5], 1, 64, [16, 8, 4], oriented=True, width=16)

    def load(i: int) -> tuple[list[Tensor], tuple[int, int], Boxes]:
        return maps[i], (64, 64), truths[i]

    def score() -> float:
        return value_of(Records("map50_rotated", records_of(detector.eval(), load, range(6), 1)))

    assert score() < 0.2
    train_detector(detector, load, range(6), 0, 25)
    assert score() > 0.8


def test_anchors_lie_on_the_cells_of_images_of_any_size() -> None:
    """Of 1,175 pixels a map at stride 8 has 147 cells, whose anchors lie 8 pixels apart: 1,175 // 147 is 7."""
    from torchvision.models.detection.image_list import ImageList

    cells, size = (4, 8, 16, 32), (512, 1175)
    shapes = [(math.ceil(size[0] / cell), math.ceil(size[1] / cell)) for cell in cells]
    detector = Detector([3] * 4, 2, size[0], [rows for rows, _ in shapes])
    features = [torch.zeros(1, 64, *shape) for shape in shapes[1:]]
    blank = torch.zeros(()).expand(1, 3, *size)
    (found,) = detector.rpn.anchor_generator(ImageList(blank, [size]), features)
    per_cell = detector.rpn.anchor_generator.num_anchors_per_location()[0]
    parts = found.split([rows * columns * per_cell for rows, columns in shapes[1:]])
    for part, cell, (rows, columns) in zip(parts, cells[1:], shapes[1:]):
        centre = (part[:, :2] + part[:, 2:]) / 2
        assert centre.amin(0).tolist() == [0, 0]
        assert centre.amax(0).tolist() == [(columns - 1) * cell, (rows - 1) * cell]
    assert detector.roi_heads.box_roi_pool.scales == [1 / 8, 1 / 16, 1 / 32]
    small = Detector([3] * 4, 2, 40, [10, 5, 3, 2])  # 3 cells of 16 pixels hold 40, and 2 of 32
    assert small.roi_heads.box_roi_pool.scales == [1 / 8, 1 / 16, 1 / 32]


def test_published_corners_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    corners = [[4, 10], [20, 4], [24, 14], [8, 20]]
    for name in ("dior_r", "fair1m"):
        published.MAKERS[name](tmp_path / name, np.random.default_rng(0))
        row = row_named(name)
        target = row.read(str(tmp_path / name), row).items[0].read().target
        assert isinstance(target, Boxes)
        assert target.corners is not None
        assert target.corners.tolist() == [corners]
    upright = replace(row_named("dior_r"), oriented=False)
    target = upright.read(str(tmp_path / "dior_r"), upright).items[0].read().target
    assert isinstance(target, Boxes)
    assert (target.corners, target.xyxy.tolist()) == (None, [[4, 5, 30, 20]])
    note = tmp_path / "fair1m/validation/labelXml/0.xml"
    whole = note.read_text()
    for broken, says in (
        (whole.replace("<point>20.0,4.0</point><point>24.0,14.0</point>", ""), "no four corners"),
        (whole.replace("<point>", "<point>9"), "is empty or outside its 40 x 40 pixels"),
    ):
        note.write_text(broken)
        row = row_named("fair1m")
        with pytest.raises(UsageError, match=says):
            [item.read() for item in row.read(str(tmp_path / "fair1m"), row).of("test")]
