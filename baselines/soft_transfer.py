"""What CHM and TransforMatcher share: a trunk for each role, and points that move by softly
sampling the expected positions of the cells around them (Min and Cho, CHM, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nemf.backbones import (
    ResNet,
    check_finite,
    last_of_stage,
    squashed_frame,
    tap_table,
    trunk_of,
)
from nemf.checkpoints import fitting_state, read_state
from nemf.errors import NemfError
from nemf.geometry import squash, unsquash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch

PAPER_CELLS = 30  # a side, of the result; lengths of the read-out are given for it


@dataclass(frozen=True, eq=False)
class RoleFeatures:
    """``levels`` float32 (..., C, S): the image on S cells of a square grid, row by row; ``canvas``
    (height, width) px, the frame that was squashed."""

    levels: Tensor
    canvas: Size


class SoftTransfer(Matcher):
    """A matcher with a trunk for each role that scores every cell of the query image against every
    cell of the reference image, on grids of twice ``cells`` a side, and reads points from that.

    A subclass gives :meth:`levels`, :meth:`scores` and the lengths of the read-out: ``peak_sigma``
    of the Gaussian around a row's maximum, in sides of the grid, and ``reach`` of the sampler, in
    halves of the frame's side at the paper's 30 cells (``training_reach`` while it trains). They
    follow the number of cells.

    Points move in the frame of the image squashed to ``input_size``: x * input_size / width, which
    is normalised to (x - side / 2) / (side / 2). A point is the mean of the cells within reach,
    weighted by nearness; further than that from every cell, outside the image, it gets NaN, no
    answer. (TransforMatcher's code adds 1e-5 to the sum of the weights, an answer in the centre of
    the frame then and elsewhere a pull of up to 0.3 px towards it; here they sum to one.)
    """

    uses_role = True
    peak_sigma: ClassVar[float]
    reach: ClassVar[float]
    training_reach: ClassVar[float]

    def __init__(self, backbone: str, last_id: int, input_size: int) -> None:
        """Trunks of ``backbone`` up to ``last_id``, without values yet."""
        super().__init__()
        if input_size < 32:
            raise NemfError(f"input_size must be at least 32 px, not {input_size}")
        self.input_size = input_size
        self.cells = -(-input_size // tap_table(backbone)[last_of_stage(backbone, 3)].jump_px)
        self.backbone = nn.Module()
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            self.backbone.query = ResNet(backbone, last_id)
            self.backbone.reference = ResNet(backbone, last_id)

    def levels(self, frames: Tensor, role: Role) -> Tensor:
        """(B, ..., C, S): ``frames`` (B, 3, input_size, input_size) from
        :func:`nemf.backbones.normalise` under the trunk of ``role``."""
        raise NotImplementedError

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """(B, Q, R): scores of every query cell (row) and reference cell, on grids of twice
        ``cells`` a side, from :meth:`levels` of both."""
        raise NotImplementedError

    def transfer(self, points: Tensor, scores: Tensor, reach: float | None = None) -> Tensor:
        """(N, 2): where ``points`` (N, 2) px of the squashed query image go in the squashed
        reference image, by ``scores`` (Q, R); ``reach`` of the sampler, the class's if None."""
        half = self.input_size / 2
        reach = self.reach if reach is None else reach
        return self._sample(points / half - 1, self._expected(scores), reach) * half + half

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Keypoints."""
        return {"loss_keypoints": batch.valid.sum()}

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The squared distance of the source keypoints' answers and the target keypoints, in halves
        of the frame's side, mean over the keypoints. The frames' side is ``input_size``."""
        batch.check_side(self.input_size)
        query, reference = self.levels(batch.src, "query"), self.levels(batch.trg, "reference")
        distances = []
        for i, scores in enumerate(self.scores(query, reference)):
            src, trg = (kps[i][batch.valid[i]] for kps in (batch.src_kps, batch.trg_kps))
            apart = self.transfer(src, scores, self.training_reach) - trg
            distances.append((apart / (self.input_size / 2)).square().sum())
        count = (counts or self.supervised(batch))["loss_keypoints"]
        return {"loss_keypoints": torch.stack(distances).sum() / count.clamp_min(1)}

    def encode_one(self, image: Image, role: Role) -> RoleFeatures:
        frame = squashed_frame(image, self.input_size).to(self.device)
        levels = self.levels(frame, role)[0]
        check_finite(levels, image)
        return RoleFeatures(levels, image.canvas)

    def match_one(self, query: RoleFeatures, reference: RoleFeatures, points: Tensor) -> Matches:
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
        sigma_norm = self.peak_sigma * 2 * self.cells * self._cell_norm
        near = (apart.square().sum(2) / (-2 * sigma_norm**2)).exp()
        return (scores * near).softmax(1) @ grid

    def _sample(self, points_norm: Tensor, positions: Tensor, reach: float) -> Tensor:
        """(N, 2): ``positions`` (Q, 2) of the cells near each of ``points_norm`` (N, 2), mixed."""
        apart = points_norm[:, None] - self._grid(positions)
        reach_norm = reach * (PAPER_CELLS - 1) / 2 * self._cell_norm
        nearness = (reach_norm - (apart.square().sum(2) + 1e-5).sqrt()).clamp_min(0)
        return (nearness / nearness.sum(1, keepdim=True)) @ positions

    @property
    def _cell_norm(self) -> float:
        """The distance of neighbouring cells."""
        return 2 / (2 * self.cells - 1)

    def _grid(self, like: Tensor) -> Tensor:
        """(Q, 2): normalised (x, y) of the cells, row by row."""
        axis = torch.linspace(-1, 1, 2 * self.cells, dtype=like.dtype, device=like.device)
        return torch.cartesian_prod(axis, axis).flip(1)

    def _take(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """The values of a file, all of them; NemfError if it does not fit."""
        wanted = self.state_dict()
        unexpected = [key for key in state if key not in wanted]
        holds = f"this {self.card.title} on {self.backbone.query.name}"
        fitting = fitting_state(path, state, wanted, unexpected=unexpected, holds=holds)
        self.load_state_dict(fitting, assign=True)

    def _begin_trunks(
        self, init: Literal["head", "random"], backbone_weights: str | Path | None
    ) -> None:
        """Both trunks with the same values (see :func:`nemf.backbones.trunk_of`)."""
        empty = self.backbone.query
        self.backbone.query = trunk_of(empty.name, init, backbone_weights, empty.upto)
        self.backbone.reference = deepcopy(self.backbone.query)

    def _freeze_trunks(self, train_trunk: bool) -> None:
        for trunk in (self.backbone.query, self.backbone.reference):
            trunk.freeze(weights=not train_trunk)


def read_roles(path: Path, dropped: tuple[str, ...]) -> dict[str, Tensor]:
    """The state of an official file or of ours, the trunks under our names.

    The official files hold both trunks as one of twice the width, which is cut in two (the first
    half is the query's); of it, what begins with one of ``dropped`` is left out.
    """
    state = read_state(path)
    if any(key.startswith(("backbone.query.", "backbone.reference.")) for key in state):
        return state
    return dict(_halved(state, dropped))


def _halved(state: Mapping[str, Tensor], dropped: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        part, _, name = key.partition(".")
        if part != "backbone":
            yield key, value
        elif not name.startswith(dropped):
            halves = value.chunk(2) if value.ndim else (value, value)
            for role, half in zip(("query", "reference"), halves, strict=False):
                yield f"backbone.{role}.{name}", half
