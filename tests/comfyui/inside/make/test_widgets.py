"""Widgets of the job nodes: what settings say is what nodes say; their order, which saved workflows
hold, never changes."""

import math

import pytest

import nodes as host_nodes
from ppcl_engine.settings import convert_settings, prune_settings
from ppcl_engine.settings.base_settings import from_mapping
from ppcl_engine.settings.help_texts import setting_help
from ppcl_engine.settings.ranges import Range, rules_of

COMMON = "device dtype streamed seed wait start keep_running"
WIDGETS = {
    "PruneModel": "model_file prompts target target_in quality name size most_hours device seed wait start keep_running "
    "preview_seconds",
    "RecordCalibration": "model_file samples each_picture batch empty_captions seed",
    "CalibrateFromPrompts": f"model_file prompts samples batch empty_captions steps guidance height width {COMMON} "
    "references preset",
    "Probe": "ridge train_steps learning_rate held_out device dtype streamed wait start keep_running target_tokens_only "
    "preset",
    "Detect": f"method remove longest protect samples tokens bootstrap eps max_drop {COMMON} target_tokens_only preset",
    "EditPlan": "intervals sites form",
    "DistillDepth": "rounds updates learning_rate intervals correction init loss warm_up weight_decay cache_gb "
    f"{COMMON} preview_seconds target_tokens_only quant_aware preset",
    "DistillWidth": "choose share sites form longest rounds updates learning_rate give_back warm_up cache_gb polish_steps "
    f"polish_learning_rate {COMMON} preview_seconds target_tokens_only quant_aware preset",
    "FineTune": "variant name steps learning_rate warm_up weight_decay ema data checkpointing save_every "
    f"{COMMON} preview_seconds offload optimizer_state quant_aware preset",
    "Export": "layout name variant store report_pictures device dtype streamed wait start keep_running budget_gb refit",
    "Sparsify": "file variant pattern sparsity score granularity exchange compensate permute skip name store device dtype "
    "streamed wait start keep_running preview_seconds",
    "AdaptLora": "lora variant name rank updates learning_rate warm_up device dtype streamed seed wait start "
    "keep_running preview_seconds target_tokens_only",
    "WatchJob": "run_name wait",
    "CancelJob": "run_name",
    "PrepareRun": "processes parallel",
}
SETTINGS = {
    "CalibrateFromPrompts": prune_settings.CalibrateConfig,
    "Probe": prune_settings.ProbeConfig,
    "Detect": prune_settings.DetectConfig,
    "DistillDepth": prune_settings.DistillDepthConfig,
    "DistillWidth": prune_settings.DistillWidthConfig,
    "FineTune": prune_settings.FinetuneConfig,
    "Export": convert_settings.ExportConfig,
    "Sparsify": convert_settings.SparsifyConfig,
    "AdaptLora": convert_settings.AdaptLoraConfig,
}
# the search's, which has one choice more
OTHER = {("DistillWidth", "form"): prune_settings.DetectWidthConfig}
OWN_WORDS = {
    ("AdaptLora", "lora"),
    ("DistillWidth", "sites"),
    ("CalibrateFromPrompts", "prompts"),
    ("CalibrateFromPrompts", "references"),
}
OPTIONAL = {
    ("Sparsify", "sparsity"): 0.5,
    ("Sparsify", "variant"): "",
}  # left out on the command line; here there is a value
BY_ANOTHER_NAME = {
    # 0 leaves the polish out
    ("DistillWidth", "polish_steps"): (prune_settings.PolishConfig, "steps", 0),
    ("DistillWidth", "polish_learning_rate"): (prune_settings.PolishConfig, "learning_rate", 0.0),
}
SCALARS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@pytest.fixture(scope="module")
def widgets(pack):
    """A function from a node to its widgets: name -> input."""

    def of(node: str) -> dict:
        schema = host_nodes.NODE_CLASS_MAPPINGS[f"PPCL_{node}"].GET_SCHEMA()
        return {row.id: row for row in schema.inputs if row.io_type in SCALARS}

    return of


@pytest.mark.parametrize("node", WIDGETS)
def test_the_order_of_widgets_never_changes(widgets, node):
    """Saved workflows hold values by position: append, and this line too."""
    assert list(widgets(node)) == WIDGETS[node].split()


