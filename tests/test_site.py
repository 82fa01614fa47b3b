"""The site: it builds, no link of it is dead, it asks no other site for anything, and a browser shows it as meant."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REPOSITORY = re.compile(
    r"https://(?:github\.com/hf-xent/hf_xent/(?:blob|tree)|raw\.githubusercontent\.com/hf-xent/hf_xent)/main/([^)\s\"'>#]+)"
)
MAIN = ("", "methods/emo/", "which_loss/", "api/trainers/", "commands/")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
NEEDS_MKDOCS = pytest.mark.skipif(find_spec("mkdocs") is None, reason="pip install -e .[docs]")
NEEDS_BROWSER = pytest.mark.skipif(
    BROWSER is None or find_spec("playwright") is None, reason="needs chromium and playwright: apt-get install chromium"
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site, built once for all processes of pytest."""
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "site"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            draft = shared.with_name("site-draft")
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(draft)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            draft.rename(shared)
    return shared


@pytest.mark.slow
@NEEDS_MKDOCS
def test_the_site_builds_without_a_warning_and_describes_every_public_name(site):
    assert "hf-xent train" in (site / "commands" / "index.html").read_text()
    api = runpy.run_path(str(DOCS / "site_api.py"))
    for name in api["API"]:
        module, page = importlib.import_module(name), name.removeprefix("hf_xent.")
        text = (site / "api" / page / "index.html").read_text(encoding="utf-8")
        homes = [api["home"](module, public) for public in getattr(module, "__all__", ())]
        if name == "hf_xent":  # a table, which leads to them
            assert all(f"#{home}" in text or home in sys.modules for home in homes)
        else:
            assert [home for home in homes if f'id="{home}"' not in text and f"#{home}" not in text] == []
    losses_page = (site / "api" / "losses" / "index.html").read_text(encoding="utf-8")
    assert "(1 - p_y)^gamma log p_y" in losses_page and "arXiv:1708.02002" in losses_page
    patching_page = (site / "api" / "patching" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"Parameters:.*?memory_budget.*?Raises:", patching_page, re.DOTALL)


