"""Driving scenes, made up and rendered: a road, vehicles on it, and a ring of pinhole cameras that sees them.

Lengths are in metres. The ego vehicle stands at the origin; x points forward, y to the left, z up. A scene is drawn
from its seed alone, so that the same number is the same scene everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RANGE = 8.0
"""Scenes reach from -RANGE to RANGE along x and y."""
CAMERAS, HEIGHT, WIDTH = 4, 32, 48
MOST_VEHICLES, MOST_LINES, LINE_POINTS = 4, 4, 8
VEHICLE_CLASSES, LINE_CLASSES = ("car", "truck"), ("border", "divider")
_SIZES = np.array([[3.0, 1.6, 1.4], [4.2, 2.0, 2.4]], np.float32)
"""Length, width and height of each class of vehicle."""
_COLOURS = np.array([[0.75, 0.15, 0.15], [0.15, 0.25, 0.75]], np.float32)
_FOCAL = WIDTH / 2 / np.tan(np.radians(52.0))
_CAMERA_HEIGHT = 2.2
_LANE_WIDTH = 2.8


@dataclass(frozen=True)
class Scene:
    """What a scene holds; rows that are not used are zero and have class -1.

    Args:
        images: ``(cameras, 3, height, width)``, 0 to 1.
        vehicles: ``(MOST_VEHICLES, 6)``: x, y, length, width, and sine and cosine of the heading.
        vehicle_classes: ``(MOST_VEHICLES,)``.
        lines: ``(MOST_LINES, LINE_POINTS, 2)``: points of each line from the back to the front.
        line_classes: ``(MOST_LINES,)``.
    """

    images: Floats
    vehicles: Floats
    vehicle_classes: NDArray[np.int64]
    lines: Floats
    line_classes: NDArray[np.int64]


def camera_matrices() -> Floats:
    """Return ``(cameras, 3, 4)``: from a homogeneous point to pixels, times the depth, and the depth."""
    matrices = []
    for angle in np.arange(CAMERAS) * 2 * np.pi / CAMERAS:
        forward = np.array([np.cos(angle), np.sin(angle), 0.0])
        right, down = np.array([np.sin(angle), -np.cos(angle), 0.0]), np.array([0.0, 0.0, -1.0])
        rotation = np.stack([right, down, forward])
        shift = -rotation @ np.array([0.0, 0.0, _CAMERA_HEIGHT])
        lens = np.array([[_FOCAL, 0, WIDTH / 2], [0, _FOCAL, HEIGHT * 0.3], [0, 0, 1]])
        matrices.append(lens @ np.concatenate([rotation, shift[:, None]], axis=1))
    return np.stack(matrices).astype(np.float32)


def project(points: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Project points into every camera.

    Args:
        points: ``(N, 3)``.

    Returns:
        Places in the image, ``(cameras, N, 2)``, from 0 to 1, and whether the camera sees them, ``(cameras, N)``.
    """
    homogeneous = np.concatenate([points, np.ones_like(points[:, :1])], axis=1)
    seen = np.einsum("cij,nj->cni", camera_matrices(), homogeneous)
    depth = seen[..., 2:]
    places = seen[..., :2] / np.maximum(depth, 1e-3) / np.array([WIDTH, HEIGHT], np.float32)
    visible = (depth[..., 0] > 0.1) & (places > 0).all(-1) & (places < 1).all(-1)
    return places.astype(np.float32), visible


def make_scene(seed: int) -> Scene:
    """Draw and render a scene.

    Args:
        seed: which one.
    """
    random = np.random.default_rng(seed)
    lines, line_classes, heading = _draw_road(random)
    vehicles, vehicle_classes = _draw_vehicles(random, heading)
    images = _render(random, lines, line_classes, vehicles, vehicle_classes)
    return Scene(images, vehicles, vehicle_classes, lines, line_classes)


def _draw_road(random: np.random.Generator) -> tuple[Floats, NDArray[np.int64], float]:
    """Lines of a road of one to three lanes, bent a little, and its direction."""
    lanes = int(random.integers(1, MOST_LINES))
    heading, bend = random.uniform(-0.45, 0.45), random.uniform(-0.02, 0.02)
    middle = random.uniform(-1.5, 1.5)
    lines = np.zeros((MOST_LINES, LINE_POINTS, 2), np.float32)
    classes = np.full(MOST_LINES, -1)
    x = np.linspace(-RANGE, RANGE, 81)
    for number in range(lanes + 1):
        side = (number - lanes / 2) * _LANE_WIDTH / np.cos(heading)
        y = middle + side + np.tan(heading) * x + bend * x**2
        inside = np.flatnonzero(np.abs(y) < RANGE)
        if len(inside) < 10:
            continue
        chosen = np.linspace(inside[0], inside[-1], LINE_POINTS)
        lines[number] = np.stack([np.interp(chosen, np.arange(81), v) for v in (x, y)], axis=1)
        classes[number] = int(0 < number < lanes)
    return lines, classes, heading


