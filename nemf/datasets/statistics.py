"""The card of a dataset split: what it holds, in numbers. Torch-free, nothing is decoded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemf.datasets.index import PairDataset
from nemf.pairs import FLAGS, ImageRecord, Pair


def card(dataset: PairDataset) -> dict[str, Any]:
    """Numbers that describe the pairs of ``dataset``, ready for JSON.

    ``images`` counts the images that its pairs use, ``distinct_images`` those with a content of
    their own. ``pairs_per_image``: in how many pairs an image occurs. Keypoints are counted per
    pair (one that both images show counts once). ``keypoints_outside``: of the keypoints of both
    sides, how many lie off their image by more than half a pixel. ``flags``: pairs per value of
    each difficulty flag; pairs without one under ``"not annotated"``. Sizes are in pixels.
    """
    pairs = list(dataset)
    uses: Counter[ImageRecord] = Counter()
    for pair in pairs:
        uses.update({pair.src, pair.trg})
    n_kps = [len(pair.kp_names) for pair in pairs]
    return {
        "name": dataset.name,
        "title": dataset.title,
        "synthetic": dataset.synthetic,
        "layout": dataset.layout,
        "split": dataset.split,
        "fingerprint": dataset.fingerprint,
        "pairs": len(pairs),
        "official_pairs": dataset.official_pairs,
        "images": len(uses),
        "distinct_images": len({image.hash for image in uses}),
        "pairs_per_image": _spread(list(uses.values())),
        "image_width": _spread([image.size[1] for image in uses]),
        "image_height": _spread([image.size[0] for image in uses]),
        "keypoints": sum(n_kps),
        "keypoints_per_pair": _spread(n_kps),
        "keypoints_outside": sum(_outside(pair) for pair in pairs),
        "classes": _classes(pairs),
        "flags": {flag: _flag_counts([pair.flags[flag] for pair in pairs]) for flag in FLAGS},
    }


def render(card: dict[str, Any]) -> str:
    """A card as text for a terminal."""
    kind = "synthetic stand-in" if card["synthetic"] else "real photographs"
    official = card["official_pairs"]
    pairs = f"{card['pairs']:,}"
    if official is not None:
        whole = "all" if official == card["pairs"] else "a part"
        pairs += f" of {official:,} official pairs ({whole})"
    rows = [
        ("pairs", pairs),
        ("images", f"{card['images']:,} ({card['distinct_images']:,} distinct)"),
        ("pairs per image", _range(card["pairs_per_image"])),
        ("image width (px)", _range(card["image_width"])),
        ("image height (px)", _range(card["image_height"])),
        ("keypoints", f"{card['keypoints']:,} ({card['keypoints_outside']:,} off the image)"),
        ("keypoints per pair", _range(card["keypoints_per_pair"])),
    ]
    for flag, counts in card["flags"].items():
        rows.append((flag, ", ".join(f"{value}: {n:,}" for value, n in counts.items())))
    rows.append(("fingerprint", card["fingerprint"]))
    lines = [f"{card['title']}, {card['split']} ({kind}, layout {card['layout']})"]
    lines += [f"  {label:<20}{text}" for label, text in rows]
    width = max(5, *(len(name) for name in card["classes"]))
    lines.append(f"  {'class':<{width}}{'pairs':>8}{'images':>8}{'keypoints':>11}{'per pair':>10}")
    for name, numbers in card["classes"].items():
        lines.append(
            f"  {name:<{width}}{numbers['pairs']:>8,}{numbers['images']:>8,}"
            f"{numbers['keypoints']:>11,}{numbers['keypoints_per_pair']:>10.2f}"
        )
    return "\n".join(lines)


def _classes(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    members: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[pair.category].append(pair)
    described = {}
    for category, group in sorted(members.items()):
        n_kps = [len(pair.kp_names) for pair in group]
        described[category] = {
            "pairs": len(group),
            "images": len({image for pair in group for image in (pair.src, pair.trg)}),
            "keypoints": sum(n_kps),
            "keypoints_per_pair": sum(n_kps) / len(group),
        }
    return described


def _flag_counts(values: Sequence[int]) -> dict[str, int]:
    counts = Counter(values)
    absent = counts.pop(-1, 0)
    named = {str(value): n for value, n in sorted(counts.items())}
    return named | ({"not annotated": absent} if absent else {})


def _outside(pair: Pair) -> int:
    count = 0
    for image, kps in ((pair.src, pair.src_kps), (pair.trg, pair.trg_kps)):
        height, width = image.size
        off = (kps < -0.5) | (kps > np.float32([width - 0.5, height - 0.5]))
        count += int(off.any(1).sum())
    return count


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {
        "min": int(min(values)),
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "max": int(max(values)),
    }


def _range(spread: dict[str, float]) -> str:
    low, high = spread["min"], spread["max"]
    return f"{low} to {high}, median {spread['median']:g}, mean {spread['mean']:.2f}"
