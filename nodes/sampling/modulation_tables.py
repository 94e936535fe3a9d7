"""Fills tables of folded modulations when the host starts to sample: a new schedule costs one pass over
the stored weights, a known one nothing.

The sigmas are known then. Timesteps that the model's table lacks come from models/ppcl/tables, or are
computed from the modulations in the files that the model was loaded from. One modulation is in memory
at a time; it runs as in the unfolded model, on the same device, so that the values are the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.weight_adapter import WeightAdapterBase
from torch import nn

from ...ppcl_engine.architectures.folded import refuse_timesteps, table_maps
from ...ppcl_engine.models.folding.tables import (
    TABLE_KEY,
    Table,
    conditionings,
    make_table,
    put_table,
    read_table,
    table_in,
    write_table,
)
from ...ppcl_engine.system.tensor_files import TensorFile
from ..host import folded
from ..host.modulations import Modulations
from ..host.quantised import filled_linear
from ..paths import tables_folder
from .timesteps import timesteps_of

KEY = "ppcl_fold"
MOST_TIMESTEPS = 512  # in one model's table; older ones are dropped and can be read again
LOW_RANK = {"lora": 4, "loha": 7, "lokr": 8}
"""adapters whose change does not depend on the weight -> index, in their weights, of a DoRA scale,
with which it does"""


def fill_before_sampling(model) -> None:
    """From now on this folded MODEL, and every clone of it, checks its patches and fills its table
    when sampling starts."""
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _before_sampling)
    model.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _after_load)


def _after_load(patcher, *_, **__) -> None:
    """Notes in `PrunedState.refused` why a node could not save what is loaded. Loading must not fail, only
    sampling and saving."""
    transformer = patcher.model.diffusion_model
    try:
        check_patches(patcher, folded.inputs_in(transformer))
        transformer.ppcl.refused = ""
    except ValueError as error:
        transformer.ppcl.refused = str(error)


def _before_sampling(executor, noise, latent_image, sampler, sigmas, *arguments, **named):
    patcher = executor.class_obj.model_patcher
    inputs = folded.inputs_in(patcher.model.diffusion_model)
    check_patches(patcher, inputs)
    if isinstance(inputs, folded.Table):
        know(patcher, inputs, timesteps_of(patcher, sampler, sigmas), len(noise))
    return executor(noise, latent_image, sampler, sigmas, *arguments, **named)


def check_patches(patcher, inputs) -> None:
    """Raises ValueError, in one line, for patches that cannot be made on folded modulations."""
    engine = patcher.model.diffusion_model.ppcl.structure.host.engine
    for patches in (patcher.patches, *patcher.hook_patches.values()):
        for key, changes in patches.items():
            if key.startswith(f"diffusion_model.{engine.time_embedder}."):
                raise ValueError(
                    f"a LoRA changes {key}, which folded modulations can't follow; set fold to off"
                )
            module = key.rpartition(".")[0].removeprefix("diffusion_model.")
            if module.endswith(engine.timestep_modulations) and not all(
                _adds(p, inputs) for p in changes
            ):
                raise ValueError(
                    f"a change of {key} depends on the weight itself (DoRA, a merge), which is folded away; set fold to off"
                )


def _adds(patch: tuple, inputs) -> bool:
    """Whether a patch can be made on folded modulations: a table only takes those that add the same
    to any weight; a basis, which has all that is left of W, takes merges too."""
    _, value, strength_model, _, _ = patch
    if isinstance(value, WeightAdapterBase):
        scale = LOW_RANK.get(value.name)
        return (
            scale is not None
            and value.weights[scale] is None
            and (strength_model == 1 or _scales(inputs))
        )
    if isinstance(value, list) or strength_model != 1:
        return _scales(inputs)
    return len(value) == 1 or value[0] == "diff"


def _scales(inputs) -> bool:
    return isinstance(inputs, folded.Basis)


def know(patcher, inputs: folded.Table, timesteps: list[float], samples: int) -> None:
    """Fills the model's table with the timesteps that it lacks. Raises ValueError, in one line, if
    there is nothing to fill it from."""
    # with guidance both prompts may go through the model at once
    rows = (samples, 2 * samples)
    known = inputs.timesteps.tolist()
    if inputs.stored is None:
        inputs.stored = frozenset(known)
    missing = [t for t in timesteps if t not in inputs.stored and (t, rows) not in inputs.asked]
    if not missing:
        return
    later = patcher.model.diffusion_model.ppcl.later
    if later is None:
        # 0 is the schedule's end, where the model is not evaluated
        if lacking := [t for t in missing if t != 0]:
            refuse_timesteps(lacking, known, inputs.precision)
        return
    new = stored_table(patcher, inputs, later, missing, rows)
    unload(patcher)
    maps = table_maps(patcher.model.diffusion_model, folded.TableMap)
    keeps = len(set(known) | set(missing)) <= MOST_TIMESTEPS
    put_table(maps, inputs, new.joined(table_in(maps, inputs)) if keeps else new)
    inputs.batches = next(iter(maps.values())).batches
    folded.renewed(patcher.model.diffusion_model)
    inputs.stored = inputs.stored if keeps else frozenset()
    inputs.asked = {(t, r) for t, r in inputs.asked if keeps and t not in missing} | {
        (t, rows) for t in missing
    }
    patcher.size = 0  # makes the host measure the model again


def unload(patcher) -> None:
    """Takes the model off its device, whichever branch is loaded, since its weights are about to
    change."""
    loaded = comfy.model_management.current_loaded_models
    for one in [m for m in loaded if m.model is not None and m.model.model is patcher.model]:
        one.model_unload()
        loaded.remove(one)


def stored_table(
    patcher, inputs: folded.Table, later: Modulations, timesteps: list[float], rows: tuple
) -> Table:
    """The table of these timesteps, from models/ppcl/tables; otherwise computed, and written there."""
    key = _key(patcher, inputs, later, rows)
    for path in sorted(tables_folder().glob(f"{key[:24]}-*.safetensors")):
        about = json.loads(TensorFile(path).metadata.get(TABLE_KEY, "{}"))
        if about.get("key") == key and set(timesteps) <= set(about["timesteps"]):
            return read_table(path, key).only(timesteps)
    table = computed(patcher, inputs, later, timesteps, rows)
    digest = hashlib.sha256(json.dumps(sorted(timesteps)).encode()).hexdigest()
    write_table(tables_folder() / f"{key[:24]}-{digest[:12]}.safetensors", table, key)
    return table


def _key(patcher, inputs: folded.Table, later: Modulations, rows: tuple) -> str:
    """A hash of everything that the bits of a value depend on."""
    linear, names = inputs.new_linear, sorted(_host_names(patcher, later))
    parts = (
        later.mark,
        later.shapes,
        names,
        _dtype(patcher),
        linear.func.__qualname__,
        linear.keywords["dtype"],
        comfy.model_management.get_torch_device_name(patcher.load_device),
        torch.__version__,
        rows,
    )
    return hashlib.sha256(str(parts).encode()).hexdigest()


def _dtype(patcher) -> torch.dtype:
    return patcher.model.manual_cast_dtype or patcher.model.get_dtype()


def computed(
    patcher, inputs: folded.Table, later: Modulations, timesteps: list[float], rows: tuple
) -> Table:
    """One pass over the stored modulations, with progress; the host's stop button ends it."""
    device, dtype = patcher.load_device, _dtype(patcher)
    like = torch.empty(0, dtype=dtype, device=device)
    with cast_when_used(inputs.embedder[0]) as embedder:
        given = conditionings(
            lambda t: embedder.forward(t.to(device), like), timesteps, [(r, r) for r in rows]
        )
    opened = _opened(inputs, later, _host_names(patcher, later), device)
    return make_table(((name, open_one, given) for name, open_one in opened), timesteps)