class Page(HTMLParser):
    """What a page links to, what it loads, and the names that links may lead to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.names = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and given.get("src"):
            self.loaded.append(given["src"])
        if given.get("srcset"):
            self.loaded += [part.split()[0] for part in given["srcset"].split(",")]
        if tag == "link" and given.get("href") and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])


@cache
def parsed(path):
    return Page(path.read_text(encoding="utf-8"))


def target(site, page, link):
    """The file of the site that a link of a page leads to."""
    path = unquote(urlsplit(link).path)
    found = site / path.lstrip("/") if path.startswith("/") else (page.parent / path if path else page)
    return (found / "index.html" if found.is_dir() else found).resolve()


@pytest.mark.slow
@NEEDS_MKDOCS
def test_no_link_is_dead(site):
    dead, counted = [], 0
    for page in site.rglob("*.html"):
        for link in (*parsed(page).links, *parsed(page).loaded):
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            counted += 1
            file, name = target(site, page, link), unquote(urlsplit(link).fragment)
            there = file.is_file() and (
                file.suffix != ".html" or not name or name.startswith("__") or name in parsed(file).names
            )
            if not there and not name.endswith("-mode-only"):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert counted > 1000 and sorted(set(dead)) == []


@pytest.mark.slow
@NEEDS_MKDOCS
def test_no_page_loads_anything_from_another_site(site):
    elsewhere = {link for page in site.rglob("*.html") for link in parsed(page).loaded if urlsplit(link).netloc}
    assert elsewhere == set()
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", styles) == []


def test_links_to_the_repository_lead_to_files_of_it():
    folders = ("docs", "benchmarks", "examples", "model_cards", "distribution")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    found = {(page, path) for page in pages for path in REPOSITORY.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 20
    assert [f"{page.name}: {path}" for page, path in sorted(found) if not (ROOT / path.rstrip(".,")).exists()] == []


@NEEDS_MKDOCS
def test_formulas_become_mathml_and_mistakes_are_refused():
    formulas = runpy.run_path(str(DOCS / "site_formulas.py"))
    page = formulas["rendered"](
        r'<p>A <span class="arithmatex">\(p &lt; \frac{1}{2}\)</span>, <code>$$</code> and</p>'
        r'<div class="arithmatex">\[\max_v z_v \sim \log p_y\]</div>'
    )
    inline, block = map(ElementTree.fromstring, re.findall(r"<math.*?</math>", page, re.DOTALL))
    assert "".join(inline.itertext()) == "p<12" and inline.get("display") == "inline"
    assert "".join(block.itertext()) == "maxvzv\u223clogpy" and block.get("display") == "block"
    assert inline.get("alttext") == r"p < \frac{1}{2}"
    assert "</math>,</span>" in page  # a comma stays with its formula
    signs = ElementTree.fromstring(formulas["mathml"](r"a = -\lVert b \rVert - c"))
    found = [sign for sign in signs.iter() if sign.tag.endswith("}mo")]
    attributes = [(sign.text, sign.get("form"), sign.get("stretchy")) for sign in found]
    minus, bars = "\u2212", ("\u2016", None, "false")
    assert attributes == [("=", None, None), (minus, "prefix", None), bars, bars, (minus, None, None)]
    for wrong, message in ((r"\nosuch{x}", "nosuch"), (r"\frac{1}{2", "braces"), (r"\left( x", "not understood")):
        with pytest.raises(ValueError, match=message):
            formulas["mathml"](wrong)
    with pytest.raises(ValueError, match="empty lines"):
        formulas["rendered"]("<p>$$ x $$</p>")


def cells(markdown):
    """The rows of a Markdown table as lists of cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_tables_of_options_have_what_a_class_and_its_bases_here_declare():
    pytest.importorskip("trl", reason="the trainers need the extra train")
    options = runpy.run_path(str(DOCS / "site_options.py"))
    from transformers import TrainingArguments

    from hf_xent import EMOConfig

    markdown = options["with_tables"]("A\n\n<!-- options: hf_xent.EMOConfig -->\n\nB", lambda path: f"<{path}>")
    rows = {name.strip("`"): (default.strip("`"), text) for name, default, text in cells(markdown)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name: field for field in dataclasses.fields(EMOConfig) if field.name not in inherited}
    assert fields.keys() <= rows.keys() and rows.keys() - fields.keys() <= inherited
    assert all(rows[name][0] == repr(field.default) for name, field in fields.items())
    assert "only the ratio changes" in rows["gt_detach"][1] and "<hf_xent.trainers.emo.EMOConfig>" in markdown
    assert markdown.startswith("A\n\n|") and markdown.endswith("\n\nB")


