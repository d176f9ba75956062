"""SCorrSAN (Huang et al., ECCV 2022): one high-resolution correlation of features that know their
surroundings, and two networks that teach each other around sparse keypoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.aggregation import (
    at_least_float32,
    correlate,
    expected_sources,
    follow,
    mutual_filter,
    to_flow,
    unit,
)
from nemf.backbones import (
    ResNet,
    check_finite,
    fitting_model,
    last_of_stage,
    squashed_frame,
    tap_table,
    trunk_of,
)
from nemf.cards import MatcherCard
from nemf.checkpoints import check_given, check_sources, read_state
from nemf.errors import NemfError
from nemf.geometry import squash, unsquash
from nemf.matcher import Matcher, Role, hash_of_state
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch, end_point_error, flow_labels

CARD = MatcherCard(
    name="scorrsan",
    title="SCorrSAN",
    paper="Learning Semantic Correspondence with Sparse Annotations (ECCV)",
    year=2022,
    arxiv="2208.06974",
    licence_of_original="GPL-3.0",
    backbone="ResNet-101",
    input_size="256x256",
    training="keypoints of SPair-71k or PF-PASCAL, mutual teachers",
    official_protocol="cats-paper@1",
    description="One correlation of layer3 with spatial context, enlarged to a 64x64 flow.",
    flow_resolution="64",
    weights_at="none published",
)

# For SPair-71k; for PF-PASCAL the paper has a context of 13 and 1024 channels.
PAPER_SIZES = {"context": 7, "width": 2048, "feature_size": 64}
TRUNK = "feature_extraction.backbone."
PEER = "peer."
DILATION = 7  # cells a side: how far around labelled cells pseudo-labels are trusted


@dataclass(frozen=True, eq=False)
class SCorrSANFeatures:
    """``map`` float32 (C, S), unit length along C, S positions of a square grid row by row;
    ``canvas`` (height, width) px, the frame that was squashed to the square input."""

    map: Tensor
    canvas: Size


@dataclass(frozen=True)
class MutualTeaching:
    """How two networks teach each other (sec. 3.3, the mutual online teachers): from
    ``first_epoch`` (0, 1, ...) on, each also learns the other's flow, ``weight`` times as much as
    the labels, where the two are closest: in a share of the cells around labels that grows from
    ``first_share`` to ``last_share`` in ``ramp_epochs`` epochs. By default as for SPair-71k; for
    PF-PASCAL the paper begins with epoch 60.

    NemfError for shares outside 0 < first <= last <= 1 and negative numbers.
    """

    first_epoch: int = 4
    weight: float = 10.0
    first_share: float = 0.2
    last_share: float = 0.9
    ramp_epochs: int = 10

    def __post_init__(self) -> None:
        shares = 0 < self.first_share <= self.last_share <= 1
        if not shares or min(self.first_epoch, self.weight, self.ramp_epochs) < 0:
            raise NemfError(f"no teaching by {self}: needs 0 < first_share <= last_share <= 1")

    def share(self, epoch: int) -> float:
        """Of the cells around labels, how many an epoch keeps; 0 before the first."""
        since = epoch - self.first_epoch
        if since < 0:
            return 0.0
        progress = min(since / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0
        return self.first_share + progress * (self.last_share - self.first_share)


class SpatialContext(nn.Module):
    """The efficient spatial context encoder (sec. 3.2): a map beside its similarities with its
    neighbours (:func:`self_similarity`), projected."""

    def __init__(self, channels: int, context: int, width: int) -> None:
        super().__init__()
        self.context = context
        self.conv = nn.Conv2d(channels + 4 * context, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, width, h, w)."""
        similar = self_similarity(features, self.context)
        return self.conv(torch.cat([features, similar], 1)).relu()


