"""Ten 3-D object classes with named keypoints and per-instance proportions, paint and pattern.

Object frame: +x front, +y left, +z up, ground at z = 0, roughly metres. Left and right are the
object's own, so "wheel_front_left" is the same wheel from every viewpoint. Parts that make a class
recognisable (tyres, hubs, windows, lamps, hooves) keep their typical look; the rest varies.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nemf.datasets.rendering import Material, Mesh

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class SolidObject:
    """One instance: its mesh and its named keypoints, object coordinates (3,) each."""

    mesh: Mesh
    keypoints: dict[str, np.ndarray]


@dataclass(frozen=True)
class ObjectClass:
    """How a class is built and photographed.

    ``voc_id`` is its 1-based place in the alphabetical list of the 20 PASCAL VOC classes.
    ``azimuth_deg`` bounds the angle away from the front, on either side; ``setting`` names the
    kind of background; ``keypoints`` is the annotated subset, in order; ``tolerance`` is how far
    (as a share of the object's diagonal) a keypoint may lie under the surface that shows it, as
    the middle of a wheel's axle does.
    """

    name: str
    voc_id: int
    build: Callable[[np.random.Generator], SolidObject]
    azimuth_deg: tuple[float, float]
    elevation_deg: tuple[float, float]
    setting: str
    keypoints: tuple[str, ...]
    tolerance: float = 0.03


def _tint(rng: np.random.Generator, colour: Colour, amount: float = 0.12) -> Colour:
    """A class-typical colour with a little variation in brightness and hue."""
    varied = np.asarray(colour) * rng.uniform(1 - amount, 1 + amount)
    varied = varied + rng.uniform(-amount / 3, amount / 3, 3)
    return tuple(np.clip(varied, 0.02, 1.0).tolist())


def random_colour(rng: np.random.Generator, saturation=(0.35, 0.95), value=(0.5, 1.0)) -> Colour:
    """Any hue, with saturation and value drawn from the given bounds."""
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))


def random_axes(rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal (3, 3) matrix, the orientation of a pattern."""
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def _paint(rng: np.random.Generator, size: float, gloss: float = 0.25) -> Material:
    """A coat that differs from instance to instance in colour and pattern."""
    pattern = rng.choice(
        ["plain", "stripes", "checks", "spots", "blotches"], p=[0.36, 0.2, 0.12, 0.16, 0.16]
    )
    colour = random_colour(rng) if rng.uniform() < 0.8 else (rng.uniform(0.15, 0.95),) * 3
    return Material(
        colour,
        str(pattern),
        random_colour(rng, (0.1, 0.9), (0.2, 1.0)),
        size * rng.uniform(0.09, 0.22),
        random_axes(rng),
        gloss,
    )


def _plain(rng: np.random.Generator, colour: Colour, gloss: float = 0.0) -> Material:
    return Material(_tint(rng, colour), gloss=gloss)


def _rounded_ring(x: float, half_width: float, low: float, high: float, cut: float) -> np.ndarray:
    """Cross-section (8, 3) in the plane x: a rectangle with its corners cut off."""
    y, z = half_width, (low, high)
    return np.array(
        [
            (x, -y + cut, z[0]),
            (x, y - cut, z[0]),
            (x, y, z[0] + cut),
            (x, y, z[1] - cut),
            (x, y - cut, z[1]),
            (x, -y + cut, z[1]),
            (x, -y, z[1] - cut),
            (x, -y, z[0] + cut),
        ]
    )


def _car_wheel(mesh: Mesh, rng, centre, radius: float, width: float, hub: Material) -> None:
    """A tyre with a bright hub, axle along y, symmetric about ``centre``."""
    tyre = _plain(rng, (0.09, 0.09, 0.1))
    start = np.asarray(centre) - (0, width / 2, 0)
    profile = [(0.82, 0), (1, 0.2), (1, 0.8), (0.82, 1)]
    mesh.lathe(start, (0, 1, 0), np.array(profile) * (radius, width), tyre, segments=20)
    for grow, share, material in ((0.01, 0.62, hub), (0.02, 0.2, tyre)):
        offset = np.array([0, width / 2 + grow * radius, 0])
        mesh.cylinder(centre - offset, centre + offset, share * radius, material, segments=12)


def _sides(points: dict[str, tuple[float, float, float]]) -> dict[str, np.ndarray]:
    """Mirror left points: each entry becomes name_left as given and name_right with y negated."""
    both = {}
    for name, (x, y, z) in points.items():
        both[f"{name}_left"] = np.array([x, y, z])
        both[f"{name}_right"] = np.array([x, -y, z])
    return both


def _side_panels(mesh: Mesh, quad: np.ndarray, material: Material, spans, v) -> None:
    """Lay panels on a left-side quadrilateral and on its mirror image.

    ``quad`` runs front-bottom, front-top, rear-top, rear-bottom on the left; ``spans`` are the
    parts from front (0) to rear (1), ``v`` the part from bottom (0) to top (1).
    """
    for span in spans:
        # left, counter-clockwise from outside: rear-bottom is to the right of front-bottom
        left = quad[[0, 3, 2, 1]]
        mesh.panel(left, material, u=span, v=v)
        right = (quad * (1, -1, 1))[[3, 0, 1, 2]]
        mesh.panel(right, material, u=(1 - span[1], 1 - span[0]), v=v)


def _car(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 4.0, 0.35)
    length, width, height = rng.uniform(3.7, 4.8), rng.uniform(1.65, 1.9), rng.uniform(1.35, 1.65)
    front, half, sill, belt = length / 2, width / 2, 0.2, 0.6 * height
    glass = _plain(rng, (0.42, 0.6, 0.75), 0.5)
    dark = _plain(rng, (0.12, 0.12, 0.13))
    body = [
        _rounded_ring(-front, 0.86 * half, sill + 0.1, belt - 0.1, 0.06),
        _rounded_ring(-front + 0.1, 0.96 * half, sill, belt, 0.08),
        _rounded_ring(-0.25 * length, half, sill, belt + 0.03, 0.08),
        _rounded_ring(0.25 * length, half, sill, belt, 0.08),
        _rounded_ring(front - 0.14, 0.95 * half, sill, 0.86 * belt, 0.08),
        _rounded_ring(front, 0.82 * half, sill + 0.12, 0.8 * belt, 0.06),
    ]
    mesh.loft(np.stack(body), paint, smooth=False)
    hatch = rng.uniform() < 0.5
    foot_front, foot_rear = 0.2 * length, -(0.47 if hatch else 0.33) * length
    roof_front = foot_front - rng.uniform(0.5, 0.75)
    roof_rear = foot_rear + (rng.uniform(0.15, 0.4) if hatch else rng.uniform(0.4, 0.6))
    low, high, foot, roof = belt - 0.06, height, 0.92 * half, 0.76 * half
    # front-left, front-right, rear-right, rear-left
    bottom = np.array(
        [
            (foot_front, foot, low),
            (foot_front, -foot, low),
            (foot_rear, -foot, low),
            (foot_rear, foot, low),
        ]
    )
    top = np.array(
        [
            (roof_front, roof, high),
            (roof_front, -roof, high),
            (roof_rear, -roof, high),
            (roof_rear, roof, high),
        ]
    )
    mesh.hexahedron(bottom, top, paint)
    side = np.array([bottom[0], top[0], top[3], bottom[3]])
    split = rng.uniform(0.45, 0.55)
    _side_panels(mesh, side, glass, ((0.08, split - 0.02), (split + 0.02, 0.93)), (0.2, 0.88))
    mesh.panel([bottom[1], bottom[0], top[0], top[1]], glass, u=(0.06, 0.94), v=(0.16, 0.93))
    mesh.panel([bottom[3], bottom[2], top[2], top[3]], glass, u=(0.08, 0.92), v=(0.25, 0.9))

    mesh.box((front - 0.02, 0, sill + 0.16), (0.14, 1.72 * half, 0.13), dark)
    mesh.box((-front + 0.02, 0, sill + 0.16), (0.14, 1.76 * half, 0.13), dark)
    mesh.box((front, 0, 0.66 * belt), (0.05, 0.8 * half, 0.16), dark)
    plate = _plain(rng, (0.92, 0.92, 0.85))
    mesh.box((front + 0.05, 0, sill + 0.17), (0.03, 0.42, 0.1), plate)
    mesh.box((-front - 0.04, 0, sill + 0.3), (0.08, 0.42, 0.12), plate)
    lamp, tail = _plain(rng, (0.97, 0.95, 0.75), 0.4), _plain(rng, (0.8, 0.06, 0.06), 0.3)
    light = (front - 0.07, 0.68 * half, 0.68 * belt)
    tail_light = (-front + 0.04, 0.76 * half, 0.72 * belt)
    for sign in (1, -1):
        mirrored = np.array([1, sign, 1])
        mesh.ellipsoid(light * mirrored, (0.13, 0.2, 0.12), lamp)
        mesh.box(tail_light * mirrored, (0.12, 0.3, 0.2), tail)
    radius, tyre_width = rng.uniform(0.3, 0.37), 0.24
    hub = _plain(rng, (0.75, 0.76, 0.78), 0.3)
    axle_front, axle_rear, track = 0.31 * length, -0.29 * length, half - 0.07
    for x in (axle_front, axle_rear):
        for sign in (1, -1):
            centre = np.array([x, sign * track, radius])
            inner = np.array([x, sign * (half - 0.25), radius])
            mesh.cylinder(
                inner, (x, sign * (half + 0.012), radius), 1.2 * radius, dark, segments=18
            )
            _car_wheel(mesh, rng, centre, radius, tyre_width, hub)
    outer = track + tyre_width / 2 + 0.02 * radius
    points = _sides(
        {
            "wheel_front": (axle_front, outer, radius),
            "wheel_rear": (axle_rear, outer, radius),
            "headlight": (light[0] + 0.1, light[1] + 0.1, light[2]),
            "taillight": (tail_light[0] - 0.06, tail_light[1] + 0.1, tail_light[2]),
            "roof_front": tuple(top[0]),
            "roof_rear": tuple(top[3]),
            "windshield_base": tuple(bottom[0] + (0, 0, 0.06)),
            "bumper_front": (front + 0.03, 0.84 * half, sill + 0.16),
        }
    )
    return SolidObject(mesh, points)


def _bus(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 7.0, 0.3)
    length, width, height = rng.uniform(6.5, 9.5), rng.uniform(2.3, 2.6), rng.uniform(2.7, 3.2)
    front, half, floor = length / 2, width / 2, 0.35
    rings = [_rounded_ring(x, half, floor, height, 0.1) for x in (-front, front)]
    mesh.loft(np.stack(rings), paint, smooth=False)
    glass, dark = _plain(rng, (0.35, 0.52, 0.68), 0.5), _plain(rng, (0.1, 0.1, 0.11))
    band = Material(random_colour(rng, (0.0, 0.9), (0.3, 1.0)))
    side = np.array(
        [
            (front, half, floor + 0.1),
            (front, half, height - 0.1),
            (-front, half, height - 0.1),
            (-front, half, floor + 0.1),
        ]
    )
    count = int(rng.integers(5, 8))
    edges = np.linspace(0.03, 0.97, count + 1)
    windows = [(a + 0.012, b - 0.012) for a, b in pairwise(edges)]
    _side_panels(mesh, side, glass, windows, (0.48, 0.86))
    _side_panels(mesh, side, band, ((0.0, 1.0),), (0.22, rng.uniform(0.28, 0.38)))
    right = (side * (1, -1, 1))[[3, 0, 1, 2]]
    mesh.panel(right, glass, u=(1 - windows[0][1], 1 - windows[0][0]), v=(0.02, 0.86), lift=0.03)
    y, z = half - 0.04, (floor + 0.1, height - 0.1)
    face = np.array([(front, -y, z[0]), (front, y, z[0]), (front, y, z[1]), (front, -y, z[1])])
    mesh.panel(face, glass, u=(0.05, 0.95), v=(0.36, 0.82), lift=0.02)
    mesh.panel(face, dark, u=(0.2, 0.8), v=(0.86, 0.99), lift=0.02)
    sign_text = Material((1.0, 0.8, 0.2), "stripes", (0.1, 0.1, 0.1), 0.3, np.eye(3)[[1, 0, 2]])
    mesh.panel(face, sign_text, u=(0.26, 0.74), v=(0.89, 0.96), lift=0.04)
    back = face[[1, 0, 3, 2]] * (-1, 1, 1)
    mesh.panel(back, glass, u=(0.15, 0.85), v=(0.5, 0.82), lift=0.02)
    lamp, tail = _plain(rng, (0.97, 0.95, 0.75), 0.3), _plain(rng, (0.8, 0.06, 0.06), 0.3)
    light_z = floor + 0.35
    for sign in (1, -1):
        mesh.ellipsoid((front, sign * 0.74 * half, light_z), (0.08, 0.19, 0.15), lamp)
        mesh.box((-front, sign * 0.8 * half, light_z + 0.2), (0.08, 0.22, 0.4), tail)
    mesh.box((front, 0, floor + 0.06), (0.16, 1.98 * half, 0.2), dark)
    radius = rng.uniform(0.44, 0.5)
    axle_front, axle_rear, track = front - 0.22 * length, -front + 0.2 * length, half - 0.12
    hub = _plain(rng, (0.72, 0.72, 0.74), 0.3)
    for x in (axle_front, axle_rear):
        for sign in (1, -1):
            inner, outer = (
                (x, sign * (half - 0.3), radius),
                (x, sign * (half + 0.02), radius),
            )
            mesh.cylinder(inner, outer, 1.2 * radius, dark, segments=18)
            _car_wheel(mesh, rng, np.array([x, sign * track, radius]), radius, 0.34, hub)
    points = _sides(
        {
            "roof_front": (front, half - 0.05, height - 0.05),
            "roof_rear": (-front, half - 0.05, height - 0.05),
            "bottom_front": (front, half - 0.05, floor + 0.05),
            "bottom_rear": (-front, half - 0.05, floor + 0.05),
            "wheel_front": (axle_front, track + 0.17 + 0.02 * radius, radius),
            "wheel_rear": (axle_rear, track + 0.17 + 0.02 * radius, radius),
        }
    )
    return SolidObject(mesh, points)


def _aeroplane(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 8.0, 0.3)
    length, radius = rng.uniform(9, 11), rng.uniform(0.62, 0.8)
    front, lift = 0.45 * length, 1.6
    stations = [
        (1.0, 0.02, -0.12), (0.985, 0.3, -0.1), (0.94, 0.6, -0.06), (0.87, 0.88, 0.0),
        (0.8, 1.0, 0.0), (0.35, 1.0, 0.0), (0.15, 0.66, 0.2), (0.03, 0.26, 0.42), (0.0, 0.05, 0.5),
    ]  # fmt: skip
    angle = 2 * np.pi * np.arange(16) / 16
    rings = np.stack(
        [
            np.stack(
                [
                    np.full(16, front - length * (1 - share)),
                    size * radius * np.cos(angle),
                    lift + radius * (rise + size * np.sin(angle)),
                ],
                axis=1,
            )
            for share, size, rise in stations
        ]
    )
    mesh.loft(rings, paint)
    tail_x = front - length
    span, sweep, chord = rng.uniform(4.2, 5.4), rng.uniform(1.4, 2.4), rng.uniform(1.7, 2.2)
    metal = _plain(rng, (0.72, 0.74, 0.78), 0.3)
    trim = Material(random_colour(rng), gloss=0.2)
    dark = _plain(rng, (0.12, 0.14, 0.2), 0.3)
    glass = _plain(rng, (0.3, 0.45, 0.62), 0.6)

    def blade(root, tip, root_chord, tip_chord, thick, axis, material):
        """A wing-like solid; root and tip are the middles of the two leading edges."""
        across = np.eye(3)[axis]
        outline = np.array(
            [(0, 0), (-0.25, 0.5), (-0.7, 0.4), (-1, 0), (-0.7, -0.4), (-0.25, -0.5)]
        )
        rings = [
            np.asarray(start)
            + outline[:, :1] * size * np.array([1.0, 0, 0])
            + outline[:, 1:] * thick * size * across
            for start, size in ((root, root_chord), (tip, tip_chord))
        ]
        mesh.loft(np.stack(rings), material, smooth=False)

    wing_x, wing_z = 0.08 * length, lift - 0.35 * radius
    dihedral, engine_y = rng.uniform(0.2, 0.6), 0.42 * span
    engine_x = wing_x - 0.42 * sweep + 0.35
    engine = np.array([engine_x, engine_y, wing_z - 0.38])
    tip = np.array([wing_x - sweep, span, wing_z + dihedral])
    for sign in (1, -1):
        mirror = np.array([1, sign, 1])
        blade(
            (wing_x, sign * 0.5 * radius, wing_z), tip * mirror, chord, 0.4 * chord, 0.13, 2, metal
        )
        profile = [(0.2, 0), (0.34, 0.25), (0.36, 1.0), (0.3, 1.25), (0.24, 1.3)]
        mesh.lathe((engine - (1.3, 0, 0)) * mirror, (1, 0, 0), profile, trim)
        mesh.cylinder(engine * mirror, (engine + (0.02, 0, 0)) * mirror, 0.23, dark, segments=14)
        tail_tip = np.array([tail_x - 0.15, 0.34 * span, lift + 0.62 * radius])
        blade(
            (tail_x + 1.1, sign * 0.1, lift + 0.42 * radius),
            tail_tip * mirror, 1.05, 0.5, 0.12, 2, metal,
        )  # fmt: skip
        for x in np.linspace(0.26, 0.74, 11) * length + tail_x:
            mesh.box((x, sign * radius * 0.95, lift + 0.28 * radius), (0.2, 0.1, 0.22), dark)
    fin_height = rng.uniform(1.5, 2.0)
    fin_top = np.array([tail_x - 0.1, 0, lift + 0.5 * radius + fin_height])
    blade((tail_x + 1.7, 0, lift + 0.5 * radius), fin_top, 1.7, 0.75, 0.12, 1, trim)
    nose_x = tail_x + length
    for sign in (1, -1):
        quad = np.array(
            [
                (nose_x - 0.105 * length, 0.02, lift + 0.74 * radius),
                (nose_x - 0.052 * length, 0.02, lift + 0.5 * radius),
                (nose_x - 0.052 * length, 0.47 * radius, lift + 0.22 * radius),
                (nose_x - 0.105 * length, 0.74 * radius, lift + 0.42 * radius),
            ]
        )
        quad = quad if sign > 0 else (quad * (1, -1, 1))[::-1]
        mesh.panel(quad, glass, lift=0.07)
    points = {
        "nose": np.array([nose_x, 0, lift - 0.12 * radius]),
        "cockpit": np.array([nose_x - 0.078 * length, 0, lift + 0.68 * radius]),
        "tail_end": np.array([tail_x, 0, lift + 0.5 * radius]),
        "fin_top_front": fin_top,
        "fin_top_rear": fin_top - (0.75, 0, 0),
        **_sides(
            {
                "wing_tip": tuple(tip),
                "engine": tuple(engine + (0.02, 0, 0)),
                "tailplane_tip": tuple(tail_tip),
            }
        ),
        "belly": np.array([0.1 * length, 0, lift - radius]),
    }
    return SolidObject(mesh, points)


def _spoked_wheel(mesh: Mesh, rng, centre, radius: float, thick: float, hub: Material) -> None:
    mesh.torus(centre, radius - thick, thick, _plain(rng, (0.09, 0.09, 0.1)))
    mesh.torus(centre, radius - 2.2 * thick, 0.4 * thick, hub)
    turn = rng.uniform(0, 1)
    for angle in (turn + np.arange(8)) * np.pi / 4:
        rim = np.array([np.cos(angle), 0, np.sin(angle)]) * (radius - 2 * thick)
        mesh.cylinder(centre, centre + rim, 0.004 + 0.1 * thick, hub, segments=4)


def _bicycle(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 1.2, 0.3)
    radius, base = rng.uniform(0.31, 0.36), rng.uniform(0.98, 1.12)
    metal, dark = _plain(rng, (0.72, 0.73, 0.75), 0.4), _plain(rng, (0.13, 0.11, 0.1), 0.1)
    rear, front = np.array([-base / 2, 0, radius]), np.array([base / 2, 0, radius])
    for centre in (rear, front):
        _spoked_wheel(mesh, rng, centre, radius, 0.026, metal)
        mesh.cylinder(centre - (0, 0.05, 0), centre + (0, 0.05, 0), 0.03, metal)
    crank = np.array([-0.06, 0, radius - 0.05])
    head_low = front + (-0.13, 0, rng.uniform(0.34, 0.4))
    head_top = head_low + (-0.05, 0, rng.uniform(0.12, 0.2))
    seat_cluster = crank + (-0.16, 0, rng.uniform(0.44, 0.54))
    seat = seat_cluster + (-0.05, 0, rng.uniform(0.12, 0.24))
    tube = rng.uniform(0.022, 0.03)
    low_step = rng.uniform() < 0.3
    joint = crank + 0.45 * (seat_cluster - crank) if low_step else seat_cluster
    for a, b in ((crank, head_low), (joint, head_top), (crank, seat_cluster), (head_low, head_top)):
        mesh.cylinder(a, b, tube, paint)
    mesh.cylinder(seat_cluster, seat, 0.7 * tube, metal)
    for sign in (1, -1):
        side = np.array([0, sign * 0.05, 0])
        mesh.cylinder(crank + 0.5 * side, rear + side, 0.6 * tube, paint, segments=6)
        mesh.cylinder(seat_cluster + 0.5 * side, rear + side, 0.6 * tube, paint, segments=6)
        mesh.cylinder(head_low + 0.8 * side, front + side, 0.7 * tube, paint, segments=6)
    saddle = np.stack(
        [
            _rounded_ring(x, half, 0.0, 0.05, 0.012) + seat
            for x, half in ((-0.14, 0.08), (-0.04, 0.075), (0.05, 0.03), (0.14, 0.02))
        ]
    )
    mesh.loft(saddle, dark)
    stem = head_top + (0.02, 0, rng.uniform(0.08, 0.16))
    mesh.cylinder(head_top, stem, 0.7 * tube, metal)
    reach, back = rng.uniform(0.24, 0.3), rng.uniform(-0.12, 0.06)
    for sign in (1, -1):
        bend = stem + (0.03, sign * 0.55 * reach, 0.03)
        grip = stem + (back, sign * reach, 0.02)
        mesh.cylinder(stem, bend, 0.015, metal, segments=8)
        mesh.cylinder(bend, grip, 0.015, metal, segments=8)
        mesh.cylinder(0.4 * bend + 0.6 * grip, grip, 0.024, dark, segments=8)
    mesh.cylinder(crank - (0, 0.012, 0), crank + (0, 0.045, 0), 0.09, metal, segments=16)
    turn = rng.uniform(0, 2 * np.pi)
    arm = 0.16 * np.array([np.cos(turn), 0, np.sin(turn)])
    for sign in (1, -1):
        foot = crank + sign * arm + (0, sign * 0.09, 0)
        mesh.cylinder(crank + (0, sign * 0.06, 0), foot, 0.013, metal, segments=6)
        mesh.box(foot + (0, sign * 0.04, 0), (0.09, 0.09, 0.025), dark)
    points = {
        "wheel_front": front,
        "wheel_rear": rear,
        "wheel_front_bottom": front - (0, 0, radius),
        "wheel_rear_bottom": rear - (0, 0, radius),
        "handle_left": stem + (back, reach, 0.02),
        "handle_right": stem + (back, -reach, 0.02),
        "saddle_front": seat + (0.14, 0, 0.045),
        "saddle_rear": seat + (-0.14, 0, 0.045),
        "crank": crank,
        "head_tube": head_low,
        "seat_cluster": seat_cluster,
    }
    return SolidObject(mesh, points)


def _motorbike(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 1.4, 0.5)
    radius, base = rng.uniform(0.3, 0.34), rng.uniform(1.35, 1.55)
    metal, dark = _plain(rng, (0.72, 0.73, 0.76), 0.6), _plain(rng, (0.12, 0.11, 0.11), 0.15)
    engine_metal = _plain(rng, (0.4, 0.4, 0.42), 0.3)
    rear, front = np.array([-base / 2, 0, radius]), np.array([base / 2, 0, radius])
    for centre, thick in ((front, 0.055), (rear, 0.075)):
        _spoked_wheel(mesh, rng, centre, radius, thick, metal)
        mesh.cylinder(centre - (0, 0.05, 0), centre + (0, 0.05, 0), 0.1, metal, segments=14)
    head = front + (-0.3, 0, 0.55)
    engine = np.array([0.0, 0, radius + 0.08])
    mesh.box(engine, (0.42, 0.28, 0.24), engine_metal)
    for shift in (-0.1, 0.1):
        mesh.cylinder(engine + (shift, 0, 0.08), engine + (1.8 * shift, 0, 0.32), 0.1, engine_metal)
    for sign in (1, -1):
        mesh.cylinder(
            engine + (-0.06, sign * 0.1, 0), engine + (-0.06, sign * 0.17, 0), 0.11, metal,
            segments=14,
        )  # fmt: skip
        fork = np.array([0, sign * 0.065, 0])
        mesh.cylinder(front + fork, head + fork + (0, 0, 0.1), 0.022, metal)
        mesh.cylinder(rear + fork, rear + 1.4 * fork + (0.16, 0, 0.36), 0.025, metal)
        mesh.cylinder(rear + fork, engine + fork + (-0.1, 0, -0.05), 0.03, dark, segments=6)
    mesh.cylinder(engine + (0.1, 0, 0.0), head, 0.05, dark)
    tank = np.array([0.14, 0, radius + 0.5])
    mesh.ellipsoid(tank, (0.32, 0.16, 0.15), paint, tilt=0.12)
    seat_high = rng.uniform(0.4, 0.46)
    rise = rng.uniform(0.0, 0.12)
    seat = np.stack(
        [
            _rounded_ring(x, half, radius + low, radius + high, 0.03)
            for x, half, low, high in (
                (-0.72, 0.09, seat_high + rise - 0.08, seat_high + rise),
                (-0.45, 0.14, seat_high + 0.5 * rise - 0.1, seat_high + 0.7 * rise),
                (-0.16, 0.13, seat_high - 0.1, seat_high - 0.02),
                (-0.04, 0.08, seat_high - 0.06, seat_high + 0.02),
            )
        ]
    )
    mesh.loft(seat, dark)
    mesh.hexahedron(
        np.array([(-0.66, 0.09, 0), (-0.66, -0.09, 0), (-0.1, -0.12, 0), (-0.1, 0.12, 0)])
        + (0, 0, radius + 0.24),
        np.array([(-0.84, 0.1, 0.1), (-0.84, -0.1, 0.1), (-0.1, -0.13, 0), (-0.1, 0.13, 0)])
        + (0, 0, radius + seat_high - 0.07),
        paint,
    )
    for centre, extra, spread in ((front, 0.03, (40, 140)), (rear, 0.05, (60, 160))):
        angles = np.deg2rad(np.linspace(*spread, 9))
        arch = []
        for angle in angles:
            ray = np.array([np.cos(angle), 0, np.sin(angle)])
            inner, outer = centre + ray * (radius + extra), centre + ray * (radius + extra + 0.03)
            wide = np.array([0, 0.09, 0])
            arch.append([inner - wide, outer - wide, outer + wide, inner + wide])
        mesh.loft(np.array(arch), paint)
    lamp, tail = _plain(rng, (0.97, 0.95, 0.78), 0.4), _plain(rng, (0.85, 0.06, 0.05), 0.3)
    light = head + (0.16, 0, 0.02)
    mesh.ellipsoid(light - (0.06, 0, 0), (0.12, 0.12, 0.12), dark)
    mesh.lathe(light - (0.02, 0, 0), (1, 0, 0), [(0.11, 0), (0.1, 0.06), (0.05, 0.085)], lamp)
    tail_light = np.array([-0.84, 0, radius + seat_high - 0.04 + 0.06])
    mesh.box(tail_light, (0.08, 0.18, 0.08), tail)
    bar = head + (-0.03, 0, 0.14)
    reach, up = rng.uniform(0.34, 0.42), rng.uniform(0.05, 0.16)
    for sign in (1, -1):
        elbow, grip = bar + (0, sign * 0.2, up), bar + (-0.14, sign * reach, up)
        mesh.cylinder(bar, elbow, 0.018, metal, segments=8)
        mesh.cylinder(elbow, grip, 0.018, metal, segments=8)
        mesh.cylinder(0.45 * elbow + 0.55 * grip, grip, 0.03, dark, segments=8)
    pipe_end = np.array([-0.86, -0.2, radius + 0.04])
    mesh.cylinder(engine + (0.1, -0.2, -0.08), (-0.3, -0.2, radius - 0.04), 0.035, metal)
    mesh.cylinder((-0.3, -0.2, radius - 0.04), pipe_end, (0.05, 0.07), metal, segments=14)
    points = {
        "wheel_front": front,
        "wheel_rear": rear,
        "wheel_front_bottom": front - (0, 0, radius),
        "wheel_rear_bottom": rear - (0, 0, radius),
        "handle_left": bar + (-0.14, reach, up),
        "handle_right": bar + (-0.14, -reach, up),
        "headlight": light + (0.06, 0, 0),
        "taillight": tail_light - (0.04, 0, 0),
        "tank_top": tank + (0, 0, 0.15),
        "seat_rear": np.array([-0.72, 0, radius + seat_high + rise]),
        "exhaust_end": pipe_end,
        "engine": engine + (0, 0, -0.12),
    }
    return SolidObject(mesh, points)


def _bottle(rng: np.random.Generator) -> SolidObject:
    mesh = Mesh()
    radius, height = rng.uniform(0.36, 0.46), rng.uniform(2.5, 3.2)
    shoulder, neck_low = height * rng.uniform(0.55, 0.64), height * rng.uniform(0.72, 0.78)
    neck = radius * rng.uniform(0.32, 0.42)
    glass_colour = [(0.1, 0.32, 0.14), (0.34, 0.18, 0.07), (0.62, 0.76, 0.74), (0.13, 0.15, 0.3)]
    glass = _plain(rng, glass_colour[int(rng.integers(4))], 0.9)
    slope = np.linspace(0, np.pi, 9)
    curve = neck + (radius - neck) * (1 + np.cos(slope)) / 2
    heights = shoulder + (neck_low - shoulder) * np.linspace(0, 1, 9)
    profile = [
        (0.8 * radius, 0), (radius, 0.05), *zip(curve, heights, strict=True),
        (0.95 * neck, 0.93 * height), (1.15 * neck, 0.935 * height),
        (1.15 * neck, 0.96 * height), (neck, 0.962 * height), (neck, height),
    ]  # fmt: skip
    mesh.lathe((0, 0, 0), (0, 0, 1), profile, glass, segments=28)
    foil = Material(random_colour(rng), gloss=0.4)
    cap_low = height * rng.uniform(0.84, 0.9)
    cap_profile = np.array(
        [(1.14 * neck, cap_low / height), (1.1 * neck, 0.93), (1.25 * neck, 0.935),
         (1.25 * neck, 0.97), (1.12 * neck, 0.975), (1.1 * neck, 1.01)]
    ) * (1, height)  # fmt: skip
    mesh.lathe((0, 0, 0), (0, 0, 1), cap_profile, foil, segments=20)

    spread = np.deg2rad(rng.uniform(50, 62))
    low, high = height * rng.uniform(0.12, 0.17), shoulder * rng.uniform(0.84, 0.93)
    paper = _paint(rng, 1.0, 0.05)
    border = Material(random_colour(rng, (0.2, 0.9), (0.15, 0.9)))

    def wrap(angles, z0, z1, material, lift):
        """Paste a patch onto the barrel between two meridians (radians, 0 = front)."""
        r = radius + lift
        edge = np.stack([r * np.cos(angles), r * np.sin(angles)], axis=1)
        for a, b in pairwise(edge):
            mesh.panel([(*a, z0), (*b, z0), (*b, z1), (*a, z1)], material, lift=0)

    meridians = np.linspace(-spread, spread, 15)
    rim = 0.07 * (high - low)
    wrap(meridians, low, high, border, 0.008)
    wrap(meridians, low + rim, high - rim, paper, 0.014)
    ink = Material(random_colour(rng, (0.3, 0.9), (0.1, 0.5)))
    middle = (low + high) / 2
    tall = 0.22 * (high - low)
    wrap(0.45 * meridians, middle - 0.6 * tall, middle + 0.6 * tall, border, 0.02)
    wrap(0.32 * meridians, middle - 0.35 * tall, middle + 0.35 * tall, ink, 0.026)
    y, x = (radius + 0.01) * np.sin(spread), (radius + 0.01) * np.cos(spread)
    side = np.deg2rad(55)
    points = {
        "cap_top": np.array([0, 0, 1.01 * height]),
        "cap_bottom": np.array([1.14 * neck, 0, cap_low]),
        "neck_bottom": np.array([neck, 0, neck_low]),
        "label_centre": np.array([radius + 0.026, 0, middle]),
        **_sides(
            {
                "label_top": (x, y, high),
                "label_bottom": (x, y, low),
                "shoulder": (radius * np.cos(side), radius * np.sin(side), shoulder),
                "base": (radius * np.cos(side), radius * np.sin(side), 0.05),
            }
        ),
    }
    return SolidObject(mesh, points)


def _chair(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 0.9, 0.1)
    wide, deep = rng.uniform(0.42, 0.52), rng.uniform(0.4, 0.5)
    seat, tall = rng.uniform(0.42, 0.48), rng.uniform(0.85, 1.1)
    wood = _plain(rng, [(0.5, 0.32, 0.16), (0.25, 0.15, 0.09), (0.75, 0.58, 0.36)][rng.integers(3)])
    half, reach = wide / 2, deep / 2
    thick, leg = 0.055, rng.uniform(0.024, 0.034)
    splay, lean = rng.uniform(0.0, 0.05), rng.uniform(0.03, 0.12)
    mesh.box((0, 0, seat - thick / 2), (deep, wide, thick), wood)
    cushion = [
        _rounded_ring(x, half - 0.01, seat - 0.01, seat + high, 0.02)
        for x, high in ((-reach + 0.01, 0.02), (-reach + 0.05, 0.045), (reach - 0.05, 0.045),
                        (reach + 0.005, 0.02))
    ]  # fmt: skip
    mesh.loft(np.stack(cushion), paint)

    def post(foot, top):
        square = leg * np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)])
        mesh.hexahedron(square * 0.8 + foot, square + top, wood)

    feet = {"front": reach - leg + splay, "rear": -reach + leg - splay}
    spread = half - leg + splay
    top_x = -reach + leg - lean
    for sign in (1, -1):
        for x in feet.values():
            post(
                (x, sign * spread, 0),
                (np.sign(x) * (reach - leg), sign * (half - leg), seat - thick),
            )
        post((-reach + leg, sign * (half - leg), seat), (top_x, sign * (half - leg), tall))
    if rng.uniform() < 0.5:
        for share in rng.choice([0.25, 0.3, 0.35]) + np.array([0, 0.3, 0.6]):
            x = -reach + leg - lean * share
            mesh.box((x, 0, seat + share * (tall - seat)), (0.03, wide - 2 * leg, 0.07), wood)
    else:
        low = seat + 0.12
        slab = np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]) * (0.025, half - leg, 1)
        bottom_x = -reach + leg - lean * 0.12 / (tall - seat)
        mesh.hexahedron(slab + (bottom_x, 0, low), slab + (top_x, 0, tall - 0.04), paint)
    mesh.box((top_x, 0, tall), (2.2 * leg, wide, 0.06), wood)
    if rng.uniform() < 0.4:
        for sign in (1, -1):
            mesh.box((0.02, sign * (half + 0.01), seat + 0.22), (deep - 0.02, 0.045, 0.03), wood)
            post(
                (reach - 0.06, sign * (half - 0.01), seat), (reach - 0.06, sign * half, seat + 0.21)
            )
    points = _sides(
        {
            "back_top": (top_x + 1.1 * leg, half, tall + 0.03),
            "seat_front": (reach, half, seat),
            "seat_rear": (-reach, half, seat),
            "foot_front": (feet["front"], spread, 0.0),
            "foot_rear": (feet["rear"], spread, 0.0),
        }
    )
    return SolidObject(mesh, points)


