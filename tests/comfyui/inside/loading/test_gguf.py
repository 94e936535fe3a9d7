"""A base in GGUF. ComfyUI-GGUF cannot be had where tests run: its loader call is imitated here, by
the names, arguments and habits it has (operations without weights until they are loaded, tensors
whose data has another shape than theirs, a patcher made by `clone`). The host, our nodes and the
way through them are real."""

import sys
from pathlib import Path
from types import ModuleType

import comfy.model_patcher
import comfy.ops
import folder_paths
import pytest
import torch
from torch import nn

import nodes as host_nodes
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.system.tensor_files import TensorFile

from ..forwards import relative_error

two = pytest.mark.parametrize("architecture", ["qwen_image", "flux1"], indirect=True)
three = pytest.mark.parametrize("architecture", ["qwen_image", "flux1", "sd35"], indirect=True)
one = pytest.mark.parametrize("architecture", ["qwen_image"], indirect=True)
STEP = 1 / 4096
MAGIC, CUT_OFF = b"GGUF", b"GGUF\3\0"


class Quantised(torch.Tensor):
    """int16 multiples of STEP in one row."""

    @staticmethod
    def __new__(cls, data, *_, **__):
        return super().__new__(cls, data)

    def __init__(self, data, whole: torch.Size):
        self.whole = whole

    @property
    def shape(self):
        return getattr(self, "whole", None) or self.size()

    def to(self, *arguments, **named):
        new = super().to(*arguments, **named)
        new.whole = self.whole
        return new

    def detach(self):
        return self


class Ops(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = (
                in_features,
                out_features,
                None,
                None,
            )

        def _load_from_state_dict(self, state_dict, prefix, *_):
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    setattr(
                        self, name, nn.Parameter(state_dict[f"{prefix}{name}"], requires_grad=False)
                    )

        def forward_comfy_cast_weights(self, x):
            if not isinstance(self.weight, Quantised):
                return super().forward_comfy_cast_weights(x)
            weight = torch.Tensor(self.weight.as_subclass(torch.Tensor).to(x.dtype) * STEP).view(
                self.weight.whole
            )
            return nn.functional.linear(
                x, weight, None if self.bias is None else self.bias.to(x.dtype)
            )


class Patcher(comfy.model_patcher.ModelPatcher):
    def clone(self, *arguments, **named):
        own, self.__class__ = self.__class__, Patcher
        new = super().clone(*arguments, **named)
        self.__class__ = own
        return new


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    """As a GGUF file holds it: matrices quantised, vectors as they are, and no bytes."""
    if tensor.ndim != 2:
        return tensor.half() if tensor.dtype == torch.uint8 else tensor
    return Quantised((tensor / STEP).round().to(torch.int16).flatten(), tensor.shape)


def content_of(path: str, host_tensors: dict) -> dict[str, torch.Tensor]:
    """Stands in for that pack's reader. A file that holds a name gives the tensors of the .safetensors
    of that name, one that is cut off raises that reader's error, any other gives the teacher."""
    data = Path(path).read_bytes()
    if data == CUT_OFF:
        return {"a": torch.zeros(1), "b": data[len(data)]}
    return (
        TensorFile(data.removeprefix(MAGIC).decode()).read_all() if data != MAGIC else host_tensors
    )


@pytest.fixture
def gguf_file(models, host_tensors, monkeypatch) -> str:
    """Name of the teacher in GGUF, by the host's names, with the other pack in the host."""
    other = ModuleType("imitated_gguf_nodes")
    other.GGMLOps, other.GGUFModelPatcher = Ops, Patcher
    other.gguf_sd_loader = lambda path: {
        name: quantised(t) for name, t in content_of(path, host_tensors).items()
    }
    other.UnetLoaderGGUF = type("UnetLoaderGGUF", (), {"__module__": other.__name__})
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", other.UnetLoaderGGUF)
    folder = models.diffusion_models
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "unet_gguf", ([str(folder)], {".gguf"})
    )
    (folder / "teacher.gguf").write_bytes(MAGIC)
    yield "teacher.gguf"
    (folder / "teacher.gguf").unlink()


@two
def test_variants_on_a_base_in_gguf(
    load, switched, velocity, engine_velocity, bundle, teacher, gguf_file
):
    model = load(bundle.name, base=gguf_file, weight_dtype="default")
    assert isinstance(model, Patcher)
    for name in ("full", "small", "1-2,text:3-4", "smallest"):
        branch = switched(model, variant=name)
        assert isinstance(branch, Patcher)
        # what int16 costs
        assert relative_error(velocity(branch), engine_velocity(bundle, name, teacher)) < 0.02