class SCorrSAN(Matcher):
    """SCorrSAN: a flow from every cell of the query image into the reference image, read at the
    points. The paper's "target" is our query image, its "source" our reference image.

    ``context``: side in cells, odd, of the neighbourhood that a cell's context is taken from;
    ``width``: channels of the result; ``feature_size``: side of the flow's grid. The features are
    the trunk's layer3 before its last ReLU.

    Weights come from exactly one of these (none have been published):

    - ``weights``: a checkpoint of ours, or a file of the official code's names. Layers of the trunk
      deeper than layer3 and its classifier may be there or not; they are not kept, nor is a peer
      that training left there. Sizes are read from the tensors; given as keywords they must agree;
    - ``init``: "head", for training, draws the encoder from ``init_seed``, sizes that are not given
      are the paper's; its first channels begin as the map itself. The trunk comes from
      ``backbone_weights`` or from where :func:`nemf.backbones.build_backbone` looks. "random" draws
      everything, but the trunk if ``backbone_weights`` gives it.

    **Training.** ``teaching`` (keywords of :class:`MutualTeaching`; None: labels alone) adds a
    ``peer``, a second network from the next seed that is trained beside this one and has no part in
    answers or in the hash of the weights. ``epoch`` is told by the training. Training leaves the
    trunks as they are unless ``train_trunk``; their batch norms keep their statistics either way.
    Left out of the paper: its other recipe, a single teacher trained before. Ours, where the paper
    or its code leave it open: labels are CATs' on the finer grid, the share of cells is taken pair
    by pair, and its growth begins with the teaching.

    Points move in the frame of the image squashed to ``input_size``; see
    :func:`nemf.aggregation.follow`. ``official=True`` reads the flow and labels cells as the
    official CATs does, whose code this method's extends.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file or
    sizes that do not fit.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        context: int | None = None,
        width: int | None = None,
        feature_size: int | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        official: bool = False,
        input_size: int = 256,
        train_trunk: bool = False,
        teaching: MutualTeaching | Mapping[str, Any] | None = None,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        check_sources("scorrsan", weights, init, backbone_weights)
        self.official = official
        self.input_size = input_size
        self.last_id = last_of_stage(backbone, 3)
        tap = tap_table(backbone)[self.last_id]
        given = {"context": context, "width": width, "feature_size": feature_size}
        given = {name: value for name, value in given.items() if value is not None}
        if weights is not None:
            if teaching is not None:
                raise NemfError(f"teaching goes with init only: {weights} holds one network")
            state = read_state(Path(weights))
            sizes = _sizes(Path(weights), state, given, tap.channels)
        else:
            sizes = PAPER_SIZES | given
        for name, value in {**sizes, "input_size": input_size}.items():
            if value < 1:
                raise NemfError(f"{name} must be at least 1, not {value}")
        if sizes["context"] % 2 == 0:
            raise NemfError(f"context must be odd, not {sizes['context']}")
        self.feature_size = sizes["feature_size"]
        self.cells = -(-input_size // tap.jump_px)

        self.feature_extraction = nn.Module()
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            self.x_normal = nn.Parameter(torch.empty(self.feature_size))
            self.y_normal = nn.Parameter(torch.empty(self.feature_size))
            encoder = SpatialContext(tap.channels, sizes["context"], sizes["width"])
            self.SCEs = nn.ModuleList([encoder])
            self.feature_extraction.backbone = ResNet(backbone, self.last_id)
        if weights is not None:
            trunk = self.feature_extraction.backbone
            fitting = fitting_model(
                Path(weights), state, self, trunk, TRUNK, "this SCorrSAN", dropped=(PEER,)
            )
            self.load_state_dict(fitting, assign=True)
        else:
            trunk = trunk_of(backbone, init, backbone_weights, self.last_id)
            self.feature_extraction.backbone = trunk
            self._draw_head(init_seed)
        trunk.freeze(weights=not train_trunk)

        self.epoch = 0
        self.teaching = self.peer = None
        if teaching is not None:
            if not isinstance(teaching, MutualTeaching):
                teaching = MutualTeaching(**teaching)
            self.teaching = teaching
            self.peer = SCorrSAN(
                **{"backbone": backbone, **sizes, "init": init},
                **{"backbone_weights": backbone_weights, "input_size": input_size},
                **{"train_trunk": train_trunk, "init_seed": init_seed + 1},
            )

    @property
    def weights_hash(self) -> str:
        """Of the network that answers."""
        state = self.state_dict()
        return hash_of_state({k: v for k, v in state.items() if not k.startswith(PEER)})

    def embed(self, frames: Tensor) -> Tensor:
        """(B, width, S) of unit length along the channels: layer3 of ``frames``
        (B, 3, input_size, input_size) from :func:`nemf.backbones.normalise` with its context."""
        (tap,) = self.feature_extraction.backbone.taps(frames, [self.last_id])
        return unit(self.SCEs[0](tap)).flatten(2)

    def flow(self, src: Tensor, trg: Tensor, only: Tensor | None = None) -> Tensor:
        """(B, 2, feature_size, feature_size): x and y displacement, in cells, of every target cell
        into the source, from :meth:`embed` of both. ``only`` int64 (K,): the numbers of the target
        cells that matter, row by row; elsewhere the flow then leads to the centre of the source."""
        volume = self._enlarged(mutual_filter(correlate(src, trg)))
        if only is not None:
            volume = volume[:, :, only]
        volume = self._enlarged(volume.transpose(1, 2)).transpose(1, 2)
        sources = expected_sources(volume, self.x_normal, self.y_normal)
        if only is not None:
            everywhere = sources.new_zeros(*sources.shape[:2], self.feature_size**2)
            sources = everywhere.index_copy(2, only, sources)
        return to_flow(sources.unflatten(2, (self.feature_size, self.feature_size)))

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Labelled cells, and those that this epoch keeps of the pseudo-labels."""
        _, labelled = flow_labels(batch, self.feature_size, self.official)
        counts = {"loss_flow": labelled.sum()}
        if self._share:
            counts["loss_pseudo"] = self._n_kept(around(labelled)).sum()
        return counts

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """``loss_flow``: the end-point error of the flow in cells, mean over the labelled ones;
        ``loss_pseudo``, once teaching has begun: the distance of the two networks' flows, mean over
        the kept cells, times its weight; it moves either network towards the other. Each is the sum
        of the two networks' losses if there are two.

        The frames' side is ``input_size``.
        """
        batch.check_side(self.input_size)
        networks = [self] if self.peer is None else [self, self.peer]
        flows = [net.flow(net.embed(batch.src), net.embed(batch.trg)) for net in networks]
        labels, labelled = flow_labels(batch, self.feature_size, self.official)
        counts = counts or self.supervised(batch)
        errors = torch.stack([end_point_error(flow, labels, labelled) for flow in flows])
        losses = {"loss_flow": errors.sum() / counts["loss_flow"].clamp_min(1)}
        if self._share:
            kept = self._kept(*flows, around(labelled))
            taught = zip(flows, reversed(flows), strict=True)
            errors = [end_point_error(flow, other.detach(), kept) for flow, other in taught]
            total = self.teaching.weight * torch.stack(errors).sum()
            losses["loss_pseudo"] = total / counts["loss_pseudo"].clamp_min(1)
        return losses

    def transfer(self, points: Tensor, flow: Tensor) -> Tensor:
        """(N, 2): where ``points`` (N, 2) of the target go by ``flow`` (2, h, w), in pixels of the
        squashed frame, read as ``official`` says."""
        return follow(points, flow, self.input_size, whole_pixels=self.official)

    def _enlarged(self, rows: Tensor) -> Tensor:
        """(B, N, feature_size ** 2): maps (B, N, cells ** 2), bilinear, align_corners=True."""
        maps = rows.unflatten(2, (self.cells, self.cells))
        size = (self.feature_size, self.feature_size)
        return F.interpolate(maps, size, mode="bilinear", align_corners=True).flatten(2)

    def _cells_around(self, points: Tensor) -> Tensor:
        """int64 (K,): the cells whose flow ``points`` (N, 2) px of the squashed frame follow."""
        if self.official:
            points = points.trunc()
        last = self.feature_size - 1
        place = (points + 0.5) * (self.feature_size / self.input_size) - 0.5
        low = place.floor().clamp(0, last).long()
        (x0, y0), (x1, y1) = low.unbind(1), (low + 1).clamp_max(last).unbind(1)
        corners = [y * self.feature_size + x for y in (y0, y1) for x in (x0, x1)]
        return torch.cat(corners).unique()

    @property
    def _share(self) -> float:
        return 0.0 if self.teaching is None else self.teaching.share(self.epoch)

    def _n_kept(self, near: Tensor) -> Tensor:
        """int64 (B,): how many of the cells ``near`` labels, bool (B, h, w), each pair keeps."""
        total = near.flatten(1).sum(1)
        return (total.double() * self._share).round().long().clamp_min(1).minimum(total)

    def _kept(self, flow: Tensor, other: Tensor, near: Tensor) -> Tensor:
        """bool (B, h, w): in each pair the cells ``near`` labels where the two flows (B, 2, h, w)
        differ least. Either network's loss is the same there, so the choice of one is that of the
        other, and the paper's exchange of choices changes nothing."""
        apart = (flow - other).detach().float().square().sum(1).masked_fill(~near, torch.inf)
        rank = apart.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < self._n_kept(near)[:, None]).view(near.shape)

    def encode_one(self, image: Image, role: Role) -> SCorrSANFeatures:
        features = self.embed(squashed_frame(image, self.input_size).to(self.x_normal))[0]
        check_finite(features, image)
        return SCorrSANFeatures(features, image.canvas)

    def match_one(
        self, query: SCorrSANFeatures, reference: SCorrSANFeatures, points: Tensor
    ) -> Matches:
        frame = (self.input_size, self.input_size)
        if not len(points):
            return Matches(points.float())
        source, target = (side.map[None].to(self.device) for side in (reference, query))
        squashed = squash(points.to(target), query.canvas, frame)
        (flow,) = self.flow(source, target, self._cells_around(squashed))
        moved = self.transfer(squashed, flow)
        return Matches(unsquash(moved, reference.canvas, frame).float())

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights as a layer of torch begins, but for the first channels, which are the map
        itself."""
        generator = torch.Generator().manual_seed(seed)
        conv = self.SCEs[0].to_empty(device="cpu").conv
        self.SCEs[0].is_random = True
        bound = conv.in_channels**-0.5
        for parameter in conv.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
        channels = conv.in_channels - 4 * self.SCEs[0].context
        first = conv.weight[:channels, :, 0, 0]
        first.zero_().fill_diagonal_(1)
        conv.bias[:channels] = 0
        self.x_normal = nn.Parameter(torch.linspace(-1, 1, self.feature_size))
        self.y_normal = nn.Parameter(torch.linspace(-1, 1, self.feature_size))


def self_similarity(features: Tensor, side: int) -> Tensor:
    """(B, 4 side, h, w): the cosine of every cell's features (B, C, h, w) with those of the cells
    in line with it: along the diagonal, column, other diagonal and row, in this order, of those at
    the (row, column) offsets (i, i), (i, 0), (i, -i), (0, i), i from -(side // 2) to side // 2.
    Outside the map it is 0.

    A zero vector has cosine 0 with everything.
    """
    reach, (h, w) = side // 2, features.shape[2:]
    directions = F.normalize(at_least_float32(features), dim=1)
    padded = F.pad(directions, [reach] * 4)
    steps = range(-reach, reach + 1)
    offsets = [(i * dy, i * dx) for dy, dx in ((1, 1), (1, 0), (1, -1), (0, 1)) for i in steps]
    shifted = (padded[:, :, reach + y :, reach + x :][:, :, :h, :w] for y, x in offsets)
    return torch.stack([(directions * other).sum(1) for other in shifted], 1)


def around(labelled: Tensor) -> Tensor:
    """bool (B, h, w): the cells no more than ``DILATION // 2`` rows and columns from a labelled one
    (sec. 3.3, the spatial prior)."""
    near = F.max_pool2d(labelled.float()[:, None], DILATION, stride=1, padding=DILATION // 2)
    return near[:, 0] > 0


def _sizes(
    path: Path, state: Mapping[str, Tensor], given: Mapping[str, int], channels: int
) -> dict[str, int]:
    """The sizes that the tensors of a file have; NemfError where they disagree with those
    ``given``, or the file with a trunk of so many ``channels``."""
    try:
        width, c_in = state["SCEs.0.conv.weight"].shape[:2]
        (feature_size,) = state["x_normal"].shape
    except (KeyError, ValueError) as problem:
        raise NemfError(f"{path} is no SCorrSAN checkpoint ({problem})") from None
    context, rest = divmod(c_in - channels, 4)
    if rest or context < 1:
        raise NemfError(
            f"{path} has an encoder of {c_in} channels, which is no layer3 of {channels} and four "
            "times a context: pass the backbone it was trained with"
        )
    found = {"context": context, "width": width, "feature_size": feature_size}
    check_given(path, found, given)
    return found
