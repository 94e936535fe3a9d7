"""What a host without this pack does with our files, at Qwen-Image's real width and one or two
blocks (1.4 GB)."""

import json
import struct
from contextlib import contextmanager

import comfy.supported_models
import pytest
import torch

from ppcl_engine.algorithms.sparsity.files import SPARSITY_KEY
from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.assembly import empty_model
from ppcl_engine.models.bundle import MAP_KEY
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.standalone import GUARD_SHAPE, guard_name
from ppcl_engine.models.stored_layout import HINTS_TENSOR, STRUCTURE_TENSOR
from ppcl_engine.models.tensor_sources import Source, write_sources
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.plan import PruningPlan, parse_intervals, parse_sites
from ppcl_engine.system.float8 import FP8, FP8_MARK
from ppcl_engine.system.tensor_files import TensorFile
from ppcl_engine.system.two_of_four import INDICES, VALUES, compressed_shapes

from ..conftest import fp8_in
from ..forwards import relative_error

QWEN = architecture_named("qwen_image")
REAL = QWEN.model_configs["qwen_image"]
NUMBERS = 2**22  # random ones, used again and again: what is tested is whose they are
NAMES = {torch.bfloat16: "BF16", torch.uint8: "U8"}


@contextmanager
def without_the_pack():
    models = comfy.supported_models.models
    ours = [m for m in models if m.__name__.startswith("PPCL")]
    models[:] = [m for m in models if m not in ours]
    try:
        yield
    finally:
        models[:] = ours + models


def random_numbers() -> torch.Tensor:
    return (0.02 * torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))).bfloat16()


def write_real(
    path, shapes: dict, small: dict | None = None, metadata: dict | None = None, numbers=None
) -> None:
    """A safetensors file of bf16 tensors: zeros that take no disk, or `numbers` again and again;
    and `small` tensors as they are."""
    header, offset = {"__metadata__": metadata or {}}, 0
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    tensors |= {name: (t.dtype, tuple(t.shape)) for name, t in (small or {}).items()}
    for name, (dtype, shape) in tensors.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if numbers is not None:
            data = numbers.view(torch.uint8).numpy().data
            for start in range(0, offset, len(data)):
                file.write(data[: offset - start])
        for name, tensor in (small or {}).items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.numpy().data)
        file.truncate(8 + len(text) + offset)


@pytest.fixture
def removed(models):
    """Big files go at once."""
    yield
    for path in models.diffusion_models.glob("real_*"):
        path.unlink()


