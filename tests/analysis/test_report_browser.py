"""The report and the index in a real browser: Chromium without a window, driven by its own protocol over two pipes, so
without a package.

Skipped where no Chromium is installed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import write_index, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--window-size=1280,900"),
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install Debian's `chromium` to run these")


class Browser:
    """One page. Messages are JSON ended by a zero byte; Chromium reads them from its descriptor 3 and answers on 4."""

    def __init__(self, profile: Path) -> None:
        (read, self.to), (self.came, write) = os.pipe(), os.pipe()
        start = f"import os, sys; os.dup2({read}, 3); os.dup2({write}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", start, str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.buffer, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            came = os.read(self.came, 1 << 16)
            assert came, "Chromium has ended"
            self.buffer += came
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, path: Path) -> None:
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def key(self, key: str, shift: bool = False) -> None:
        """Press one key as a hand does."""
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        code = {"Enter": 13, "Tab": 9}.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=8 * shift, **typed
            )

    def click(self, place: str) -> None:
        """Click into the middle of the element that an expression gives."""
        box = self.run(
            "(element => { element.scrollIntoView({block: 'center'}); return element.getBoundingClientRect().toJSON() "
            f"}})({place})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent",
                **{
                    "type": kind,
                    "x": box["x"] + box["width"] / 2,
                    "y": box["y"] + box["height"] / 2,
                    "button": "left",
                    "clickCount": 1,
                },
            )

    def close(self) -> None:
        self.session = ""
        self.send("Browser.close")
        self.process.wait(20)
        os.close(self.to)
        os.close(self.came)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(troubled_study: Path) -> Path:
    return write_report(troubled_study)


@pytest.fixture
def page(browser: Browser, report: Path) -> Browser:
    """The report, freshly opened."""
    browser.open(report)
    return browser


HEAD = "[...document.querySelectorAll('#all th')].find(head => head.textContent.startsWith('val loss'))"
LOSSES = (
    f"[...document.querySelectorAll('#all tbody tr')].map(row => row.cells[{HEAD}.cellIndex].textContent).filter(text "
    "=> text)"
)
SHOWN = "[...document.querySelectorAll('#all tbody tr')].filter(row => row.offsetParent).length"
FOUND = "document.getElementById('found').textContent"


def test_the_page_asks_for_nothing_and_logs_no_error(page: Browser) -> None:
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert all(address.startswith(("file:", "data:")) for address in asked)
    assert sum(address.startswith("file:") for address in asked) == 1  # the page itself
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    noise = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
    assert [event for event in page.events if event["method"] in noise] == []


def test_a_click_sorts_and_a_second_one_turns_the_order(page: Browser) -> None:
    states = []
    for _ in range(2):
        page.click(f"{HEAD}.querySelector('button')")
        states.append((page.run(f"{HEAD}.getAttribute('aria-sort')"), [float(text) for text in page.run(LOSSES)]))
    (rising, up), (falling, down) = states
    assert (rising, falling) == ("ascending", "descending")
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert page.run("[...document.querySelectorAll('#all th')].filter(head => head.ariaSort !== 'none').length") == 1
    assert page.run(FOUND) == "18 of 18 trials, by val loss (nats/token), falling"


def test_the_keyboard_alone_reaches_filter_and_headings_and_sees_its_focus(page: Browser) -> None:
    page.run("document.getElementById('text').focus()")
    reached = []
    for _ in range(30):
        page.key("Tab")
        reached.append(page.run("document.activeElement.textContent"))
        assert (
            page.run(
                "document.activeElement.tagName === 'SELECT' || getComputedStyle(document.activeElement).outlineStyle"
            )
            != "none"
        )
        if reached[-1].startswith("val loss"):
            break
    assert reached[0].startswith("any")  # the choice of the status comes next
    assert reached[-1].startswith("val loss")
    page.key("Enter")
    losses = [float(text) for text in page.run(LOSSES)]
    assert losses == sorted(losses)
    page.key("Tab", shift=True)
    assert not page.run("document.activeElement.textContent").startswith("val loss")


def test_words_and_status_filter_with_a_live_count(page: Browser) -> None:
    assert page.run("document.getElementById('text').labels[0].textContent").strip().startswith("Filter")
    page.click("document.getElementById('text')")
    for letter in "diverged":
        page.key(letter)
    assert (page.run(SHOWN), page.run(FOUND)) == (1, "1 of 18 trials")
    assert page.run("document.getElementById('found').tagName") == "OUTPUT"  # which screen readers announce
    page.run("text.value = ''; text.dispatchEvent(new Event('input'))")
    page.run("document.getElementById('status').value = 'finished'; status.dispatchEvent(new Event('change'))")
    assert page.run(SHOWN) == 15
    page.click(f"{HEAD}.querySelector('button')")
    assert page.run(FOUND) == "15 of 18 trials, by val loss (nats/token), rising"


def test_without_scripts_every_trial_is_there_and_no_dead_control(browser: Browser, report: Path) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report)
        text = browser.send("DOM.getOuterHTML", nodeId=browser.send("DOM.getDocument", depth=-1)["root"]["nodeId"])[
            "outerHTML"
        ]
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert text.count("<tr data-status=") == 18
    assert '<div id="controls" class="soft" hidden' in text
    assert "<button" not in text


@pytest.mark.parametrize("width", [360, 1280])
def test_no_width_makes_the_page_itself_scroll_sideways(page: Browser, width: int) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    try:
        assert page.run("innerWidth") == width
        assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")


def test_the_index_asks_for_nothing_fits_a_phone_and_leads_to_the_report(browser: Browser, report: Path) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=False)
    try:
        browser.open(write_index([report.parent]))
        assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        asked = [
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert sum(not address.startswith("data:") for address in asked) == 1
        assert browser.run("document.querySelector('h2 a').href") == report.as_uri()
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")


def test_text_stands_out_from_its_ground_by_the_ratio_that_wcag_asks(page: Browser) -> None:
    """At least 4.5 (WCAG 2.2, 1.4.3 level AA), for every element that holds text."""
    least = page.run(
        """(() => {
          const parse = text => text.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
            .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
          const opaque = colour => colour.length < 4 || colour[3] > 0;
          const ground = element => {
            const own = parse(getComputedStyle(element).backgroundColor);
            return opaque(own) ? own : element.parentElement ? ground(element.parentElement) : [255, 255, 255];
          };
          const text = node => node.nodeType === 3 && node.textContent.trim();
          return Math.min(...[...document.body.querySelectorAll("*")]
            .filter(each => each.offsetParent && [...each.childNodes].some(text))
            .map(each => { const [a, b] = [light(parse(getComputedStyle(each).color)), light(ground(each))];
              return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
        })()"""
    )
    assert least >= 4.5


def test_printing_gives_every_section(page: Browser) -> None:
    headings = page.run("[...document.querySelectorAll('h1, h2')].map(head => head.textContent)")
    assert len(headings) == 8
    printed = page.send("Page.printToPDF", preferCSSPageSize=True, generateDocumentOutline=True, generateTaggedPDF=True)
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF")
    for heading in headings:
        assert b"(" + heading.encode() + b")" in pdf, heading
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", "-", "-"], input=pdf, capture_output=True, check=True).stdout.decode()
        for part in ("All 18 trials", "00000000000b", "Environment", "What this cannot tell", "Settings as written"):
            assert part in text
