"""The page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")
PICTURES = os.environ.get("PGP_PICTURES")
"""Folder for pictures of the page, to look at."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome (Debian's package chromium)"),
]


@pytest.fixture
def run(quick_run):
    return quick_run


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def start(run):
    """Start the service as a process, and return its address."""
    processes = []

    def start(*flags, **variables):
        command = [sys.executable, "-m", "pgp", "serve", str(run), "--port", "0", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables)
        processes.append(process)
        return re.search(r"http://127\.0\.0\.1:[0-9]+", process.stdout.readline())[0]

    yield start
    for process in processes:
        process.terminate()
        assert process.wait(30) == 143
        process.stdout.close()


def opened(browser, width, scheme, address):
    """Open the page, and fail on any error in it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(address)
    return page


def look(page, name):
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def expect(page, selector, text):
    sync_api.expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_drop_predict_teach_predict_undo_reload(browser, start, red, tmp_path, width, scheme):
    name = "red <b>thing</b>"
    page = opened(browser, width, scheme, start())
    expect(page, "#summary", "10 classes learned in 5 tasks")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.set_input_files("#ask-files", [*red[:2], tmp_path / "broken.png"])
    expect(page, "#answers li:nth-child(1)", "None of these classes")
    expect(page, "#answers li:nth-child(3)", "cannot read the image broken.png")
    look(page, f"asked-{width}-{scheme}")

    page.click("#learn")
    page.fill("#name", name)
    page.click("#learn")
    expect(page, "#teach-error", "Choose photos of the class first.")
    page.set_input_files("#teach-files", red)
    expect(page, "#chosen", "5 photos chosen")
    page.click("#learn")
    expect(page, "#taught", f"Learned {name} from 5 photos in")
    expect(page, "#classes tbody tr:nth-child(1)", "4 photos")
    page.set_input_files("#ask-files", red[:1])
    expect(page, "#answers li:nth-child(1) .best", name)
    assert page.locator("b").count() == 0  # names are never markup
    look(page, f"taught-{width}-{scheme}")

    page.reload()
    expect(page, "#summary", "11 classes learned in 6 tasks")
    expect(page, "#undo", f"Undo {name}")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#undo")
    expect(page, "#taught", "The run is as it was before.")
    expect(page, "#summary", "10 classes learned in 5 tasks")
    assert page.locator("#undo").is_hidden()
    assert page.locator("#matrix tbody tr").count() == 5
    overflow = page.evaluate_handle("document.documentElement").get_property("scrollWidth").json_value()
    assert overflow <= width


def test_by_keyboard_and_with_a_token(browser, start, red):
    page = opened(browser, 800, "light", start(PGP_TOKEN="secret"))
    expect(page, "#sign-in", "This service needs a token.")
    assert page.locator("#content").is_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page, "#summary", "expected the token of this service")
    page.fill("#token", "secret")
    page.keyboard.press("Enter")
    expect(page, "#summary", "10 classes learned")
    focused = []
    for _ in range(4):
        page.keyboard.press("Tab")
        focused.append(page.locator("*:focus").get_attribute("id"))
    assert focused == ["ask-files", "name", "teach-files", "learn"]


def test_photos_are_dropped(browser, start, red):
    page = opened(browser, 800, "light", start())
    expect(page, "#summary", "10 classes")
    drop = """(zone, bytes) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
      zone.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }"""
    session = page.context.new_cdp_session(page)
    session.send("Page.setBypassCSP", {"enabled": True})  # the test's own script would be refused
    page.reload()
    expect(page, "#summary", "10 classes")
    page.locator("#ask-drop").evaluate(drop, list(red[0].read_bytes()))
    expect(page, "#answers", "dropped.png")
