"""The site's links lead somewhere, and a browser shows every page without errors and legibly."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import jaxtrain as jt
from tests.public_names import public_names

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
PAGES = sorted(
    str(page.relative_to(SITE))
    for page in SITE.rglob("*.html")
    if "_static" not in page.parts  # templates of the theme
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Where a test of the site must not be skipped, as in CI.
REQUIRED = "JAXTRAIN_REQUIRE_SITE" in os.environ

pytestmark = pytest.mark.slow
if not PAGES and not REQUIRED:
    pytest.skip("the site is not built; run make docs", allow_module_level=True)

# Elements by which a page loads something.
LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


class Page(HTMLParser):
    """The anchors of a page, what it loads and where it links to."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: set[str] = set()
        self.links: set[str] = set()
        self.feed((SITE / name).read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.ids.add(value)
            elif (tag, name) in LOADS and value:
                self.loads.add(value)
            elif (tag, name) == ("a", "href") and value:
                self.links.add(value)


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(name) for name in PAGES}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if "JAXTRAIN_WITHOUT_BROWSER" in os.environ or not (REQUIRED or CHROMIUM):
        pytest.skip("needs Chromium")
    if not REQUIRED:
        pytest.importorskip("playwright", reason="needs the extra docs")
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "Chromium is not installed"
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        arguments += ["--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def test_the_site_has_its_pages(pages: dict[str, Page]) -> None:
    names = ("index", "guide", "tutorials/linear_regression", "reference/training")
    assert {f"{name}.html" for name in names} <= set(pages)


def test_every_link_leads_to_a_file_and_an_anchor(pages: dict[str, Page]) -> None:
    broken = []
    for name, page in pages.items():
        for link in page.links | page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if url.scheme not in ("http", "https", "mailto") or " " in link:
                    broken.append((name, link))
                continue
            file = (SITE / name).parent / unquote(url.path) if url.path else SITE / name
            if not file.is_file():
                broken.append((name, link))
            elif url.fragment and file.suffix == ".html":
                target = pages[str(Path(os.path.relpath(file, SITE)))]
                if unquote(url.fragment) not in target.ids:
                    broken.append((name, link))
    assert broken == []


def test_no_page_loads_anything_from_another_host(pages: dict[str, Page]) -> None:
    assert [load for page in pages.values() for load in page.loads if urlsplit(load).netloc] == []


def test_every_public_name_is_in_the_reference_once(pages: dict[str, Page]) -> None:
    reference = [page for name, page in pages.items() if name.startswith("reference/")]
    found = [anchor for page in reference for anchor in page.ids]
    anchors: dict[int, list[str]] = {}  # those of each object, of which one is on a page
    for name, value in public_names().items():
        module, _, last = name.rpartition(".")
        prefix = getattr(jt, module).__name__ if module else "jaxtrain"
        anchors.setdefault(id(value), []).append(f"{prefix}.{last}")
    counts = {names[0]: sum(map(found.count, names)) for names in anchors.values()}
    assert {name: count for name, count in counts.items() if count != 1} == {}


# The texts whose contrast with their background is below 4.5, or 3 for large letters (WCAG AA).
LOW_CONTRAST = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, below) => {
    const alpha = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map((i) => top[i] * alpha + below[i] * (1 - alpha));
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backgrounds = new Map([[null, [255, 255, 255]]]);
  const background = (element) => {
    if (!backgrounds.has(element)) {
      const color = parse(getComputedStyle(element).backgroundColor);
      backgrounds.set(element, over(color, background(element.parentElement)));
    }
    return backgrounds.get(element);
  };
  const low = new Set();
  const main = document.querySelector(".bd-article");
  if (!main) return location.pathname.endsWith("/search.html") ? [] : ["no article"];
  const walker = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || seen.has(element) || element.matches(".headerlink, script, style")) continue;
    seen.add(element);
    const style = getComputedStyle(element);
    const below = background(element);
    const pair = [over(parse(style.color), below), below].map(luminance).sort((a, b) => a - b);
    const contrast = (pair[1] + 0.05) / (pair[0] + 0.05);
    const needed = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    if (contrast < needed) low.add(`${contrast.toFixed(1)} ${style.color} ${text.slice(0, 40)}`);
  }
  return [...low];
}"""
BROKEN_IMAGES = "() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
# What is wider than the screen and does not lie in something that scrolls.
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  const scrolls = (e) =>
    e && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  return [...document.querySelectorAll(".bd-article *")]
    .filter((e) => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
    .map((e) => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}`);
}"""

# Code that is wider than its box, and what is wider and does not scroll.
CODE_TOO_WIDE = """() => [...document.querySelectorAll(".bd-article .highlight pre")]
  .filter((e) => !e.closest(".cell_output") && e.scrollWidth > e.clientWidth + 1)
  .map((e) => `${e.scrollWidth} > ${e.clientWidth}: ${e.textContent.trim().slice(0, 40)}`)"""
HIDDEN = """() => [...document.querySelectorAll(".bd-article pre, .bd-article table")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1)
  .filter((e) => !["auto", "scroll"].includes(getComputedStyle(e).overflowX))
  .map((e) => `${e.tagName} ${e.textContent.trim().slice(0, 40)}`)"""


# The pages that show source code are many and alike.
@pytest.mark.parametrize(
    "name",
    [name for name in PAGES if not name.startswith(("_modules/", "repository/"))]
    + ["_modules/jaxtrain/dataset.html", "repository/experiments/mnist.py.html"],
)
def test_a_browser_shows_the_page(browser, name: str) -> None:
    problems: list[str] = []

    def on_console(message) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def on_request(request) -> None:
        if not request.url.startswith(("file:", "data:")):
            problems.append(f"not in the site: {request.url}")

    with browser.new_context(color_scheme="light") as context:
        page = context.new_page()
        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("request", on_request)
        page.goto((SITE / name).as_uri(), wait_until="load")
        page.add_style_tag(content="* { transition: none !important }")
        for scheme, width in (("light", 1280), ("dark", 375)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(f"document.documentElement.dataset.theme === {scheme!r}")
            assert page.evaluate(BROKEN_IMAGES) == []
            assert page.evaluate(LOW_CONTRAST) == []
            assert page.evaluate(TOO_WIDE) == []
            assert page.evaluate(HIDDEN) == []
            if width == 1280 and not name.startswith(("_modules/", "repository/")):
                assert page.evaluate(CODE_TOO_WIDE) == []
    assert problems == []
