"""MMNet (Zhao et al., ICCV 2021): a pyramid of multi-scale features, correlated coarse to fine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.backbones import (
    ResNet,
    backbone_of,
    check_finite,
    fitting_model,
    normalise,
    resembling,
    tap_table,
    trunk_of,
)
from nemf.cards import MatcherCard
from nemf.checkpoints import check_sources, read_state
from nemf.errors import NemfError
from nemf.geometry import squash, to_norm, unsquash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size

log = logging.getLogger(__name__)

CARD = MatcherCard(
    name="mmnet",
    title="MMNet",
    paper="Multi-scale Matching Networks for Semantic Correspondence (ICCV)",
    year=2021,
    arxiv="2108.00211",
    licence_of_original="none stated",
    backbone="ResNet-101, plain or of an FCN for PASCAL VOC",
    input_size="224x320",
    training="keypoints of SPair-71k or PF-PASCAL",
    official_protocol="mmnet-paper@1",
    description="Every block of the trunk at several dilations, summed up per stage, enhanced from "
    "its neighbourhood and passed on to the finer stage; correlations add up likewise.",
    published_as="MMNet",
    flow_resolution="28x40",
    weights_at="Google Drive, linked from github.com/wintersun661/MMNet",
)

FRAME: Size = (224, 320)  # (height, width) px of what is encoded
CHANNELS = 21  # of the pyramid
BRANCH = 32  # channels of a multi-scale block
DILATIONS = (4, 8, 12)
TRUNK = "backbone."
# Tensors of the official files that no computation reads: remains of other designs, among them
# three of 80 million values each.
UNUSED = (
    *(f"conv{stage}_kernel." for stage in range(5)),
    *("conv0_down.", "msblock0."),
    *(f"feature_upsample_{stage}." for stage in (2, 3, 4)),
    *(f"upsample_{ratio}." for ratio in (4, 8, 16)),
)


@dataclass(frozen=True, eq=False)
class MMNetFeatures:
    """``pyramid``: float32 (21, h, w), coarse to fine, of the stages that are matched; ``canvas``
    (height, width) px, the frame that was squashed."""

    pyramid: list[Tensor]
    canvas: Size


class MultiScaleBlock(nn.Module):
    """One block's output seen at several dilations (sec. 3.2): (B, C, h, w) to (B, 32, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, BRANCH, 3, padding=1)
        for i, dilation in enumerate(DILATIONS, start=1):
            conv = nn.Conv2d(BRANCH, BRANCH, 3, padding=dilation, dilation=dilation)
            self.add_module(f"conv{i}", conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return x + sum(conv(x).relu() for conv in (self.conv1, self.conv2, self.conv3))


class LocalAttention(nn.Module):
    """Adds to every cell what its 3x3 neighbours hold, weighted by the softmax of their cosine with
    it (sec. 3.2, local self-transformer): (B, C, h, w), same shape out. Beyond the border the
    outermost cells are repeated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.conv_theta = nn.Conv2d(channels, inner, 1)
        self.conv_phi = nn.Conv2d(channels, inner, 1)
        self.conv_g = nn.Conv2d(channels, inner, 1)
        self.conv_back = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x, (1, 1, 1, 1), "replicate")
        keys, values = (_neighbours(conv(around)) for conv in (self.conv_phi, self.conv_g))
        cosine = F.cosine_similarity(keys, self.conv_theta(x)[:, :, None], dim=1)  # (B, 9, h, w)
        mixed = (cosine.softmax(1)[:, None] * values).sum(2)
        return x + self.conv_back(mixed)


def _neighbours(padded: Tensor) -> Tensor:
    """(B, C, 9, h, w): the 3x3 neighbours of every cell of (B, C, h + 2, w + 2), row by row."""
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).movedim(4, 2)


class MMNet(Matcher):
    """MMNet: every point reads its row of the correlations and moves to the best cell.

    Weights come from exactly one of these:

    - ``weights``: an official file or a checkpoint of ours, both with the trunk. ``backbone`` is
      read from the tensors; given as a keyword it must agree. What official files hold beside
      (``UNUSED``) is left out, and the log says so;
    - ``init``: "head" draws all but the trunk from ``init_seed``; the trunk ("resnet101" if no
      ``backbone`` is given) comes from ``backbone_weights`` or from where
      :func:`nemf.backbones.build_backbone` looks. "random" draws it too, if ``backbone_weights``
      does not give it.

    Official files: folder 13rBUJLxWbwgOHihWCZvcLnyDBN_guQFq on Google Drive, linked from the README
    of github.com/wintersun661/MMNet; both are on "fcn_resnet101", whose third and fourth stages
    keep the resolution of the second.

    ``level``: the stage whose correlations are read, 2 (an eighth of the frame) in the paper. The
    canvas is squashed to 320 x 224 px without smoothing; the cell in column c of w is at pixel
    c * 320 / w of that. A point mixes the rows of the four cells around it (bilinear); beyond the
    outermost cells it reads those. There is no training here.

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
        level: int = 2,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        check_sources("mmnet", weights, init, backbone_weights)
        state: dict[str, Tensor] = {}
        if weights is not None:
            state = read_state(Path(weights))
            backbone = backbone_of(Path(weights), _fitting_backbones(state), backbone)
        backbone = backbone or "resnet101"
        table = tap_table(backbone)
        self.top = table[-1].stage
        if level not in range(1, self.top + 1):
            raise NemfError(f"level must be a stage of {backbone}, 1 to {self.top}, not {level!r}")
        self.level = level
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            self._build_head([tap.stage for tap in table], [tap.channels for tap in table])
        if weights is not None:
            with torch.device("meta"):
                self.backbone = ResNet(backbone)
            self.load_state_dict(self._fitting(Path(weights), state), assign=True)
        else:
            self._draw_head(init_seed)
            self.backbone = trunk_of(backbone, init, backbone_weights, len(table) - 1)
        self.backbone.freeze()

    def pyramid(self, frames: Tensor) -> list[Tensor]:
        """float32 (B, 21, h, w), from the coarsest stage to ``level``, of ``frames``
        (B, 3, 224, 320) from :func:`nemf.backbones.normalise`."""
        stages = [tap.stage for tap in tap_table(self.backbone.name)]
        ids = [k for k, stage in enumerate(stages) if stage >= self.level]
        taps = dict(zip(ids, self.backbone.taps(frames, ids), strict=True))
        found: list[Tensor] = []
        for stage in range(self.top, self.level - 1, -1):
            mine = [taps[k].relu() for k in ids if stages[k] == stage]
            level = self._summed(stage, mine)
            if found:
                coarser = found[-1]
                if coarser.shape[2:] != level.shape[2:]:
                    coarser = self._part(f"feat_upsample_{stage + 1}")(coarser)
                level = self._part(f"conv{stage}_scale")(torch.cat([level, coarser], 1))
            found.append(level)
        return found

    def correlation(self, query: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """float32 (h, w, h, w), query first: inner products on the finest level of two pyramids,
        lists of (21, h, w), added up with those of the coarser levels."""
        total = None
        for a, b in zip(query, reference, strict=True):
            products = torch.einsum("chw,cuv->hwuv", a, b)
            total = products if total is None else products + _enlarged(total, products.shape)
        return total

    def transfer(self, points: Tensor, correlation: Tensor) -> Tensor:
        """(N, 2): where ``points`` (N, 2) px of the query's frame go in the reference's frame."""
        cells, (rows, cols) = correlation.shape[:2], correlation.shape[2:]
        at = to_norm(squash(points, FRAME, cells), cells)
        planes = correlation.flatten(2).permute(2, 0, 1)[None]
        read = F.grid_sample(planes, at[None, None], padding_mode="border", align_corners=True)
        best = read[0, :, 0].argmax(0)  # of (R, N)
        found = torch.stack([best % cols, best // cols], 1).to(points)
        return unsquash(found, FRAME, (rows, cols))

    def encode_one(self, image: Image, role: Role) -> MMNetFeatures:
        pixels = normalise(image.on_canvas()).to(self.device)
        frame = F.interpolate(pixels, FRAME, mode="bilinear", align_corners=False)
        pyramid = [level[0] for level in self.pyramid(frame)]
        check_finite(pyramid[-1], image)
        return MMNetFeatures(pyramid, image.canvas)

    def match_one(self, query: MMNetFeatures, reference: MMNetFeatures, points: Tensor) -> Matches:
        points = squash(points.to(self.device, torch.float32), query.canvas, FRAME)
        levels = ([level.to(self.device) for level in side.pyramid] for side in (query, reference))
        moved = self.transfer(points, self.correlation(*levels))
        return Matches(unsquash(moved, reference.canvas, FRAME))

    def _summed(self, stage: int, blocks: Sequence[Tensor]) -> Tensor:
        """(B, 21, h, w): the outputs of a stage's blocks, seen at several scales and enhanced."""
        total = 0
        for number, block in enumerate(blocks, start=1):
            scales = self._part(f"msblock{stage}_{number}")(block)
            total = total + self._part(f"conv{stage}_{number}_down")(scales)
        return self._part(f"wa_{stage}")(total)

    def _part(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def _build_head(self, stages: Sequence[int], channels: Sequence[int]) -> None:
        """Everything but the trunk, whose taps have these stages and channels, under the official
        names."""
        for stage in range(1, self.top + 1):
            of_stage = [c for c, s in zip(channels, stages, strict=True) if s == stage]
            for number, width in enumerate(of_stage, start=1):
                self.add_module(f"msblock{stage}_{number}", MultiScaleBlock(width))
                self.add_module(f"conv{stage}_{number}_down", nn.Conv2d(BRANCH, CHANNELS, 1))
            self.add_module(f"wa_{stage}", LocalAttention(CHANNELS))
            if stage < self.top:
                fuse = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1)
                self.add_module(f"conv{stage}_scale", fuse)
            if stage > 1:
                up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, stride=2, padding=1, bias=False)
                self.add_module(f"feat_upsample_{stage}", up)

    def _fitting(self, path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        unused = {key.partition(".")[0]: None for key in state if key.startswith(UNUSED)}
        if unused:
            log.info("%s: unused and left out: %s", path, ", ".join(unused))
        holds = f"this MMNet on {self.backbone.name}"
        return fitting_model(path, state, self, self.backbone, TRUNK, holds, dropped=UNUSED)

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights of a scale that keeps the features', no offsets."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                continue
            weight = module.to_empty(device="cpu").weight
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
            module.is_random = True


def _enlarged(volume: Tensor, size: torch.Size) -> Tensor:
    """``volume`` with every cell repeated along all axes, as often as ``size`` asks for."""
    for axis, (have, want) in enumerate(zip(volume.shape, size, strict=True)):
        volume = volume.repeat_interleave(want // have, axis)
    return volume


def _fitting_backbones(state: Mapping[str, Tensor]) -> list[str]:
    """The architectures that the trunk of a file fits."""
    trunk = {k.removeprefix(TRUNK): v for k, v in state.items() if k.startswith(TRUNK)}
    return resembling(trunk)
