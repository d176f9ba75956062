"""A small software renderer: lofted meshes, a pinhole camera, a z-buffer and shaded colour.

Everything is vectorised NumPy over all triangles and pixels at once; nothing here knows about
classes or datasets. Frames: *object* (right-handed, +x front, +y left, +z up), *camera* (+x right,
+y down, +z away from the viewer) and *image* (pixels, pixel centres at integers).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

SUPERSAMPLE = 2


@dataclass(frozen=True)
class Material:
    """Surface colour (RGB in 0..1) with an optional solid pattern in object space.

    ``pattern`` is plain, stripes, checks, spots or blotches; ``accent`` is its second colour,
    ``wavelength`` its period in object units, ``axes`` the (3, 3) rotation of the pattern and
    ``gloss`` the strength of the highlight.
    """

    colour: tuple[float, float, float]
    pattern: str = "plain"
    accent: tuple[float, float, float] = (0.0, 0.0, 0.0)
    wavelength: float = 1.0
    axes: np.ndarray = field(default_factory=lambda: np.eye(3))
    gloss: float = 0.0


class Mesh:
    """A triangle soup with a normal per corner and a material per triangle; grows part by part."""

    def __init__(self) -> None:
        self._corners: list[np.ndarray] = []
        self._normals: list[np.ndarray] = []
        self._materials: list[np.ndarray] = []
        self.palette: list[Material] = []

    def add(self, triangles: np.ndarray, normals: np.ndarray, material: Material) -> None:
        """Append triangles (T, 3, 3) with corner normals (T, 3, 3), counter-clockwise outside."""
        self._corners.append(triangles)
        self._normals.append(normals)
        self._materials.append(np.full(len(triangles), len(self.palette)))
        self.palette.append(material)

    @property
    def corners(self) -> np.ndarray:
        """All triangles, (T, 3, 3) object coordinates."""
        return np.concatenate(self._corners)

    @property
    def normals(self) -> np.ndarray:
        """Corner normals, (T, 3, 3), unit length or zero."""
        return np.concatenate(self._normals)

    @property
    def materials(self) -> np.ndarray:
        """Index into ``palette`` for each triangle, (T,)."""
        return np.concatenate(self._materials)

    def loft(
        self,
        rings: np.ndarray,
        material: Material,
        *,
        smooth: bool = True,
        closed: bool = False,
    ) -> None:
        """Skin a stack of rings (R, K, 3) into a solid; ``closed`` joins the last to the first.

        Open stacks get flat end caps. Ring order and sense do not matter: the solid is turned so
        that its signed volume is positive. Repeat a ring to keep an edge sharp.
        """
        rings = np.asarray(rings, dtype=float)
        triangles = _loft_triangles(rings, closed)
        # volume about the centre, so that it does not drown in the offset from the origin
        local = triangles - rings.mean(axis=(0, 1))
        volume = np.einsum("ti,ti->", local[:, 0], np.cross(local[:, 1], local[:, 2]))
        if volume < 0:
            rings = rings[:, ::-1]
            triangles = _loft_triangles(rings, closed)
        normals = np.repeat(_face_normals(triangles)[:, None], 3, axis=1)
        if smooth:
            vertex = _ring_normals(rings, closed)
            sides = _side_triangles(vertex, closed)
            normals[: len(sides)] = sides
        self.add(triangles, normals, material)

    def hexahedron(self, bottom: np.ndarray, top: np.ndarray, material: Material) -> None:
        """Box-like solid between two quadrilaterals (4, 3) with matching corners."""
        self.loft(np.stack([bottom, top]), material, smooth=False)

    def box(self, centre, size, material: Material) -> None:
        """Axis-aligned box with edge lengths ``size``."""
        half = np.asarray(size, dtype=float) / 2
        corner = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float) * half[:2]
        bottom = np.column_stack([corner, np.full(4, -half[2])]) + centre
        top = np.column_stack([corner, np.full(4, half[2])]) + centre
        self.hexahedron(bottom, top, material)

    def lathe(self, start, axis, profile, material: Material, *, segments: int = 14) -> None:
        """Surface of revolution about ``axis`` from ``start``; profile rows: (radius, height)."""
        profile = np.asarray(profile, dtype=float)
        axis = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
        helper = np.array([1.0, 0, 0]) if abs(axis[0]) < 0.9 else np.array([0, 1.0, 0])
        u = np.cross(axis, helper)
        u /= np.linalg.norm(u)
        v = np.cross(axis, u)
        angle = 2 * np.pi * np.arange(segments) / segments
        circle = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v
        rings = (
            np.asarray(start, dtype=float)
            + profile[:, 1, None, None] * axis
            + profile[:, 0, None, None] * circle
        )
        self.loft(rings, material)

    def cylinder(self, start, end, radius, material: Material, *, segments: int = 10) -> None:
        """Cylinder or, with a pair of radii, a truncated cone from ``start`` to ``end``."""
        first, last = np.broadcast_to(radius, 2)
        axis = np.asarray(end, dtype=float) - np.asarray(start, dtype=float)
        length = float(np.linalg.norm(axis))
        self.lathe(start, axis, [(first, 0), (last, length)], material, segments=segments)

    def ellipsoid(self, centre, radii, material: Material, *, tilt: float = 0.0) -> None:
        """Ellipsoid with semi-axes along x, y, z, turned by ``tilt`` radians nose up about y."""
        polar = np.linspace(0.02, np.pi - 0.02, 10)
        angle = 2 * np.pi * np.arange(16) / 16
        rings = np.empty((len(polar), len(angle), 3))
        rings[..., 0] = np.cos(polar)[:, None]
        rings[..., 1] = np.sin(polar)[:, None] * np.cos(angle)
        rings[..., 2] = np.sin(polar)[:, None] * np.sin(angle)
        rings = rings * np.asarray(radii, dtype=float)
        c, s = np.cos(tilt), np.sin(tilt)
        rings = rings @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        self.loft(rings + np.asarray(centre, dtype=float), material)

    def torus(self, centre, radius: float, thickness: float, material: Material) -> None:
        """Ring around the y axis: ``radius`` to the middle of a tube of radius ``thickness``."""
        around = 2 * np.pi * np.arange(28) / 28
        tube = 2 * np.pi * np.arange(8) / 8
        reach = radius + thickness * np.cos(tube)
        rings = np.empty((len(around), len(tube), 3))
        rings[..., 0] = np.cos(around)[:, None] * reach
        rings[..., 1] = thickness * np.sin(tube)
        rings[..., 2] = np.sin(around)[:, None] * reach
        self.loft(rings + np.asarray(centre, dtype=float), material, closed=True)

    def panel(
        self, quad, material: Material, *, u=(0.0, 1.0), v=(0.0, 1.0), lift: float = 0.01
    ) -> np.ndarray:
        """Lay a one-sided patch ``lift`` above a quadrilateral and return its corners (4, 3).

        ``quad`` lists the corners counter-clockwise seen from outside: its first edge carries
        ``u`` from 0 to 1, its second edge ``v``; the patch covers that part of the square.
        """
        quad = np.asarray(quad, dtype=float)
        us = np.array([u[0], u[1], u[1], u[0]])[:, None]
        vs = np.array([v[0], v[0], v[1], v[1]])[:, None]
        near = quad[0] * (1 - us) + quad[1] * us
        far = quad[3] * (1 - us) + quad[2] * us
        patch = near * (1 - vs) + far * vs
        normal = np.cross(quad[2] - quad[0], quad[3] - quad[1])
        normal /= np.linalg.norm(normal)
        patch = patch + lift * normal
        triangles = patch[[[0, 1, 2], [0, 2, 3]]]
        self.add(triangles, np.broadcast_to(normal, triangles.shape).copy(), material)
        return patch


def _side_triangles(grid: np.ndarray, closed: bool) -> np.ndarray:
    """Two triangles for each cell of a ring grid (R, K, 3) that is cyclic in K (and in R)."""
    following = np.roll(grid, -1, axis=0) if closed else grid[1:]
    current = grid if closed else grid[:-1]
    a, b = current, np.roll(current, -1, axis=1)
    d, c = following, np.roll(following, -1, axis=1)
    first = np.stack([a, b, c], axis=2)
    second = np.stack([a, c, d], axis=2)
    return np.concatenate([first.reshape(-1, 3, 3), second.reshape(-1, 3, 3)])


def _loft_triangles(rings: np.ndarray, closed: bool) -> np.ndarray:
    sides = _side_triangles(rings, closed)
    if closed:
        return sides
    caps = []
    for ring in (rings[0, ::-1], rings[-1]):
        middle = np.broadcast_to(ring.mean(axis=0), ring.shape)
        caps.append(np.stack([middle, ring, np.roll(ring, -1, axis=0)], axis=1))
    return np.concatenate([sides, *caps])


def _face_normals(triangles: np.ndarray) -> np.ndarray:
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    return normal / np.maximum(length, 1e-12)


def _ring_normals(rings: np.ndarray, closed: bool) -> np.ndarray:
    """Vertex normals of a ring grid: the mean of the normals of the cells around each vertex."""
    following = np.roll(rings, -1, axis=0) if closed else rings[1:]
    current = rings if closed else rings[:-1]
    right, far_right = np.roll(current, -1, axis=1), np.roll(following, -1, axis=1)
    cell = np.cross(far_right - current, following - right)
    cell = cell + np.roll(cell, 1, axis=1)
    if closed:
        total = cell + np.roll(cell, 1, axis=0)
    else:
        total = np.zeros_like(rings)
        total[:-1] += cell
        total[1:] += cell
    length = np.linalg.norm(total, axis=-1, keepdims=True)
    return total / np.maximum(length, 1e-12)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera: camera = rotation @ object + translation, image = focal_px·(x, y)/z + centre.

    ``rotation`` (3, 3), ``translation`` (3,) in object units, ``centre_px`` (x, y).
    """

    rotation: np.ndarray
    translation: np.ndarray
    focal_px: float
    centre_px: tuple[float, float]

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Project object points (..., 3) to pixels (..., 2) and depths (...) in object units."""
        seen = points @ self.rotation.T + self.translation
        depth = seen[..., 2]
        return self.focal_px * seen[..., :2] / depth[..., None] + self.centre_px, depth

    def magnified(self, factor: float) -> Camera:
        """The same view on a grid ``factor`` times as fine: x becomes factor·(x + ½) − ½."""
        x, y = (factor * (c + 0.5) - 0.5 for c in self.centre_px)
        return replace(self, focal_px=self.focal_px * factor, centre_px=(x, y))


def look_at(
    target: np.ndarray,
    *,
    azimuth_deg: float,
    elevation_deg: float,
    roll_deg: float,
    distance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation (3, 3) and translation (3,) of a camera that looks at ``target``.

    Azimuth 0 sees the front of the object, 90 its left side; elevation is positive from above;
    roll turns the picture clockwise.
    """
    azimuth, elevation, roll = np.deg2rad([azimuth_deg, elevation_deg, roll_deg])
    towards = np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ]
    )
    forward = -towards
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right - s * down, s * right + c * down, forward])
    return rotation, -rotation @ (np.asarray(target) + distance * towards)


