"""Photographs of synthetic objects: pose, framing, background, shadow, occluders and sensor.

A photograph is a pure function of its class, its framing and its random generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from nemf.datasets.rendering import (
    Camera,
    Lighting,
    Mesh,
    Rendering,
    look_at,
    rasterise,
    render,
    visible,
)
from nemf.datasets.synthetic_objects import ObjectClass, SolidObject, random_colour

_ATTEMPTS = 12
_LARGEST_OCCLUSION = 0.3


@dataclass(frozen=True)
class Framing:
    """What a photographer allows: shares of pictures that are truncated or occluded and so on.

    ``keypoints`` are the annotated names and ``fewest_visible`` how many of them should be seen;
    ``azimuth_deg`` bounds the viewpoint (0 front, 90 the object's left side, −90 its right side).
    """

    keypoints: tuple[str, ...]
    azimuth_deg: tuple[float, float]
    truncated: float = 0.22
    occluded: float = 0.35
    fewest_visible: int = 5


@dataclass(frozen=True)
class Photograph:
    """``pixels`` uint8 (H, W, 3) RGB; ``keypoints_px`` (N, 2) exact projections, seen or not;
    ``visible`` (N,) bool: inside the image, not behind the object itself or an occluder;
    ``box_px`` int (4,) xyxy, the tight inclusive box of the object's visible pixels.
    """

    pixels: np.ndarray
    keypoints_px: np.ndarray
    visible: np.ndarray
    box_px: np.ndarray
    azimuth_deg: float
    truncated: bool
    occluded: bool


def take_photograph(subject: ObjectClass, framing: Framing, rng: np.random.Generator) -> Photograph:
    """Build an instance of ``subject`` and photograph it.

    A view that shows too few keypoints is replaced by another, up to a fixed number of times;
    then the best one is kept.
    """
    solid = subject.build(rng)
    corners = solid.mesh.corners.reshape(-1, 3)
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = float(np.linalg.norm(high - low))
    points = np.array([solid.keypoints[name] for name in framing.keypoints])
    best = None
    for _ in range(_ATTEMPTS):
        width, height = _canvas(rng, subject.name)
        azimuth, camera, truncated = _frame(
            rng, subject, framing, corners, (low + high) / 2, size, (width, height)
        )
        lighting = _lighting(rng)
        picture = render(solid.mesh, camera, width, height, lighting)
        occluder = _occluder(rng, picture.coverage, framing.occluded)
        xy, _ = camera.project(points)
        seen = visible(points, camera, picture.depth, subject.tolerance * size)
        seen &= (xy >= 0).all(axis=1) & (xy <= (width - 1, height - 1)).all(axis=1)
        column, row = np.rint(xy[seen]).astype(int).T
        seen[seen] = occluder[1][row, column] < 0.5
        shown = (picture.coverage * (1 - occluder[1])) > 0.2
        if shown.any() and (best is None or seen.sum() > best[0]):
            best = (seen.sum(), solid, camera, lighting, picture, occluder, xy, seen, shown,
                    azimuth, truncated)  # fmt: skip
        if best is not None and best[0] >= framing.fewest_visible:
            break
    if best is None:
        raise RuntimeError(f"no view of {subject.name} shows the object")
    _, solid, camera, lighting, picture, occluder, xy, seen, shown, azimuth, truncated = best
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    covered = float((picture.coverage * occluder[1]).sum() / picture.coverage.sum())
    return Photograph(
        _develop(rng, subject.setting, solid, camera, lighting, picture, occluder),
        xy,
        seen,
        np.array([columns[0], rows[0], columns[-1], rows[-1]]),
        azimuth,
        truncated,
        covered > 0.01,
    )


_TALL = {"bottle": 0.75, "chair": 0.8, "boat": 0.9, "bus": 1.45, "aeroplane": 1.5}


def _canvas(rng: np.random.Generator, name: str) -> tuple[int, int]:
    """Width and height: the longer side 200..320 px, the aspect ratio typical of the class."""
    aspect = _TALL.get(name, 1.3) * np.exp(rng.uniform(-0.22, 0.22))
    longer = int(rng.integers(200, 321))
    shorter = max(int(longer / max(aspect, 1 / aspect)), 120)
    return (longer, shorter) if aspect >= 1 else (shorter, longer)


def _frame(rng, subject, framing, corners, middle, size, canvas):
    """Draw a pose and fit the object into the canvas: (azimuth in degrees, camera, truncated)."""
    azimuth = rng.uniform(*framing.azimuth_deg)
    rotation, translation = look_at(
        middle,
        azimuth_deg=azimuth,
        elevation_deg=rng.uniform(*subject.elevation_deg),
        roll_deg=rng.normal(0, 10 if subject.setting == "sky" else 3),
        distance=size * rng.uniform(1.3, 2.6),
    )
    canvas = np.asarray(canvas)
    unit, _ = Camera(rotation, translation, 1.0, (0.0, 0.0)).project(corners)
    low, high = unit.min(axis=0), unit.max(axis=0)
    cut = rng.uniform() < framing.truncated
    fill = rng.uniform(0.9, 1.2) if cut else 1 - 0.55 * rng.beta(1.3, 2.0) - 0.04
    focal = float(fill * ((canvas - 1) / (high - low)).min())
    extent = focal * (high - low)
    place = rng.uniform(0, 1, 2)
    corner = place * (canvas - 1 - extent)
    if cut:
        # push the object over one border by up to a third of its extent
        axis, sign = int(rng.integers(2)), rng.choice([-1, 1])
        over = rng.uniform(0.08, 0.33) * extent[axis]
        corner[axis] = -over if sign < 0 else canvas[axis] - 1 - extent[axis] + over
    centre = corner - focal * low
    outside = (corner < -0.5).any() or (corner + extent > canvas - 0.5).any()
    camera = Camera(rotation, translation, focal, (float(centre[0]), float(centre[1])))
    return azimuth, camera, bool(outside)


def _lighting(rng: np.random.Generator) -> Lighting:
    angle, rise = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(35, 75))
    direction = np.array([np.cos(rise) * np.cos(angle), np.cos(rise) * np.sin(angle), np.sin(rise)])
    warmth = rng.uniform(-0.08, 0.1)
    lamp = rng.uniform(0.45, 0.75) * np.array([1 + warmth, 1.0, 1 - warmth])
    return Lighting(direction, lamp, np.full(3, rng.uniform(0.5, 0.68)))


def _noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Smooth noise (H, W) around 0 within about ±1: three octaves, ``cells`` blobs across."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(3):
        across = cells * 2**octave
        down = max(2, round(across * height / width))
        grid = Image.fromarray(rng.uniform(-1, 1, (down, across + 1)).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return total / 1.75


def _mask(width: int, height: int, draw) -> np.ndarray:
    """Antialiased (H, W) float32 mask in 0..1; ``draw`` paints on a canvas of twice the size."""
    canvas = Image.new("L", (2 * width, 2 * height))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def _occluder(rng, coverage: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Something in front of the object: colour (H, W, 3) and opacity (H, W), often empty."""
    height, width = coverage.shape
    empty = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    if rng.uniform() >= share:
        return empty
    rows, columns = np.nonzero(coverage > 0.5)
    if len(rows) == 0:
        return empty
    left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
    x = rng.uniform(left, right)
    wide, tall = right - left + 1, bottom - top + 1
    kind = rng.choice(["pole", "bush", "crate", "blob"])
    angle = rng.uniform(0, 2 * np.pi, 14)
    jitter = rng.uniform(0, 1, (14, 3))
    slant = rng.uniform(-0.1, 0.1) * height
    thick = rng.uniform(0.04, 0.11) * wide

    def draw(pen: ImageDraw.ImageDraw) -> None:
        if kind == "pole":
            foot = bottom + 0.05 * tall if rng.uniform() < 0.5 else height + 2
            outline = [(x + slant, -2), (x + slant + thick, -2), (x + thick, foot), (x, foot)]
            pen.polygon([(2 * a, 2 * b) for a, b in outline], fill=255)
        elif kind == "bush":
            for a, b, c in jitter:
                r = (0.05 + 0.09 * c) * wide
                cx, cy = x + (a - 0.5) * 0.35 * wide, bottom + 0.06 * tall - 0.28 * tall * b
                pen.ellipse([2 * (cx - r), 2 * (cy - r), 2 * (cx + r), 2 * (cy + r)], fill=255)
        elif kind == "crate":
            w, h = (0.14 + 0.14 * jitter[0, 0]) * wide, (0.16 + 0.2 * jitter[0, 1]) * tall
            y = bottom + 0.06 * tall - h
            pen.rectangle([2 * x, 2 * y, 2 * (x + w), 2 * (y + h)], fill=255)
        else:
            order = np.sort(angle)
            radius = (0.08 + 0.08 * jitter[:, 0]) * min(wide, tall)
            cy = top + jitter[0, 1] * tall
            outline = np.stack([x + radius * np.cos(order), cy + radius * np.sin(order)], axis=1)
            pen.polygon([tuple(p) for p in 2 * outline], fill=255)

    opacity = _mask(width, height, draw)
    if (coverage * opacity).sum() > _LARGEST_OCCLUSION * coverage.sum():
        return empty
    base = {
        "pole": random_colour(rng, (0.0, 0.4), (0.2, 0.8)),
        "bush": (0.22, rng.uniform(0.36, 0.55), 0.15),
    }.get(str(kind), random_colour(rng, (0.2, 0.9), (0.3, 0.9)))
    texture = _noise(rng, width, height, 24 if kind == "bush" else 8)
    if kind == "crate":
        step = rng.uniform(6, 14)
        texture = texture + 0.5 * np.sign(np.sin(np.arange(height) * 2 * np.pi / step))[:, None]
    elif kind == "pole":
        shade = (np.arange(width) - x) / thick
        texture = 0.4 * texture + np.clip(1 - 2 * np.abs(shade - 0.4), -1, 1)
    colour = np.asarray(base, np.float32) * (1 + 0.28 * texture[..., None])
    return np.clip(colour, 0, 1).astype(np.float32), opacity


_GROUND = {
    "street": [(0.42, 0.42, 0.43), (0.55, 0.53, 0.5), (0.6, 0.48, 0.4)],
    "field": [(0.36, 0.47, 0.2), (0.52, 0.5, 0.26), (0.63, 0.53, 0.37)],
    "indoor": [(0.55, 0.38, 0.23), (0.72, 0.66, 0.58), (0.42, 0.4, 0.44), (0.5, 0.25, 0.2)],
    "water": [(0.18, 0.36, 0.46), (0.25, 0.45, 0.5), (0.3, 0.4, 0.42)],
}


def _backdrop(rng, setting: str, width: int, height: int) -> np.ndarray:
    """What lies behind, (H, W, 3): a textured wall indoors, otherwise sky with clouds."""
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    if setting == "indoor":
        wall = np.asarray(random_colour(rng, (0.05, 0.5), (0.45, 0.9)), np.float32)
        picture = np.broadcast_to(wall, (height, width, 3)) * (0.9 + 0.15 * down)
        pattern = rng.choice(["plain", "stripes", "bricks", "dots"])
        y, x = np.mgrid[:height, :width].astype(np.float32)
        step = rng.uniform(14, 34)
        if pattern == "stripes":
            lines = np.sin(2 * np.pi * x / step) > rng.uniform(-0.4, 0.6)
        elif pattern == "bricks":
            course = np.floor(y / (step / 2))
            lines = (y % (step / 2) < 1.6) | ((x + course % 2 * step / 2) % step < 1.6)
        elif pattern == "dots":
            lines = np.sin(2 * np.pi * x / step) * np.sin(2 * np.pi * y / step) > 0.5
        else:
            lines = np.zeros((height, width), bool)
        picture = picture * (1 - rng.uniform(0.12, 0.35) * lines[..., None])
    else:
        high = np.asarray([(0.36, 0.56, 0.85), (0.55, 0.62, 0.7), (0.85, 0.6, 0.5)])
        sky = high[rng.choice(3, p=[0.55, 0.3, 0.15])].astype(np.float32)
        pale = np.float32([0.86, 0.89, 0.92])
        picture = sky + (pale - sky) * np.clip(down * rng.uniform(0.8, 1.6), 0, 1)
        cloud = np.clip(_noise(rng, width, height, 3) * 1.8 - rng.uniform(-0.2, 0.8), 0, 1)
        picture = picture + (0.95 - picture) * (0.8 * cloud[..., None])
    return picture + 0.05 * _noise(rng, width, height, 6)[..., None]


def _distractors(rng, setting: str, picture: np.ndarray, horizon_px: float) -> np.ndarray:
    """Clutter behind the object, standing on the horizon or hanging on the wall."""
    height, width = picture.shape[:2]
    canvas = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)

    def rgb(saturation=(0.1, 0.7), value=(0.25, 0.85)):
        return tuple(int(255 * c) for c in random_colour(rng, saturation, value))

    count = {"street": 7, "field": 6, "indoor": 5, "water": 4, "sky": 2}[setting]
    foot = float(np.clip(horizon_px, 0.12 * height, height))
    for _ in range(int(rng.integers(count // 2, count + 1))):
        x, w, h = rng.uniform(-0.1, 1) * width, rng.uniform(0.08, 0.3) * width, rng.uniform(0.1, 1)
        if setting == "street":
            top = foot - h * 0.9 * foot
            pen.rectangle([x, top, x + w, foot + 3], fill=rgb((0.05, 0.5), (0.3, 0.8)))
            pane, step = rgb((0.1, 0.4), (0.2, 0.9)), max(w / rng.integers(2, 6), 6)
            for a in np.arange(x + 0.2 * step, x + w - 0.6 * step, step):
                for b in np.arange(top + 0.3 * step, foot - 0.6 * step, 1.2 * step):
                    pen.rectangle([a, b, a + 0.5 * step, b + 0.6 * step], fill=pane)
        elif setting in ("field", "water"):
            green = (int(rng.uniform(40, 90)), int(rng.uniform(70, 130)), int(rng.uniform(30, 70)))
            r = 0.5 * w if setting == "field" else 0.8 * w
            rise = r * (0.4 + h) if setting == "field" else 0.25 * r
            for a, b in rng.uniform(-0.5, 0.5, (5, 2)):
                cx, cy, s = x + a * r, foot - rise * (0.6 + 0.6 * b), r * 0.55
                pen.ellipse([cx - s, cy - min(s, rise), cx + s, cy + min(s, rise)], fill=green)
        elif setting == "indoor":
            top = foot * rng.uniform(0.02, 0.7)
            low = min(top + h * 0.7 * foot, foot) if rng.uniform() < 0.6 else foot + 2
            if rng.uniform() < 0.7:
                pen.rectangle(
                    [x, top, x + w, max(low, top + 3)], fill=rgb(), outline=rgb(), width=3
                )
                pen.line([x, (top + low) / 2, x + w, (top + low) / 2], fill=rgb(), width=2)
            else:
                pen.ellipse([x, top, x + w, max(low, top + 3)], fill=rgb())
        else:
            pen.ellipse([x, foot * h, x + w, foot * h + 0.3 * w], fill=rgb((0.0, 0.1), (0.8, 1.0)))
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    return np.asarray(canvas, dtype=np.float32) / 255


def _litter(rng, picture: np.ndarray) -> np.ndarray:
    """Small things lying about: coloured boxes, balls and scraps."""
    height, width = picture.shape[:2]
    canvas = Image.fromarray((picture * 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 8))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = rng.uniform(0.02, 0.13, 2) * width
        fill = tuple(int(255 * c) for c in random_colour(rng, (0.1, 0.8), (0.15, 0.9)))
        side = tuple(int(0.6 * c) for c in fill)
        kind = int(rng.integers(3))
        if kind == 0:
            pen.rectangle([x, y, x + w, y + h], fill=fill)
            lean = 0.3 * w
            pen.polygon([(x + w, y), (x + w + lean, y - lean), (x + w + lean, y + h - lean),
                         (x + w, y + h)], fill=side)  # fmt: skip
        elif kind == 1:
            pen.ellipse([x, y, x + h, y + h], fill=fill, outline=side, width=2)
        else:
            outline = [(x + a, y + b) for a, b in rng.uniform(-1, 1, (5, 2)) * (w, 0.5 * h)]
            pen.polygon(outline, fill=fill)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return np.asarray(canvas, dtype=np.float32) / 255


def _ground(rng, setting: str, camera: Camera, width: int, height: int):
    """Ground colour (H, W, 3) in perspective and where the ground is seen (H, W) bool.

    Indoors, and mostly in the street, it ends at a wall some way behind the object.
    """
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ray = np.stack(
        [(x - camera.centre_px[0]) / camera.focal_px, (y - camera.centre_px[1]) / camera.focal_px,
         np.ones_like(x)], axis=-1,
    )  # fmt: skip
    ray = ray @ camera.rotation.astype(np.float32)
    eye = (-camera.translation @ camera.rotation).astype(np.float32)
    below = ray[..., 2] * np.sign(eye[2]) < -1e-3
    reach = np.where(below, -eye[2] / np.where(below, ray[..., 2], 1), 0)
    place = eye[:2] + reach[..., None] * ray[..., :2]
    behind = -place @ eye[:2] / np.linalg.norm(eye[:2])
    if setting == "indoor" or (setting == "street" and rng.uniform() < 0.7):
        below &= behind < rng.uniform(0.25, 0.8) * np.linalg.norm(eye)
    palette = _GROUND[setting]
    base = np.asarray(palette[int(rng.integers(len(palette)))], np.float32)
    base = base * rng.uniform(0.8, 1.2)
    turn = rng.uniform(0, np.pi)
    u = place @ np.float32([np.cos(turn), np.sin(turn)])
    v = place @ np.float32([-np.sin(turn), np.cos(turn)])
    far = np.clip(reach / (2.5 * np.linalg.norm(eye)), 0, 1)
    size = float(np.linalg.norm(eye)) / rng.uniform(7, 16)
    kind = rng.choice(["plain", "tiles", "planks"])
    texture = 0.12 * _noise(rng, width, height, 20)
    if setting == "water":
        texture = texture + 0.16 * np.sin(6 * u / size + 2 * np.sin(2.1 * v / size)) * (1 - far)
    elif setting != "field" and kind != "plain":
        stretch = 4 if kind == "planks" else 1
        joint = (u % size < 0.06 * size) | (v % (stretch * size) < 0.06 * size)
        cell = np.floor(u / size) * 12.9898 + np.floor(v / (stretch * size)) * 78.233
        shade = np.sin(cell * 7.13) * rng.uniform(0.04, 0.14)
        texture = texture + (shade - 0.3 * joint) * (1 - far)
    else:
        patches = np.sin(2.3 * u / size + 1.7 * np.sin(1.1 * v / size))
        texture = texture + 0.08 * patches * (1 - far)
    return np.clip(base * (1 + texture[..., None]), 0, 1), below


def _shadow(mesh: Mesh, camera: Camera, direction, width: int, height: int) -> np.ndarray:
    """Where the object keeps the lamp off the ground plane: (H, W) in 0..1, with a soft edge."""
    lit = np.einsum("tci,i->t", mesh.normals, direction) > 0
    corners = mesh.corners[lit]
    flat = corners - corners[..., 2:] / direction[2] * direction
    xy, depth = camera.project(flat)
    edge1, edge2 = xy[:, 1] - xy[:, 0], xy[:, 2] - xy[:, 0]
    area = edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0]
    usable = (np.abs(area) > 1e-3) & (depth.min(axis=1) > 0.05)
    nearest, _ = rasterise(xy[usable], 1 / depth[usable], width, height)
    soft = Image.fromarray(np.where(nearest >= 0, 255, 0).astype(np.uint8))
    return np.asarray(soft.filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255


def _develop(
    rng: np.random.Generator,
    setting: str,
    solid: SolidObject,
    camera: Camera,
    lighting: Lighting,
    picture: Rendering,
    occluder: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Compose background, shadow, object and occluder and add lens and sensor: uint8 (H, W, 3)."""
    height, width = picture.coverage.shape
    scene = _backdrop(rng, setting, width, height)
    if setting == "sky":
        scene = _distractors(rng, setting, scene, height)
    else:
        ground, below = _ground(rng, setting, camera, width, height)
        scene = _distractors(rng, setting, scene, height - below[:, width // 2].sum())
        ground = _litter(rng, ground)
        if setting != "water":
            dark = _shadow(solid.mesh, camera, lighting.direction, width, height)
            ground = ground * (1 - rng.uniform(0.35, 0.6) * dark[..., None])
        scene = np.where(below[..., None], ground, scene)
    scene = picture.colour + (1 - picture.coverage[..., None]) * scene
    colour, opacity = occluder
    scene = scene + opacity[..., None] * (colour - scene)
    cast = rng.uniform(0.93, 1.07, 3) * rng.uniform(0.9, 1.12)
    scene = (np.clip(scene, 0, 1).astype(np.float32) * cast.astype(np.float32)) ** np.float32(
        rng.uniform(0.8, 1.15)
    )
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0.004, 0.022)
    pixels = (np.clip(scene + grain, 0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.uniform() < 0.3:
        soft = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
        pixels = np.asarray(soft)
    return pixels
