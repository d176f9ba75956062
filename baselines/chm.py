"""CHM (Min & Cho, CVPR 2021): Hough matching by 6-D and 4-D convolutions over correlations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.soft_transfer import PAPER_CELLS, SoftTransfer, read_roles
from nemf.aggregation import at_least_float32, mutual_filter
from nemf.backbones import last_of_stage, tap_table
from nemf.cards import MatcherCard
from nemf.checkpoints import check_sources
from nemf.convolution import convolve, doubled
from nemf.errors import NemfError
from nemf.matcher import Role

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
    weights_at="Google Drive, linked from github.com/juhongm999/chm",
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
# Where training begins: kernels that sum to these gains, spread over their nonlinearities.
FIRST_GAIN, FIRST_BIAS, SECOND_GAIN = 8.0, -6.0, 40.0


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


class CHM(SoftTransfer):
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

    How points are read: see :class:`baselines.soft_transfer.SoftTransfer`.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file that
    does not fit.
    """

    card = CARD
    peak_sigma = 17 / PAPER_CELLS
    reach = training_reach = 0.1

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
        super().__init__(backbone, last_of_stage(backbone, 3), input_size)
        check_sources("chm", weights, init, backbone_weights)
        if kernel not in (None, *SCALE_GROUPS):
            raise NemfError(f"kernel must be one of {', '.join(SCALE_GROUPS)}, not {kernel!r}")
        state = {}
        if weights is not None:
            state = _read(Path(weights))
            kernel = _kernel_of(Path(weights), state, kernel)

        channels = tap_table(backbone)[self.backbone.query.upto].channels
        self.learner = nn.Module()
        self.learner.conv2ds = nn.ModuleList(
            nn.Conv2d(channels, channels // 4, 3, padding=1, bias=False, device="meta")
            for _ in SCALES
        )
        self.learner.chm6d = HoughSpace6d(kernel or "psi")
        self.learner.chm4d = HoughSpace4d(kernel or "psi")
        if weights is not None:
            self._take(Path(weights), state)
        else:
            self._begin_trunks(init, backbone_weights)
            self._draw_head(init_seed)
        self._freeze_trunks(train_trunk)

    def levels(self, frames: Tensor, role: Role) -> Tensor:
        """(B, scales, C, S): layer3 of ``frames`` (B, 3, input_size, input_size) from
        :func:`nemf.backbones.normalise`, resized to each scale, convolved, of unit length along C,
        and brought to the S cells of the grid.

        The paper resizes correlations to the grid, which is linear in each side's features: doing
        it to those gives the same.
        """
        trunk = self.backbone.query if role == "query" else self.backbone.reference
        (tap,) = trunk.taps(frames, [trunk.upto])
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
            volume = F.softplus(self.learner.chm4d(doubled(volume)))
            return mutual_filter(volume.flatten(3).flatten(1, 2))

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


def _read(path: Path) -> dict[str, Tensor]:
    """The state of an official file or of ours, under our names and in our shapes."""
    state = read_roles(path, ("layer4.", "fc."))
    shapes = {"learner.chm4d.weight": (-1,)}
    if state.get("learner.chm6d.param", torch.empty(0)).numel() == 9 * SIDE**4:
        shapes["learner.chm6d.param"] = (9, -1)
    return {key: value.reshape(shapes.get(key, value.shape)) for key, value in state.items()}


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
