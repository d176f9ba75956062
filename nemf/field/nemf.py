"""NeMF (Hong et al., NeurIPS 2022): the encoder, and matching by search in its field."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf import onednn
from nemf.aggregation import Aggregator, mutual_filter, soft_argmax, to_flow, unit
from nemf.backbones import (
    ResNet,
    check_finite,
    check_ids,
    fitting_model,
    normalise,
    tap_table,
    trunk_of,
)
from nemf.cards import MatcherCard
from nemf.checkpoints import check_sources, read_state
from nemf.errors import NemfError
from nemf.field.embedding import pyramid_embedding
from nemf.field.field import HarmonicEmbedding, MatchingField
from nemf.field.search import (
    Uniform,
    counted_uniform,
    initial_field,
    optimise,
    patch_match,
    read_field,
)
from nemf.geometry import to_norm, to_pixels
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch, end_point_error, flow_labels

CARD = MatcherCard(
    name="nemf",
    title="NeMF",
    paper="Neural Matching Fields: Implicit Representation of Matching Fields for Visual "
    "Correspondence (NeurIPS)",
    year=2022,
    arxiv="2210.02689",
    licence_of_original="none stated",
    backbone="ResNet-101",
    input_size="256x256",
    training="keypoints (SPair-71k or PF-PASCAL)",
    official_protocol="nemf-paper@1",
    description="A neural field scores any two points; PatchMatch and gradient steps search it.",
    published_as="NeMF",
    flow_resolution="ori",
    weights_at="not in the official repository (github.com/KU-CVLAB/NeMF)",
)

INPUT_PX = 256
PAIRS_AT_ONCE = {"cpu": 1, "cuda": 8}  # a CPU gains nothing from batches
PAPER_SIZES = {
    "proj_dim": 128,
    "depth": 1,
    "mlp_ratio": 4,
    "level_channels": 16,
    "field_width": 256,
}
TRUNK = "feature_extraction.backbone."
DEAD_TRUNK = "mlp_model.backbone."  # a second ResNet in the official files that nothing reads


@dataclass(frozen=True)
class FieldTraining:
    """What the field is trained against: ``candidates`` positions a keypoint and direction, the
    true one among them; the share ``near`` of the others lies around the truth (normal, deviation
    ``near_norm``), the rest anywhere in the image. ``flow_weight`` of the encoder's flow loss."""

    candidates: int = 100
    near: float = 0.0
    near_norm: float = 0.1
    flow_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.candidates < 2 or not 0 <= self.near <= 1 or not self.near_norm > 0:
            raise NemfError(f"no training against {self}: needs 2 candidates, near from 0 to 1")