@pytest.mark.parametrize("node", ["PruneModel", *SETTINGS])
def test_what_people_change_is_not_folded_away(widgets, node):
    """On hosts that know the mark."""
    rows, first = widgets(node), set(host_nodes.NODE_CLASS_MAPPINGS[f"PPCL_{node}"].FIRST)
    folded = {name for name, row in rows.items() if getattr(row, "advanced", None)}
    assert first and first <= rows.keys() and not folded & {*first, "wait", "start", "preset"}
    assert bool(folded) == hasattr(rows["wait"], "advanced")


def test_every_making_node_is_here(pack):
    ours = {name for name in host_nodes.NODE_CLASS_MAPPINGS if name.startswith("PPCL_")}
    loading = {
        "LoadModel",
        "Variant",
        "Info",
        "LoraReport",
        "Compare",
        "DemoCaption",
        "DemoDecode",
        "FoldModel",
    }
    assert ours == {f"PPCL_{name}" for name in {*WIDGETS, *loading}}


@pytest.mark.parametrize("node", SETTINGS)
def test_words_and_defaults_are_the_settings(widgets, node):
    count = 0
    for name, widget in widgets(node).items():
        kind = OTHER.get((node, name), SETTINGS[node])
        owner = next(
            (base for base in kind.__mro__ if name in vars(base).get("__annotations__", {})), None
        )
        if owner is None or (node, name) in OWN_WORDS:
            continue
        assert widget.tooltip == setting_help(owner, name), (node, name)
        assert widget.default == OPTIONAL.get((node, name), getattr(kind, name)), (node, name)
        count += 1
    assert count > 5


@pytest.mark.parametrize("node", SETTINGS)
def test_the_settings_take_the_widgets_values(pack, widgets, node):
    """Also at their least and at their most."""
    kind, values = SETTINGS[node], pack("widgets").values
    for bound in ("default", "min", "max"):
        given = {
            n: getattr(w, bound, None) if getattr(w, bound, None) is not None else w.default
            for n, w in widgets(node).items()
        }
        if node == "DistillWidth":
            given["form"] = "paper"
        if node == "CalibrateFromPrompts":  # the node writes its text to a file
            given["prompts"] = "prompts.txt"
        if node == "AdaptLora":
            given["lora"] = "style.safetensors"
        model = "path" if node == "Sparsify" else "model"
        from_mapping(kind, {**values(kind, given), model: "m", "run": "r"}, node)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (
            "DetectConfig",
            {"method": "cosine"},
            "method 'cosine' is not a choice; choose from ppcl, budget",
        ),
        ("DistillDepthConfig", {"learning_rate": math.nan}, "learning_rate is nan; give a number"),
        ("DistillDepthConfig", {"cache_gb": math.inf}, "cache_gb is inf; give a number"),
        (
            "DetectConfig",
            {"protect": "1 " * 100_000},
            "protect has 200,000 characters; give at most 100,000",
        ),
    ],
)
def test_values_that_no_widget_gives(pack, kind, given, message):
    """The server passes them on as they come."""
    with pytest.raises(ValueError, match=message):
        pack("widgets").values(getattr(prune_settings, kind), given)


@pytest.mark.parametrize("name", ["; rm -rf /", "cuda:0; ls", "mps0", "cuda:", "", "../cpu"])
def test_a_device_is_a_name(pack, name):
    with pytest.raises(ValueError, match="is not a device; choose auto, cpu, cuda or cuda:1"):
        pack("make.base").check_device(name)


@pytest.mark.parametrize("node", [*SETTINGS, "RecordCalibration"])
def test_bounds_are_the_settings(widgets, node):
    """What a page takes is what a run file and the command line take."""
    found = 0
    for name, widget in widgets(node).items():
        kind = OTHER.get((node, name), SETTINGS.get(node, prune_settings.CalibrateConfig))
        if (node, name) in BY_ANOTHER_NAME:
            kind, name, least = BY_ANOTHER_NAME[node, name]
            assert widget.min == least, (node, name)
        elif isinstance(rule := rules_of(kind).get(name), Range):
            assert (widget.min, widget.max) == (rule.least, rule.most), (node, name)
            found += 1
    assert found or node == "Export"


def test_steps_of_numbers_fit_their_size(widgets):
    """A learning rate of 0.00001 is not rounded away by the page, which rounds to a widget's
    step."""
    for node in WIDGETS:
        for name, widget in widgets(node).items():
            if widget.io_type == "FLOAT" and widget.default:
                assert widget.step <= widget.default / 9.9, (node, name)
                assert (
                    abs(widget.default / widget.step - round(widget.default / widget.step)) < 1e-6
                ), (node, name)