@pytest.fixture
def wide_text(inputs, monkeypatch):
    monkeypatch.setattr(
        inputs, "text", torch.randn(1, 7, 3584, generator=torch.Generator().manual_seed(6))
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["native standalone", "unstructured sparse"])
def test_files_in_its_own_layout_load(models, run_node, velocity, wide_text, removed, sparse):
    """Two random blocks, renumbered, or a full model of one with half of its weights zero: every
    tensor is the file's, and it runs."""
    config, path = (
        {**REAL, "num_layers": 1 if sparse else 2},
        models.diffusion_models / "real_native.safetensors",
    )
    metadata = {SPARSITY_KEY: "{}"} if sparse else {MAP_KEY: "[0, 3]"}
    hints = {} if sparse else {HINTS_TENSOR: torch.zeros(40, dtype=torch.uint8)}
    numbers = random_numbers()
    numbers[::2] *= not sparse
    write_real(
        path,
        expected_shapes(QWEN, config),
        hints,
        {**metadata, "config": json.dumps(config)},
        numbers,
    )
    with without_the_pack():
        (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    file, found = TensorFile(path), model.model.diffusion_model.state_dict()
    names = [name for name in file.keys() if name != HINTS_TENSOR]
    assert found.keys() == set(names)
    assert all(
        torch.equal(found[name][-1], file.read(name)[-1]) for name in (*names[:3], *names[-3:])
    )
    velocities = velocity(model)
    assert velocities.isfinite().all() and velocities.std() > 0


@pytest.mark.parametrize(
    ("blocks", "intervals", "correction", "sites"),
    [(2, "0-1", "16", ""), (2, "", "none", "text:1"), (1, "", "none", "ffn_image:0")],
    ids=["correction", "text", "gated FFN"],
)
def test_other_files_are_refused(models, run_node, removed, blocks, intervals, correction, sites):
    """Not loaded in silence with parts missing; the pack loads the same file."""
    config = {**REAL, "num_layers": blocks}
    found = [{**vars(i), "correction": correction} for i in parse_intervals(intervals)]
    plan = PruningPlan(
        architecture=QWEN.name,
        config=config,
        num_blocks=blocks,
        fingerprint="f",
        intervals=tuple(
            type(i)(**f) for i, f in zip(parse_intervals(intervals), found, strict=True)
        ),
        sites=parse_sites(sites, "gated"),
    )
    layout = layout_of(plan, plan.everything())
    shapes = {
        name: tuple(t.shape) for name, t in empty_model(QWEN, config, layout).state_dict().items()
    }
    small = {
        STRUCTURE_TENSOR: torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8),
        guard_name(plan, layout): torch.zeros(GUARD_SHAPE, dtype=torch.uint8),
    }
    path = models.diffusion_models / "real_pruned.safetensors"
    write_real(path, shapes, small)
    with without_the_pack(), pytest.raises(RuntimeError, match="size mismatch"):
        run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert len(model.model.diffusion_model.transformer_blocks) == blocks


def test_a_compressed_file_is_refused(models, run_node, removed):
    """2:4: it would find no matrix at all and leave them as memory happened to be. The pack loads
    the same file."""
    config, path = {**REAL, "num_layers": 1}, models.diffusion_models / "real_sparse.safetensors"
    shapes = expected_shapes(QWEN, config)
    matrices = [
        name
        for name, shape in shapes.items()
        if name.startswith("transformer_blocks.") and len(shape) == 2
    ]
    small = {min(matrices): torch.zeros(GUARD_SHAPE, dtype=torch.uint8)}
    for name in matrices:
        values, indices = compressed_shapes(shapes.pop(name))
        shapes[name + VALUES] = values
        # the first two of every four
        small[name + INDICES] = torch.full(indices, 0b0100_0100, dtype=torch.uint8)
    write_real(path, shapes, small, {SPARSITY_KEY: "{}", "config": json.dumps(config)})
    with without_the_pack(), pytest.raises(RuntimeError, match="size mismatch"):
        run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert model.model.diffusion_model.transformer_blocks[0].attn.to_q.weight.shape == (3072, 3072)


def test_an_export_in_fp8_loads(models, run_node, velocity, wide_text, removed, caplog):
    """As `ppcl export --store float8` writes it: a random block runs on the host's own fp8 layers."""
    config, path = {**REAL, "num_layers": 1}, models.diffusion_models / "real_fp8.safetensors"
    shapes, numbers = expected_shapes(QWEN, config), random_numbers()

    def source(shape: tuple[int, ...]) -> Source:
        count = torch.Size(shape).numel()
        return Source(shape, lambda: numbers.repeat(-(-count // NUMBERS))[:count].reshape(shape))

    extra = {FP8_MARK: torch.zeros(2, dtype=FP8)}
    write_sources(
        path,
        {n: source(s) for n, s in shapes.items()},
        "float8",
        {"format": "pt"},
        extra,
    )
    with without_the_pack():
        (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]
    layer = model.model.diffusion_model.transformer_blocks[0].attn.to_q
    stored, scale = fp8_in(layer)
    assert stored.dtype == FP8
    assert relative_error(stored[5].float() * scale, numbers[5 * 3072 : 6 * 3072].float()) < 0.05
    velocities = velocity(model)
    assert velocities.isfinite().all() and velocities.std() > 0
