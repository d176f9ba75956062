"""Hit rates of the feature cache on lists of SPair-71k's shape (test split): 18 classes, 27 images
each, 12,234 pairs; by how many images the budget holds. ``python -m tests.benchmarks.cache_order``.

The pairs of a class are listed at random or by source image. "list": the least recently used one
goes, pairs in the order of the list. "optimum": the same order, and the one goes that is needed
last (Belady). "ours": the order within chunks of 64 or 512 pairs that prediction takes.
"any order": what no order and no cache can exceed, as a newly encoded image can serve only pairs
with images that are held.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from experiments.feature_cache import visiting_order

CLASSES, IMAGES = 18, 27


@dataclass(frozen=True)
class _Image:
    hash: str


@dataclass(frozen=True)
class _Pair:
    query: _Image
    reference: _Image


def spair_sized(listed: str, n_pairs: int) -> list[_Pair]:
    """Pairs as a list of SPair-71k has them, as far as the cache looks at them. ``listed``:
    "sorted" or "shuffled" within a class."""
    rng, pairs = random.Random(0), []
    for c in range(CLASSES):
        images = [_Image(f"{c}/{k}") for k in range(IMAGES)]
        every = [_Pair(a, b) for a in images for b in images if a is not b]
        n = n_pairs * (c + 1) // CLASSES - n_pairs * c // CLASSES
        chosen = [every[i] for i in sorted(rng.sample(range(len(every)), n))]
        if listed == "shuffled":
            rng.shuffle(chosen)
        pairs += chosen
    return pairs


def requests(pairs: Sequence, chunk: int | None) -> list[str]:
    """The images in the order in which prediction asks for them; ``chunk=None``: as listed."""
    asked: list[str] = []
    size = chunk or max(len(pairs), 1)
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        order = range(len(part)) if chunk is None else visiting_order(part)
        for i in order:
            asked += [part[i].query.hash, part[i].reference.hash]
    return asked


def hit_rate(asked: Sequence[Hashable], places: int) -> float:
    """Share of the requests that a least-recently-used cache of so many places answers."""
    held: OrderedDict[Hashable, None] = OrderedDict()
    hits = 0
    for image in asked:
        if image in held:
            hits += 1
            held.move_to_end(image)
        else:
            held[image] = None
            if len(held) > places:
                held.popitem(last=False)
    return hits / len(asked)


def optimal_hit_rate(asked: Sequence[Hashable], places: int) -> float:
    """The same of a cache that knows the future and drops what is needed last (Belady, 1966)."""
    again = [len(asked)] * len(asked)
    last: dict[Hashable, int] = {}
    for i in range(len(asked) - 1, -1, -1):
        again[i] = last.get(asked[i], len(asked))
        last[asked[i]] = i
    held: dict[Hashable, int] = {}
    heap: list[tuple[int, int, Hashable]] = []
    hits = 0
    for i, image in enumerate(asked):
        if image in held:
            hits += 1
        elif len(held) >= places:
            while True:
                need, _, old = heapq.heappop(heap)
                if held.get(old) == -need:
                    del held[old]
                    break
        held[image] = again[i]
        heapq.heappush(heap, (-again[i], i, image))
    return hits / len(asked)


def highest_hit_rate(pairs: Sequence[_Pair], places: int) -> float:
    """What no order exceeds: of the pairs of two images each, a load serves those with one of the
    ``places - 1`` others that are held."""
    edges = len({frozenset((p.query.hash, p.reference.hash)) for p in pairs})
    images = len({i.hash for p in pairs for i in (p.query, p.reference)})
    loads = max(images, -(-edges // max(places - 1, 1)))
    return 1 - loads / (2 * len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12_234)
    n_pairs = parser.parse_args().pairs
    print("| list | images held | list | optimum | ours, 64 | ours, 512 | any order at most |")
    print("|---|---|---|---|---|---|---|")
    for listed in ("shuffled", "sorted"):
        pairs = spair_sized(listed, n_pairs)
        asked = {chunk: requests(pairs, chunk) for chunk in (None, 64, 512)}
        for places in (4, 8, 12, 16, 20, 27):
            rates = [hit_rate(asked[None], places), optimal_hit_rate(asked[None], places)]
            rates += [hit_rate(asked[chunk], places) for chunk in (64, 512)]
            rates.append(highest_hit_rate(pairs, places))
            cells = " | ".join(f"{100 * rate:.1f} %" for rate in rates)
            print(f"| {listed} | {places} | {cells} |")


if __name__ == "__main__":
    main()
