"""The built site works from the file system: every page loads without a request, search finds, no page is too wide."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from docs.generate.collect import collect, pages_of
from tests.support.documents import ROOT

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WAIT_SECONDS = 20
SEARCH = "[...document.querySelectorAll('*')].map(part => part.shadowRoot).find(root => root)"
"""The part of the page that holds search, which the theme keeps in a shadow root."""
DESKTOP, PHONE = 1280, 390

needs_zensical = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="Zensical is not installed: make docs installs it"
)


def configuration() -> dict[str, Any]:
    """The contents of mkdocs.yml."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return loaded


def pages_in_navigation(entries: Any) -> Iterator[str]:
    """The files that the navigation names."""
    if isinstance(entries, str):
        yield entries
    for entry in entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ():
        yield from pages_in_navigation(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = sorted(page for page in pages_of(ROOT).values() if page.endswith(".md"))
    assert sorted(pages_in_navigation(configuration()["nav"])) == pages


def test_the_configuration_names_nothing_that_leaves_the_page() -> None:
    # Zensical skips plugins that it does not know without a message, so no other may be relied on.
    found = configuration()
    assert found["plugins"] == ["search", "offline"]
    assert found["theme"]["font"] is False
    assert found["extra"]["polyfills"] == ["assets/iframe-worker.js"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    collect(ROOT, folder / "build" / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Chrome"]:
    """A headless browser that records every request."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER))) as driver:
        yield driver


def requests_of(browser: "Chrome") -> list[str]:
    """The addresses that were requested since the last call."""
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    sent = [entry for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    return [entry["params"]["request"]["url"] for entry in sent]


def set_width(browser: "Chrome", width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@needs_zensical
@pytest.mark.end_to_end
@pytest.mark.skipif(CHROMEDRIVER is None, reason="no chromedriver on this machine: apt-get install chromium-driver")
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_every_page_loads_from_the_file_system_without_a_request(site: Path, browser: "Chrome", width: int) -> None:
    set_width(browser, width)
    requests_of(browser)
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    assert len(pages) > 25
    for page in pages:
        browser.get(page.as_uri())
        name = page.relative_to(site).as_posix()
        requested = requests_of(browser)
        assert requested, name
        assert [url for url in requested if not url.startswith(("file:", "data:", "about:", "blob:"))] == [], name
        assert browser.get_log("browser") == [], name  # type: ignore[no-untyped-call]
        wide, shown = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= shown == width, name
        if folder := os.environ.get("LORAGRID_SCREENSHOTS"):
            browser.save_screenshot(str(Path(folder) / f"site-{name.replace('/', '-')}-{width}.png"))


@needs_zensical
@pytest.mark.end_to_end
@pytest.mark.skipif(CHROMEDRIVER is None, reason="no chromedriver on this machine: apt-get install chromium-driver")
def test_search_works_from_the_file_system(site: Path, browser: "Chrome") -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    set_width(browser, DESKTOP)
    browser.get((site / "index.html").as_uri())
    requests_of(browser)
    browser.execute_script("document.querySelector('.md-search__button').click()")
    wait = WebDriverWait(browser, WAIT_SECONDS)
    wait.until(lambda _: browser.execute_script(f"return !!({SEARCH})"), "search does not open")
    browser.switch_to.active_element.send_keys("micro_batch_size")
    wait.until(
        lambda _: "training.micro_batch_size" in browser.execute_script(f"return ({SEARCH}).textContent"),
        "search finds nothing",
    )
    if folder := os.environ.get("LORAGRID_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / "site-search.png"))
    assert [url for url in requests_of(browser) if url.startswith("http")] == []
