"""The made-up scenes, and the metric they are judged by, against geometry and sums done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score

from examples.bev.data import BevDataModule, collated
from examples.bev.metrics import DetectionAP, average_precision, chamfer_distance
from examples.bev.scenes import CAMERAS, HEIGHT, RAYS, WIDTH, make_scene, project


def test_a_scene_is_drawn_from_its_number_alone() -> None:
    first, again, other = make_scene(3), make_scene(3), make_scene(4)
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    assert first.images.min() >= 0
    assert first.images.max() <= 1


def test_what_is_rendered_along_a_ray_is_projected_to_its_pixel() -> None:
    for camera in range(CAMERAS):
        row, column = 20, 11
        point = np.array([[0, 0, 2.2]], np.float32) + 3.0 * RAYS[camera, row, column]
        places, visible = project(point.astype(np.float32))
        assert visible[camera, 0]
        assert places[camera, 0] * [WIDTH, HEIGHT] == pytest.approx([column + 0.5, row + 0.5], abs=1e-3)


def test_a_vehicle_is_seen_where_its_middle_is_projected() -> None:
    scene = make_scene(1_000_005)
    nearest = np.hypot(*scene.vehicles[:, :2].T)[scene.vehicle_classes >= 0].argmin()
    vehicle, kind = (
        scene.vehicles[scene.vehicle_classes >= 0][nearest],
        scene.vehicle_classes[scene.vehicle_classes >= 0][nearest],
    )
    places, visible = project(np.array([[*vehicle[:2], 0.6]], np.float32))
    camera = int(visible[:, 0].argmax())
    column, row = (places[camera, 0] * [WIDTH, HEIGHT]).astype(int)
    colour = scene.images[camera, :, row, column]
    assert colour.argmax() == (0, 2)[kind]  # cars are red, trucks are blue
    assert colour.max() > 1.5 * colour.min()


def test_batches_of_one_recording_in_five_lack_a_camera() -> None:
    row = [torch.zeros(CAMERAS, 3, HEIGHT, WIDTH), *(torch.zeros(1) for _ in range(4))]
    counts = [len(collated([(*row, torch.tensor(32 * recording))]).cameras) for recording in range(10)]
    assert counts == [4, 3, 4, 4, 4, 4, 3, 4, 4, 4]


def test_scenes_come_back_from_their_file(tmp_path: Path) -> None:
    made, read = (BevDataModule(4, 4, 4, str(tmp_path)) for _ in range(2))
    made.setup()
    read.setup()
    assert len(list(tmp_path.iterdir())) == 2
    for left, right in zip(made.train_set.tensors, read.train_set.tensors, strict=True):
        assert torch.equal(left, right)


def test_average_precision_of_falling_precision_is_that_of_scikit_learn() -> None:
    scores, right = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1.0, 1, 0, 1, 0])
    assert average_precision(scores, right, 3) == pytest.approx(average_precision_score(right, scores), abs=1e-6)
    assert average_precision(scores, right, 6) == pytest.approx(average_precision_score(right, scores) / 2, abs=1e-6)


def test_chamfer_distance_is_that_of_the_nearest_points() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(1, 1, points, 2, generator=generator) for points in (5, 7))
    between = cdist(left[0, 0], right[0, 0])
    expected = (between.min(0).mean() + between.min(1).mean()) / 2
    assert float(chamfer_distance(left, right)) == pytest.approx(expected, abs=1e-5)


def test_answers_that_are_right_are_worth_100_percent_and_each_thing_is_found_once() -> None:
    metric = DetectionAP(2, (0.5, 1.0))
    classes = torch.tensor([[0, 1, -1]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.8], [0.5, 0.0]]])
    distances = torch.tensor([[[0.1, 9.0, 0.0], [9.0, 0.2, 0.0], [0.2, 9.0, 0.0]]])
    metric.update(scores, distances, classes)
    assert float(metric.compute()) == pytest.approx(100)  # the second answer for thing 0 comes behind the right one
    metric.reset()
    metric.update(scores, distances + torch.tensor([0.6, 0.0, 0.0]), classes)
    assert float(metric.compute()) == pytest.approx(100 * (0 + 1 + 1 + 1) / 4)
