"""Files of others read within limits: JSON, YAML, parquet. Torch-free.

Each reader returns plain data or raises one NemfError that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemf.errors import NemfError
from nemf.limits import PARQUET_BYTES, TEXT_BYTES
from nemf.parquet_footer import decoded_bytes

if TYPE_CHECKING:
    import pyarrow as pa


def file_bytes(path: Path) -> int:
    """The length of a regular file. OSError if there is none; NemfError for anything else that has
    a path: a folder, a pipe or a device, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise NemfError(f"{path}: is no regular file; give a file")
    return status.st_size


def read_within(path: Path) -> bytes:
    """The content of a text-like file. OSError, ValueError as ``open`` raises them; NemfError for
    what is no regular file or longer than :data:`nemf.limits.TEXT_BYTES`."""
    TEXT_BYTES.check(path, file_bytes(path), "holds")
    return path.read_bytes()


def read_json(path: Path, kind: str = "JSON", *, missing: str | None = None) -> Any:
    """The content of a JSON file.

    NemfError "<path>: <missing>" if it is not there, "<path>: cannot be read as <kind> (...)" if it
    is too long, no JSON, nested too deeply, or gives one key of an object twice (a reader that
    takes either would be guessing).
    """
    try:
        return json.loads(read_within(path), object_pairs_hook=_once)
    except NemfError:
        raise
    except (OSError, ValueError, RecursionError) as problem:
        if missing is not None and isinstance(problem, FileNotFoundError):
            raise NemfError(f"{path}: {missing}") from None
        raise NemfError(f"{path}: cannot be read as {kind} ({problem})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object gives the key {twice!r} twice")
    return content


def read_yaml(path: Path, kind: str = "YAML") -> Any:
    """The content of a YAML file: plain data only.

    NemfError "<path>: cannot be read as <kind> (...)" if it is missing, too long, no YAML, nested
    too deeply, gives a key twice, or uses aliases (a short file could stand for an endless text).
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it uses an alias")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            content = super().construct_mapping(node, deep)
            if len(content) < len(node.value):
                raise yaml.YAMLError("a mapping gives a key twice")
            return content

    try:
        return yaml.load(read_within(path).decode("utf-8"), Plain)
    except NemfError:
        raise
    except Exception as problem:  # yaml's constructors raise many kinds, say for a date of month 13
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise NemfError(f"{path}: cannot be read as {kind} ({reason})") from None


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, dictionaries: Sequence[str] = ()
) -> pa.Table:
    """A parquet file, or those of its ``columns`` that it has, checksums verified.
    ``dictionaries``: text columns to leave encoded (a short file may repeat a long text endlessly).

    FileNotFoundError if it is not there. NemfError "<path>: cannot be read as parquet (...)" if it
    is none, is damaged, or would decode to more than :data:`nemf.limits.PARQUET_BYTES`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file_bytes(path)
        with pa.OSFile(str(path)) as source:
            PARQUET_BYTES.check(path, decoded_bytes(path), "decodes to")
            metadata = pq.read_metadata(source)
            names = metadata.schema.to_arrow_schema().names
            if len(set(names)) < len(names):
                raise ValueError("it has two columns of one name")
            file = pq.ParquetFile(
                source,
                metadata=metadata,
                read_dictionary=[name for name in dictionaries if name in names],
                page_checksum_verification=True,
            )
            wanted = None if columns is None else [name for name in columns if name in names]
            table = file.read(columns=wanted)
            table.validate(full=True)
            return table
    except (FileNotFoundError, NemfError):
        raise
    except (OSError, ValueError, LookupError, MemoryError, pa.ArrowException) as problem:
        reason = " ".join(str(problem).split())
        raise NemfError(f"{path}: cannot be read as parquet ({reason})") from None
