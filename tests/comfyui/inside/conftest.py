"""A real ComfyUI in this process, with this repository loaded as it loads custom nodes; tiny models
as its files."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shared.output import machine, versions
from ppcl_engine.architectures import REFERENCES
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.atomic import write_json

from ...tiny.flux1_parts import FLUX_DEPTH, FLUX_PARTS
from ...tiny.sd35_parts import SD35_PARTS, SD35_SIZES
from ...tiny.trained_run import Parts, write_parts

ROOT = Path(__file__).resolve().parents[3]

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.latent_formats  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfyui_version  # noqa: E402
import folder_paths  # noqa: E402

import nodes as host_nodes  # noqa: E402

torch.set_num_threads(1)
BOUND = 0.5  # of a folded random model of width 32, whose embedding has no low rank
FIGURES = "COMFYUI=.hosts/0.3.75/ComfyUI .hosts/0.3.75/venv/bin/python tests/comfyui/launch.py -m pytest tests/comfyui/inside --figures {path}"


def pytest_addoption(parser):
    parser.addoption("--figures", type=Path, help="write what was measured into this JSON file")


@pytest.fixture(scope="session")
def figures(request):
    """name -> what a test measured; of several, the largest."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = max(value, found.get(name, value))

    yield note
    if path := request.config.getoption("--figures"):
        about = {
            "machine": machine(),
            "versions": {**versions(), "comfyui": comfyui_version.__version__},
        }
        write_json(path, {**found, **about, "command": FIGURES.format(path=path)})


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> SimpleNamespace:
    """Empty folders in place of the host's models/..., by their names there."""
    root = tmp_path_factory.mktemp("models")
    folder_paths.models_dir = str(root)
    found = {}
    for name in ("diffusion_models", "loras", "controlnet", "ppcl"):
        (root / name).mkdir()
        found[name] = root / name
        if name != "ppcl":  # the pack registers its own
            folder_paths.folder_names_and_paths[name] = ([str(root / name)], {".safetensors"})
    return SimpleNamespace(**found)


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

    def run(node_id: str, **inputs):
        node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
        with torch.inference_mode():
            if hasattr(node, "define_schema"):
                return node.execute(**inputs).args
            return getattr(node(), node.FUNCTION)(**inputs)

    return run


@pytest.fixture(scope="session")
def empty_host_model(pack):
    """Of a file's tensors, on the meta device too: the host's model without weights, where each of
    them has a home."""
    entries = pack("host.entries")

    def make(host, tensors: dict):
        found = comfy.model_detection.detect_unet_config(dict(tensors), "")
        # what the host's own class says, whether or not it could load the file by itself
        config = next(
            c for c in entries.config_classes(host) if super(entries.PrunedConfig, c).matches(found)
        )(found)
        config.set_inference_dtype(torch.bfloat16, None)
        return config.get_model(tensors, "", device=torch.device("meta")).diffusion_model

    return make


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the tests of an architecture run on. file: of its teacher; channels: settings of its
    tiny model, for latents of the host; frames: whether a latent has a frame; parts: of its plan;
    pooled, guidance: of its conditioning."""

    architecture: str
    file: str
    channels: dict[str, int | list[int]]
    frames: bool = False
    parts: Parts = field(default_factory=Parts)
    pooled: int | None = None
    guidance: float | None = None


# 64 in all: some formats want no less
WIDE = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
CASES = {
    "qwen_image": Case(
        architecture="qwen_image",
        file="teacher",
        channels={"in_channels": 64, "out_channels": 16},
        frames=True,
    ),
    "flux1": Case(
        architecture="flux1",
        file="flux",
        channels={"in_channels": 64, **FLUX_DEPTH},
        parts=FLUX_PARTS,
        pooled=20,
        guidance=3.5,
    ),
    "qwen_image_wide": Case(
        architecture="qwen_image",
        file="wide",
        channels={"in_channels": 64, "out_channels": 16, **WIDE},
        frames=True,
    ),
    "flux1_wide": Case(
        architecture="flux1",
        file="flux_wide",
        channels={"in_channels": 64, **FLUX_DEPTH, **WIDE},
        parts=FLUX_PARTS,
        pooled=20,
        guidance=3.5,
    ),
    "sd35": Case(
        architecture="sd35", file="sd35", channels=SD35_SIZES, parts=SD35_PARTS, pooled=20
    ),
    "sd35_large": Case(
        architecture="sd35",
        file="sd35_large",
        channels=SD35_SIZES | {"dual_attention_layers": []},
        parts=SD35_PARTS,
        pooled=20,
    ),
}


# sizes of an edit model's reference latents
EDITS = {"text alone": (), "references": ((8, 12), (4, 8))}
edits = pytest.mark.parametrize("references", EDITS.values(), ids=EDITS, indirect=True)


@pytest.fixture(scope="session")
def host_case(request, architecture) -> Case:
    """Of the architecture, or the one that a test module names by parametrizing this fixture."""
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


@pytest.fixture(scope="module")
def references(request) -> tuple[tuple[int, int], ...]:
    """None, or what a test names by `edits`."""
    return getattr(request, "param", ())


@pytest.fixture(scope="module")
def inputs(host_case, architecture, references) -> SimpleNamespace:
    """One forward that host and engine compute alike: batch 1, unpadded text, even grid. more: what
    the host's conditioning has beside the text; captions: the same for the engine; grid: of all
    pictures."""
    generator = torch.Generator().manual_seed(5)
    latents, text = (
        torch.randn(1, 16, 1, 8, 12, generator=generator),
        torch.randn(1, 7, 24, generator=generator),
    )
    more, captions = {}, {"encoder_hidden_states": text}
    if host_case.pooled:
        more["pooled_output"] = captions["pooled_projections"] = torch.randn(
            1, host_case.pooled, generator=generator
        )
    if host_case.guidance:
        more["guidance"], captions["guidance"] = (
            host_case.guidance,
            torch.tensor([host_case.guidance]),
        )
    latents = latents if host_case.frames else latents[:, :, 0]
    pictures = [torch.randn(1, 16, 1, *size, generator=generator) for size in references]
    if pictures:
        more["reference_latents"] = [
            comfy.latent_formats.Wan21().process_out(picture) for picture in pictures
        ]
        captions[REFERENCES] = torch.cat(
            [architecture.pack(flat(picture)) for picture in pictures], dim=1
        )
    grid = torch.cat([architecture.grid(picture) for picture in (latents, *pictures)])
    return SimpleNamespace(
        latents=latents, text=text, sigma=0.7, more=more, captions=captions, grid=grid
    )


@pytest.fixture(scope="module")
def velocity(inputs):
    """One forward of a MODEL by the host's own way of sampling: loaded, patched, wrapped."""

    def run(model, positive=None, cfg: float = 1.0) -> torch.Tensor:
        found = []

        def once(wrapped, x, sigmas, extra_args=None, callback=None, disable=None):
            denoised = wrapped(inputs.latents, torch.full((1,), inputs.sigma), **(extra_args or {}))
            found.append((inputs.latents - denoised) / inputs.sigma)
            return x

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(
            positive or [[inputs.text, inputs.more]], [[inputs.text[:, ::2], inputs.more]]
        )
        guider.set_cfg(cfg)
        empty = torch.zeros_like(inputs.latents)
        with torch.inference_mode():
            guider.sample(
                torch.zeros_like(empty),
                empty,
                comfy.samplers.KSAMPLER(once),
                torch.tensor([1.0, 0.0]),
            )
        return flat(found[0]).clone()

    return run


