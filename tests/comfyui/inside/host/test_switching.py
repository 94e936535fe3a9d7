"""Branches of one loaded model share everything; switching reads nothing; a file's variant reads
only itself.

On the bundled teacher with random students: sizes and seconds do not depend on what was trained.
"""

import gc
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import pytest
import torch

import ppcl_engine.demo
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.tensor_files import write_tensors

from ....tiny.trained_run import write_parts

TEACHER = Path(ppcl_engine.demo.__file__).with_name("teacher.safetensors")
BRANCHES = ("full", "small", "smallest")
SWITCHES = 1000
opened: list[str] = []
sys.addaudithook(
    lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None
)


@pytest.fixture(scope="module")
def demo(models, tmp_path_factory):
    """(bundle's name, base's name) of the bundled teacher, both in bf16."""
    (models.diffusion_models / "demo.safetensors").symlink_to(TEACHER)
    folder = tmp_path_factory.mktemp("demo")
    write_parts(Run(folder), TEACHER)
    path = export(
        ExportConfig(model=TEACHER, run=folder, layout="bundle", name="demo", store="bfloat16")
    )
    path.replace(models.ppcl / "demo.ppcl.safetensors")
    return "demo.ppcl.safetensors", "demo.safetensors"


@pytest.fixture(scope="module")
def whole(load, demo):
    return load(demo[0], base=demo[1], variant="full")


@pytest.fixture
def text(inputs, monkeypatch):
    """Makes the text as wide as the bundled teacher reads it."""
    monkeypatch.setattr(
        inputs, "text", torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(6))
    )


@contextmanager
def files_of_models(models):
    """Names of model files that were opened while it ran; none may be open or mapped either."""
    found, start = [], len(opened)
    yield found
    roots = (str(models.ppcl), str(models.diffusion_models), str(TEACHER.parent))
    descriptors = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    found += [name for name in (*opened[start:], *descriptors, *mapped) if name.startswith(roots)]


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: every read of this process


def tensor_bytes() -> int:
    gc.collect()
    tensors = [
        o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"
    ]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def run_on_device(model) -> None:
    comfy.model_management.load_models_gpu([model])


def test_the_counters_see_a_load(load, demo, models):
    before = bytes_read()
    with files_of_models(models) as files:
        load(demo[0], base=demo[1])
    size = (models.ppcl / demo[0]).stat().st_size + TEACHER.stat().st_size
    assert any("demo.ppcl" in name for name in files)
    assert bytes_read() - before > 0.95 * size


def test_three_branches_weigh_as_one(load, demo, switched, velocity, text, figures):
    before = tensor_bytes()
    model = load(demo[0], base=demo[1], variant="full")
    velocity(model)
    one = tensor_bytes() - before
    branches = [switched(model, variant=name) for name in BRANCHES]
    velocities = [velocity(branch) for branch in branches]
    assert not torch.equal(velocities[0], velocities[1]) and not torch.equal(
        velocities[1], velocities[2]
    )
    ratio = (tensor_bytes() - before) / one
    figures("branches_memory_ratio", ratio)
    assert ratio < 1.05


def test_a_thousand_switches(whole, switched, velocity, models, text, figures):
    first = {name: velocity(switched(whole, variant=name)) for name in BRANCHES}
    memory, seconds = tensor_bytes(), []
    with files_of_models(models) as files:
        for count in range(SWITCHES):
            name = BRANCHES[count % len(BRANCHES)]
            start = time.perf_counter()
            branch = switched(whole, variant=name)
            run_on_device(branch)
            seconds.append(time.perf_counter() - start)
            if count % 100 < len(BRANCHES):
                assert torch.equal(velocity(branch), first[name])
    growth, middle = tensor_bytes() / memory - 1, sorted(seconds)[SWITCHES // 2]
    for name, value in (("seconds", middle), ("bytes_read", len(files)), ("memory_growth", growth)):
        figures(f"switch_{name}", value)
    assert files == []  # no file was opened, is open or is mapped: nothing was read
    assert growth <= 0.01 and middle < 0.1


def test_a_lora_stays_on_its_branch(whole, switched, run_node, velocity, models, text):
    generator, stored = torch.Generator().manual_seed(1), {}
    for index in range(6):
        name = f"transformer_blocks.{index}.attn.to_q"
        stored |= {
            f"{name}.lora_{a}.weight": torch.randn(s, generator=generator)
            for a, s in (("A", (2, 96)), ("B", (96, 2)))
        }
    write_tensors(models.loras / "branch.safetensors", stored)
    plain = {name: velocity(switched(whole, variant=name)) for name in BRANCHES}
    (patched,) = run_node(
        "LoraLoaderModelOnly", model=whole, lora_name="branch.safetensors", strength_model=0.5
    )
    changed = {}
    for _ in range(2):  # each behind each other
        for name in BRANCHES:
            assert torch.equal(velocity(switched(whole, variant=name)), plain[name])
            actual = velocity(switched(patched, variant=name))
            assert not torch.equal(actual, plain[name]) and torch.equal(
                actual, changed.setdefault(name, actual)
            )


@pytest.mark.parametrize("variant", [*BRANCHES, "1-2,ffn_image:1"])
def test_a_variant_alone_reads_only_itself(load, demo, variant, figures):
    # what is imported on the way does not count
    load(demo[0], base=demo[1], variant=variant, switchable=False)
    before = bytes_read()
    model = load(demo[0], base=demo[1], variant=variant, switchable=False)
    read = bytes_read() - before
    parameters = sum(p.numel() for p in model.model.diffusion_model.parameters())
    figures("load_bytes_ratio", read / (2 * parameters))
    # of a file this small, headers with their hashes are more than a hundredth
    assert 1 <= read / (2 * parameters) <= 1.03


def test_what_was_not_loaded_is_refused(load, demo, switched):
    model = load(demo[0], base=demo[1], variant="small", switchable=False)
    with pytest.raises(ValueError, match="set switchable to on"):
        switched(model, variant="smallest")


def test_parameters_are_the_engines(whole, pack, demo, models):
    from ppcl_engine.models.opening import open_model
    from ppcl_engine.models.weights import parameter_count

    parts, variant = pack("host.switching"), pack("use.choose_variant")
    for name in BRANCHES:
        plan = variant.switchable_plan(whole)
        layout = sys.modules[
            f"{type(plan).__module__.rpartition('.plan.')[0]}.models.layout"
        ].layout_of(plan, plan.variant(name))
        expected = parameter_count(open_model(models.ppcl / demo[0], name, TEACHER))
        assert parts.size_of(whole.model.diffusion_model, layout)[0] == expected