def test_tables_of_options_know_functions_and_registries_and_refuse_the_rest():
    options = runpy.run_path(str(DOCS / "site_options.py"))
    table = partial(options["table"], link=str)
    rows = cells(table("hf_xent.patch"))
    assert [name for name, _, _ in rows][:3] == ["`model`", "`loss`", "`observe`"] and rows[0][1] == "required"
    assert all(text for _, _, text in rows)
    [[name, default, text]] = cells(table("loss focal"))
    assert (name, default) == ("`gamma`", "`2.0`") and "focusing strength" in text
    assert options["escaped"]("a|b `c|d` <e> x_y") == r"a\|b `c\|d` &lt;e&gt; x\_y"
    for wrong in ("hf_xent.NoSuch", "loss nosuch", "nokind focal", "hf_xent.losses.LOSSES.names"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            table(wrong)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without writing a line for each."""

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=[*QUIET, "--no-first-run"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """A new page, and under `page.failures` what went wrong in it: console errors and failed or foreign requests."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, color_scheme="light")
    found = context.new_page()
    found.set_default_timeout(30_000)
    found.failures = []
    found.on("console", lambda line: found.failures.append(line.text) if line.type == "error" else None)
    found.on("pageerror", lambda error: found.failures.append(str(error)))
    # the next page cuts what the one before was still loading, such as the worker of the search
    failed = lambda r: [] if ABORTED in str(r.failure) else [f"{r.url}: {r.failure}"]  # noqa: E731
    found.on("requestfailed", lambda request: found.failures.extend(failed(request)))
    found.on("response", lambda r: found.failures.append(f"{r.url}: {r.status}") if r.status >= 400 else None)
    found.on("request", lambda r: None if r.url.startswith(LOCAL) else found.failures.append(f"asked for {r.url}"))
    yield found
    context.close()


ABORTED = "net::ERR_ABORTED"
LOCAL = ("http://127.0.0.1:", "data:", "blob:")


@pytest.mark.slow
@NEEDS_MKDOCS
@NEEDS_BROWSER
def test_pages_load_without_an_error_and_formulas_have_a_size(site, address, page):
    methods = sorted(path.parent.name for path in (site / "methods").glob("*/index.html"))
    with_formulas = [name for name in methods if "<math" in (site / "methods" / name / "index.html").read_text()]
    sample = [*(f"methods/{name}/" for name in dict.fromkeys((*with_formulas[:4], *methods[::8])))]
    for path in dict.fromkeys((*MAIN, *sample, "api/patching/", "gallery/", "troubleshooting/")):
        page.goto(address + path, wait_until="load")
        sizes = page.eval_on_selector_all("math", "found => found.map(m => m.getBoundingClientRect().toJSON())")
        assert all(size["width"] > 4 and size["height"] > 4 for size in sizes), path
        assert sizes or path.split("/")[1:2] != with_formulas[:1]
        pictures = "found => found.filter(i => i.offsetParent && !i.naturalWidth).map(i => i.src)"
        assert page.eval_on_selector_all("img", pictures) == [], path
    assert page.failures == []


@pytest.mark.slow
@NEEDS_MKDOCS
@NEEDS_BROWSER
def test_search_finds_a_loss(address, page):
    page.goto(address)
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").fill("focal")
    page.locator(".md-search-result__item a").first.wait_for()
    found = page.locator(".md-search-result__item").all_inner_texts()
    assert any("focal" in text.lower() for text in found) and page.failures == []


@pytest.mark.slow
@NEEDS_MKDOCS
@NEEDS_BROWSER
def test_the_button_changes_to_dark_colors_and_pictures_follow(address, page):
    page.goto(address)
    scheme = partial(page.evaluate, "document.body.getAttribute('data-md-color-scheme')")
    shown = partial(page.evaluate, "[...document.images].filter(i => i.offsetParent).map(i => i.src)")
    assert scheme() == "default" and any("memory-light" in src for src in shown())
    page.get_by_title("Switch to dark colors").click()
    assert scheme() == "slate" and any("memory-dark" in src for src in shown())
    assert not any("memory-light" in src for src in shown())
    page.reload()
    assert scheme() == "slate" and page.failures == []  # it is remembered


@pytest.mark.slow
@NEEDS_MKDOCS
@NEEDS_BROWSER
def test_nothing_is_wider_than_a_phone(address, page):
    page.set_viewport_size({"width": 420, "height": 900})
    widths = {}
    for path in MAIN:
        page.goto(address + path)
        widths[path] = page.evaluate("document.documentElement.scrollWidth")
    assert all(width <= 420 for width in widths.values()), widths


def templates():
    """Every text of the package's source, with … in the place of its values."""
    for path in (ROOT / "hf_xent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_are_explained_are_those_of_the_source():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    marked = re.findall(r"^> (`+)(.*?)\1$", page, re.MULTILINE | re.DOTALL)
    quoted = [text.replace("\n> ", " ").strip() for _, text in marked]
    assert len(quoted) >= 20 and len(set(quoted)) == len(quoted)
    known = set(templates())
    assert [text for text in quoted if text not in known] == []


def test_commands_that_pages_recommend_exist():
    from typer.main import get_command

    from hf_xent import cli

    top, found = get_command(cli.app), 0
    for page in ("which_loss.md", "index.md", "gallery.md", "troubleshooting.md"):
        for line in re.findall(r"^hf-xent (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE):
            words, command = shlex.split(line.partition("  #")[0]), top
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            known = {option for parameter in command.params for option in parameter.opts}
            given = {word for word in words if word.startswith("--")}
            assert command is not top and (given <= known or command.ignore_unknown_options), line
            found += 1
    assert found >= 8
