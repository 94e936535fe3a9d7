"""A person's path: the page, the template list, the demo, Run, the comparison. In a real Chromium, where there is one.

The screenshot stays in pytest's folder: `--basetemp DIR` says where.
"""

import re
import shutil

import pytest

from .graphs import QUICK

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZE = {"width": 1920, "height": 1080}
SETTINGS = {  # a page that does not open its own list at the first start, and shows nothing over the graph
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
BANNER = "div.bg-gradient-to-r > button"
READY = "() => !!(window.app?.graph && window.LiteGraph?.registered_node_types['PPCL_Compare'])"
LOADED = "() => app.graph._nodes.some(n => n.type == 'PPCL_Compare')"
DRAWN = """() => app.graph._nodes.filter(
    n => ['PPCL_Compare', 'PPCL_Info'].includes(n.type) && n.imgs?.[0]?.naturalWidth > 300).length == 2"""
FIT = "() => { app.canvas.ds.scale = 0.92; app.canvas.ds.offset = [62, 112]; app.canvas.setDirty(true, true) }"
MISTAKE = "() => { app.graph._nodes.find(n => n.type == 'PPCL_DemoCaption').widgets[0].value = 'a red lion' }"
SET = """(settings) => { for (const node of app.graph._nodes)
    for (const widget of node.widgets ?? []) if (widget.name in (settings[node.type] ?? {})) {
        widget.value = settings[node.type][widget.name] } }"""
ADVANCED = "() => app.graph._nodes.find(n => n.type == 'PPCL_DistillWidth').progress > 0"
MADE = """() => app.graph._nodes.filter(n => n.type.startsWith('PPCL_') && n.imgs?.[0]?.naturalWidth > 300)
    .map(n => n.type).sort().join(' ')"""
SECONDS = 1000  # milliseconds


@pytest.fixture(scope="module")
def page():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the browser test is left out (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser.new_page(viewport=SIZE)
        browser.close()


def open_template(page, server, name: str) -> None:
    """From the template list, as a person does."""
    server.post("/settings", SETTINGS)
    page.goto(server.url)
    page.wait_for_function(READY, timeout=60 * SECONDS)
    if (banner := page.locator(BANNER)).count():
        banner.click()
    page.get_by_text("Templates", exact=True).first.click()
    page.get_by_test_id(f"template-workflow-{name}").click(timeout=30 * SECONDS)
    page.wait_for_function(LOADED, timeout=30 * SECONDS)


def press_run(page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def test_template_run_picture(server, page, tmp_path):
    server.post("/free", {"unload_models": True, "free_memory": True})  # nothing of an earlier test is shown
    open_template(page, server, "ppcl-demo-three-sizes")
    assert page.evaluate(DRAWN) is False
    press_run(page)
    page.wait_for_function(DRAWN, timeout=120 * SECONDS)
    page.evaluate(FIT)
    page.wait_for_timeout(2 * SECONDS)
    page.screenshot(path=tmp_path / "comfyui.png")


def test_a_mistake_is_shown_in_the_error_box(server, page):
    page.evaluate(MISTAKE)
    press_run(page)
    page.get_by_text("this model does not know the word 'lion'").first.wait_for(timeout=30 * SECONDS)


def test_a_model_is_made_in_the_page(server, made, page, tmp_path):
    """Calibration to depth are there already (`made`); width is trained while the page looks."""
    open_template(page, server, "ppcl-demo-make-your-own")
    width = {**QUICK["PPCL_DistillWidth"], "updates": 3, "polish_steps": 30, "preview_seconds": 1}
    page.evaluate(SET, {**QUICK, "PPCL_DistillWidth": width})
    press_run(page)
    page.wait_for_function(ADVANCED, timeout=600 * SECONDS)
    page.get_by_text(re.compile(r"(distill-width|polish) \d+ of \d+")).first.wait_for(timeout=60 * SECONDS)
    page.screenshot(path=tmp_path / "training.png")
    names = "Compare Detect DistillDepth DistillWidth Export Probe"
    shown = " ".join(f"PPCL_{name}" for name in names.split())
    page.wait_for_function(f"() => ({MADE})() == '{shown}'", timeout=600 * SECONDS)
    page.screenshot(path=tmp_path / "made.png")
