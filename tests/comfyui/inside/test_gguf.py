"""A base in GGUF. ComfyUI-GGUF cannot be had where tests run: its loader call is imitated here, by the names, arguments
and habits it has (operations without weights until they are loaded, tensors whose data has another shape than theirs,
a patcher made by `clone`). The host, our nodes and the way through them are real."""

import sys
from types import ModuleType

import comfy.model_patcher
import comfy.ops
import folder_paths
import pytest
import torch
from torch import nn

import nodes as host_nodes
from ppcl_engine.files import TensorFile

from .conftest import relative_error

pytestmark = pytest.mark.parametrize("architecture", ["qwen_image", "flux1"], indirect=True)
STEP = 1 / 4096


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
            self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

        def _load_from_state_dict(self, state_dict, prefix, *_):
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    setattr(self, name, nn.Parameter(state_dict[f"{prefix}{name}"], requires_grad=False))

        def forward_comfy_cast_weights(self, x):
            if not isinstance(self.weight, Quantised):
                return super().forward_comfy_cast_weights(x)
            weight = torch.Tensor(self.weight.as_subclass(torch.Tensor).to(x.dtype) * STEP).view(self.weight.whole)
            return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class Patcher(comfy.model_patcher.ModelPatcher):
    def clone(self, *arguments, **named):
        own, self.__class__ = self.__class__, Patcher
        new = super().clone(*arguments, **named)
        self.__class__ = own
        return new


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    """As a GGUF file holds it: matrices quantised, vectors as they are."""
    if tensor.ndim != 2:
        return tensor
    return Quantised((tensor / STEP).round().to(torch.int16).flatten(), tensor.shape)


@pytest.fixture
def gguf_file(models, host_tensors, monkeypatch) -> str:
    """Name of the teacher in GGUF, by the host's names, with the other pack in the host."""
    other = ModuleType("imitated_gguf_nodes")
    other.GGMLOps, other.GGUFModelPatcher = Ops, Patcher
    other.gguf_sd_loader = lambda path: {name: quantised(t) for name, t in host_tensors.items()}
    other.UnetLoaderGGUF = type("UnetLoaderGGUF", (), {"__module__": other.__name__})
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", other.UnetLoaderGGUF)
    folder = models.diffusion_models
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", ([str(folder)], {".gguf"}))
    (folder / "teacher.gguf").write_bytes(b"GGUF")
    yield "teacher.gguf"
    (folder / "teacher.gguf").unlink()


def test_variants_on_a_base_in_gguf(load, switched, velocity, engine_velocity, bundle, teacher, gguf_file):
    model = load(bundle.name, base=gguf_file, weight_dtype="default")
    assert isinstance(model, Patcher)
    for name in ("full", "small", "1-2,text:3-4", "smallest"):
        branch = switched(model, variant=name)
        assert isinstance(branch, Patcher)
        assert relative_error(velocity(branch), engine_velocity(bundle, name, teacher)) < 0.02  # what int16 costs


def test_sizes_of_a_base_in_gguf(load, bundle, teacher, gguf_file, pack):
    model = load(bundle.name, base=gguf_file, variant="full", weight_dtype="default")
    plan = pack("variant").switchable_plan(model)
    parts = pack("host.parts")
    layout = sys.modules[f"{type(plan).__module__.rpartition('.')[0]}.layout"].full_layout(plan.num_blocks)
    parameters, size = parts.size_of(model.model.diffusion_model, layout)
    assert parameters == sum(tensor.numel() for tensor in TensorFile(teacher).read_all().values())
    assert size < 0.6 * 4 * parameters


def test_without_that_pack_or_with_other_settings(load, bundle, gguf_file, monkeypatch):
    with pytest.raises(ValueError, match="set switchable to on"):
        load(bundle.name, base=gguf_file, weight_dtype="default", switchable=False)
    monkeypatch.delitem(host_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF")
    with pytest.raises(ValueError, match="needs ComfyUI-GGUF"):
        load(bundle.name, base=gguf_file, weight_dtype="default")


def test_it_cannot_be_saved(saved, load, bundle, gguf_file, models):
    """The host's node would write what no loader reads."""
    model, there = load(bundle.name, base=gguf_file, weight_dtype="default"), set(models.diffusion_models.iterdir())
    with pytest.raises(ValueError, match=r"in the form of another pack \(GGUF\), which cannot be saved") as error:
        saved(model)
    assert "\n" not in str(error.value) and set(models.diffusion_models.iterdir()) == there