@dataclass(frozen=True)
class Lighting:
    """A lamp direction in object space (3,), its RGB strength and the RGB ambient light."""

    direction: np.ndarray
    lamp: np.ndarray
    ambient: np.ndarray


@dataclass(frozen=True)
class Rendering:
    """``colour`` (H, W, 3) float32 in 0..1 premultiplied by ``coverage`` (H, W) float32 in 0..1.

    ``depth`` (SUPERSAMPLE·H, SUPERSAMPLE·W) float in object units, inf where the object is not.
    """

    colour: np.ndarray
    coverage: np.ndarray
    depth: np.ndarray


def rasterise(
    corners_px: np.ndarray, inverse_depth: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest triangle per pixel: indices (H, W), −1 for none, and its inverse depth (H, W).

    ``corners_px`` (T, 3, 2) and ``inverse_depth`` (T, 3) describe front-facing triangles in front
    of the camera. Inverse depth is affine in the image, so the z-buffer is exact.
    """
    nearest = np.full(height * width, -1, dtype=np.int64)
    buffer = np.zeros(height * width)
    x, y = corners_px[..., 0], corners_px[..., 1]
    top = np.clip(np.ceil(y.min(axis=1)), 0, height).astype(np.int64)
    bottom = np.clip(np.floor(y.max(axis=1)), -1, height - 1).astype(np.int64)
    slope = _affine(corners_px, inverse_depth)

    # one entry per (triangle, row), then the exact span of that row inside the triangle
    rows = np.maximum(bottom - top + 1, 0)
    owner = np.repeat(np.arange(len(rows)), rows)
    row = np.arange(len(owner)) - np.repeat(np.cumsum(rows) - rows, rows) + top[owner]
    left = np.full(len(owner), np.inf)
    right = np.full(len(owner), -np.inf)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        rise = y[:, b] - y[:, a]
        run = np.divide(x[:, b] - x[:, a], rise, out=np.zeros_like(rise), where=rise != 0)
        low, high = np.minimum(y[:, a], y[:, b]), np.maximum(y[:, a], y[:, b])
        crossing = x[owner, a] + (row - y[owner, a]) * run[owner]
        meets = (row >= low[owner]) & (row <= high[owner]) & (rise[owner] != 0)
        np.minimum(left, crossing, out=left, where=meets)
        np.maximum(right, crossing, out=right, where=meets)
    first = np.clip(np.ceil(left), 0, width)
    last = np.clip(np.floor(right), -1, width - 1)
    counts = np.maximum(last - first + 1, 0).astype(np.int64)

    span = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(len(span)) - (np.cumsum(counts) - counts - first.astype(np.int64))[span]
    base = slope[owner, 1] * row + slope[owner, 2]
    value = base[span] + slope[owner, 0][span] * column
    pixel = (row * width)[span] + column
    np.maximum.at(buffer, pixel, value)
    wins = value == buffer[pixel]
    nearest[pixel[wins]] = owner[span[wins]]
    return nearest.reshape(height, width), buffer.reshape(height, width)


def _affine(corners_px: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients (T, ..., 3) of value = a·x + b·y + c for values (T, 3, ...) at the corners."""
    shape = (-1,) + (1,) * (values.ndim - 2)
    x, y = corners_px[..., 0], corners_px[..., 1]
    x1, x2 = ((x[:, i] - x[:, 0]).reshape(shape) for i in (1, 2))
    y1, y2 = ((y[:, i] - y[:, 0]).reshape(shape) for i in (1, 2))
    v1, v2 = values[:, 1] - values[:, 0], values[:, 2] - values[:, 0]
    area = x1 * y2 - x2 * y1
    a = (v1 * y2 - v2 * y1) / area
    b = (x1 * v2 - x2 * v1) / area
    c = values[:, 0] - a * x[:, 0].reshape(shape) - b * y[:, 0].reshape(shape)
    return np.stack([a, b, c], axis=-1)


def render(mesh: Mesh, camera: Camera, width: int, height: int, lighting: Lighting) -> Rendering:
    """Render a mesh to ``width`` × ``height`` pixels, antialiased over SUPERSAMPLE² samples."""
    fine = camera.magnified(SUPERSAMPLE)
    fine_width, fine_height = SUPERSAMPLE * width, SUPERSAMPLE * height
    corners_px, depth = fine.project(mesh.corners)
    edge1, edge2 = corners_px[:, 1] - corners_px[:, 0], corners_px[:, 2] - corners_px[:, 0]
    area = edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0]
    # y points down, so outward faces turned to the viewer run clockwise in the usual sense
    facing = area < -1e-6
    corners_px, inverse = corners_px[facing], 1 / depth[facing]
    normals, materials = mesh.normals[facing], mesh.materials[facing]
    nearest, buffer = rasterise(corners_px, inverse, fine_width, fine_height)

    row, column = np.nonzero(nearest >= 0)
    triangle = nearest[row, column]
    z = 1 / buffer[row, column]
    normal = _affine(corners_px, normals * inverse[..., None]).astype(np.float32)[triangle]
    x32, y32 = column.astype(np.float32)[:, None], row.astype(np.float32)[:, None]
    normal = normal[..., 0] * x32 + normal[..., 1] * y32 + normal[..., 2]
    normal /= np.maximum(np.sqrt(np.einsum("ni,ni->n", normal, normal)), 1e-9)[:, None]
    seen = np.stack(
        [
            (column - fine.centre_px[0]) * z / fine.focal_px,
            (row - fine.centre_px[1]) * z / fine.focal_px,
            z,
        ],
        axis=1,
    )
    point = ((seen - fine.translation) @ fine.rotation).astype(np.float32)
    eye = (-fine.translation @ fine.rotation).astype(np.float32)
    colour = _shade(mesh.palette, materials[triangle], point, normal, eye, lighting)

    cell = (row // SUPERSAMPLE) * width + column // SUPERSAMPLE
    total = np.stack(
        [np.bincount(cell, weights=channel, minlength=width * height) for channel in colour.T],
        axis=1,
    )
    samples = SUPERSAMPLE**2
    coverage = np.bincount(cell, minlength=width * height) / samples
    depth_map = np.full((fine_height, fine_width), np.inf)
    depth_map[row, column] = z
    return Rendering(
        (total / samples).reshape(height, width, 3).astype(np.float32),
        coverage.reshape(height, width).astype(np.float32),
        depth_map,
    )


def _shade(palette, material, point, normal, eye, lighting: Lighting) -> np.ndarray:
    albedo = np.array([m.colour for m in palette], dtype=np.float32)[material]
    for index, one in enumerate(palette):
        if one.pattern != "plain":
            mine = np.nonzero(material == index)[0]
            share = _pattern(one, point[mine])[:, None]
            accent = np.asarray(one.accent, dtype=np.float32)
            albedo[mine] += share * (accent - albedo[mine])
    facing = normal @ lighting.direction.astype(np.float32)
    diffuse = np.maximum(facing, 0)[:, None] * lighting.lamp.astype(np.float32)
    # light from above is brighter than light thrown back by the ground
    ambient = (0.8 + 0.2 * normal[:, 2:]) * lighting.ambient.astype(np.float32)
    gloss = np.array([m.gloss for m in palette], dtype=np.float32)[material]
    view = eye - point
    view /= np.sqrt(np.einsum("ni,ni->n", view, view))[:, None]
    half = view + lighting.direction.astype(np.float32)
    half /= np.sqrt(np.einsum("ni,ni->n", half, half))[:, None]
    highlight = gloss * np.maximum(np.einsum("ni,ni->n", normal, half), 0) ** 24
    return np.clip(albedo * (ambient + diffuse) + highlight[:, None], 0, 1)


def _pattern(material: Material, point: np.ndarray) -> np.ndarray:
    """Share of the accent colour at object points (N, 3), 0..1 with soft edges."""
    phase = point @ (material.axes * (2 * np.pi / material.wavelength)).T.astype(np.float32)
    if material.pattern == "stripes":
        value = np.sin(phase[:, 0])
    elif material.pattern == "checks":
        value = np.sin(phase[:, 0]) * np.sin(phase[:, 1])
    elif material.pattern == "spots":
        value = np.cos(phase).prod(axis=1) - 0.35
    elif material.pattern == "blotches":
        bent = phase + 1.7 * np.sin(0.63 * phase[:, [1, 2, 0]] + 1)
        value = np.sin(bent).sum(axis=1) / 2
    else:
        raise ValueError(f"unknown pattern {material.pattern!r}")
    return np.clip(0.5 + 5 * value, 0, 1)


def visible(
    points: np.ndarray, camera: Camera, depth_map: np.ndarray, tolerance: float
) -> np.ndarray:
    """Which object points (N, 3) the renderer's depth map shows: (N,) bool.

    A point is visible when one of the 3×3 samples around it lies on a surface within ``tolerance``
    (object units) of the point's own depth; points outside the map are not.
    """
    xy, depth = camera.magnified(SUPERSAMPLE).project(points)
    height, width = depth_map.shape
    shown = np.zeros(len(points), dtype=bool)
    for index, ((x, y), z) in enumerate(zip(np.rint(xy).astype(int), depth, strict=True)):
        if 0 <= x < width and 0 <= y < height:
            around = depth_map[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            shown[index] = bool((np.abs(around - z) <= tolerance).any())
    return shown
