"""The whole book at smoke size: built by the command line, then every page opened in headless Chromium."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

import kvrepro
from kvrepro.book import Project
from kvrepro.book.site import outside_references, toc_files
from kvrepro.book.stamps import Stamp
from kvrepro.doctor import find_browser

ROOT = Path(__file__).resolve().parents[1]
PAGES = toc_files(Project(ROOT))
WRITTEN = ("results", "published", "_generated", "status.md", "compare.md")
GENERATED = shutil.ignore_patterns(*WRITTEN, "__pycache__", ".ipynb_checkpoints")
LOCAL_SCHEMES = ("data", "blob", "about", "file")
BROWSER_SCHEMES = ("chrome", "chrome-untrusted", "chrome-extension", "devtools")
_HUNG_S = 3000  # a build takes six minutes beside the other tests, and several times that on a busy machine


@dataclass(frozen=True)
class Smoke:
    """The book built at smoke size in a copy of the checkout, and what the build said."""

    project: Project
    environment: dict[str, str]
    first: subprocess.CompletedProcess[str]

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``kvrepro build`` again."""
        return _build(self.environment, *arguments)


def _build(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvrepro", "build", "--profile", "smoke", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_HUNG_S, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    root = tmp_path_factory.mktemp("checkout").resolve()
    for folder in ("notebooks", "book"):
        shutil.copytree(ROOT / folder, root / folder, ignore=GENERATED)
    shutil.copytree(ROOT / "results" / "published", root / "results" / "published")
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, root)
    environment = {
        **os.environ,
        "KVREPRO_ROOT": str(root),
        "KVREPRO_RESULTS": str(root / "results" / "local"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    first = _build(environment)
    print(first.stderr)  # shown when a test fails
    return Smoke(Project(root), environment, first)


def test_smoke_build_goes_through(smoke: Smoke) -> None:
    assert smoke.first.returncode == 0, smoke.first.stdout + smoke.first.stderr
    assert smoke.first.stdout.splitlines()[-1] == f"open {smoke.project.front.as_uri()}"
    assert smoke.project.front.is_file()


def test_every_notebook_ran_without_error(smoke: Smoke) -> None:
    for notebook in smoke.project.notebooks():
        stamp = Stamp.read(notebook.stamp)
        assert stamp is not None, f"{notebook.name} was not run"
        assert not stamp.failure, f"{notebook.name}: {stamp.failure}"
        assert set(stamp.statuses) <= {"ok", "skipped"}, f"{notebook.name}: {dict(stamp.statuses)}"
        text = notebook.page.read_text(encoding="utf-8")
        assert str(smoke.project.root) not in text, f"{notebook.name} shows an absolute path"


def test_second_build_does_nothing(smoke: Smoke) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.project.root.rglob("*") if path.is_file()}
    again = smoke.build()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "up to date" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in smoke.project.root.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"build.lock"}


def test_working_tree_stays_clean(smoke: Smoke) -> None:
    assert not (ROOT / "book" / "results" / "smoke").exists()
    for notebook in Project(ROOT).notebooks():
        assert not any(cell.get("outputs") for cell in json.loads(notebook.source.read_text())["cells"]), notebook.name


def test_site_names_no_outside_resource(smoke: Smoke) -> None:
    assert outside_references(smoke.project.html) == []


def test_site_has_every_page_and_no_warning(smoke: Smoke) -> None:
    missing = [page for page in PAGES if not (smoke.project.html / f"{page}.html").is_file()]
    assert missing == []
    log = (smoke.project.work / "jupyter-book.log").read_text(encoding="utf-8")
    assert "WARNING" not in log


def test_public_names_are_documented(smoke: Smoke) -> None:
    page = (smoke.project.html / "book" / "api.html").read_text(encoding="utf-8")
    known = {f"kvrepro.{name}" for name in kvrepro.__all__} - {"kvrepro.methods", "kvrepro.__version__"}
    known |= {f"kvrepro.methods.{name}" for name in ("names", "describe", "create", "register")}
    assert not {name for name in known if f'id="{name}"' not in page}


