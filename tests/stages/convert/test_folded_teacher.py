"""The method on a folded teacher: students are folded too, with a third fewer numbers to train, and
give the teacher's blocks back like any other."""

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.weights import Weights, parameter_count
from ppcl_engine.settings.convert_settings import ExportConfig, FoldConfig
from ppcl_engine.settings.prune_settings import DistillWidthConfig, FinetuneConfig, PolishConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.system.tensor_files import TensorFile

RANK = 3


@pytest.fixture(scope="module")
def folded_teacher(tmp_path_factory, teacher_file):
    folder = tmp_path_factory.mktemp("folded")
    return fold(FoldConfig(path=teacher_file, form="basis", rank=RANK, run=folder, device="cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folded_teacher, make_run, run_stages):
    """Run folders after depth, width, polish and fine-tuning, resident and streamed."""
    found = {}
    for streamed in (False, True):
        folder = make_run(tmp_path_factory.mktemp("run"), folded_teacher)
        run = run_stages(
            folded_teacher, folder, "probe", "detect", "distill_depth", streamed=streamed
        )
        common = {"model": folded_teacher, "run": folder, "device": "cpu", "streamed": streamed}
        first = run.load_plan().intervals[0].first
        distill_width(DistillWidthConfig(**common, sites=f"ffn_image:{first}", rounds=1, updates=2))
        polish(PolishConfig(**common, steps=2))
        run_stages(folded_teacher, folder, "variants", streamed=streamed)
        finetune(FinetuneConfig(**common, variant="smallest", steps=2, checkpointing=streamed))
        found[streamed] = run
    return found


def test_students_are_folded(trained, folded_teacher, architecture):
    run, config = trained[False], Weights(folded_teacher).config
    for interval in run.load_plan().intervals:
        file = TensorFile(run.student(interval.name))
        for kind in ("weight", "first", "second"):  # the weights, and the optimiser's state of them
            assert file.shape(f"{kind}.img_mod.1.weight") == (
                6 * architecture.width(config),
                1 + RANK,
            )
        assert not any("directions" in name for name in file.keys())


def test_streamed_is_the_same_bits(trained):
    files = [
        {p.relative_to(run.folder): p.read_bytes() for p in run.students.rglob("*")}
        for run in trained.values()
    ]
    assert files[0] == files[1]


def test_a_bundle_of_it_opens(trained, folded_teacher, architecture, padded_inputs, tmp_path):
    path = export(
        ExportConfig(
            model=folded_teacher, run=trained[False].folder, layout="bundle", store="float32"
        )
    )
    plan, inputs = Bundle(path).plan, padded_inputs()
    teacher = open_model(folded_teacher)
    assert torch.equal(
        architecture.call(open_model(path, "full", folded_teacher), inputs),
        architecture.call(teacher, inputs),
    )
    pruned = [variant for variant in plan.variants if variant.intervals]
    assert {variant.tuned for variant in pruned} == {False, True}
    for variant in pruned:
        model = open_model(path, variant.name, folded_teacher)
        assert parameter_count(model) == variant.parameters < parameter_count(teacher)
        assert not torch.equal(architecture.call(model, inputs), architecture.call(teacher, inputs))
    alone = export(
        ExportConfig(
            model=folded_teacher,
            run=trained[False].folder,
            layout="ppcl",
            store="float32",
            variant="smallest",
        )
    )
    assert torch.equal(
        architecture.call(open_model(alone), inputs),
        architecture.call(open_model(path, "smallest", folded_teacher), inputs),
    )


def test_a_table_knows_too_few_timesteps_to_train_on(teacher_file, tmp_path, make_run, run_stages):
    table = fold(
        FoldConfig(path=teacher_file, form="table", run=tmp_path, dtype="float32", device="cpu")
    )
    folder = make_run(tmp_path / "run", table)
    with pytest.raises(
        ValueError, match="the model's table has no timestep .* or fold with form basis"
    ):
        run_stages(table, folder, "probe")