@contextmanager
def cast_when_used(module: nn.Module) -> Iterator[nn.Module]:
    """Meanwhile the module runs on its inputs' device, wherever its weights are: the host casts and
    moves them when they are used."""
    parts = [part for part in module.modules() if hasattr(part, "comfy_cast_weights")]
    old = [part.comfy_cast_weights for part in parts]
    try:
        for part in parts:
            part.comfy_cast_weights = True
        yield module
    finally:
        for part, value in zip(parts, old, strict=True):
            part.comfy_cast_weights = value


def _host_names(patcher, later: Modulations) -> dict[str, str]:
    """Name of each modulation in the host's model -> its name in the file."""
    names = patcher.model.diffusion_model.ppcl.structure.names
    return {
        (names.get(f"{n}.weight") or f"{n}.weight").removesuffix(".weight"): n for n in later.stored
    }


def _opened(
    inputs: folded.Table, later: Modulations, names: dict[str, str], device: torch.device
) -> Iterator:
    bar = comfy.utils.ProgressBar(len(names))
    for host_name, name in names.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield host_name, lambda name=name: _modulation(inputs, later, name, device)
        bar.update(1)


def _modulation(
    inputs: folded.Table, later: Modulations, name: str, device: torch.device
) -> nn.Module:
    """A modulation as the host builds it in an unfolded block."""
    linear = filled_linear(inputs.new_linear, later.shape(name), later.read(name))
    return nn.Sequential(nn.SiLU(), linear).to(device).requires_grad_(False)
