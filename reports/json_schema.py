"""A JSON document against a JSON Schema (draft 2020-12), for the keywords that our schemas use.

A schema with any other keyword is refused: what is not checked here must not look checked. Python
only, so that results can be read without further packages; a test compares it with jsonschema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nemf.errors import NemfError

_NOTES = {"$schema", "$id", "$defs", "title", "description"}


def problems(document: Any, schema: Mapping[str, Any]) -> list[str]:
    """What is wrong with a document as :func:`json.loads` gives it, one line each with the place
    (``scores[3].pck``); empty if it fits.

    NemfError if the schema uses a keyword or reference that this module does not know.
    """
    return list(_problems(document, schema, schema, ""))


def _problems(
    value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str
) -> Iterator[str]:
    unknown = sorted(set(schema) - _NOTES - set(_KEYWORDS))
    if unknown:
        raise NemfError(f"schema at {at or 'top'}: {', '.join(unknown)} cannot be checked")
    for keyword, wanted in schema.items():
        if keyword in _KEYWORDS:
            yield from _KEYWORDS[keyword](value, wanted, schema, root, at)


def _reference(value: Any, target: str, _: Any, root: Mapping[str, Any], at: str) -> Iterator[str]:
    name = target.removeprefix("#/$defs/")
    if name == target or name not in root.get("$defs", {}):
        raise NemfError(f"schema at {at or 'top'}: no such definition as {target}")
    yield from _problems(value, root["$defs"][name], root, at)


def _any_of(value: Any, options: list[Any], _: Any, root: Any, at: str) -> Iterator[str]:
    tries = [list(_problems(value, option, root, at)) for option in options]
    if all(tries):
        yield min(tries, key=len)[0]


def _type(value: Any, wanted: str | list[str], *rest: Any) -> Iterator[str]:
    names = [wanted] if isinstance(wanted, str) else wanted
    if not any(_TYPES[name](value) for name in names):
        yield f"{_place(rest)} must be {' or '.join(names)}, not {_shown(value)}"


def _const(value: Any, wanted: Any, *rest: Any) -> Iterator[str]:
    if not _same(value, wanted):
        yield f"{_place(rest)} must be {json.dumps(wanted)}, not {_shown(value)}"


def _enum(value: Any, wanted: list[Any], *rest: Any) -> Iterator[str]:
    if not any(_same(value, one) for one in wanted):
        yield f"{_place(rest)} must be one of {json.dumps(wanted)[1:-1]}, not {_shown(value)}"


def _pattern(value: Any, wanted: str, *rest: Any) -> Iterator[str]:
    # `$` of ECMA's expressions is the very end; Python's also stands before a last newline
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", wanted), value):
        yield f"{_place(rest)} must match {wanted}, which {_shown(value)} does not"


def _limit(words: str, holds: Callable[[Any, Any], bool], measured: type) -> Callable[..., Any]:
    """A bound on numbers, or on the length of texts or lists."""

    def check(value: Any, wanted: Any, *rest: Any) -> Iterator[str]:
        if measured is float:
            size = value if _TYPES["number"](value) else None
        else:
            size = len(value) if isinstance(value, measured) else None
        if size is not None and not holds(size, wanted):
            yield f"{_place(rest)} must {words} {wanted}, not {_shown(value)}"

    return check


def _required(value: Any, wanted: list[str], *rest: Any) -> Iterator[str]:
    absent = [name for name in wanted if isinstance(value, dict) and name not in value]
    if absent:
        yield f"{_place(rest)} lacks {', '.join(absent)}"


def _properties(value: Any, wanted: Mapping[str, Any], _: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, schema in wanted.items():
            if name in value:
                yield from _problems(value[name], schema, root, f"{at}.{name}" if at else name)


def _additional(value: Any, wanted: Any, schema: Any, root: Any, at: str) -> Iterator[str]:
    if wanted is not False:
        raise NemfError(f"schema at {at or 'top'}: additionalProperties must be false")
    if isinstance(value, dict) and (more := value.keys() - schema.get("properties", {}).keys()):
        yield f"{_place((schema, root, at))} has unknown {', '.join(sorted(more))}"


def _items(value: Any, wanted: Any, _: Any, root: Any, at: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _problems(item, wanted, root, f"{at}[{number}]")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and value == int(value),
}

_KEYWORDS: dict[str, Callable[..., Iterator[str]]] = {
    "$ref": _reference,
    "anyOf": _any_of,
    "type": _type,
    "const": _const,
    "enum": _enum,
    "pattern": _pattern,
    "minLength": _limit("be at least so long:", lambda size, limit: size >= limit, str),
    "maxLength": _limit("be at most so long:", lambda size, limit: size <= limit, str),
    "minItems": _limit("have at least so many entries:", lambda size, limit: size >= limit, list),
    "minimum": _limit("be at least", lambda size, limit: size >= limit, float),
    "maximum": _limit("be at most", lambda size, limit: size <= limit, float),
    "exclusiveMinimum": _limit("be above", lambda size, limit: size > limit, float),
    "exclusiveMaximum": _limit("be below", lambda size, limit: size < limit, float),
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
}


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _place(rest: tuple[Any, ...]) -> str:
    return rest[-1] or "the document"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
