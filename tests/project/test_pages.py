"""The pages in a browser: nothing is cut, every text can be read in light and dark mode, both widgets move.

Needs Chromium and skips without one. A small page of everything that chapters show is built with the real settings
and styles. ECODIFF_BOOK=folder checks a whole book, too: continuous integration names the one that it has just built.
"""

import os
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ecodiff.lab.book import build, pdf
from ecodiff.storage.paths import root

pytestmark = pytest.mark.xdist_group("pages")  # one process builds the specimen and starts the browser

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
# Faults of one page as it stands, as sentences. `desktop`: an equation that must be scrolled is a fault, too.
FAULTS = Path(__file__).with_name("page_faults.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium with a profile of its own, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = pdf.find_browser()
    if found is None:
        pytest.skip("no Chromium here: install Debian's `chromium`, or set CHROMIUM to the program")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=pdf.FLAGS)
        yield chromium
        chromium.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def serve():
    """A function from a folder to the address at which this machine serves it to itself."""
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def opened(browser, address, scheme="light", width=1280):
    """A page with its mathematics set, and the list of what its scripts complain about."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    context.route("**/*", lambda route: route.continue_() if "//127.0.0.1" in route.request.url else route.abort())
    page = context.new_page()
    page.set_default_timeout(300_000)  # of a busy machine
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_function("!document.querySelector('.math') || window.MathJax?.startup?.promise")
    page.evaluate("window.MathJax?.startup?.promise")
    return page, complaints


def ours(complaints):
    """Without what the theme says on every page, whatever the page: it loads its Thebe script twice, takes "no mode
    chosen yet" for an error, and asks for scripts from elsewhere."""
    foreign = ("THEBE_JS_URL", "Got invalid theme mode", "net::ERR_FAILED")
    return [text for text in complaints if not any(name in text for name in foreign)]


def faults(browser, address):
    """What is wrong with one page, at every width and in every scheme."""
    page, complaints = opened(browser, address)
    page.add_script_tag(content=FAULTS)
    found = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
            what = {"sizes": scheme == "light", "desktop": width >= 1280}  # colours change no size
            found += [f"{width} px, {scheme}: {fault}" for fault in page.evaluate("pageFaults", what)]
    page.context.close()
    return found + [f"console: {text}" for text in ours(complaints)]


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    """The folder of a built page that has one of everything, with the book's own settings and styles."""
    base = tmp_path_factory.mktemp("specimen")
    (base / "notebooks" / "profiles").mkdir(parents=True)
    (base / "notebooks" / "profiles" / "default.yaml").write_text("profile: default\n")
    source = base / "notebooks" / "01_specimen.md"
    shutil.copy(Path(__file__).with_name("specimen.md"), source)
    shutil.copy(root() / "_config.yml", base)
    for name in ("_static", "_extra"):
        shutil.copytree(root() / "book" / name, base / "book" / name)
    shutil.copy(root() / "book" / "references.bib", base / "book")
    (base / "book" / "index.md").write_text(
        "# A table of 7 books\n\n```{bibliography}\n```\n\n```{include} _status.md\n```\n"
    )
    (base / "book" / "glossary.md").write_text(
        "# Glossary\n\n```{glossary}\nhard concrete\n  The distribution of a {term}`gate`.\n\n"
        "gate\n  A number between 0 and 1.\n```\n"
    )
    chapters = "chapters:\n- file: notebooks/01_specimen\n- file: glossary\n"
    (base / "book" / "_toc.yml").write_text("format: jb-book\nroot: index\n" + chapters)
    build.run(source, "default", base / "out")
    return build.build_html(base / "out", base).parent


def pages(folder):
    """The pages of a book, by their names in the folder, without what Sphinx adds."""
    generated = ("_modules", "_static", "_sources", "genindex", "search", "py-modindex", "prf-prf")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    return [name for name in names if not name.startswith(generated)]