def _tvmonitor(rng: np.random.Generator) -> SolidObject:
    mesh = Mesh()
    wide, tall = rng.uniform(0.9, 1.3), rng.uniform(0.62, 0.75)
    tube = rng.uniform() < 0.4
    base = rng.uniform(0.1, 0.2) if not tube else 0.06
    half, low, high = wide / 2, base, base + tall
    case_colour = [(0.1, 0.1, 0.11), (0.75, 0.74, 0.7), (0.35, 0.24, 0.15)][rng.integers(3)]
    case = _plain(rng, case_colour, 0.2)
    depth = 0.1
    mesh.box((-depth / 2, 0, (low + high) / 2), (depth, wide, tall), case)
    if tube:
        front_y, back_y, middle = 0.46 * wide, 0.28 * wide, (low + high) / 2
        near = [(-0.1, y * front_y, middle + z * 0.46 * tall)
                for y, z in ((-1, -1), (1, -1), (1, 1), (-1, 1))]  # fmt: skip
        far = [(-0.1 - 0.5 * wide, y * back_y, middle - 0.08 * tall + z * 0.3 * tall)
               for y, z in ((-1, -1), (1, -1), (1, 1), (-1, 1))]  # fmt: skip
        mesh.hexahedron(np.array(near), np.array(far), case)
        for sign in (1, -1):
            mesh.box((-0.1, sign * 0.3 * wide, 0.03), (0.25, 0.08, 0.06), case)
        foot_y, foot_x = 0.3 * wide + 0.04, 0.025
    else:
        mesh.cylinder((-0.06, 0, 0.02), (-0.06, 0, low + 0.05), 0.05, case)
        foot_y, foot_x = rng.uniform(0.2, 0.3), 0.12
        mesh.box((-0.03, 0, 0.015), (0.3, 2 * foot_y, 0.03), case)
    rim = rng.uniform(0.03, 0.07)
    chin = rng.uniform(0.06, 0.14)
    face = np.array([(0, -half, low), (0, half, low), (0, half, high), (0, -half, high)])
    edge = (rim / wide, 1 - rim / wide)
    shade = _plain(rng, (0.05, 0.05, 0.06))
    mesh.panel(face, shade, u=edge, v=(chin / tall, 1 - rim / tall), lift=0.004)
    picture = Material(
        random_colour(rng, (0.3, 0.8), (0.35, 0.8)), "blotches",
        random_colour(rng, (0.2, 0.8), (0.5, 1.0)), wide * rng.uniform(0.3, 0.6),
        random_axes(rng), 0.3,
    )  # fmt: skip
    inset = 0.012
    screen = mesh.panel(
        face, picture, u=(edge[0] + inset, edge[1] - inset),
        v=(chin / tall + inset, 1 - rim / tall - inset), lift=0.008,
    )  # fmt: skip
    lamp = Material((0.95, 0.2, 0.1) if rng.uniform() < 0.5 else (0.2, 0.95, 0.3), gloss=0.3)
    button = np.array([0.01, 0.42 * wide, low + 0.5 * chin])
    mesh.box(button, (0.02, 0.05, 0.024), lamp)
    names = ("bottom_right", "bottom_left", "top_left", "top_right")
    points = {f"frame_{n}": p for n, p in zip(names, face, strict=True)}
    points |= {f"screen_{n}": p for n, p in zip(names, screen, strict=True)}
    points["power_light"] = button + (0.01, 0, 0)
    points |= _sides({"foot": (foot_x, foot_y, 0.02)})
    return SolidObject(mesh, points)


