"""A bundle on a base that is stored in fp8, plain and scaled, as such models are published."""

import pytest
import torch

from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..forwards import relative_error

FP8, LARGEST = torch.float8_e4m3fn, 448.0


@pytest.fixture(scope="module")
def plain(teacher, models):
    """Every tensor in fp8."""
    tensors = TensorFile(teacher).read_all()
    metadata = TensorFile(teacher).metadata
    path = models.diffusion_models / "teacher_fp8.safetensors"
    write_tensors(path, {name: tensor.to(FP8) for name, tensor in tensors.items()}, metadata)
    return path


@pytest.fixture(scope="module")
def scaled(teacher, models):
    """Matrices in fp8 with a scale each, all else as it was."""
    found = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, tensor in TensorFile(teacher).read_all().items():
        if tensor.ndim == 2:
            scale = tensor.abs().max() / LARGEST
            found |= {
                name: (tensor / scale).to(FP8),
                name.removesuffix("weight") + "scale_weight": scale,
            }
        else:
            found[name] = tensor.to(torch.bfloat16)
    path = models.diffusion_models / "teacher_fp8_scaled.safetensors"
    write_tensors(path, found, TensorFile(teacher).metadata)
    return path


@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
@pytest.mark.parametrize("base", ["plain", "scaled"])
def test_variants_on_it(load, switched, velocity, bundle, teacher, base, variant, request, caplog):
    path = request.getfixturevalue(base)
    exact = velocity(load(bundle.name, base=teacher.name, variant=variant, switchable=False))
    options = {"base": path.name, "weight_dtype": "default"}
    caplog.clear()
    actual = velocity(switched(load(bundle.name, **options), variant=variant))
    alone = velocity(load(bundle.name, variant=variant, switchable=False, **options))
    # a student's halved modulation has a scale of its own when it is alone
    assert relative_error(actual, alone) < 0.01
    assert 0 < relative_error(actual, exact) < 0.1
    assert not [line for line in caplog.messages if "missing" in line]
