"""The documentation site: the pages that are made, and the built site in a browser."""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from nemf.cards import available_matchers
from nemf.datasets import available_datasets
from tests.browser import Browser

REPO = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPO / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("generate")


# -- made pages -----------------------------------------------------------------------------------


def test_every_matcher_has_a_page_from_its_card() -> None:
    made = generate.pages()
    cards = available_matchers()
    assert len(cards) >= 9
    for name, card in cards.items():
        page = made[f"cards/matchers/{name}.md"]
        for fact in (card.title, card.description, card.paper, card.training, card.input_size):
            assert fact.replace("|", "\\|") in page
        assert f"`{card.official_protocol}`" in page
        assert f"[{card.title}]({name}.md)" in made["cards/matchers/index.md"]
    assert "| `hpf_small` | HPF, small CNN (4,6) |" in made["cards/matchers/hpf.md"]


def test_every_dataset_has_a_page_from_its_card() -> None:
    made = generate.pages()
    for name, card in available_datasets().items():
        page = made[f"cards/datasets/{name}.md"]
        assert f"# {card['title']}\n" in page
        for split, count in card["official_pairs"].items():
            assert f"{split} {count:,}" in page
    spair = made["cards/datasets/spair.md"]
    assert "| `canonical@1` | src→trg; error ≤ alpha x trg bbox;" in spair


def test_every_public_module_and_command_is_in_the_reference() -> None:
    made = generate.pages()
    assert made["reference/nemf/scoring.md"].endswith("\n::: nemf.scoring\n")
    assert "[`nemf.scoring`](nemf/scoring.md)" in made["reference/index.md"]
    assert not [uri for uri in made if "/configs/" in uri or "/_" in uri]
    commands = made["reference/command-line.md"]
    for verb in ("predict", "data verify", "leaderboard", "export"):
        assert f"\n## nemf {verb}\n" in commands
    assert "\x08" not in commands


def test_links_of_made_pages_lead_somewhere() -> None:
    made = generate.pages()
    there = {*made, *(p.relative_to(REPO / "docs").as_posix() for p in REPO.glob("docs/**/*"))}
    count = 0
    for uri, text in made.items():
        text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                count += 1
                target = posixpath.normpath(posixpath.join(posixpath.dirname(uri), link))
                assert target in there, (uri, link)
    assert count > 50


def test_links_out_of_the_documents_are_led_to_pages() -> None:
    text = "[a](../CHANGELOG.md) [b](tables.md#x) [c](../LICENSE) [d](../nemf/scoring.py)"
    led = generate.led(text, "protocols.md")
    assert led == "[a](changelog.md) [b](tables.md#x) [c](licence.md) [d](../nemf/scoring.py)"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="the extra `docs` is not installed")
    markdown = load("docstring_markup").markdown
    text = "See :func:`nemf.match` and :class:`Short`.\n\n>>> f(1)\n2\n\nThe end."
    assert markdown(text) == (
        "See [`nemf.match`][nemf.matcher.match] and `Short`.\n\n\n```pycon\n>>> f(1)\n2\n```\n\n"
        "The end."
    )
    assert markdown(">>> f()\n1") == "\n```pycon\n>>> f()\n1\n```"


# -- the built site -------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.ids.add(found["id"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found["href"])
        if tag == "a" and found.get("href"):
            self.leads.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPO, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    yield folder
    shutil.rmtree(folder)


@pytest.mark.long
def test_the_site_asks_nothing_of_the_network_and_its_links_lead_somewhere(site: Path) -> None:
    pages = {
        page.relative_to(site).as_posix(): Links(page.read_text(encoding="utf-8"))
        for page in site.rglob("*.html")
    }
    assert len(pages) > 100
    for name, page in pages.items():
        if name == "404.html":  # of a server: its links are absolute
            continue
        assert not [link for link in page.loads if re.match(r"(https?:)?//", link)], name
        for link in page.leads:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            target = name if not path else target
            assert (site / target).exists(), (name, link)
            if anchor and target in pages:
                assert anchor in pages[target].ids, (name, link)


@pytest.mark.long
def test_the_site_opens_and_searches_from_the_disk(site: Path, browser: Browser) -> None:
    browser.call("Page.navigate", url=(site / "index.html").as_uri())
    wait = (
        "new Promise((done, fail) => {{ const start = Date.now(); (function look() {{"
        " if ({0}) done(true); else if (Date.now() - start > 40000) fail(new Error('waited'));"
        " else setTimeout(look, 100); }})(); }})"
    )
    browser.js(wait.format("document.readyState === 'complete' && window.component$"))
    browser.js(
        "(() => { document.getElementById('__search').click();"
        " const field = document.querySelector('.md-search__input'); field.focus();"
        " field.value = 'dyadic'; field.dispatchEvent(new Event('keyup', { bubbles: true }));"
        " field.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    browser.js(wait.format("document.querySelector('.md-search-result__link')"))
    links = browser.js(
        "[...document.querySelectorAll('.md-search-result__link')].map((e) => e.href)"
    )
    assert any("statistics.html" in link for link in links)
    requests = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