def _draw_vehicles(random: np.random.Generator, heading: float) -> tuple[Floats, NDArray[np.int64]]:
    vehicles = np.zeros((MOST_VEHICLES, 6), np.float32)
    classes = np.full(MOST_VEHICLES, -1)
    placed: list[Floats] = [np.zeros(2, np.float32)]
    for row in range(int(random.integers(1, MOST_VEHICLES + 1))):
        place = random.uniform(-0.85 * RANGE, 0.85 * RANGE, 2).astype(np.float32)
        if min(float(np.hypot(*(place - other))) for other in placed) < 3.2:
            continue
        placed.append(place)
        kind = int(random.integers(len(VEHICLE_CLASSES)))
        size = _SIZES[kind, :2] * random.uniform(0.9, 1.1)
        angle = heading + random.normal(0, 0.15)
        vehicles[row] = [*place, *size, np.sin(angle), np.cos(angle)]
        classes[row] = kind
    return vehicles, classes


def _rays() -> Floats:
    """Directions of all pixels, ``(cameras, height, width, 3)``, with depth one."""
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    right, down = (u - WIDTH / 2) / _FOCAL, (v - HEIGHT * 0.3) / _FOCAL
    rays = []
    for angle in np.arange(CAMERAS) * 2 * np.pi / CAMERAS:
        cos, sin = np.cos(angle), np.sin(angle)
        rays.append(np.stack([cos + right * sin, sin - right * cos, -down], axis=-1))
    return np.stack(rays).astype(np.float32)


RAYS = _rays()


def _render(
    random: np.random.Generator,
    lines: Floats,
    line_classes: NDArray[np.int64],
    vehicles: Floats,
    vehicle_classes: NDArray[np.int64],
) -> Floats:
    """Images of the scene, with a textured ground, light from one side, and noise."""
    down = RAYS[..., 2]
    ground = down < -1e-3
    reach = np.where(ground, _CAMERA_HEIGHT / np.maximum(-down, 1e-3), 1e3).astype(np.float32)
    places = RAYS[ground][:, :2] * reach[ground][:, None]
    image = np.empty((*RAYS.shape[:3], 3), np.float32)
    image[...] = np.array([0.55, 0.65, 0.8], np.float32) * random.uniform(0.8, 1.1)
    image[ground] = _ground(random, places, reach[ground], lines, line_classes)
    nearest = reach
    for vehicle, kind in zip(vehicles, vehicle_classes, strict=True):
        if kind >= 0:
            hit, shade = _box(vehicle, float(_SIZES[kind, 2]))
            front = hit < nearest
            colour = np.clip(_COLOURS[kind] + random.normal(0, 0.06, 3), 0, 1)
            image[front] = colour * shade[front][:, None]
            nearest = np.where(front, hit, nearest)
    image *= random.uniform(0.75, 1.15)
    image += random.normal(0, 0.02, image.shape)
    channels_first: Floats = np.clip(image, 0, 1).transpose(0, 3, 1, 2).astype(np.float32)
    return channels_first


def _ground(
    random: np.random.Generator, places: Floats, reach: Floats, lines: Floats, line_classes: NDArray[np.int64]
) -> Floats:
    """Colours of places on the ground: asphalt with a texture, and painted lines, blurred by what a pixel covers."""
    wave = random.uniform(0.5, 2.0, (3, 2))
    texture = np.sin(places @ wave.T + random.uniform(0, 6, 3)).mean(axis=1)
    colour = np.repeat((0.32 + 0.05 * texture + random.normal(0, 0.02, len(places)))[:, None], 3, axis=1)
    footprint = reach**2 / (_FOCAL * _CAMERA_HEIGHT) * 0.5 + 0.1
    for line, kind in zip(lines, line_classes, strict=True):
        if kind < 0:
            continue
        start, step = line[:-1], line[1:] - line[:-1]
        along = ((places[:, None] - start) * step).sum(-1) / (step**2).sum(-1)
        off = places[:, None] - start - np.clip(along, 0, 1)[..., None] * step
        distance = np.sqrt((off**2).sum(-1))
        paint = np.clip((0.18 - distance.min(axis=1)) / footprint + 0.5, 0, 1) * np.minimum(1, 0.36 / footprint)
        painted = np.array([0.95, 0.95, 0.95] if kind == 0 else [0.95, 0.8, 0.2], np.float32)
        colour += paint[:, None] * (painted - colour)
    ground: Floats = colour.astype(np.float32)
    return ground


def _box(vehicle: Floats, height: float) -> tuple[Floats, Floats]:
    """How far along each ray it meets a vehicle (infinite if it does not), and how bright the side is that it meets."""
    x, y, length, width, sin, cos = vehicle
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
    origin = turn @ np.array([-x, -y, _CAMERA_HEIGHT - height / 2], np.float32)
    directions = RAYS @ turn.T
    directions = np.where(np.abs(directions) < 1e-6, 1e-6, directions)
    half = np.array([length, width, height], np.float32) / 2
    sides = np.stack([(-half - origin) / directions, (half - origin) / directions])
    enter, leave = sides.min(axis=0), sides.max(axis=0).min(axis=-1)
    first = enter.max(axis=-1)
    hit = np.where((first < leave) & (first > 0), first, np.inf).astype(np.float32)
    shade = np.array([0.75, 0.95, 1.1], np.float32)[enter.argmax(axis=-1)]
    return hit, shade
