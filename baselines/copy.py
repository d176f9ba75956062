"""The floor of every table: copy the keypoints, scaled by the ratio of the image sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemf.cards import MatcherCard
from nemf.geometry import squash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size

CARD = MatcherCard(
    name="copy",
    title="copy (floor)",
    paper="this project",
    year=None,
    arxiv=None,
    licence_of_original="Apache-2.0",
    backbone="none",
    input_size="any",
    training="none",
    official_protocol="canonical@1",
    description="Copies each keypoint, scaled by the ratio of the image sizes; looks at no pixel.",
    weights_at="needs none",
)


class CopyKeypoints(Matcher):
    """Predicts (x * W_ref / W_query, y * H_ref / H_query), whatever the images show."""

    card = CARD

    def encode(self, images: Sequence[Image], role: Role) -> list[Size]:
        return [image.size for image in images]

    def match(
        self, queries: Sequence[Size], references: Sequence[Size], points: Sequence[Tensor]
    ) -> list[Matches]:
        triples = zip(queries, references, points, strict=True)
        return [Matches(squash(kps.float(), query, reference)) for query, reference, kps in triples]
