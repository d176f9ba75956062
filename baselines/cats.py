"""CATs (Cho et al., NeurIPS 2021): multi-level correlations refined by a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.aggregation import (
    Aggregator,
    correlate,
    follow,
    mutual_filter,
    soft_argmax,
    to_flow,
    unit,
)
from nemf.backbones import (
    ResNet,
    check_finite,
    check_ids,
    fitting_model,
    squashed_frame,
    tap_table,
    trunk_of,
)
from nemf.cards import MatcherCard
from nemf.checkpoints import check_given, check_sources, read_state
from nemf.errors import NemfError
from nemf.geometry import squash, unsquash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch, end_point_error, flow_labels

CARD = MatcherCard(
    name="cats",
    title="CATs",
    paper="CATs: Cost Aggregation Transformers for Visual Correspondence (NeurIPS)",
    year=2021,
    arxiv="2106.02520",
    licence_of_original="GPL-3.0",
    backbone="ResNet-101",
    input_size="256x256",
    training="keypoints of SPair-71k or PF-PASCAL",
    official_protocol="cats-paper@1",
    description="Correlations of several layers, refined by a transformer into a 16x16 flow.",
    published_as="CATs",
    flow_resolution="16",
    weights_at="Google Drive, linked from github.com/SunghwanHong/Cost-Aggregation-transformers",
)

# As the official training script sets them.
PAPER_SIZES = {"feature_size": 16, "proj_dim": 128, "depth": 1, "mlp_ratio": 4}
PAIRS_AT_ONCE = 16  # on a GPU; a CPU gains nothing from batches
TRUNK = "feature_extraction.backbone."


@dataclass(frozen=True, eq=False)
class CATsFeatures:
    """An image as the source or the target of a pair.

    ``levels``: per layer float32 (C, S), unit length along C, S = feature_size ** 2 positions row
    by row; ``projected`` float32 (L, S, proj_dim), of the features before normalisation;
    ``canvas`` (height, width) px, the frame that was squashed to the square input.
    """

    levels: list[Tensor]
    projected: Tensor
    canvas: Size


class CATs(Matcher):
    """CATs: a flow from every cell of the query image into the reference image, read at the points.

    The paper's "target" is our query image, its "source" our reference image: the flow lives on the
    target's grid and points into the source. ``layers``: increasing hyperpixel ids of ``backbone``,
    by default the paper's.

    Weights come from exactly one of these:

    - ``weights``: an official file or a checkpoint of ours, of the same 674 keys in the paper's
      configuration. Layers of the trunk deeper than ``layers`` and its classifier may be there or
      not; they are not kept. ``feature_size``, ``proj_dim``, ``depth`` and ``mlp_ratio`` are read
      from the tensors; given as keywords they must agree. ``heads`` cannot be read from them;
    - ``init``: "head", for training, draws all but the trunk from ``init_seed``, sizes that are
      not given are the paper's; the aggregation begins as the identity. The trunk comes from
      ``backbone_weights`` or from where :func:`nemf.backbones.build_backbone` looks. "random" draws
      everything, but the trunk if ``backbone_weights`` gives it.

    Training leaves the trunk as it is unless ``train_trunk``; its batch norms keep their
    statistics either way (the official training let those of a "frozen" trunk drift).

    Points move in the frame of the image squashed to ``input_size``: x * input_size / width,
    without a half-pixel term, as in the official training labels. The cell in column c of jump j is
    centred on pixel c * j + (j - 1) / 2 of that frame. Between the centres the flow is bilinear,
    beyond the outermost ones constant; it is read at the point itself. ``official=True`` reads it
    as the official code does: at the point truncated to integers and clamped to the frame.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file or
    sizes that do not fit.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] = (0, 8, 20, 21, 26, 28, 29, 30),
        feature_size: int | None = None,
        proj_dim: int | None = None,
        depth: int | None = None,
        heads: int = 6,
        mlp_ratio: float | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        official: bool = False,
        input_size: int = 256,
        train_trunk: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers = check_ids(backbone, layers)
        self.official = official
        self.input_size = input_size
        check_sources("cats", weights, init, backbone_weights)
        given = {
            "feature_size": feature_size,
            "proj_dim": proj_dim,
            "depth": depth,
            "mlp_ratio": mlp_ratio,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if weights is not None:
            state = read_state(Path(weights))
            sizes = _sizes(Path(weights), state, given, backbone, self.layers)
        else:
            sizes = PAPER_SIZES | given
        for name, value in {**sizes, "heads": heads, "input_size": input_size}.items():
            if not value >= 1:
                raise NemfError(f"{name} must be at least 1, not {value}")
        self.feature_size = sizes["feature_size"]

        self.feature_extraction = nn.Module()
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            self._build_head(backbone, heads, sizes)
            self.feature_extraction.backbone = ResNet(backbone, self.layers[-1])
        if weights is not None:
            trunk = self.feature_extraction.backbone
            fitting = fitting_model(Path(weights), state, self, trunk, TRUNK, "this CATs")
            self.load_state_dict(fitting, assign=True)
        else:
            trunk = trunk_of(backbone, init, backbone_weights, self.layers[-1])
            self.feature_extraction.backbone = trunk
            self._draw_head(init_seed)
            if init == "head":  # training begins at the correlation as it is
                nn.init.zeros_(self.decoder.proj.weight)
        trunk.freeze(weights=not train_trunk)

    @torch.no_grad()
    def match(
        self,
        queries: Sequence[CATsFeatures],
        references: Sequence[CATsFeatures],
        points: Sequence[Tensor],
    ) -> list[Matches]:
        triples = list(zip(queries, references, points, strict=True))
        step = 1 if self.device.type == "cpu" else PAIRS_AT_ONCE
        parts = [triples[i : i + step] for i in range(0, len(triples), step)]
        return [found for part in parts for found in self._match(part)]

    def levels(self, frames: Tensor) -> list[Tensor]:
        """Per layer (B, C, feature_size, feature_size): what the trunk sees in ``frames``.

        ``frames`` (B, 3, input_size, input_size) from :func:`nemf.backbones.normalise`. Differs
        from the taps by a resize (bilinear, align_corners=True).
        """
        size = (self.feature_size, self.feature_size)
        taps = self.feature_extraction.backbone.taps(frames, self.layers)
        return [F.interpolate(x, size, mode="bilinear", align_corners=True) for x in taps]

    def project(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, L, S, proj_dim): the appearance of every position of ``levels``, not normalised."""
        flat = [x.flatten(2).transpose(1, 2) for x in levels]
        return torch.stack([proj(x) for proj, x in zip(self.proj, flat, strict=True)], 1)

    def embed(self, frames: Tensor) -> tuple[list[Tensor], Tensor]:
        """:meth:`levels` of unit length along C, and :meth:`project` of them as they are."""
        levels = self.levels(frames)
        return [unit(x) for x in levels], self.project(levels)

    def refine(
        self,
        src_levels: Sequence[Tensor],
        src_projected: Tensor,
        trg_levels: Sequence[Tensor],
        trg_projected: Tensor,
    ) -> Tensor:
        """(B, S, T): the refined correlation of source and target, mean over the levels.

        Levels (B, C, ...) of unit length along C; projections as :meth:`project` gives them.
        """
        pairs = zip(src_levels, trg_levels, strict=True)
        correlation = torch.stack([correlate(src, trg) for src, trg in pairs], 1)
        return self.decoder(mutual_filter(correlation), src_projected, trg_projected).mean(1)

    def flow(self, refined: Tensor) -> Tensor:
        """(B, 2, feature_size, feature_size): x and y displacement, in cells, of every target cell
        into the source, from ``refined`` (B, S, T)."""
        return to_flow(soft_argmax(refined, self.x_normal, self.y_normal))

    def transfer(self, points: Tensor, flow: Tensor) -> Tensor:
        """(N, 2): where ``points`` (N, 2) of the target go by ``flow`` (2, h, w), in pixels of the
        squashed frame, read as ``official`` says."""
        return follow(points, flow, self.input_size, whole_pixels=self.official)

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Labelled cells."""
        _, labelled = flow_labels(batch, self.feature_size, self.official)
        return {"loss_flow": labelled.sum()}

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The end-point error of the flow in cells, mean over the labelled ones (sec. 3.4).

        The frames' side is ``input_size``. ``official`` labels as the official code does.
        """
        batch.check_side(self.input_size)
        flow = self.flow(self.refine(*self.embed(batch.src), *self.embed(batch.trg)))
        labels, labelled = flow_labels(batch, self.feature_size, self.official)
        count = (counts or {"loss_flow": labelled.sum()})["loss_flow"]
        return {"loss_flow": end_point_error(flow, labels, labelled) / count.clamp_min(1)}

    def encode_one(self, image: Image, role: Role) -> CATsFeatures:
        levels, projected = self.embed(self._frame(image))
        check_finite(projected, image)
        flat = [level[0].flatten(1) for level in levels]
        return CATsFeatures(flat, projected[0], canvas=image.canvas)

    def _frame(self, image: Image) -> Tensor:
        """(1, 3, input_size, input_size)."""
        return squashed_frame(image, self.input_size).to(self.x_normal)

    def _match(self, part: Sequence[tuple[CATsFeatures, CATsFeatures, Tensor]]) -> list[Matches]:
        target = self._stack([query for query, _, _ in part])
        source = self._stack([reference for _, reference, _ in part])
        refined = self.refine(*source, *target)
        frame = (self.input_size, self.input_size)
        answers = []
        for (query, reference, points), flow in zip(part, self.flow(refined), strict=True):
            squashed = squash(points.to(flow), query.canvas, frame)
            moved = self.transfer(squashed, flow)
            answers.append(Matches(unsquash(moved, reference.canvas, frame).float()))
        return answers

    def _stack(self, images: Sequence[CATsFeatures]) -> tuple[list[Tensor], Tensor]:
        """Levels and projections of several images as batches on the matcher's device."""
        levels = zip(*(image.levels for image in images), strict=True)
        projected = torch.stack([image.projected for image in images])
        return [torch.stack(x).to(self.device) for x in levels], projected.to(self.device)

    def _build_head(self, backbone: str, heads: int, sizes: dict[str, int | float]) -> None:
        """Everything but the trunk, under the official names."""
        channels = [tap_table(backbone)[k].channels for k in self.layers]
        self.x_normal = nn.Parameter(torch.empty(self.feature_size))
        self.y_normal = nn.Parameter(torch.empty(self.feature_size))
        self.proj = nn.ModuleList(nn.Linear(c, sizes["proj_dim"]) for c in channels)
        try:
            self.decoder = Aggregator(n_levels=len(channels), heads=heads, **sizes)
        except ValueError as problem:
            raise NemfError(str(problem)) from None

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights; projections as a linear layer of torch begins."""
        generator = torch.Generator().manual_seed(seed)
        self.decoder.to_empty(device="cpu").initialise(generator)
        self.decoder.is_random = True
        for proj in self.proj.to_empty(device="cpu"):
            bound = proj.in_features**-0.5
            for parameter in proj.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        self.x_normal = nn.Parameter(torch.linspace(-1, 1, self.feature_size))
        self.y_normal = nn.Parameter(torch.linspace(-1, 1, self.feature_size))


def _sizes(
    path: Path,
    state: dict[str, Tensor],
    given: dict[str, int | float],
    backbone: str,
    layers: Sequence[int],
) -> dict[str, int | float]:
    """The sizes that the tensors of a file have; NemfError where they disagree with those
    ``given``, or their levels with ``layers`` of ``backbone``."""
    try:
        _, n_levels, _, feature_size, half_width = state["decoder.pos_embed_x"].shape
        shapes = [state[f"proj.{k}.weight"].shape for k in range(n_levels)]
        proj_dims, held = zip(*shapes, strict=True)
        hidden = len(state["decoder.blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError, TypeError) as problem:
        raise NemfError(f"{path} is no CATs checkpoint ({problem})") from None
    wanted = tuple(tap_table(backbone)[k].channels for k in layers)
    if held != wanted:
        raise NemfError(
            f"{path} was trained on {n_levels} levels of {held} channels, but layers={layers} of "
            f"{backbone} have {wanted}: pass the backbone and layers it was trained with"
        )
    ratio = hidden / (2 * half_width)
    found = {
        "feature_size": feature_size,
        "proj_dim": proj_dims[0],
        "depth": len({key.split(".")[2] for key in state if key.startswith("decoder.blocks.")}),
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    }
    check_given(path, found, given)
    return found
