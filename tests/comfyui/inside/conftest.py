"""A real ComfyUI in this process, with this repository loaded as it loads custom nodes; tiny models
as its files."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shared.output import machine, versions
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.atomic import write_json

from ...tiny.trained_run import write_parts
from .cases import CASES, Case

ROOT = Path(__file__).resolve().parents[3]

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.ldm.lumina.model as host_lumina  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfyui_version  # noqa: E402
import folder_paths  # noqa: E402

import nodes as host_nodes  # noqa: E402

from .forwards import (  # noqa: E402, F401
    as_loaded,
    drawn,
    engine_velocity,
    inputs,
    opened,
    references,
    velocity,
)

torch.set_num_threads(1)
BOUND = 0.5  # of a folded random model of width 32, whose embedding has no low rank
FIGURES = "COMFYUI=.hosts/0.3.75/ComfyUI .hosts/0.3.75/venv/bin/python tests/comfyui/launch.py -m pytest tests/comfyui/inside --figures {path}"


def pytest_addoption(parser):
    parser.addoption("--figures", type=Path, help="write what was measured into this JSON file")


@pytest.fixture(scope="session")
def figures(request):
    """name -> what a test measured; of several, the largest."""
    measured: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        measured[name] = max(value, measured.get(name, value))

    yield note
    if path := request.config.getoption("--figures"):
        about = {
            "machine": machine(),
            "versions": {**versions(), "comfyui": comfyui_version.__version__},
        }
        write_json(path, {**measured, **about, "command": FIGURES.format(path=path)})


@pytest.fixture(scope="session", autouse=True)
def narrow_time_embedder():
    """The host's Z-Image computes its conditioning in 1024 and 256 channels, which its own models
    have; a tiny one has its own width instead of the 256."""
    stock = host_lumina.TimestepEmbedder

    def make(width: int, output_size: int | None = None, **options):
        return stock(1024, output_size=min(width, output_size or width), **options)

    host_lumina.TimestepEmbedder = make
    yield
    host_lumina.TimestepEmbedder = stock


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> SimpleNamespace:
    """Empty folders in place of the host's models/..., by their names there."""
    root = tmp_path_factory.mktemp("models")
    folder_paths.models_dir = str(root)
    folders = {}
    for name in ("diffusion_models", "loras", "controlnet", "ppcl"):
        (root / name).mkdir()
        folders[name] = root / name
        if name != "ppcl":  # the pack registers its own
            folder_paths.folder_names_and_paths[name] = ([str(root / name)], {".safetensors"})
    return SimpleNamespace(**folders)


@pytest.fixture(scope="session")
def pack(models, figures):
    """`pack("use.load_model")` is the module nodes/use/load_model.py of the pack as the host
    imported it."""
    path, start = str(ROOT), time.perf_counter()
    assert asyncio.run(host_nodes.load_custom_node(path, module_parent="custom_nodes"))
    figures("start_seconds", time.perf_counter() - start)
    for extra in ("model_advanced", "model_merging", "slg", "custom_sampler", "edit_model", "flux"):
        file = str(Path(host_nodes.__file__).parent / "comfy_extras" / f"nodes_{extra}.py")
        assert asyncio.run(host_nodes.load_custom_node(file, module_parent="comfy_extras"))
    name = path.replace(".", "_x_")
    assert "PPCL_LoadModel" in host_nodes.NODE_CLASS_MAPPINGS
    return lambda module: importlib.import_module(f"{name}.nodes.{module}")


@pytest.fixture(scope="session")
def run_node(pack):
    """Calls a node of the host's registry as its executor does; gives its outputs."""

    def run(node_id: str, **widgets):
        node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
        with torch.inference_mode():
            if hasattr(node, "define_schema"):
                return node.execute(**widgets).args
            return getattr(node(), node.FUNCTION)(**widgets)

    return run


@pytest.fixture(scope="session")
def empty_host_model(pack):
    """Makes the host's model for a file's tensors, without weights (tensors on the meta device will
    do): it has a parameter for each of them."""
    entries = pack("host.entries")

    def make(host, tensors: dict):
        detected = comfy.model_detection.detect_unet_config(dict(tensors), "")
        # what the host's own class says, whether or not it could load the file by itself
        config = next(
            c
            for c in entries.config_classes(host)
            if super(entries.PrunedConfig, c).matches(detected)
        )(detected)
        config.set_inference_dtype(torch.bfloat16, None)
        return config.get_model(tensors, "", device=torch.device("meta")).diffusion_model

    return make