@pytest.fixture
def as_loaded(monkeypatch):
    """Meanwhile sampling loads nothing more: weights stay off the device, and are cast and patched
    when they are used."""

    @contextmanager
    def stay():
        with monkeypatch.context() as patch:
            patch.setattr(
                comfy.model_management, "load_models_gpu", lambda *arguments, **named: None
            )
            yield

    return stay


@pytest.fixture(scope="module")
def engine_velocity(inputs, architecture):
    """The same forward by the engine."""

    def run(path: Path, *arguments, **options) -> torch.Tensor:
        model = open_model(path, *arguments, **options)
        return engine_forward(architecture, model, inputs)

    return run


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


@pytest.fixture
def opened(load, run_node, engine_velocity, velocity):
    """What a file gives, by whatever opens it."""

    def run(path: Path) -> dict[str, torch.Tensor]:
        (stock,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
        return {
            "ours": velocity(load(path.name)),
            "host": velocity(stock),
            "engine": engine_velocity(path),
        }

    return run


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
def drawn(run_node, inputs):
    """Latents that the host's own sampler draws."""

    def run(
        model,
        steps: int = 3,
        sampler: str = "euler",
        samples: int = 1,
        cfg: float = 2.0,
        equal: bool = True,
    ):
        text = inputs.text.expand(samples, -1, -1)
        negative = -text if equal else text[:, ::2]
        empty = torch.zeros(samples, *inputs.latents.shape[1:])
        (found,) = run_node(
            "KSampler",
            model=model,
            seed=3,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler="simple",
            positive=[[text, inputs.more]],
            negative=[[negative, inputs.more]],
            latent_image={"samples": empty},
            denoise=1.0,
        )
        return found["samples"]

    return run


@pytest.fixture(scope="module")
def loose_bound(pack):
    """A random model keeps no useful bound."""
    module = pack("loading.fold_on_load")
    old, module.BOUND = module.BOUND, BOUND
    yield
    module.BOUND = old


@pytest.fixture(scope="module")
def plain(load, bundle, teacher):
    """The bundle, switchable, nothing folded."""
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


def engine_forward(architecture, model, inputs) -> torch.Tensor:
    tokens = architecture.pack(flat(inputs.latents))
    rows = {"hidden_states": tokens, "timestep": torch.tensor([inputs.sigma]), "grid": inputs.grid}
    with torch.no_grad():
        tokens = architecture.call(
            model, {**rows, **inputs.captions, "encoder_hidden_states": inputs.text}
        )
    return architecture.unpack(tokens, inputs.grid)


def calls_of(model) -> list[tuple[torch.Tensor, ...]]:
    """(latents, sigmas, text, velocity) of every forward from now on."""
    heard = []

    def hear(executor, x, t, context, *arguments, **named):
        result = executor(x, t, context, *arguments, **named)
        heard.append((flat(x).clone(), t.clone(), context.clone(), flat(result).clone()))
        return result

    model.add_wrapper_with_key("diffusion_model", "test", hear)
    return heard


def flat(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, :, 0] if latents.ndim == 5 else latents


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
