"""HTML pages that are one file each: style and script inside, nothing asked of the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, scripts: Sequence[str], **values: Any) -> str:
    """A page from ``templates/``: ``template`` filled with ``values`` (escaped), the style of all
    pages as ``style``, the named ``scripts`` joined as ``script``, and ``hashes`` of both for the
    page's Content-Security-Policy: only these texts may run."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    inlined = {
        "style": _text("page.css"),
        "script": "\n".join(_text(name) for name in scripts),
    }
    return environment.get_template(template).render(
        **values,
        **{name: Markup(text) for name, text in inlined.items()},
        hashes={name: _source_hash(text) for name, text in inlined.items()},
    )


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    """A source expression of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