@dataclass(frozen=True, eq=False)
class NeMFFeatures:
    """One encoded image. ``levels``: unit features (C, h, w) at the trunk's own resolutions, fine
    to coarse; ``projected`` (L, S, proj_dim); its ``canvas`` and content ``hash``."""

    levels: list[Tensor]
    projected: Tensor
    canvas: Size
    hash: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded pairs: ``refined`` (B, 16 L, S, T); ``volume`` (B * S * T, 16 L) to look up."""

    refined: Tensor
    volume: Tensor


class NeMF(Matcher):
    """Neural Matching Fields. The paper's "target" is our query image, its "source" our reference.

    ``layers``: increasing hyperpixel ids, one per pyramid level; each level's side must be a half,
    one, two or four times ``feature_size`` at 256x256 (ResNet-101: 3, 7, 30, 33). Weights come from
    exactly one of: ``weights``, an official file (1,368 keys; its second, unused ResNet is dropped)
    or a checkpoint of ours, depth and widths read from the tensors; or ``init``: "head", for
    training, draws all but the trunk from ``init_seed``, sizes that are not given are the paper's;
    the aggregation begins as the identity. The trunk comes from ``backbone_weights`` or from where
    :func:`nemf.backbones.build_backbone` looks. "random" draws everything, but the trunk if
    ``backbone_weights`` gives it. ``level_channels`` are the channels of each embedded level,
    ``field_width`` the width of the field's layers.

    Training leaves the trunk as it is unless ``train_trunk``; its batch norms keep their statistics
    either way. ``training``: see :class:`FieldTraining`.

    ``iterations`` and ``alpha`` (normalised) of the search; ``optimise=False`` leaves out the
    gradient steps on the coordinates. Random numbers come from (seed, both images): an answer does
    not depend on the order of pairs. ``official=True`` instead draws from torch's global generator
    in the official order, clamps queries into the canvas and takes log(sigmoid) literally.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file or
    sizes that do not fit.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] = (3, 7, 30, 33),
        feature_size: int = 16,
        proj_dim: int | None = None,
        depth: int | None = None,
        heads: int = 6,
        mlp_ratio: float | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        official: bool = False,
        iterations: int = 20,
        alpha: float = 0.1,
        optimise: bool = True,
        seed: int = 2022,
        level_channels: int | None = None,
        field_width: int | None = None,
        training: FieldTraining | Mapping[str, Any] | None = None,
        train_trunk: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers = check_ids(backbone, layers)
        self.feature_size, self.official, self.seed = feature_size, official, seed
        self.iterations, self.alpha, self.optimise = iterations, alpha, optimise
        if not isinstance(training, FieldTraining):
            training = FieldTraining(**(training or {}))
        self.training_field = training
        if iterations < 0 or not alpha > 0:
            raise NemfError(f"iterations={iterations} must be >= 0 and alpha={alpha} positive")
        check_sources("nemf", weights, init, backbone_weights)
        state = read_state(Path(weights)) if weights is not None else {}
        sizes = _sizes(state)
        given = {
            "proj_dim": proj_dim,
            "depth": depth,
            "mlp_ratio": mlp_ratio,
            "level_channels": level_channels,
            "field_width": field_width,
        }
        for name, value in given.items():
            if value is not None and state and sizes[name] != value:
                raise NemfError(f"{weights} has {name} {sizes[name]}, not {value}: leave it out")
            sizes[name] = sizes[name] if value is None else value

        self.feature_extraction = nn.Module()
        with torch.device("meta"):
            self._build_head(backbone, heads, sizes)
            self.feature_extraction.backbone = ResNet(backbone, self.layers[-1])
        if weights is not None:
            trunk, dropped = self.feature_extraction.backbone, (DEAD_TRUNK,)
            fitting = fitting_model(Path(weights), state, self, trunk, TRUNK, "this NeMF", dropped)
            self.load_state_dict(fitting, assign=True)
        else:
            trunk = trunk_of(backbone, init, backbone_weights, self.layers[-1])
            self.feature_extraction.backbone = trunk
            self._draw_head(init_seed)
            if init == "head":  # training begins at the correlation as it is
                nn.init.zeros_(self.decoder.proj.weight)
        trunk.freeze(weights=not train_trunk)
        self.mlp_model.harmonic = HarmonicEmbedding()  # in no checkpoint, so still without values

    @property
    def couples_pairs(self) -> bool:
        return self.official

    # -- construction -------------------------------------------------------------------------

    def _build_head(self, backbone: str, heads: int, sizes: dict[str, int | float]) -> None:
        taps = [tap_table(backbone)[k] for k in self.layers]
        size, n_levels = self.feature_size, len(taps)
        per_level, width = int(sizes["level_channels"]), int(sizes["field_width"])
        self.x_normal = nn.Parameter(torch.empty(size))
        self.y_normal = nn.Parameter(torch.empty(size))
        self.proj = nn.ModuleList(nn.Linear(tap.channels, int(sizes["proj_dim"])) for tap in taps)
        try:
            self.corr_embedder = nn.ModuleList(
                pyramid_embedding(INPUT_PX // tap.jump_px, size, per_level) for tap in taps
            )
            self.decoder = Aggregator(
                feature_size=size,
                n_levels=n_levels,
                proj_dim=int(sizes["proj_dim"]),
                depth=int(sizes["depth"]),
                heads=heads,
                mlp_ratio=sizes["mlp_ratio"],
                repeat=per_level,
            )
        except ValueError as problem:
            raise NemfError(f"layers {self.layers} of {backbone}: {problem}") from None
        try:
            self.mlp_model = MatchingField(per_level * n_levels, width)
        except ValueError as problem:  # the group norm's
            raise NemfError(f"level_channels={per_level}: {problem}") from None

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights, as torch's layers begin; fc_1 starts at zero."""
        generator = torch.Generator().manual_seed(seed)
        self.decoder.to_empty(device="cpu").initialise(generator)
        for part in (self.proj, self.corr_embedder, self.mlp_model):
            part.to_empty(device="cpu")
            part.is_random = True
            for module in part.modules():
                if isinstance(module, nn.GroupNorm):
                    module.weight.fill_(1.0)
                    module.bias.fill_(0.0)
                elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                    bound = (module.weight[0].numel()) ** -0.5
                    for parameter in (module.weight, module.bias):
                        parameter.uniform_(-bound, bound, generator=generator)
        for block in self.mlp_model.mlp[0].blocks:
            block.fc_1.weight.zero_()
        for name in ("x_normal", "y_normal"):
            setattr(self, name, nn.Parameter(torch.linspace(-1, 1, self.feature_size)))

    # -- encoder ------------------------------------------------------------------------------

    def encode_one(self, image: Image, role: Role) -> NeMFFeatures:
        levels = self.levels(self.frame(image))
        projected = self.project(levels)
        check_finite(projected, image)
        return NeMFFeatures([unit(x)[0] for x in levels], projected[0], image.canvas, image.hash)

    def frame(self, image: Image) -> Tensor:
        """(1, 3, 256, 256): the normalised canvas, resized (bicubic, align_corners=True)."""
        pixels = normalise(image.on_canvas()).to(self.device)
        return F.interpolate(pixels, (INPUT_PX, INPUT_PX), mode="bicubic", align_corners=True)

    def levels(self, frames: Tensor) -> list[Tensor]:
        """Taps (B, C, h, w) of the trunk at their own resolutions."""
        trunk = self.feature_extraction.backbone
        if not onednn.takes(frames):
            return trunk.taps(frames, self.layers)
        return [tap.to_dense() for tap in trunk.taps(frames.to_mkldnn(), self.layers)]

    def project(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, L, S, proj_dim): appearance at the positions of the common grid."""
        size = (self.feature_size, self.feature_size)
        grids = [F.interpolate(x, size, mode="bilinear", align_corners=True) for x in levels]
        flat = [x.flatten(2).transpose(1, 2) for x in grids]
        return torch.stack([proj(x) for proj, x in zip(self.proj, flat, strict=True)], 1)

    def cost(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        """(B, 16 L, S, T): embedded correlations of all levels, filtered. Per level unit features
        (B, C, h, w)."""
        embedded = []
        for embedder, src, trg in zip(self.corr_embedder, source, target, strict=True):
            volume = embedder.of_features(src, trg)
            embedded.append(volume.flatten(4).flatten(2, 3))
        return mutual_filter(torch.cat(embedded, 1))

    def refine(self, cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """(B, 16 L, S, T): the aggregated cost; projections (B, L, positions, proj_dim)."""
        return self.decoder(cost, source, target)

    def encode_pairs(
        self, sources: Sequence[NeMFFeatures], targets: Sequence[NeMFFeatures]
    ) -> Encoded:
        """Everything about pairs that does not depend on the queries."""
        (source, src_projected), (target, trg_projected) = (
            (
                [
                    torch.stack(x).to(self.device)
                    for x in zip(*(i.levels for i in images), strict=True)
                ],
                torch.stack([image.projected for image in images]).to(self.device),
            )
            for images in (sources, targets)
        )
        refined = self.refine(self.cost(source, target), src_projected, trg_projected)
        return Encoded(refined, self.mlp_model.embed(refined))

    # -- training -----------------------------------------------------------------------------

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Keypoints of both directions, and labelled cells."""
        _, labelled = flow_labels(batch, self.feature_size, self.official)
        return {"loss_field": 2 * batch.valid.sum(), "loss_flow": labelled.sum()}

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """``loss_field``: cross-entropy of the true position among the candidates, mean over the
        keypoints of both directions; ``loss_flow``: end-point error of the encoder's flow in cells,
        mean over the labelled ones, times ``flow_weight``. The paper gives neither's details."""
        settings = self.training_field
        counts = counts or self.supervised(batch)
        encoded = self._encode_batch(batch)
        logits = self.logits(encoded.volume, batch, self.candidates(batch))
        truth = logits.new_zeros(len(logits), dtype=torch.long)
        field = F.cross_entropy(logits.float(), truth, reduction="sum")
        flow = to_flow(soft_argmax(encoded.refined.mean(1), self.x_normal, self.y_normal))
        apart = end_point_error(flow, *flow_labels(batch, self.feature_size, self.official))
        return {
            "loss_field": field / counts["loss_field"].clamp_min(1),
            "loss_flow": settings.flow_weight * apart / counts["loss_flow"].clamp_min(1),
        }

    def _encode_batch(self, batch: PairBatch) -> Encoded:
        sides = []
        for frames in (batch.src, batch.trg):
            if batch.side_px != INPUT_PX:
                size = (INPUT_PX, INPUT_PX)
                frames = F.interpolate(frames, size, mode="bicubic", align_corners=True)
            levels = self.levels(frames)
            sides.append(([unit(x) for x in levels], self.project(levels)))
        (source, src_projected), (target, trg_projected) = sides
        refined = self.refine(self.cost(source, target), src_projected, trg_projected)
        return Encoded(refined, self.mlp_model.embed(refined))

    def candidates(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(B, K, N - 1, 2) normalised wrong positions in the target, for every source keypoint, and
        in the source, for every target keypoint: pixel centres drawn from the pairs' seeds."""
        side, settings = batch.side_px, self.training_field
        b, k = batch.valid.shape
        wrong = settings.candidates - 1
        if self.official:
            drawn = torch.stack(
                [torch.randint(0, side, (b, k, wrong, 2)) for _ in range(2)]
            ).float()
        else:
            drawn = torch.zeros(2, b, k, wrong, 2)
            for i, seed in enumerate(batch.seeds.tolist()):
                generator = torch.Generator().manual_seed(seed)
                valid = batch.valid[i].cpu()
                for found, kps in zip(drawn, (batch.trg_kps[i], batch.src_kps[i]), strict=True):
                    found[i, valid] = _draw(kps.cpu()[valid], side, settings, generator)
        in_trg, in_src = (drawn / (side - 1) * 2 - 1).to(batch.src.device)
        return in_trg, in_src

    def logits(self, volume: Tensor, batch: PairBatch, candidates: tuple[Tensor, Tensor]) -> Tensor:
        """(M, N): scores of the true position, first, and the ``candidates``; rows are the valid
        source keypoints of all pairs, then their target keypoints."""
        size = (batch.side_px, batch.side_px)
        pairs, _ = torch.nonzero(batch.valid, as_tuple=True)
        src, trg = (
            to_norm(kps[batch.valid], size)[:, None] for kps in (batch.src_kps, batch.trg_kps)
        )
        in_trg, in_src = (
            torch.cat([true, wrong[batch.valid]], 1)
            for true, wrong in zip((trg, src), candidates, strict=True)
        )
        sources = torch.cat([src.expand_as(in_trg), in_src])
        targets = torch.cat([in_trg, trg.expand_as(in_src)])
        of = pairs.repeat(2).repeat_interleave(targets.shape[1])
        side = self.mlp_model.at_targets(targets.flatten(0, 1), self.feature_size, of)
        each = torch.arange(len(of), device=of.device)
        return self.mlp_model.score(volume, sources.flatten(0, 1), side, each).view_as(
            targets[..., 0]
        )

    # -- search -------------------------------------------------------------------------------

    @torch.no_grad()
    def match(
        self,
        queries: Sequence[NeMFFeatures],
        references: Sequence[NeMFFeatures],
        points: Sequence[Tensor],
    ) -> list[Matches]:
        triples = list(zip(queries, references, points, strict=True))
        step = 1 if self.official else PAIRS_AT_ONCE.get(self.device.type, 1)
        parts = [triples[i : i + step] for i in range(0, len(triples), step)]
        return [found for part in parts for found in self._match(part)]

    def _match(self, part: Sequence[tuple[NeMFFeatures, NeMFFeatures, Tensor]]) -> list[Matches]:
        answers = [Matches(points.to(self.device, torch.float32).clone()) for _, _, points in part]
        asked = [k for k, answer in enumerate(answers) if len(answer.points)]
        if not asked:
            return answers
        queries, references, _ = zip(*(part[k] for k in asked), strict=True)
        targets = [
            to_norm(self._within(answers[k].points, query.canvas), query.canvas)
            for k, query in zip(asked, queries, strict=True)
        ]
        encoded = self.encode_pairs(references, queries)
        fields = self.search(encoded, queries, references, targets)
        found = torch.cat([read_field(f, t) for f, t in zip(fields, targets, strict=True)])
        counts = [len(t) for t in targets]
        if self.optimise:
            numbers = torch.arange(len(asked), device=self.device)
            found = optimise(
                self.mlp_model,
                encoded.volume,
                self.feature_size,
                found,
                torch.cat(targets),
                alpha=self.alpha,
                official=self.official,
                pairs=numbers.repeat_interleave(torch.tensor(counts, device=self.device)),
            )
        for k, reference, positions in zip(asked, references, found.split(counts), strict=True):
            answers[k] = Matches(to_pixels(positions, reference.canvas))
        return answers

    def _within(self, points: Tensor, canvas: Size) -> Tensor:
        """``points`` as the search takes them: official code clamps them into the canvas."""
        if not self.official:
            return points
        height, width = canvas
        return torch.minimum(points.clamp_min(0), points.new_tensor([width - 1, height - 1]))

    def search(
        self,
        encoded: Encoded,
        targets: Sequence[NeMFFeatures],
        sources: Sequence[NeMFFeatures],
        points: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Per pair the field (H, W, 2) over the target's canvas, normalised source coordinates.
        With ``points`` (N, 2), normalised, only what they read is searched; None gives the whole
        field."""
        axis = torch.linspace(-1, 1, self.feature_size, device=self.device)
        positions = soft_argmax(encoded.refined.mean(1), axis, axis)
        starts = [
            initial_field(cells[None], *target.canvas)
            for cells, target in zip(positions, targets, strict=True)
        ]
        return patch_match(
            self.mlp_model,
            encoded.volume,
            self.feature_size,
            starts,
            self._uniform(targets, sources),
            points=points,
            iterations=self.iterations,
            alpha=self.alpha,
        )

    def _uniform(self, targets: Sequence[NeMFFeatures], sources: Sequence[NeMFFeatures]) -> Uniform:
        """The pairs' own random numbers, or torch's global ones if official (one pair then)."""
        if self.official:
            shape = (1, *targets[0].canvas, 2)  # drawn whole, to stay in step with official streams
            return lambda _, __, pixels: torch.rand(shape, device=self.device).view(-1, 2)[pixels]
        texts = [f"{self.seed} {t.hash} {s.hash}" for t, s in zip(targets, sources, strict=True)]
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return counted_uniform([int.from_bytes(digest[:8], "big") for digest in digests])


def _draw(kps: Tensor, side_px: int, settings: FieldTraining, generator: torch.Generator) -> Tensor:
    """(N, candidates - 1, 2) px: positions anywhere in a frame, the first ``near`` of them around
    ``kps`` (N, 2) px."""
    shape = (len(kps), settings.candidates - 1, 2)
    drawn = torch.randint(0, side_px, shape, generator=generator).float()
    n_near = round(settings.near * shape[1])
    around = torch.randn(len(kps), n_near, 2, generator=generator)
    around = kps[:, None] + around * (settings.near_norm * (side_px - 1) / 2)
    drawn[:, :n_near] = around.clamp(0, side_px - 1)
    return drawn


def _sizes(state: dict[str, Tensor]) -> dict[str, int | float]:
    """Sizes that the tensors of a file have; the paper's where it lacks them."""
    sizes: dict[str, int | float] = dict(PAPER_SIZES)
    if "proj.0.weight" in state:
        sizes["proj_dim"] = state["proj.0.weight"].shape[0]
    for name, key, axis in (
        ("level_channels", "corr_embedder.0.embedder.conv4d.1.1.weight", 0),
        ("field_width", "mlp_model.mlp.0.fc_out.weight", 1),
    ):
        if key in state:
            sizes[name] = state[key].shape[axis]
    blocks = {k.split(".")[2] for k in state if k.startswith("decoder.blocks.")}
    sizes["depth"] = len(blocks) or 1
    hidden = state.get("decoder.blocks.0.mlp.fc1.weight")
    if hidden is not None:
        sizes["mlp_ratio"] = hidden.shape[0] / hidden.shape[1]
    return sizes