def _boat(rng: np.random.Generator) -> SolidObject:
    mesh, paint = Mesh(), _paint(rng, 3.0, 0.3)
    length, half, deck = rng.uniform(4.2, 5.4), rng.uniform(0.75, 0.95), rng.uniform(0.6, 0.75)
    stations = [(-0.5, 0.78, 0.0), (-0.25, 1.0, -0.02), (0.1, 0.95, 0.02), (0.35, 0.55, 0.14),
                (0.47, 0.16, 0.24), (0.5, 0.02, 0.28)]  # fmt: skip
    rings = []
    for share, wide, rise in stations:
        x, y, top = share * length, wide * half, deck + rise
        rings.append([(x, y, top), (x, 0.82 * y, 0.35 * deck), (x - 0.02 * share, 0.4 * y, 0.0),
                      (x - 0.02 * share, -0.4 * y, 0.0), (x, -0.82 * y, 0.35 * deck),
                      (x, -y, top)])  # fmt: skip
    rings = np.array(rings)
    mesh.loft(rings, paint, smooth=False)
    wood = _plain(rng, (0.62, 0.43, 0.24))
    white, glass = _plain(rng, (0.9, 0.9, 0.88), 0.2), _plain(rng, (0.3, 0.45, 0.62), 0.5)
    for a, b in pairwise(rings):
        mesh.panel([a[5], b[5], b[0], a[0]], wood, lift=0.006)
        for edge in (0, 5):
            mesh.cylinder(a[edge], b[edge], 0.035, wood, segments=6)
    cabin_front, cabin_rear = 0.12 * length, -0.24 * length
    cabin_y, cabin_top = 0.58 * half, deck + rng.uniform(0.36, 0.5)
    bottom = np.array([(cabin_front, cabin_y, deck), (cabin_front, -cabin_y, deck),
                       (cabin_rear, -cabin_y, deck), (cabin_rear, cabin_y, deck)])  # fmt: skip
    top = bottom * (1, 0.9, 0) + (0, 0, cabin_top)
    top[:2, 0] -= 0.2
    mesh.hexahedron(bottom, top, white)
    side = np.array([bottom[0], top[0], top[3], bottom[3]])
    _side_panels(mesh, side, glass, ((0.12, 0.44), (0.54, 0.86)), (0.35, 0.8))
    mast_x, mast_top = 0.05 * length, deck + rng.uniform(4.0, 5.2)
    mesh.cylinder((mast_x, 0, deck), (mast_x, 0, mast_top), (0.06, 0.04), wood)
    boom_z = cabin_top + 0.25
    swing = rng.uniform(-0.25, 0.25)
    boom_end = np.array([-0.44 * length, swing, boom_z])
    mesh.cylinder((mast_x, 0, boom_z), boom_end, 0.045, wood, segments=8)
    cloth = Material((0.93, 0.92, 0.86))
    if rng.uniform() < 0.6:
        cloth = Material(
            cloth.colour, "stripes", random_colour(rng), rng.uniform(0.7, 1.4),
            np.eye(3)[[2, 0, 1]] if rng.uniform() < 0.5 else random_axes(rng),
        )  # fmt: skip

    def sail(corners):
        corners = np.asarray(corners, dtype=float)
        mesh.loft(np.stack([corners - (0, 0.015, 0), corners + (0, 0.015, 0)]), cloth, smooth=False)

    head = np.array([mast_x - 0.06, 0, mast_top - 0.15])
    belly = np.array([0, 0.5 * swing, 0])
    sail([(mast_x - 0.08, 0, boom_z + 0.06), boom_end + (0.15, 0, 0.07), 0.5 * (boom_end + head)
          + (-0.25, 0, 0.1) + belly, head])  # fmt: skip
    bow = np.array([0.5 * length, 0, deck + 0.28])
    if rng.uniform() < 0.75:
        sail([bow + (-0.12, 0, 0.1), (mast_x + 0.15, 0, deck + 0.75),
              (mast_x + 0.1, 0, mast_top - 0.9)])  # fmt: skip
    points = {
        "bow_top": bow,
        "mast_top": np.array([mast_x, 0, mast_top]),
        "boom_end": boom_end,
        "boom_mast": np.array([mast_x, 0, boom_z]),
        **_sides(
            {
                "stern": tuple(rings[0][0]),
                "cabin_top_front": tuple(top[0]),
                "cabin_top_rear": tuple(top[3]),
            }
        ),
        "bow_bottom": np.array([0.49 * length, 0, 0.35 * deck]),
        "stern_bottom": np.array([-0.5 * length, 0, 0.0]),
    }
    return SolidObject(mesh, points)


