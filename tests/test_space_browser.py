"""The page in a headless Chromium; skipped where gradio, playwright or Chromium are missing."""

import re
import shutil

import pytest
import space_prediction
from space_choice import Choice
from space_models import write_shallow


pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"), pytest.mark.slow]

PATIENCE = 120_000
"""Milliseconds that a shared machine may take."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page is served, with shallow models."""
    import app

    folder = write_shallow(tmp_path_factory.mktemp("models"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_prediction, "_listed_folder", lambda: folder)
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        page = app.build()
        yield page.queue().launch(css=app.STYLE, prevent_thread_lock=True, quiet=True)[1]
        page.close()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(browser, request):
    """A tab of a phone, in the scheme that the test asks for; fails where the page logs an error."""
    scheme = getattr(request, "param", "light")
    found = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme=scheme)
    found.set_default_timeout(PATIENCE)
    errors = []
    found.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    found.on("pageerror", lambda error: errors.append(str(error)))
    yield found
    found.close()
    assert [error for error in errors if "ERR_" not in error] == []  # fonts that need a network


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
def test_a_phone_shows_the_bars_without_scrolling_sideways(tab, address):
    tab.goto(address)
    tab.wait_for_selector(".fit .bar.chosen")
    assert tab.locator(".fit .bar").count() == 6
    assert tab.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")


def test_a_link_restores_the_choice_and_a_change_gives_another_link(tab, address):
    wanted = Choice(model="Qwen/Qwen2.5-0.5B", gpu=80.0, batch=2, method="sinkgd", seq=64)
    tab.goto(f"{address}?{wanted.query()}")
    tab.wait_for_selector(".bar.chosen:has-text('SinkGD, layer-wise')")
    sync_api.expect(tab.get_by_label("Sequences per card")).to_have_value("2")
    tab.get_by_label("Sequences per card").fill("3")
    tab.get_by_label("Sequences per card").press("Tab")
    sync_api.expect(tab.locator("#link textarea, #link input")).to_have_value(re.compile(r"^http.*[&?]batch=3&"))


@pytest.mark.parametrize("query", ["batch=-1", "gpu=7", "method=adam&seq=x"])
def test_a_link_that_cannot_be_read_says_so_in_one_line(tab, address, query):
    tab.goto(f"{address}?{query}")
    tab.wait_for_selector(".fit .error:has-text('This link cannot be read')")