def test_every_result_offers_its_records(smoke: Smoke) -> None:
    for notebook in smoke.project.notebooks():
        page = smoke.project.html / "book" / "results" / f"{notebook.name}.html"
        text = page.read_text(encoding="utf-8")
        assert f"{Path(notebook.name).name}.ipynb" in text
        if notebook.records.is_file():
            assert f"{notebook.records.name}" in text


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line of log for each."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(smoke: Smoke) -> Iterator[str]:
    """Address of the built site on this machine."""
    handler = functools.partial(_Quiet, directory=str(smoke.project.html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One headless Chromium for all pages, which logs its console and its network."""
    program, driver = find_browser(), shutil.which("chromedriver")
    if not program or not driver:
        message = "no Chromium with chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    options = Options()
    options.binary_location = program
    switches = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run disable-sync"
    switches += " disable-background-networking disable-component-update disable-default-apps window-size=1280,1000"
    for switch in switches.split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    chrome.set_page_load_timeout(60)
    yield chrome
    chrome.quit()


def open_page(browser: webdriver.Chrome, url: str) -> None:
    """Open a page and wait until it is drawn, formulas included."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what came before is not of this page
    browser.get(url)
    wait = WebDriverWait(browser, 60)
    wait.until(lambda b: b.execute_script("return document.readyState") == "complete")
    if browser.execute_script("return document.querySelector('script[src*=mathjax]') !== null"):
        ready = "const done = arguments[0]; MathJax.startup.promise.then(() => done(true), () => done(false));"
        assert browser.execute_async_script(ready), "MathJax did not start"


def requests(browser: webdriver.Chrome) -> list[str]:
    """Addresses that the page asked for, without those of the browser's own pages: its new tab is slow to close."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in sent if urlsplit(one["documentURL"]).scheme not in BROWSER_SCHEMES]


def outside(urls: list[str]) -> list[str]:
    """Those addresses that are not on this machine."""
    here = [urlsplit(url) for url in urls]
    return [
        url.geturl()
        for url in here
        if url.scheme not in LOCAL_SCHEMES and url.hostname not in ("127.0.0.1", "localhost")
    ]


BROKEN_IMAGES = """
const shown = 'article img, article object, article .cell_output svg, .navbar-brand img';
return Array.from(document.querySelectorAll(shown)).filter(item => {
  const box = item.getBoundingClientRect();
  const natural = item.tagName === 'IMG' ? item.complete && item.naturalWidth > 0 && item.naturalHeight > 0 : true;
  const hidden = getComputedStyle(item).display === 'none' || item.closest('details:not([open])') !== null
    || item.closest('button, .headerlink, mjx-container, .tocsection') !== null;
  return !hidden && !(natural && box.width > 0 && box.height > 0);
}).map(item => item.outerHTML.slice(0, 120));
"""
RAW_FORMULAS = r"""
const article = document.querySelector('article').cloneNode(true);
article.querySelectorAll('pre, code, mjx-container, script, .highlight').forEach(item => item.remove());
return (article.textContent.match(/\$\$|\\\(|\\\[|\\begin\{/g) || []).length;
"""
FORMULAS = """
return [document.querySelectorAll('.math').length, document.querySelectorAll('.math mjx-container').length,
        document.querySelectorAll('mjx-merror').length];
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth;"


@pytest.mark.parametrize("page", PAGES)
def test_page_in_chromium(browser: webdriver.Chrome, address: str, page: str) -> None:
    browser.set_window_size(1280, 1000)
    open_page(browser, f"{address}/{page}.html")
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    asked = requests(browser)
    assert asked, "the network log is empty"
    assert outside(asked) == []
    assert browser.execute_script("return document.querySelector('h1') !== null")
    assert browser.execute_script(BROKEN_IMAGES) == []
    assert browser.execute_script(RAW_FORMULAS) == 0
    sources, drawn, wrong = browser.execute_script(FORMULAS)
    assert (sources > 0) == (drawn > 0)
    assert wrong == 0
    assert browser.execute_script(OVERFLOW) <= 0, "the page scrolls sideways"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("book/results/")])
def test_result_shows_something_measured(browser: webdriver.Chrome, address: str, page: str) -> None:
    open_page(browser, f"{address}/{page}.html")
    count = "return document.querySelectorAll('article img, article table').length"
    assert browser.execute_script(count) > 0, "neither a figure nor a table"
    failed = "return document.querySelectorAll('article .admonition.danger').length"
    assert browser.execute_script(failed) == 0, "the page says that something failed"


def test_front_page_opens_from_disk(browser: webdriver.Chrome, smoke: Smoke) -> None:
    open_page(browser, smoke.project.front.as_uri())
    wait = WebDriverWait(browser, 30)
    wait.until(lambda b: b.execute_script("return document.querySelector('article h1') !== null"))
    assert outside(requests(browser)) == []
    assert browser.execute_script(BROKEN_IMAGES) == []


def test_narrow_page_does_not_scroll_sideways(browser: webdriver.Chrome, address: str) -> None:
    browser.set_window_size(500, 900)
    for page in PAGES:
        open_page(browser, f"{address}/{page}.html")
        assert browser.execute_script(OVERFLOW) <= 0, page