def moved(page):
    """Names of the widgets of an open page; asserts that each answers to a change of each kind of its fields."""
    changes = {
        ".hc-explorer": (("[name=lambda]", "3"), ("[name=delta]", "0.1"), ("[name=alpha]", "1.5")),
        ".ratio-slider": (("[name=ratio]", "4"), ("[name=ratio]", "0")),
        ".cost-calculator": (("[name=batch]", "3"), ("[name=steps]", "7"), ("[name=ratio]", "37"), ("[name=gpu]", "9")),
    }
    found = []
    for name, fields in changes.items():
        for box in page.locator(name).all():
            found.append(name)
            for field, value in fields:
                before = box.inner_text()
                box.locator(field).fill(value)
                assert box.inner_text() != before, f"{name} says the same after {field} = {value}"
    return found


@pytest.mark.slow
def test_a_page_of_everything_is_not_cut_and_can_be_read(browser, serve, specimen):
    address = serve(specimen)
    found = [f"{name}, {fault}" for name in pages(specimen) for fault in faults(browser, f"{address}/{name}")]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_widgets_move_and_can_be_read_from_the_start(browser, serve, specimen, scheme):
    page, complaints = opened(browser, f"{serve(specimen)}/notebooks/01_specimen.html", scheme, 390)
    assert moved(page) == [".hc-explorer", ".ratio-slider", ".cost-calculator"]
    page.add_script_tag(content=FAULTS)
    assert not page.evaluate("pageFaults", {"sizes": True, "desktop": False})
    assert not ours(complaints)
    page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_term_shows_its_definition(browser, serve, specimen, scheme):
    page, complaints = opened(browser, f"{serve(specimen)}/notebooks/01_specimen.html", scheme, 390)
    link, box = page.locator("a.glossary-term").first, page.locator("#term-definition")
    assert page.locator("a.glossary-term").count() == 1, "only the first use is a link"
    assert box.is_hidden()
    link.hover()
    assert box.is_visible() and "A number between 0 and 1." in box.inner_text()
    assert link.get_attribute("aria-describedby") == "term-definition"
    inside = box.bounding_box()
    assert inside["x"] >= 0 and inside["x"] + inside["width"] <= 390
    page.add_script_tag(content=FAULTS)
    assert not page.evaluate("pageFaults", {"sizes": True, "desktop": False})
    page.keyboard.press("Escape")
    assert box.is_hidden() and not link.get_attribute("aria-describedby")
    page.mouse.move(0, 0)
    link.focus()
    assert box.is_visible(), "the keyboard shows it"
    link.blur()
    box.wait_for(state="hidden")
    assert not ours(complaints)
    page.context.close()


