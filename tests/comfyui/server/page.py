"""The page as a person sees it, in a real Chromium: a template is opened, its nodes are measured,
Run is pressed."""

from __future__ import annotations

import shutil
from itertools import combinations

from .conftest import Server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZE = {"width": 1920, "height": 1080}
PATIENCE = 300_000
"""Milliseconds until a page is given up: beside other work on two cores it takes long to load, and
a job longer."""
OFTEN = 200
"""Milliseconds between two looks at a page that waits for the server; at every frame it draws, they
would take the processor that the server needs."""
DESIGNS = {"canvas": False, "modern": True}
"""Nodes are drawn on a canvas, or are elements of the page ("Nodes 2.0"), and then taller."""
# a page that does not open its own list at the first start, and shows nothing over the graph
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # the words of a large graph are drawn, too
    # the view stays where a test puts it: frontend 1.32 misplaces modern nodes when it moves while they are measured
    "Comfy.EnableWorkflowViewRestore": False,
    # a page that is opened anew does not load, late, what it had before
    "Comfy.Workflow.Persist": False,
}
BANNER = "div.bg-gradient-to-r > button"
# a part of it in frontend 1.32
RUN = "button[data-testid=queue-button], [data-testid=queue-button] button"
ROOM = 10
"""At least so much is free between two nodes, in pixels: fonts differ."""

READY = "() => !!(window.app?.graph && window.LiteGraph?.registered_node_types['PPCL_Compare'])"
LOADED = "(count) => app.graph._nodes.length == count && app.graph._nodes.some(n => n.type.startsWith('PPCL_'))"
LOAD = "async (name) => app.loadGraphData(await (await fetch(`/api/workflow_templates/ComfyUI-PPCL/${name}.json`)).json())"
SHOW = """([x, y, width, height]) => {
    const { ds } = app.canvas
    ds.scale = Math.min(1780 / width, 880 / height, 1)
    ds.offset = [90 / ds.scale - x, 110 / ds.scale - y]
    app.canvas.setDirty(true, true)
}"""
MEASURE = """async (modern) => {
    const title = LiteGraph.NODE_TITLE_HEIGHT
    const element = (node) => document.querySelector(`[data-node-id="${node.id}"]`)
    const box = (node) => {
        const [width, height] = node.size
        if (!modern) return [node.pos[0], node.pos[1] - title, width, height + title]
        const found = element(node)?.getBoundingClientRect() ?? { x: 0, y: 0, width: 0, height: 0 }
        return [found.x, found.y, found.width, found.height].map(length => length / app.canvas.ds.scale)
    }
    const cut = (node) => {
        const parts = modern ? [element(node)] : (node.widgets ?? []).map(widget => widget.element).filter(e => e)
        const all = parts.flatMap(part => [part, ...part.querySelectorAll('*')]).filter(e => e.tagName != 'TEXTAREA')
        const hidden = all.filter(e => getComputedStyle(e).overflowY != 'visible' && e.scrollHeight > e.clientHeight + 2)
        return hidden.length > 0 || (!modern && node.size[1] < node.computeSize()[1])
    }
    const measured = () => app.graph._nodes.map(node => [`${node.type} ${node.id}`, ...box(node).map(Math.round)])
    let before = ''
    for (let turns = 0; ; ++turns, await new Promise(resolve => setTimeout(resolve, 250))) {
        const now = measured()
        if (String(now) == before && now.every(row => row[3] > 0)) break
        if (turns == 120) throw new Error(`nodes that are not drawn, or do not come to rest: ${now.join('; ')}`)
        before = String(now)
    }
    return { boxes: measured(), cut: app.graph._nodes.filter(cut).map(node => `${node.type} ${node.id}`) }
}"""


def new_page(server: Server, browser, design: str):
    server.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": DESIGNS[design]})
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(PATIENCE)
    open_page(page, server)
    return page


def open_page(page, server: Server) -> None:
    """Anew, if it is open: lists and boxes that it showed are gone."""
    page.goto(server.url)
    page.wait_for_function(READY)
    if (banner := page.locator(BANNER)).count():
        banner.click()


def open_list(page) -> None:
    page.get_by_role("button", name="Templates", exact=True).first.click()


def choose_template(page, name: str, workflow: dict) -> None:
    """From the template list, as a person does."""
    show(page, workflow)
    open_list(page)
    page.get_by_test_id(f"template-workflow-{name}").click()
    page.wait_for_function(LOADED, arg=len(workflow["nodes"]))


def load_template(page, name: str, workflow: dict) -> None:
    """From where the template list has it."""
    show(page, workflow)
    page.evaluate(LOAD, name)
    page.wait_for_function(LOADED, arg=len(workflow["nodes"]))


def show(page, workflow: dict) -> None:
    """Puts the view where the whole workflow is seen."""
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    # away from what explains itself under the mouse
    page.mouse.move(SIZE["width"] / 2, SIZE["height"] - 5)
    page.evaluate(SHOW, [left, top, right - left, bottom - top])


def faults_of_the_layout(page, design: str) -> list[str]:
    """Nodes that lie on one another, or nearly; nodes that do not show all that is in them."""
    measured = page.evaluate(MEASURE, DESIGNS[design])
    pairs = combinations(measured["boxes"], 2)
    return [f"{a[0]} lies on {b[0]}" for a, b in pairs if touch(a, b)] + [
        f"{name} is cut" for name in measured["cut"]
    ]


def touch(one: list, other: list) -> bool:
    """name, left, top, width, height each"""
    return all(
        one[at] < other[at] + other[at + 2] + ROOM and other[at] < one[at] + one[at + 2] + ROOM
        for at in (1, 2)
    )


def press_run(page) -> None:
    page.locator(RUN).first.click()
