"""DHPF (Min et al., ECCV 2020): hyperpixels whose layers are chosen for each pair of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.hyperpixels import CellGrid, carry, inner_products, regularised_hough
from nemf.aggregation import mutual_filter
from nemf.backbones import (
    ARCHITECTURES,
    ResNet,
    backbone_of,
    build_backbone,
    check_finite,
    fitting_model,
    squashed_frame,
    tap_table,
    trunk_of,
)
from nemf.cards import MatcherCard
from nemf.checkpoints import check_sources, fitting_state, read_state
from nemf.errors import NemfError
from nemf.geometry import squash, unsquash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size

CARD = MatcherCard(
    name="dhpf",
    title="DHPF",
    paper="Learning to Compose Hypercolumns for Visual Correspondence (ECCV)",
    year=2020,
    arxiv="2007.10587",
    licence_of_original="Apache-2.0",
    backbone="ResNet-101",
    input_size="240x240",
    training="keypoints, or pairs alone, of SPair-71k or PF-PASCAL; trunk as on ImageNet",
    official_protocol="dhpf-paper@1",
    description="Hyperpixel features of the layers that gates choose for the pair, votes "
    "regularised by a Hough space of offsets, mutual maxima.",
    published_as="DHPF",
    flow_resolution="60",
    weights_at="Google Drive, linked from github.com/juhongm999/dhpf",
)

REDUCTION = 8  # channels of a layer per channel that takes part in the matching
GATE_WIDTH = 32
NORM_EPS = 1e-3
TRUNK = "backbone."


@dataclass(frozen=True, eq=False)
class DHPFFeatures:
    """What an image brings to every pair. Lists run over all taps of the trunk.

    ``reduced``: float32 (C / 8, h, w), the layer transformed; ``squares`` float32 (layers, cells):
    the squared length of its features at the cells of the common grid; ``pooled``: float32 (C,),
    the mean of the layer itself; ``canvas`` (height, width) px, the frame that was squashed.
    """

    reduced: list[Tensor]
    squares: Tensor
    pooled: list[Tensor]
    canvas: Size


class DHPF(Matcher):
    """DHPF: as HPF on the image squashed to ``input_size``, but a gate decides for every layer and
    pair whether the layer takes part, layers are transformed first, and cells must agree mutually.

    Weights come from exactly one of these:

    - ``weights``: an official file or a checkpoint of ours. The official ones hold what was learned
      and not the trunk, which is ImageNet's: it comes from ``backbone_weights`` or from where
      :func:`nemf.backbones.build_backbone` looks. ``backbone`` is read from the tensors; given as a
      keyword it must agree;
    - ``init``: "head" draws what is learned from ``init_seed``; the trunk ("resnet101" if no
      ``backbone`` is given) comes from where it does for an official file. "random" draws it too,
      if ``backbone_weights`` does not give it.

    Official files: folder 1aoKQlvHOb7vZIFK8pDJsQnC7SOyEjXVF on Google Drive, linked from the
    README of github.com/juhongm999/dhpf. A point that no cell covers gets NaN, no answer. There is
    no training here.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file that
    does not fit.
    """

    card = CARD

    def __init__(
        self,
        backbone: str | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        input_size: int = 240,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        if input_size < 32:
            raise NemfError(f"input_size must be at least 32 px, not {input_size}")
        check_sources("dhpf", weights, init, None)
        state: dict[str, Tensor] = {}
        if weights is not None:
            state = read_state(Path(weights))
            backbone = backbone_of(Path(weights), _fitting_backbones(state), backbone)
        backbone = backbone or "resnet101"
        taps = tap_table(backbone)
        first, cells = taps[0], -(-input_size // taps[0].jump_px)
        self.input_size = input_size
        self.grid = CellGrid(*(cells, cells, first.jump_px, first.field_px), self._frame)

        holds_trunk = any(key.startswith(TRUNK) for key in state)
        if holds_trunk:
            check_sources("dhpf", weights, init, backbone_weights)
            with torch.device("meta"):  # allocates nothing and draws no random numbers
                self.backbone = ResNet(backbone)
        elif init is not None:
            self.backbone = trunk_of(backbone, init, backbone_weights, len(taps) - 1)
        else:
            self.backbone = build_backbone(backbone, backbone_weights, upto=len(taps) - 1)
        with torch.device("meta"):
            self.reduction_ffns = nn.ModuleList(_reduction(tap.channels) for tap in taps)
            self.gumbel_ffns = nn.ModuleList(_gate(tap.channels) for tap in taps)
        if weights is not None:
            fitting = self._fitting(Path(weights), state, holds_trunk)
            self.load_state_dict(fitting, strict=holds_trunk, assign=True)  # verified key by key
        else:
            self._draw_head(init_seed)
        self.backbone.freeze()

    @property
    def _frame(self) -> Size:
        return (self.input_size, self.input_size)

    def selected(self, query: DHPFFeatures, reference: DHPFFeatures) -> list[int]:
        """The layers whose gates are open for a pair, increasing; maybe none (sec. 3.2, without
        the noise of training)."""
        logits = []
        for gate, a, b in zip(self.gumbel_ffns, query.pooled, reference.pooled, strict=True):
            logits.append(gate((a.to(self.device) + b.to(self.device))[None, :, None, None]))
        return torch.cat(logits).flatten(1).argmax(1).nonzero()[:, 0].tolist()

    def votes(self, query: DHPFFeatures, reference: DHPFFeatures) -> Tensor:
        """max(0, cosine)² of all pairs of cells, float32 (cells, cells), of the layers
        :meth:`selected`, the first if there is none. The cosine is that of the concatenated
        layers, shrunk a little where both are short."""
        layers = self.selected(query, reference) or [0]
        levels = []
        for side in (query, reference):
            by_size: dict[Size, list[Tensor]] = {}
            for k in layers:
                by_size.setdefault(side.reduced[k].shape[1:], []).append(side.reduced[k])
            levels.append([torch.cat(same).to(self.device) for same in by_size.values()])
        cells = (self.grid.rows, self.grid.cols)
        total = inner_products(*levels, self.grid, self.grid, cells, cells)
        lengths = [
            side.squares[layers].sum(0).sqrt().to(self.device) for side in (query, reference)
        ]
        total /= torch.outer(*lengths).add_(NORM_EPS)
        return total.relu_().square_()

    def scores(self, query: DHPFFeatures, reference: DHPFFeatures) -> Tensor:
        """float32 (cells, cells): :meth:`votes`, regularised and filtered for mutual maxima."""
        votes = self.votes(query, reference)
        return mutual_filter(regularised_hough(votes, self.grid, self.grid))

    def encode_one(self, image: Image, role: Role) -> DHPFFeatures:
        frame = squashed_frame(image, self.input_size).to(self.device)
        taps = self.backbone.taps(frame, range(len(self.reduction_ffns)))
        cells = (self.grid.rows, self.grid.cols)
        reduced, squares = [], []
        for reduce, tap in zip(self.reduction_ffns, taps, strict=True):
            level = reduce(tap)
            reduced.append(level[0])
            on_grid = F.interpolate(level, cells, mode="bilinear", align_corners=True)
            squares.append(on_grid.square().sum(1).flatten())
        squares = torch.stack(squares)
        check_finite(squares, image)
        pooled = [tap.mean((0, 2, 3)) for tap in taps]
        return DHPFFeatures(reduced, squares, pooled, image.canvas)

    def match_one(self, query: DHPFFeatures, reference: DHPFFeatures, points: Tensor) -> Matches:
        def best(cells: Tensor) -> Tensor:
            return self.scores(query, reference)[cells].argmax(1)

        points = squash(points.to(self.device, torch.float32), query.canvas, self._frame)
        moved = carry(points, self.grid, self.grid, best)
        return Matches(unsquash(moved, reference.canvas, self._frame))

    def _fitting(
        self, path: Path, state: Mapping[str, Tensor], holds_trunk: bool
    ) -> dict[str, Tensor]:
        holds = f"this DHPF on {self.backbone.name}"
        if holds_trunk:
            return fitting_model(path, state, self, self.backbone, TRUNK, holds)
        wanted = {k: v for k, v in self.state_dict().items() if not k.startswith(TRUNK)}
        unexpected = [key for key in state if key not in wanted]
        return fitting_state(path, state, wanted, unexpected=unexpected, holds=holds)

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random convolutions, batch norms that pass on."""
        generator = torch.Generator().manual_seed(seed)
        for part in (self.reduction_ffns, self.gumbel_ffns):
            part.is_random = True
            for module in part.to_empty(device="cpu").modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.normal_(0, (2 / module.in_channels) ** 0.5, generator=generator)
                elif isinstance(module, nn.BatchNorm2d):
                    module.reset_parameters()


def _reduction(channels: int) -> nn.Sequential:
    """What transforms a layer."""
    width = channels // REDUCTION
    conv = nn.Conv2d(channels, width, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def _gate(channels: int) -> nn.Sequential:
    """From the sum of both images' means of a layer to the scores of leaving it out and of using
    it."""
    into = nn.Conv2d(channels, GATE_WIDTH, 1, bias=False)
    out = nn.Conv2d(GATE_WIDTH, 2, 1, bias=False)
    return nn.Sequential(into, nn.BatchNorm2d(GATE_WIDTH), nn.ReLU(), out)


def _fitting_backbones(state: Mapping[str, Tensor]) -> list[str]:
    """The architectures whose taps have the channels that a file transforms."""
    channels = []
    while (weight := state.get(f"reduction_ffns.{len(channels)}.0.weight")) is not None:
        channels.append(weight.shape[1] if weight.ndim == 4 else 0)
    return [n for n in ARCHITECTURES if [tap.channels for tap in tap_table(n)] == channels]