@pytest.mark.slow
def test_a_tap_on_a_term_shows_it_and_a_second_one_follows_it(browser, serve, specimen):
    context = browser.new_context(has_touch=True, viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.goto(f"{serve(specimen)}/notebooks/01_specimen.html", wait_until="domcontentloaded")
    link, box = page.locator("a.glossary-term").first, page.locator("#term-definition")
    link.tap()
    assert box.is_visible() and page.url.endswith("01_specimen.html")
    page.locator("article h1").first.tap()
    assert box.is_hidden(), "a tap elsewhere closes it"
    link.tap()
    link.tap()
    page.wait_for_url("**/glossary.html#term-gate")
    context.close()


@pytest.mark.slow
def test_the_faults_are_seen(browser, serve, tmp_path):
    """The check itself, on a page with one fault of each kind."""
    (tmp_path / "bad.html").write_text("""<meta name=viewport content="width=device-width"><body class="bd-article">
    <p style="color: #999">too pale</p> <p style="width: 3000px">too wide</p>
    <div style="width: 90px; overflow: hidden"><div style="width: 400px">cut off on the right</div></div>
    <svg width="50" height="20"><text y="15" fill="#eee">pale</text></svg>
    <p style="background: #222"><span style="color: #333">dark on dark</span> <b style="color: #fff">good</b></p>
    <div style="width: 90px; overflow: auto"><pre>a line of code that is cut</pre></div>
    <table style="display: block; width: 90px; overflow: auto"><tr><td>may_be_scrolled_as_every_table</td></tr></table>
    """)
    page, _ = opened(browser, f"{serve(tmp_path)}/bad.html")
    page.add_script_tag(content=FAULTS)
    told = "\n".join(page.evaluate("pageFaults", {"sizes": True, "desktop": True}))
    for words in ("too pale", "too wide", "cut off on the right", '"pale"', "dark on dark", "a line of code"):
        assert words in told, (words, told)
    assert "good" not in told and "may_be_scrolled" not in told, told
    page.context.close()


BOOK = os.environ.get("ECODIFF_BOOK")


@pytest.fixture(scope="module")
def whole():
    if not BOOK:
        pytest.skip("ECODIFF_BOOK names no built book (the folder html of make book)")
    return Path(BOOK)


@pytest.mark.parametrize("name", pages(Path(BOOK)) if BOOK else ["index.html"])
def test_every_page_of_the_book(browser, serve, whole, name):
    found = faults(browser, f"{serve(whole)}/{name}")
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_terms_of_the_book_have_definitions(browser, serve, whole):
    address, chapters = serve(whole), [name for name in pages(whole) if name.startswith("notebooks/")]
    for name in chapters:
        page, complaints = opened(browser, f"{address}/{name}")
        links = page.locator("a[href*='glossary.html#term-']")
        assert links.count() == page.locator("a.glossary-term").count() > 0, name
        assert not ours(complaints)
        page.context.close()


@pytest.mark.slow
def test_widgets_of_the_book_move(browser, serve, whole):
    address, found = serve(whole), []
    for name in pages(whole):
        if "ecodiff-interactive" in (whole / name).read_text(encoding="utf-8"):
            page, complaints = opened(browser, f"{address}/{name}")
            found += moved(page)
            assert not ours(complaints)
            page.context.close()
    # Without recorded rows, as in the smoke profile, the slider has nothing to show.
    assert {".cost-calculator", ".hc-explorer"} <= set(found) <= {".cost-calculator", ".hc-explorer", ".ratio-slider"}


def found_first(browser, address, asked):
    """The address and the title of the first result of a search."""
    page, _ = opened(browser, f"{address}/search.html?q={asked.replace(' ', '+')}")
    first = page.locator("#search-results ul.search li > a").first
    first.wait_for()
    page.wait_for_function("!document.querySelector('#search-progress')?.textContent.includes('Searching')")
    page.wait_for_timeout(500)  # results are put into the list one by one
    answer = first.get_attribute("href"), first.inner_text()
    page.context.close()
    return answer


@pytest.mark.slow
def test_a_search_for_a_table_finds_the_section_of_its_name_first(browser, serve, specimen):
    """The other page has both words in its heading, which Sphinx alone would rank as high, and put first."""
    where, title = found_first(browser, serve(specimen), "Table 7")
    assert where.startswith("notebooks/01_specimen.html") and title.endswith("Table 7")


@pytest.mark.slow
def test_every_item_of_the_paper_is_two_clicks_from_the_landing_page(browser, serve, whole):
    address = serve(whole)
    page, _ = opened(browser, f"{address}/index.html")
    page.locator(".bd-article a[href*='item_by_item']").first.click()
    page.wait_for_url("**/*item_by_item*")
    items = page.evaluate("[...document.querySelectorAll('section h3')].map((h) => h.closest('section').id)")
    links = page.evaluate("[...document.querySelectorAll('.bd-article table a')].map((a) => a.hash.slice(1))")
    page.context.close()
    assert len(items) > 27 and not set(items) - set(links)
    for asked in ("Table 7", "Figure 9", "Algorithm 2"):
        where, _ = found_first(browser, address, asked)
        assert "item_by_item" in where, asked