@two
def test_sizes_of_a_base_in_gguf(load, bundle, teacher, gguf_file, pack):
    model = load(bundle.name, base=gguf_file, variant="full", weight_dtype="default")
    plan = pack("use.choose_variant").switchable_plan(model)
    parts = pack("host.switching")
    layout = sys.modules[
        f"{type(plan).__module__.rpartition('.plan.')[0]}.models.layout"
    ].full_layout(plan.num_blocks)
    parameters, size = parts.size_of(model.model.diffusion_model, layout)
    assert parameters == sum(tensor.numel() for tensor in TensorFile(teacher).read_all().values())
    assert size < 0.6 * 4 * parameters


@pytest.fixture
def alone(models, exported, gguf_file):
    """One variant, in a standalone file and as a tool makes GGUF of it: (name, name in GGUF)."""
    made = []

    def make(layout: str, variant: str) -> tuple[str, str]:
        path = exported(models.ppcl, layout, "alone", variant)
        other = models.ppcl / "alone.gguf"
        other.write_bytes(MAGIC + str(path).encode())
        made[:] = [path, other]
        return path.name, other.name

    yield make
    for path in made:
        path.unlink()


@three
@pytest.mark.parametrize("layout, variant", [("ppcl", "smallest"), ("comfyui", None)])
def test_a_pruned_file_in_gguf(load, alone, velocity, bundle, layout, variant):
    """Our own, with its plan in numbers instead of bytes; of those for stock hosts, the blocks that
    it has."""
    depth_only = next(i.name for i in Bundle(bundle).plan.intervals if i.correction == "none")
    name, in_gguf = alone(layout, variant or depth_only)
    model, expected = load(in_gguf, weight_dtype="default"), load(name)
    assert isinstance(model, Patcher)
    layouts = [m.model.diffusion_model.ppcl.structure.layout.places for m in (model, expected)]
    assert layouts[0] == layouts[1]
    assert relative_error(velocity(model), velocity(expected)) < 0.02


@one
def test_a_file_that_is_cut_off(load, models, bundle, gguf_file):
    (models.diffusion_models / gguf_file).write_bytes(CUT_OFF)
    for given in ({"file": bundle.name, "base": gguf_file}, {"file": gguf_file}):
        with pytest.raises(ValueError) as error:
            load(**given, weight_dtype="default")
        assert str(error.value).startswith("ComfyUI-GGUF cannot read teacher.gguf (IndexError: ")
        assert "it is cut off, or not a diffusion model" in str(error.value) and "\n" not in str(
            error.value
        )


@one
def test_what_the_loader_offers(gguf_file, monkeypatch):
    """Behind all others, so that nothing else is chosen than before; as file where the other pack
    is installed."""

    def offered(name: str) -> list[str]:
        return host_nodes.NODE_CLASS_MAPPINGS["PPCL_LoadModel"].GET_NODE_INFO_V1()["input"][
            "required"
        ][name][1]["options"]

    assert offered("file")[-1] == gguf_file and gguf_file in offered("base")
    monkeypatch.delitem(host_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF")
    assert gguf_file not in offered("file") and gguf_file in offered("base")


@one
def test_without_that_pack_or_with_other_settings(load, bundle, gguf_file, monkeypatch):
    with pytest.raises(ValueError, match="set switchable to on"):
        load(bundle.name, base=gguf_file, weight_dtype="default", switchable=False)
    with pytest.raises(ValueError, match="set switchable to on and weight_dtype to default"):
        load(gguf_file, weight_dtype="bf16")
    with pytest.raises(ValueError, match="set fold to off"):
        load(gguf_file, weight_dtype="default", fold="table")
    monkeypatch.delitem(host_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF")
    with pytest.raises(ValueError, match="needs ComfyUI-GGUF"):
        load(bundle.name, base=gguf_file, weight_dtype="default")


def test_it_cannot_be_saved(saved, load, bundle, gguf_file, models):
    """The host's node would write what no loader reads."""
    model, there = (
        load(bundle.name, base=gguf_file, weight_dtype="default"),
        set(models.diffusion_models.iterdir()),
    )
    with pytest.raises(
        ValueError, match=r"in the form of another pack \(GGUF\), which cannot be saved"
    ) as error:
        saved(model)
    assert "\n" not in str(error.value) and set(models.diffusion_models.iterdir()) == there