def _horse(rng: np.random.Generator) -> SolidObject:
    mesh = Mesh()
    browns = [(0.42, 0.24, 0.12), (0.62, 0.45, 0.27), (0.2, 0.15, 0.12), (0.85, 0.83, 0.8),
              (0.5, 0.48, 0.46)]  # fmt: skip
    base = _tint(rng, browns[rng.integers(5)])
    pattern = rng.choice(["plain", "spots", "blotches", "stripes"], p=[0.4, 0.2, 0.25, 0.15])
    accent = (0.93, 0.92, 0.88) if sum(base) < 1.6 else (0.25, 0.17, 0.12)
    coat = Material(base, str(pattern), accent, rng.uniform(0.25, 0.6), random_axes(rng), 0.05)
    dark = _plain(rng, (0.12, 0.1, 0.09))
    hair = Material(_tint(rng, [(0.1, 0.08, 0.07), (0.75, 0.65, 0.45)][rng.integers(2)]))
    back, long = rng.uniform(1.3, 1.5), rng.uniform(0.62, 0.74)
    girth = rng.uniform(0.27, 0.33)
    body_z = back - girth
    mesh.ellipsoid((0, 0, body_z), (long, 0.86 * girth, girth), coat)
    mesh.ellipsoid((0.72 * long, 0, body_z + 0.02), (0.33, 0.8 * girth, 1.05 * girth), coat)
    mesh.ellipsoid((-0.74 * long, 0, body_z + 0.05), (0.34, 0.84 * girth, 1.05 * girth), coat)
    pose = rng.uniform(-0.35, 0.25)
    neck_low = np.array([0.85 * long, 0, body_z + 0.1])
    poll = neck_low + (rng.uniform(0.42, 0.52), 0, rng.uniform(0.52, 0.62) + pose)
    along = (poll - neck_low) / np.linalg.norm(poll - neck_low)
    mesh.cylinder(neck_low - 0.2 * along, poll, (0.27, 0.13), coat, segments=14)
    mesh.ellipsoid(poll, (0.15, 0.12, 0.14), coat)
    droop = rng.uniform(-0.75, -0.45)
    snout = np.array([np.cos(droop), 0, np.sin(droop)])
    nose = poll + 0.5 * snout
    mesh.cylinder(poll, nose, (0.135, 0.085), coat, segments=12)
    mesh.ellipsoid(nose, (0.1, 0.085, 0.085), dark, tilt=droop)
    up = np.array([-np.sin(droop), 0, np.cos(droop)])
    ear_tip = poll + (-0.02, 0.085, 0.25)
    eye = poll + 0.17 * snout + 0.05 * up + (0, 0.115, 0)
    for sign in (1, -1):
        mirror = np.array([1, sign, 1])
        mesh.cylinder((poll + (-0.03, 0.07, 0.08)) * mirror, ear_tip * mirror, (0.05, 0.008), coat,
                      segments=8)  # fmt: skip
        mesh.ellipsoid(eye * mirror, (0.035, 0.025, 0.035), dark)
    crest = np.array([-along[2], 0, along[0]])
    shares = np.linspace(0.1, 1.02, 6)
    mane = []
    for share in shares:
        middle = neck_low + share * (poll - neck_low)
        radius = 0.27 - 0.14 * share
        inner, outer = middle + crest * 0.6 * radius, middle + crest * (radius + 0.09)
        wide = np.array([0, 0.045, 0])
        mane.append([inner - wide, outer - wide, outer + wide, inner + wide])
    mesh.loft(np.array(mane), hair, smooth=False)
    tail_root = np.array([-0.74 * long - 0.3, 0, body_z + 0.18])
    tail_tip = tail_root + (rng.uniform(-0.35, -0.12), 0, rng.uniform(-0.8, -0.6))
    bend = 0.5 * (tail_root + tail_tip) + (-0.12, 0, 0.12)
    mesh.cylinder(tail_root + (0.06, 0, 0), bend, (0.05, 0.085), hair)
    mesh.cylinder(bend, tail_tip, (0.085, 0.03), hair)
    hooves = {}
    for place, x, sign in (("front", 0.8 * long, 1), ("rear", -0.85 * long, 1),
                           ("front", 0.8 * long, -1), ("rear", -0.85 * long, -1)):  # fmt: skip
        stride = rng.uniform(-0.26, 0.26)
        bent = 0.5 * stride + (0.04 if place == "front" else -0.07)
        hip = np.array([x, sign * 0.6 * girth, body_z - 0.05])
        knee = np.array([x + bent, sign * 0.58 * girth, 0.5 * body_z])
        ankle = np.array([x + stride, sign * 0.56 * girth, 0.1])
        mesh.cylinder(hip, knee, (0.15, 0.075), coat)
        mesh.ellipsoid(knee, (0.08, 0.072, 0.085), coat)
        mesh.cylinder(knee, ankle, (0.068, 0.05), coat)
        foot = np.array([ankle[0] + 0.03, ankle[1], 0])
        mesh.cylinder(foot, ankle, (0.085, 0.06), dark)
        hooves[f"hoof_{place}_{'left' if sign > 0 else 'right'}"] = foot
    points = {
        "nose": nose + 0.1 * snout,
        **_sides({"ear": tuple(ear_tip), "eye": tuple(eye + (0, 0.025, 0))}),
        "withers": np.array([0.45 * long, 0, body_z + 0.92 * girth]),
        "tail_base": tail_root,
        "tail_tip": tail_tip,
        **hooves,
        "chest": np.array([0.72 * long + 0.33, 0, body_z + 0.02]),
    }
    return SolidObject(mesh, points)


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{side}" for name in names for side in ("left", "right"))


