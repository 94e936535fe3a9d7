"""A fine-tuned variant has weights of its own: loaded alone it is the engine's, in a switchable
model it says how to load it."""

from dataclasses import replace

import pytest
import torch

from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.tensor_files import write_tensors

from ....tiny.trained_run import write_parts
from ..forwards import relative_error
from ..host.test_parity import TOLERANCE


@pytest.fixture(scope="module")
def tuned_bundle(teacher, models, tmp_path_factory):
    """Its smallest variant with every weight moved a little, as a training would."""
    run = Run(tmp_path_factory.mktemp("tuned"))
    plan, weights = write_parts(run, teacher), Weights(teacher)
    source = plan.variant("smallest")
    students = RunStudents(run, weights.config, weights.architecture)
    state = open_variant(weights, students, plan, source, torch.float32, "cpu").state_dict()
    generator = torch.Generator().manual_seed(3)
    moved = {
        f"weight.{n}": t + 0.02 * torch.randn(t.shape, generator=generator)
        for n, t in state.items()
    }
    write_tensors(run.tuned_variant("better"), moved, {"settings": "{}", "step": "1"})
    with_it = plan.with_parts(variants=(*plan.variants, replace(source, name="better", tuned=True)))
    run.plan.write_text(with_it.to_json())
    path = export(
        ExportConfig(
            model=teacher, run=run.folder, layout="bundle", name="with-tuned", store="float32"
        )
    )
    return path.replace(models.ppcl / path.name)


def test_loaded_alone_it_is_the_engines(
    load, velocity, engine_velocity, tuned_bundle, teacher, figures
):
    model = load(tuned_bundle.name, base=teacher.name, variant="better", switchable=False)
    error = relative_error(velocity(model), engine_velocity(tuned_bundle, "better", teacher))
    figures("parity_relative_error", error)
    assert error < TOLERANCE
    plain = load(tuned_bundle.name, base=teacher.name, variant="smallest", switchable=False)
    assert relative_error(velocity(plain), velocity(model)) > 10 * TOLERANCE


def test_in_a_switchable_model_it_names_the_setting(load, switched, tuned_bundle, teacher):
    with pytest.raises(
        ValueError, match="'better' is fine-tuned, with weights of its own; set switchable to off"
    ):
        load(tuned_bundle.name, base=teacher.name, variant="better")
    whole = load(tuned_bundle.name, base=teacher.name, variant="smallest")
    with pytest.raises(
        ValueError, match="'better' is fine-tuned, .* load it with switchable set to off"
    ):
        switched(whole, variant="better")


def test_saved_by_the_host_it_keeps_its_weights(
    saved, opened, load, velocity, tuned_bundle, teacher
):
    model = load(tuned_bundle.name, base=teacher.name, variant="better", switchable=False)
    path, expected = saved(model), velocity(model)
    for name, actual in opened(path).items():
        assert relative_error(actual, expected) < TOLERANCE, name
