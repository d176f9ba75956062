"""NeMF (Hong et al., NeurIPS 2022): the encoder, and matching by search in its field."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf import onednn
from nemf.aggregation import Aggregator, mutual_filter, soft_argmax, unit
from nemf.backbones import (
    ResNet,
    build_backbone,
    check_finite,
    check_ids,
    fitting_model,
    normalise,
    tap_table,
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
)

INPUT_PX = 256
CHANNELS_PER_LEVEL = 16
TRUNK = "feature_extraction.backbone."
DEAD_TRUNK = "mlp_model.backbone."  # a second ResNet in the official files that nothing reads


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
    """One encoded pair: ``refined`` (1, 16 L, S, T); ``volume`` (S * T, 16 L) to look up."""

    refined: Tensor
    volume: Tensor


class NeMF(Matcher):
    """Neural Matching Fields. The paper's "target" is our query image, its "source" our reference.

    ``layers``: increasing hyperpixel ids, one per pyramid level; each level's side must be a half,
    one, two or four times ``feature_size`` at 256x256 (ResNet-101: 3, 7, 30, 33). Weights come from
    exactly one of: ``weights``, an official file (1,368 keys; its second, unused ResNet is dropped)
    or a checkpoint of ours, depth and widths read from the tensors; or ``init="random"``, drawn
    from a fixed seed, the trunk optionally from ``backbone_weights``.

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
        init: Literal["random"] | None = None,
        backbone_weights: str | Path | None = None,
        official: bool = False,
        iterations: int = 20,
        alpha: float = 0.1,
        optimise: bool = True,
        seed: int = 2022,
    ) -> None:
        super().__init__()
        self.layers = check_ids(backbone, layers)
        self.feature_size, self.official, self.seed = feature_size, official, seed
        self.iterations, self.alpha, self.optimise = iterations, alpha, optimise
        if iterations < 0 or not alpha > 0:
            raise NemfError(f"iterations={iterations} must be >= 0 and alpha={alpha} positive")
        check_sources("nemf", weights, init, backbone_weights)
        state = read_state(Path(weights)) if weights is not None else {}
        sizes = _sizes(state)
        given = {"proj_dim": proj_dim, "depth": depth, "mlp_ratio": mlp_ratio}
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
            trunk.freeze()
        else:
            trunk_init = init if backbone_weights is None else None
            self.feature_extraction.backbone = build_backbone(
                backbone, backbone_weights, trunk_init, upto=self.layers[-1]
            )
            self._draw_head()
        self.mlp_model.harmonic = HarmonicEmbedding()  # in no checkpoint, so still without values

    @property
    def couples_pairs(self) -> bool:
        return self.official

    # -- construction -------------------------------------------------------------------------

    def _build_head(self, backbone: str, heads: int, sizes: dict[str, int | float]) -> None:
        taps = [tap_table(backbone)[k] for k in self.layers]
        size, n_levels = self.feature_size, len(taps)
        channels = CHANNELS_PER_LEVEL * n_levels
        self.x_normal = nn.Parameter(torch.empty(size))
        self.y_normal = nn.Parameter(torch.empty(size))
        self.proj = nn.ModuleList(nn.Linear(tap.channels, int(sizes["proj_dim"])) for tap in taps)
        try:
            self.corr_embedder = nn.ModuleList(
                pyramid_embedding(INPUT_PX // tap.jump_px, size) for tap in taps
            )
            self.decoder = Aggregator(
                feature_size=size,
                n_levels=n_levels,
                proj_dim=int(sizes["proj_dim"]),
                depth=int(sizes["depth"]),
                heads=heads,
                mlp_ratio=sizes["mlp_ratio"],
                repeat=CHANNELS_PER_LEVEL,
            )
        except ValueError as problem:
            raise NemfError(f"layers {self.layers} of {backbone}: {problem}") from None
        self.mlp_model = MatchingField(channels)

    @torch.no_grad()
    def _draw_head(self) -> None:
        """Random weights from a fixed seed, as torch's layers begin; fc_1 starts at zero."""
        generator = torch.Generator().manual_seed(0)
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

    @torch.no_grad()
    def encode(self, images: Sequence[Image], role: Role) -> list[NeMFFeatures]:
        """Raises NemfError for an image whose features are not finite."""
        return [self._encode(image) for image in images]

    def _encode(self, image: Image) -> NeMFFeatures:
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

    def cost(self, source: NeMFFeatures, target: NeMFFeatures) -> Tensor:
        """(1, 16 L, S, T): embedded correlations of all levels, filtered."""
        embedded = []
        pairs = zip(self.corr_embedder, source.levels, target.levels, strict=True)
        for embedder, src, trg in pairs:
            volume = embedder.of_features(src[None].to(self.device), trg[None].to(self.device))
            embedded.append(volume.flatten(4).flatten(2, 3))
        return mutual_filter(torch.cat(embedded, 1))

    def refine(self, cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """(B, 16 L, S, T): the aggregated cost; projections (B, L, positions, proj_dim)."""
        return self.decoder(cost, source, target)

    def encode_pair(self, source: NeMFFeatures, target: NeMFFeatures) -> Encoded:
        """Everything about a pair that does not depend on the queries."""
        projections = (x.projected[None].to(self.device) for x in (source, target))
        refined = self.refine(self.cost(source, target), *projections)
        return Encoded(refined, self.mlp_model.embed(refined)[0])

    # -- search -------------------------------------------------------------------------------

    @torch.no_grad()
    def match(
        self,
        queries: Sequence[NeMFFeatures],
        references: Sequence[NeMFFeatures],
        points: Sequence[Tensor],
    ) -> list[Matches]:
        triples = zip(queries, references, points, strict=True)
        return [self._match(query, reference, kps) for query, reference, kps in triples]

    def _match(self, target: NeMFFeatures, source: NeMFFeatures, points: Tensor) -> Matches:
        points = points.to(self.device, torch.float32)
        if self.official:
            height, width = target.canvas
            points = torch.minimum(points.clamp_min(0), points.new_tensor([width - 1, height - 1]))
        targets = to_norm(points, target.canvas)
        if not len(points):
            return Matches(points.clone())
        encoded = self.encode_pair(source, target)
        found = self.search(encoded, target, source, targets)
        answer = read_field(found, targets)
        if self.optimise:
            answer = optimise(
                self.mlp_model,
                encoded.volume,
                self.feature_size,
                answer,
                targets,
                alpha=self.alpha,
                official=self.official,
            )
        return Matches(to_pixels(answer, source.canvas))

    def search(
        self,
        encoded: Encoded,
        target: NeMFFeatures,
        source: NeMFFeatures,
        targets: Tensor | None,
    ) -> Tensor:
        """(H, W, 2): the field over the target's canvas, normalised source coordinates. With
        ``targets`` (N, 2) only what they read is searched; None gives the whole field."""
        height, width = target.canvas
        axis = torch.linspace(-1, 1, self.feature_size, device=self.device)
        positions = soft_argmax(encoded.refined.mean(1), axis, axis)
        return patch_match(
            self.mlp_model,
            encoded.volume,
            self.feature_size,
            initial_field(positions, height, width),
            self._uniform(target, source),
            points=targets,
            iterations=self.iterations,
            alpha=self.alpha,
        )

    def _uniform(self, target: NeMFFeatures, source: NeMFFeatures) -> Uniform:
        """The pair's own random numbers, or torch's global ones if official."""
        if self.official:
            shape = (1, *target.canvas, 2)  # drawn whole, to stay in step with the official stream
            return lambda _, pixels: torch.rand(shape, device=self.device).view(-1, 2)[pixels]
        text = f"{self.seed} {target.hash} {source.hash}".encode()
        return counted_uniform(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))


def _sizes(state: dict[str, Tensor]) -> dict[str, int | float]:
    """Sizes that the tensors of a file have; the paper's where it lacks them."""
    sizes: dict[str, int | float] = {"proj_dim": 128, "depth": 1, "mlp_ratio": 4}
    if "proj.0.weight" in state:
        sizes["proj_dim"] = state["proj.0.weight"].shape[0]
    blocks = {k.split(".")[2] for k in state if k.startswith("decoder.blocks.")}
    sizes["depth"] = len(blocks) or 1
    hidden = state.get("decoder.blocks.0.mlp.fc1.weight")
    if hidden is not None:
        sizes["mlp_ratio"] = hidden.shape[0] / hidden.shape[1]
    return sizes