OBJECT_CLASSES: dict[str, ObjectClass] = {
    entry.name: entry
    for entry in (
        ObjectClass(
            "aeroplane", 1, _aeroplane, (25, 150), (-18, 35), "sky",
            ("nose", "cockpit", "tail_end", "fin_top_front", "fin_top_rear",
             *_both("wing_tip", "engine", "tailplane_tip"), "belly"),
        ),
        ObjectClass(
            "bicycle", 2, _bicycle, (35, 145), (0, 25), "street",
            ("wheel_front", "wheel_rear", "wheel_front_bottom", "wheel_rear_bottom",
             *_both("handle"), "saddle_front", "saddle_rear", "crank", "head_tube",
             "seat_cluster"),
            tolerance=0.045,
        ),
        ObjectClass(
            "boat", 4, _boat, (30, 150), (2, 22), "water",
            ("bow_top", "mast_top", "boom_end", "boom_mast",
             *_both("stern", "cabin_top_front", "cabin_top_rear"), "bow_bottom"),
        ),
        ObjectClass(
            "bottle", 5, _bottle, (0, 40), (-2, 28), "indoor",
            ("cap_top", "cap_bottom", "neck_bottom", "label_centre",
             *_both("label_top", "label_bottom", "shoulder", "base")),
        ),
        ObjectClass(
            "bus", 6, _bus, (15, 80), (2, 28), "street",
            _both("roof_front", "roof_rear", "bottom_front", "bottom_rear", "wheel_front",
                  "wheel_rear"),
        ),
        ObjectClass(
            "car", 7, _car, (20, 150), (4, 30), "street",
            _both("wheel_front", "wheel_rear", "headlight", "taillight", "roof_front",
                  "roof_rear"),
        ),
        ObjectClass(
            "chair", 9, _chair, (10, 80), (8, 38), "indoor",
            _both("back_top", "seat_front", "seat_rear", "foot_front", "foot_rear"),
        ),
        ObjectClass(
            "horse", 13, _horse, (30, 125), (0, 20), "field",
            ("nose", *_both("ear", "eye"), "withers", "tail_base", "tail_tip",
             *_both("hoof_front", "hoof_rear")),
            tolerance=0.04,
        ),
        ObjectClass(
            "motorbike", 14, _motorbike, (30, 140), (2, 25), "street",
            ("wheel_front", "wheel_rear", "wheel_front_bottom", "wheel_rear_bottom",
             *_both("handle"), "headlight", "taillight", "tank_top", "seat_rear",
             "exhaust_end"),
            tolerance=0.045,
        ),
        ObjectClass(
            "tvmonitor", 20, _tvmonitor, (0, 55), (-2, 22), "indoor",
            ("frame_top_left", "frame_top_right", "frame_bottom_right", "frame_bottom_left",
             "screen_top_left", "screen_top_right", "screen_bottom_right",
             "screen_bottom_left", "power_light", *_both("foot")),
        ),
    )
}  # fmt: skip