@pytest.fixture(scope="session")
def host_case(request, architecture) -> Case:
    """The case of the architecture, or the one that a test module names by parametrizing this
    fixture."""
    return CASES[getattr(request, "param", architecture.name)]


@pytest.fixture(scope="session")
def teacher(models, make_model, save_model, host_case) -> Path:
    """The tiny random teacher, with latents of 16 channels as the host's."""
    return save_model(
        models.diffusion_models / f"{host_case.file}.safetensors", make_model(**host_case.channels)
    )


@pytest.fixture(scope="session")
def host_tensors(teacher) -> dict[str, torch.Tensor]:
    """The teacher by the host's names, as its single files are."""
    weights = Weights(teacher)
    sources = {k: Source(weights.shape(k), lambda k=k: weights.read(k)) for k in weights.keys()}
    return {
        name: source.read()
        for name, source in comfyui_sources(weights.architecture, sources).items()
    }


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, teacher, host_case) -> Path:
    """Students with and without a correction, text and FFN projections of both forms: random,
    nothing is trained."""
    folder = tmp_path_factory.mktemp("run")
    write_parts(Run(folder), teacher, parts=host_case.parts)
    return folder


@pytest.fixture(scope="session")
def exported(teacher, run_folder):
    def make(folder: Path, layout: str, name: str, variant: str | None = None) -> Path:
        config = {"variant": variant} if variant else {}
        path = export(
            ExportConfig(
                model=teacher, run=run_folder, layout=layout, name=name, store="float32", **config
            )
        )
        return path.replace(folder / path.name)

    return make


@pytest.fixture(scope="session")
def bundle(models, exported, host_case) -> Path:
    return exported(
        models.ppcl, "bundle", "tiny" if host_case.file == "teacher" else f"tiny_{host_case.file}"
    )


@pytest.fixture
def saved(models, run_node, monkeypatch):
    """The file that a Save node of the host writes of a MODEL, among its models while the test
    lasts."""
    folder = models.diffusion_models
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    there = set(folder.iterdir())

    def save(model, node: str = "ModelSave", **more) -> Path:
        before = set(folder.iterdir())
        run_node(node, model=model, filename_prefix="saved", **more)
        (path,) = set(folder.iterdir()) - before
        return path

    yield save
    for path in set(folder.iterdir()) - there:
        path.unlink()


@pytest.fixture(scope="session")
def load(run_node):
    """PPCL_LoadModel with its widgets' defaults; gives the MODEL alone."""
    defaults = {
        "base": "none",
        "variant": "smallest",
        "switchable": True,
        "weight_dtype": "fp32",
        "preset": "auto",
        "intervals": "",
        "legacy_text": False,
    }
    return lambda file, **widgets: run_node("PPCL_LoadModel", file=file, **{**defaults, **widgets})[
        0
    ]


@pytest.fixture(scope="session")
def switched(run_node):
    """PPCL_Variant with its widgets' defaults; gives the MODEL alone."""
    defaults = {"variant": "as it is", "size": 0.6, "on": "", "off": ""}
    return lambda model, **widgets: run_node(
        "PPCL_Variant", model=model, **{**defaults, **widgets}
    )[0]


@pytest.fixture(scope="module")
def loose_bound(pack):
    """A random model keeps no useful bound."""
    module = pack("loading.fold_on_load")
    old, module.BOUND = module.BOUND, BOUND
    yield
    module.BOUND = old


@pytest.fixture(scope="module")
def whole(load, bundle, teacher):
    """The bundle with its base: switchable, nothing folded."""
    return load(bundle.name, base=teacher.name)


@pytest.fixture(scope="module")
def of_form(load, bundle, teacher, loose_bound):
    """The same, folded, loaded once."""
    return cache(lambda form: load(bundle.name, base=teacher.name, fold=form))


def fp8_in(layer) -> tuple[torch.Tensor, float]:
    """(what is stored, its scale) of a scaled fp8 layer: beside the weight in older hosts, in it in
    newer ones."""
    if hasattr(layer, "scale_weight"):
        return layer.weight, float(layer.scale_weight)
    stored, scale = (getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0])
    return stored, float(scale)


def copy_of(model):
    """A MODEL with weights of its own, as the host and packs for several GPUs make it."""
    if "force_deepcopy" in inspect.signature(model.clone).parameters:
        return model.clone(force_deepcopy=True)
    new = model.clone()
    new.model = copy.deepcopy(model.model)
    return new
