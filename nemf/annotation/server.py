"""The local server behind ``nemf annotate``: this machine only, behind a secret address.

It listens on 127.0.0.1, answers below a random token only, and refuses requests that another site
sends or that reach it under another name. The address of a folder stays the same, so that a page
that is still open goes on by itself when the server was started again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import secrets
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image as PILImage

from nemf.annotation.pair_list import Changed, PairList
from nemf.claims import claimed
from nemf.datasets.index import decode_image, default_cache, image_header
from nemf.errors import NemfError

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
_PAGE = Path(__file__).with_name("page.html")
_LONGEST_BODY = 1 << 20
# What a browser shows pixel by pixel as it is stored; anything else is sent as PNG.
_SHOWN = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


class AnnotationServer(ThreadingHTTPServer):
    """Serves the page of one :class:`PairList` at ``url``."""

    daemon_threads = True

    def __init__(self, pair_list: PairList, port: int, token: str) -> None:
        self.pair_list, self.token = pair_list, token
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"


@contextmanager
def annotation_server(folder: Path, port: int | None = None) -> Iterator[AnnotationServer]:
    """A bound server for a folder of photographs, to be run by ``serve_forever``. ``port`` None:
    the one of last time if it is free, else any.

    NemfError for a folder that cannot be annotated, that another server holds, or a port that is
    taken.
    """
    pair_list = PairList(folder)
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = default_cache() / "annotate" / name
    with claimed(cache, "server", "being annotated by another `nemf annotate`", of=folder):
        last_port, token = _last_address(cache / "address.json")
        server = None
        for number in [port] if port is not None else [last_port, 0]:
            try:
                server = AnnotationServer(pair_list, number, token)
                break
            except (OSError, OverflowError) as problem:
                if number == port:
                    raise NemfError(f"port {port} cannot be had ({problem})") from None
        assert server is not None
        with server:
            _keep_address(cache / "address.json", server.server_port, token)
            yield server


def annotate(folder: Path, port: int | None, open_browser: bool, tell: Any) -> None:
    """Serves until Ctrl-C. ``tell`` is given lines for the user."""
    with annotation_server(folder, port) as server:
        count = len(server.pair_list.photographs)
        tell(f"{count} photographs, pairs in {server.pair_list.file}")
        for name, reason in server.pair_list.left_out.items():
            tell(f"left out: {name}: {reason.removeprefix(f'{folder / name}: ')}")
        tell(f"annotate at {server.url} (Ctrl-C ends it; every click is saved at once)")
        if open_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            tell("ended; the same command goes on where it was")


def _last_address(file: Path) -> tuple[int, str]:
    """Port and token of last time, else any port and a new token."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        port, token = int(content["port"]), str(content["token"])
        if len(token) >= 32 and token.isalnum() and 0 <= port < 65536:
            return port, token
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, secrets.token_hex(16)


def _keep_address(file: Path, port: int, token: str) -> None:
    """For the user's eyes only: who knows the token may write the list of pairs."""
    file.unlink(missing_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as text:
        json.dump({"port": port, "token": token}, text)


class _Handler(BaseHTTPRequestHandler):
    server: AnnotationServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        what = self._asked()
        if what is None:
            return
        if what == "":
            self._send_page()
        elif what == "state":
            self._answer(self._state)
        elif what.startswith("image/"):
            self._send_image(what.removeprefix("image/"))
        else:
            self._send_json({"error": "there is nothing here"}, HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if self._asked() != "pair":
            self.close_connection = True
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdigit():
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        if int(length) > _LONGEST_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        body = self.rfile.read(int(length))
        self._answer(lambda: self._put(body))

    def _asked(self) -> str | None:
        """The path below the token; None, and the request is refused, for any other, under another
        host's name, or from another site's page."""
        names = {f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}"}
        origin = self.headers.get("Origin")
        parts = self.path.partition("?")[0].split("/", 2)
        known = len(parts) == 3 and secrets.compare_digest(
            parts[1].encode(), self.server.token.encode()
        )
        if (
            not known
            or self.headers.get("Host") not in names
            or (origin is not None and origin.removeprefix("http://") not in names)
        ):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return parts[2]

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # the body was not read
        self._send(b"", "text/plain", status)

    def _answer(self, work: Any) -> None:
        """Sends what ``work`` returns, or says what is wrong with the request or the disk."""
        try:
            self._send_json(work(), HTTPStatus.OK)
        except Changed as changed:
            self._send_json({"pair": changed.pair}, HTTPStatus.CONFLICT)
        except NemfError as problem:
            self._send_json({"error": str(problem)}, HTTPStatus.UNPROCESSABLE_ENTITY)

    def _state(self) -> dict[str, Any]:
        pair_list = self.server.pair_list
        return {
            "folder": str(pair_list.folder.resolve()),
            "photographs": [
                {"name": p.name, "height": p.size[0], "width": p.size[1]}
                for p in pair_list.photographs.values()
            ],
            "pairs": pair_list.pairs(),
            "left_out": pair_list.left_out,
        }

    def _put(self, body: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(body)
            which = (asked["src"], asked["trg"], asked["nth"], asked["revision"])
            content = asked["content"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise NemfError("the request is no pair") from None
        if [type(part) for part in which] != [str, str, int, str] or which[2] < 0:
            raise NemfError("the request is no pair")
        return {"pair": self.server.pair_list.put(*which, content)}

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = _PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
            "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        self._send(page.encode(), "text/html; charset=utf-8", policy=policy)

    def _send_image(self, quoted: str) -> None:
        photograph = self.server.pair_list.photographs.get(unquote(quoted))
        if photograph is None:
            self._send_json({"error": "there is no such photograph"}, HTTPStatus.NOT_FOUND)
            return
        path = self.server.pair_list.folder / photograph.name
        try:
            kind = _SHOWN.get(path.suffix.lower())
            if kind is not None and image_header(path)[1] == 1:
                self._send(path.read_bytes(), kind)
                return
            buffer = io.BytesIO()
            PILImage.fromarray(decode_image(path)).save(buffer, "PNG", compress_level=1)
            self._send(buffer.getvalue(), "image/png")
        except (NemfError, OSError) as problem:
            self._send_json({"error": str(problem)}, HTTPStatus.UNPROCESSABLE_ENTITY)

    def _send_json(self, content: Any, status: HTTPStatus) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(
        self,
        body: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        policy: str = "default-src 'none'",
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "nemf"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s", (format % args).replace(self.server.token, "..."))
