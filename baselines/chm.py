"""CHM (Min & Cho, CVPR 2021): Hough matching by 6-D and 4-D convolutions over correlations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.aggregation import at_least_float32, mutual_filter
from nemf.backbones import ResNet, check_finite, last_of_stage, normalise, tap_table, trunk_of
from nemf.cards import MatcherCard
from nemf.checkpoints import check_sources, fitting_state, read_state
from nemf.convolution import convolve
from nemf.errors import NemfError
from nemf.geometry import squash, unsquash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch

CARD = MatcherCard(
    name="chm",
    title="CHM",
    paper="Convolutional Hough Matching Networks (CVPR)",
    year=2021,
    arxiv="2103.16831",
    licence_of_original="none stated",
    backbone="ResNet-101",
    input_size="240x240",
    training="keypoints of SPair-71k or PF-PASCAL",
    official_protocol="chm-paper@1",
    description="Correlations over positions and scales, filtered by 6-D and 4-D Hough kernels.",
    published_as="CHM",
    flow_resolution="30",
)

Kernel = Literal["psi", "iso", "full"]
SCALES = (0.5, 1, 2)  # of areas
SIDE = 5  # of the kernels over positions
# The nine offsets between scales, those with one weight together.
SCALE_GROUPS: dict[Kernel, list[list[int]]] = {
    "psi": [[4], [0, 8], [2, 6], [1, 3, 5, 7]],
    "iso": [[0, 4, 8], [2, 6], [1, 3, 5, 7]],
    "full": [[k] for k in range(9)],
}
PAPER_CELLS = 30  # a side, of the result; lengths of the read-out are given for it
PEAK_SIGMA = 17 / PAPER_CELLS  # of the Gaussian around a maximum, in sides of the grid
SAMPLER_REACH_CELLS = 0.1 * (PAPER_CELLS - 1) / 2
# Where training begins: kernels that sum to these gains, spread over their nonlinearities.
FIRST_GAIN, FIRST_BIAS, SECOND_GAIN = 8.0, -6.0, 40.0


@dataclass(frozen=True, eq=False)
class CHMFeatures:
    """``levels`` float32 (scales, C, S): the image at each scale, brought to S cells on a square
    grid, row by row; ``canvas`` (height, width) px, the frame that was squashed."""

    levels: Tensor
    canvas: Size


class HoughKernel(nn.Module):
    """The weights of one kernel over two positions, (5, 5, 5, 5): offsets of the same kind share a
    weight, and a weight is spread evenly over its offsets.

    ``psi``: of the same kind are offsets whose distances from the centre (of both, unordered) and
    from each other agree, 55 kinds; ``iso``: those whose distance from each other agrees, 15;
    ``full``: none, 625.
    """

    def __init__(self, kind: Kernel) -> None:
        super().__init__()
        kinds = offset_kinds(kind)
        counts = torch.bincount(kinds)
        self.n_kinds = len(counts)
        self.register_buffer("kinds", kinds, persistent=False)
        self.register_buffer("share", 1 / counts[kinds], persistent=False)

    def forward(self, weights: Tensor) -> Tensor:
        """(..., 5, 5, 5, 5) from ``weights`` (..., kinds)."""
        spread = weights[..., self.kinds] * self.share.to(weights)
        return spread.unflatten(-1, [SIDE] * 4)


def offset_kinds(kind: Kernel) -> Tensor:
    """int64 (625,): the kind of every two offsets (y, x), (v, u) from -2 to 2, y slowest, numbered
    as they come up."""
    centre, seen = SIDE // 2, {}
    numbers = []
    for y, x, v, u in itertools.product(range(-centre, centre + 1), repeat=4):
        tail, head = y**2 + x**2, v**2 + u**2
        apart = (y - v) ** 2 + (x - u) ** 2
        key = {
            "psi": (max(tail, head), min(tail, head), apart),
            "iso": apart,
            "full": (y, x, v, u),
        }[kind]
        numbers.append(seen.setdefault(key, len(seen)))
    return torch.tensor(numbers)


class HoughSpace6d(nn.Module):
    """The convolution over both scales and both positions, (B, 3, 3, h, w, h, w), same shape out.

    Its parameters are the official ones: a vector for each group of scale offsets, one tensor for
    all in the "full" case.
    """

    def __init__(self, kind: Kernel) -> None:
        super().__init__()
        self.kernel = HoughKernel(kind)
        groups = SCALE_GROUPS[kind]
        if kind == "full":
            self.param: nn.Parameter | nn.ParameterList = nn.Parameter(
                torch.empty(len(groups), self.kernel.n_kinds)
            )
        else:
            self.param = nn.ParameterList(torch.empty(self.kernel.n_kinds) for _ in groups)
        self.bias = nn.Parameter(torch.empty(1))
        numbers, sizes = torch.empty(9, dtype=torch.long), torch.empty(9)
        for number, group in enumerate(groups):
            numbers[group], sizes[group] = number, float(len(group))
        self.register_buffer("groups", numbers, persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)

    def weight(self) -> Tensor:
        """(3, 3, 5, 5, 5, 5)."""
        vectors = torch.stack(list(self.param))
        each = vectors[self.groups] / self.sizes[:, None].to(vectors)
        return self.kernel(each).unflatten(0, (3, 3))

    def forward(self, volume: Tensor) -> Tensor:
        return convolve(volume[:, None], self.weight()[None, None], self.bias)[:, 0]


class HoughSpace4d(nn.Module):
    """The convolution over both positions, (B, h, w, h, w), same shape out."""

    def __init__(self, kind: Kernel) -> None:
        super().__init__()
        self.kernel = HoughKernel(kind)
        self.weight = nn.Parameter(torch.empty(self.kernel.n_kinds))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, volume: Tensor) -> Tensor:
        return convolve(volume[:, None], self.kernel(self.weight)[None, None], self.bias)[:, 0]


class CHM(Matcher):
    """CHM: for every cell of the query image a distribution over the reference image, from which
    points are read softly. The paper's "source" is our query image, its "target" our reference
    image; each has a trunk of its own.

    Weights come from exactly one of these:

    - ``weights``: an official file or a checkpoint of ours. The official one holds both trunks as
      one of twice the width, which is cut in two; its layer4 and classifier are dropped. ``kernel``
      is read from the tensors; given as a keyword it must agree;
    - ``init``: "head", for training, draws the rest from ``init_seed``; the kernels ("psi" if none
      is given) begin with the weight of their centre alone. Both trunks come from
      ``backbone_weights`` or from where :func:`nemf.backbones.build_backbone` looks. "random" draws
      them too, if ``backbone_weights`` does not give them.

    Training leaves the trunks as they are unless ``train_trunk``; their batch norms keep their
    statistics either way.

    Points move in the frame of the image squashed to ``input_size``: x * input_size / width, which
    is normalised to (x - side / 2) / (side / 2). A point is the mean of the cells within a tenth of
    that (at the paper's 30 cells), weighted by nearness; further than that from every cell, outside
    the image, it gets NaN, no answer. The lengths of the read-out follow the number of cells.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file that
    does not fit.
    """

    card = CARD
    uses_role = True

    def __init__(
        self,
        backbone: str = "resnet101",
        kernel: Kernel | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        input_size: int = 240,
        train_trunk: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        check_sources("chm", weights, init, backbone_weights)
        if kernel not in (None, *SCALE_GROUPS):
            raise NemfError(f"kernel must be one of {', '.join(SCALE_GROUPS)}, not {kernel!r}")
        if input_size < 32:
            raise NemfError(f"input_size must be at least 32 px, not {input_size}")
        table = tap_table(backbone)
        self.last_id = last_of_stage(backbone, 3)
        self.input_size = input_size
        self.cells = -(-input_size // table[self.last_id].jump_px)
        state = {}
        if weights is not None:
            state = _read(Path(weights))
            kernel = _kernel_of(Path(weights), state, kernel)

        channels = table[self.last_id].channels
        self.backbone, self.learner = nn.Module(), nn.Module()
        self.learner.conv2ds = nn.ModuleList(
            nn.Conv2d(channels, channels // 4, 3, padding=1, bias=False, device="meta")
            for _ in SCALES
        )
        self.learner.chm6d = HoughSpace6d(kernel or "psi")
        self.learner.chm4d = HoughSpace4d(kernel or "psi")
        if weights is not None:
            with torch.device("meta"):  # allocates nothing and draws no random numbers
                self.backbone.query = ResNet(backbone, self.last_id)
                self.backbone.reference = ResNet(backbone, self.last_id)
            self.load_state_dict(self._fitting(Path(weights), state), assign=True)
        else:
            self.backbone.query = trunk_of(backbone, init, backbone_weights, self.last_id)
            self.backbone.reference = deepcopy(self.backbone.query)
            self._draw_head(init_seed)
        for trunk in (self.backbone.query, self.backbone.reference):
            trunk.freeze(weights=not train_trunk)

    @torch.no_grad()
    def encode(self, images: Sequence[Image], role: Role) -> list[CHMFeatures]:
        """Raises NemfError for an image whose features are not finite."""
        return [self._encode(image, role) for image in images]

    @torch.no_grad()
    def match(
        self,
        queries: Sequence[CHMFeatures],
        references: Sequence[CHMFeatures],
        points: Sequence[Tensor],
    ) -> list[Matches]:
        triples = zip(queries, references, points, strict=True)
        return [self._match(*triple) for triple in triples]

    def levels(self, frames: Tensor, role: Role) -> Tensor:
        """(B, scales, C, S): layer3 of ``frames`` (B, 3, input_size, input_size) from
        :func:`nemf.backbones.normalise`, resized to each scale, convolved, of unit length along C,
        and brought to the S cells of the grid.

        The paper resizes correlations to the grid, which is linear in each side's features: doing
        it to those gives the same.
        """
        trunk = self.backbone.query if role == "query" else self.backbone.reference
        (tap,) = trunk.taps(frames, [self.last_id])
        found = []
        for scale, conv in zip(SCALES, self.learner.conv2ds, strict=True):
            side = max(round(self.cells * math.sqrt(scale)), 1)
            features = conv(_resized(tap.relu(), side))
            features = at_least_float32(features)
            found.append(_resized(F.normalize(features, dim=1), self.cells).flatten(2))
        return torch.stack(found, 1)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """(B, Q, R): the filtered scores of every query cell (row) and reference cell, on grids of
        twice ``cells`` a side, from :meth:`levels` of both (sec. 3.3)."""
        n = self.cells
        with torch.autocast(query.device.type, enabled=False):
            cosine = torch.einsum("bscq,btcr->bstqr", query, reference)
            volume = cosine.clamp_min(0).unflatten(4, (n, n)).unflatten(3, (n, n))
            # The highest of the sigmoids is the sigmoid of the highest.
            volume = self.learner.chm6d(volume).amax((1, 2)).sigmoid()
            volume = F.softplus(self.learner.chm4d(_doubled(volume)))
            return mutual_filter(volume.flatten(3).flatten(1, 2))

    def transfer(self, points: Tensor, scores: Tensor) -> Tensor:
        """(N, 2): where ``points`` (N, 2) px of the squashed query image go in the squashed
        reference image, by ``scores`` (Q, R)."""
        half = self.input_size / 2
        return self._sample(points / half - 1, self._expected(scores)) * half + half

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Keypoints."""
        return {"loss_keypoints": batch.valid.sum()}

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The squared distance of the source keypoints' answers and the target keypoints, in halves
        of the frame's side, mean over the keypoints. The frames' side is ``input_size``."""
        if batch.side_px != self.input_size:
            raise NemfError(
                f"frames of {batch.side_px} px do not suit input_size {self.input_size}"
            )
        query, reference = self.levels(batch.src, "query"), self.levels(batch.trg, "reference")
        distances = []
        for i, scores in enumerate(self.scores(query, reference)):
            src, trg = (kps[i][batch.valid[i]] for kps in (batch.src_kps, batch.trg_kps))
            apart = (self.transfer(src, scores) - trg) / (self.input_size / 2)
            distances.append(apart.square().sum())
        count = (counts or self.supervised(batch))["loss_keypoints"]
        return {"loss_keypoints": torch.stack(distances).sum() / count.clamp_min(1)}

    def _encode(self, image: Image, role: Role) -> CHMFeatures:
        picture = PIL.Image.fromarray(np.ascontiguousarray(image.on_canvas()))
        size = (self.input_size, self.input_size)
        squashed = picture.resize(size, PIL.Image.Resampling.BILINEAR)  # it smooths
        frame = normalise(np.asarray(squashed)).to(self.device)
        levels = self.levels(frame, role)[0]
        check_finite(levels, image)
        return CHMFeatures(levels, image.canvas)

    def _match(self, query: CHMFeatures, reference: CHMFeatures, points: Tensor) -> Matches:
        frame = (self.input_size, self.input_size)
        levels = (side.levels[None].to(self.device) for side in (query, reference))
        (scores,) = self.scores(*levels)
        moved = self.transfer(squash(points.to(scores), query.canvas, frame), scores)
        return Matches(unsquash(moved, reference.canvas, frame))

    def _expected(self, scores: Tensor) -> Tensor:
        """(Q, 2): the expected (x, y), -1..1 between the outermost cells, of every row of scores
        (Q, R) around its maximum, softmax without a temperature."""
        grid = self._grid(scores)
        apart = grid[scores.argmax(1)][:, None] - grid
        sigma_norm = PEAK_SIGMA * 2 * self.cells * self._cell_norm
        near = (apart.square().sum(2) / (-2 * sigma_norm**2)).exp()
        return (scores * near).softmax(1) @ grid

    def _sample(self, points_norm: Tensor, positions: Tensor) -> Tensor:
        """(N, 2): ``positions`` (Q, 2) of the cells near each of ``points_norm`` (N, 2), mixed."""
        apart = points_norm[:, None] - self._grid(positions)
        reach = SAMPLER_REACH_CELLS * self._cell_norm
        nearness = (reach - (apart.square().sum(2) + 1e-5).sqrt()).clamp_min(0)
        return (nearness / nearness.sum(1, keepdim=True)) @ positions

    @property
    def _cell_norm(self) -> float:
        """The distance of neighbouring cells."""
        return 2 / (2 * self.cells - 1)

    def _grid(self, like: Tensor) -> Tensor:
        """(Q, 2): normalised (x, y) of the cells, row by row."""
        axis = torch.linspace(-1, 1, 2 * self.cells, dtype=like.dtype, device=like.device)
        return torch.cartesian_prod(axis, axis).flip(1)

    def _fitting(self, path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.state_dict()
        unexpected = [key for key in state if key not in wanted]
        holds = f"this CHM on {self.backbone.query.name}"
        return fitting_state(path, state, wanted, unexpected=unexpected, holds=holds)

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random projections; kernels that pass their centre (and what is of its kind) on."""
        generator = torch.Generator().manual_seed(seed)
        for conv in self.learner.conv2ds.to_empty(device="cpu"):
            std = (9 * conv.in_channels) ** -0.5
            conv.weight.normal_(0, std, generator=generator)
            conv.is_random = True
        chm6d, chm4d = self.learner.chm6d, self.learner.chm4d
        centre = chm4d.kernel.kinds[SIDE**4 // 2]
        for vector in chm6d.param:
            vector.zero_()
        first = int(chm6d.groups[4])
        chm6d.param[first][centre] = FIRST_GAIN
        chm6d.bias.fill_(FIRST_BIAS)
        chm4d.weight.zero_()
        chm4d.weight[centre] = SECOND_GAIN
        chm4d.bias.zero_()


def _resized(features: Tensor, side: int) -> Tensor:
    return F.interpolate(features, (side, side), mode="bilinear", align_corners=True)


def _doubled(volume: Tensor) -> Tensor:
    """(B, h, w, h, w) to twice the size along each axis (bilinear, align_corners=True)."""
    for _ in range(2):  # the last two axes, then the others in their place
        b, h, w, *size = volume.shape
        planes = _resized(volume.reshape(b, h * w, *size), 2 * size[0])
        volume = planes.unflatten(1, (h, w)).permute(0, 3, 4, 1, 2)
    return volume


def _read(path: Path) -> dict[str, Tensor]:
    """The state of an official file or of ours, under our names and in our shapes."""
    state = read_state(path)
    if any(key.startswith(("backbone.query.", "backbone.reference.")) for key in state):
        return state
    return dict(_of_official(state))


def _of_official(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        part, _, name = key.partition(".")
        if part == "backbone":
            if name.startswith(("layer4.", "fc.")):
                continue
            halves = value.chunk(2) if value.ndim else (value, value)
            for role, half in zip(("query", "reference"), halves, strict=False):
                yield f"backbone.{role}.{name}", half
        elif key == "learner.chm6d.param" and value.numel() == 9 * SIDE**4:
            yield key, value.reshape(9, SIDE**4)
        elif key == "learner.chm4d.weight":
            yield key, value.flatten()
        else:
            yield key, value


def _kernel_of(path: Path, state: Mapping[str, Tensor], given: Kernel | None) -> Kernel:
    """The kind of kernel that a file holds; NemfError where it disagrees with the one ``given``."""
    held = state.get("learner.chm4d.weight", torch.empty(0)).numel()
    kinds = {len(offset_kinds(kind).unique()): kind for kind in SCALE_GROUPS}
    if held not in kinds:
        raise NemfError(
            f"{path} is no CHM checkpoint: learner.chm4d.weight has {held} values, not "
            f"{', '.join(f'{n} ({kind})' for n, kind in kinds.items())}"
        )
    if given not in (None, kinds[held]):
        raise NemfError(f"{path} has kernel {kinds[held]!r}, not {given!r}: leave kernel out")
    return kinds[held]
