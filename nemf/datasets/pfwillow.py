"""PF-WILLOW (Ham et al., CVPR 2016)."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from nemf.datasets.index import PairDataset, RawImage, RawPair, inside
from nemf.datasets.pfpascal import csv_number, find_list, read_pair_list
from nemf.errors import NemfError

_N_KPS = 10


class PFWillow(PairDataset):
    """PF-WILLOW: ``test_pairs.csv`` with columns image A, image B (``<root>/<class>/<file>``, the
    first component is ignored), then 10 x and 10 y of A, 10 x and 10 y of B; images in
    ``<class>/`` directly in the folder or below ``PF-dataset-WILLOW/`` or ``PF-dataset/``.

    900 ordered pairs of 100 photographs in 10 sub-classes; 30 photographs occur in two of them.
    No boxes are annotated.
    """

    name = "pfwillow"
    title = "PF-WILLOW"
    layout = "pfwillow"
    folders = ("PF-WILLOW", "pf-willow", "PF_WILLOW", "pfwillow")
    splits = ("test",)
    official: ClassVar[dict[str, int]] = {"test": 900}

    def sources(self) -> list[Path]:
        return [self.list_file(), *(p for p in sorted(self._base().iterdir()) if p.is_dir())]

    def entries(self) -> list[tuple[int, np.ndarray]]:
        table = read_pair_list(self.list_file(), min_columns=2 + 4 * _N_KPS)
        return list(enumerate(table.to_numpy(object)))

    def read(self, entry: tuple[int, np.ndarray], images: dict[str, RawImage]) -> RawPair:
        number, row = entry
        origin = f"{self.list_file()} row {number + 2}"
        files = [self._image(str(cell), images, origin) for cell in row[:2]]
        cells = [csv_number(cell) for cell in row[2 : 2 + 4 * _N_KPS]]
        if None in cells:
            raise NemfError(f"{origin}: columns 3 to 42 must be numbers")
        numbers = np.array(cells, np.float32).reshape(2, 2, _N_KPS)
        category, stems = files[0].parent.name, [f.stem for f in files]
        return RawPair(
            id=f"{number:06d}-{stems[0]}-{stems[1]}:{category}",
            category=category,
            src=str(files[0]),
            trg=str(files[1]),
            src_kps=numbers[0].T,
            trg_kps=numbers[1].T,
            kp_names=tuple(str(k) for k in range(_N_KPS)),
            origin=origin,
        )

    def _image(self, cell: str, images: dict[str, RawImage], origin: str) -> PurePosixPath:
        parts = PurePosixPath(cell).parts
        if len(parts) != 3:
            raise NemfError(f"{origin}: expected <root>/<class>/<file>, not {cell!r}")
        name = PurePosixPath(*parts[1:])
        path = inside(self._base(), str(name), origin)
        images.setdefault(str(name), RawImage(str(name), path))
        return name

    def _base(self) -> Path:
        for name in ("PF-dataset-WILLOW", "PF-dataset"):
            if (self.folder / name).is_dir():
                return self.folder / name
        return self.folder

    def list_file(self) -> Path:
        return find_list(self.folder, ["test_pairs.csv", "test_pairs_pf_willow.csv"])
