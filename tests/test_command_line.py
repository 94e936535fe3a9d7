"""A user's mistakes end in one line and exit code 2; a file of several stages is checked before the
first starts."""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from ppcl_engine.__main__ import main, read_run_file
from ppcl_engine.plan import PruningPlan
from ppcl_engine.settings.arguments import parse
from ppcl_engine.settings.assess_settings import InspectConfig, RunConfig
from ppcl_engine.settings.prune_settings import ProbeConfig
from ppcl_engine.stages import STAGES
from ppcl_engine.stages.assess import bench as bench_stage
from ppcl_engine.stages.next_steps import NEXT, next_step
from ppcl_engine.system import atomic

from .tiny.trained_run import poison

EVERY_STAGE = list(STAGES)


@pytest.fixture
def run_folder(tmp_path, teacher_file, make_run):
    return make_run(tmp_path / "run", teacher_file)


def plan_file(run_folder, teacher_file, **changes):
    from ppcl_engine.models.weights import Weights

    weights = Weights(teacher_file)
    values = {"architecture": weights.architecture.name, "config": weights.config, "num_blocks": 6}
    plan = json.loads(PruningPlan(**values, fingerprint=weights.fingerprint).to_json())
    (run_folder / "plan.json").write_text(json.dumps({**plan, **changes}))


def test_unknown_stage_lists_the_known_ones(error_of):
    assert "distill-depth" in error_of("prune")


def test_help_lists_the_stages_by_their_folders(capsys):
    assert main(["--help"]) == 0
    found, room = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line and line[0] != " ":
            room = line.partition(":")[0]
        elif line[2:3].strip():
            found.setdefault(room, []).append(line.split()[0])
    assert list(found) == ["prune", "convert", "assess", "run"]
    assert sorted(name for names in found.values() for name in names) == sorted(
        [*EVERY_STAGE, "run"]
    )
    assert found["prune"] == EVERY_STAGE[:10] and found["run"] == ["demo", "run"]


@pytest.mark.parametrize("stage", [*EVERY_STAGE, "run"])
def test_the_help_of_a_stage_has_every_setting_once(stage, capsys):
    """What a stage needs comes first, how it runs last."""
    assert main([stage, "--help"]) == 0
    text = capsys.readouterr().out
    kind = RunConfig if stage == "run" else STAGES[stage][0]
    names = [field.name.replace("_", "-") for field in fields(kind) if field.name != "file"]
    shown = [line.split()[0].strip(",-") for line in text.splitlines() if line[:4] == "  --"]
    assert sorted(shown) == sorted(names)
    titles = [
        line for line in text.splitlines() if line in ("needed:", "settings:", "how it runs:")
    ]
    assert titles == sorted(titles, key=["needed:", "settings:", "how it runs:"].index)


IMPORTS = """
import sys
from ppcl_engine.__main__ import main
assert main(["--help"]) == main(["probe", "--help"]) == 0
assert main(["prob"]) == main(["probe", "--modle", "m"]) == main(["probe"]) == 2
print({"torch", "numpy", "diffusers", "tyro", "psutil"} & set(sys.modules))
assert main(["distill-depth", "--model", "qwen_image", "--run", sys.argv[1], "--dry-run"]) == 0
print({"diffusers", "transformers", "accelerate", "torch._dynamo", "PIL"} & set(sys.modules))
"""


def test_help_and_a_mistake_need_no_torch_and_a_dry_run_no_diffusers(tmp_path):
    """Their imports take seconds."""
    command = [sys.executable, "-c", IMPORTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines().count("set()") == 2, done.stdout + done.stderr


def test_every_stage_says_what_to_run_next(tmp_path):
    assert NEXT.keys() == STAGES.keys()
    config = ProbeConfig(model=Path("a b.safetensors"), run=tmp_path, streamed=True)
    shared = f"--model 'a b.safetensors' --run {tmp_path} --streamed"
    assert next_step("probe", config, None) == f"next: ppcl detect {shared}"
    for stage, text in NEXT.items():
        following = text.split()[1]
        assert following in STAGES and following != stage
        if "{shared}" in text:  # the command is accepted as it is printed
            parse(STAGES[following][0], following, shlex.split(shared))
    assert next_step("probe", replace(config, dry_run=True), None) == ""
    assert next_step("inspect", InspectConfig(architectures=True), None) == ""
    inspected = next_step("export", config, tmp_path / "x.safetensors")
    assert inspected == f"next: ppcl inspect --path {tmp_path / 'x.safetensors'}"


def test_the_next_command_is_the_last_line(capsys, run_folder, teacher_file):
    settings = ["--model", str(teacher_file), "--run", str(run_folder), "--train-steps", "0"]
    assert main(["probe", *settings, "--device", "cpu"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"next: ppcl detect --model {teacher_file} --run {run_folder} --device cpu"


def test_foreign_and_truncated_files(error_of, tmp_path, teacher_file):
    (tmp_path / "text.safetensors").write_text("this is a poem, not a model")
    assert "not a safetensors file" in error_of("inspect", "--path", tmp_path / "text.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(teacher_file.read_bytes()[:-100])
    assert "truncated" in error_of("inspect", "--path", tmp_path / "cut.safetensors")
    for stage in (
        ("inspect",),
        ("generate", "--prompt", "a"),
        ("generate", "--prompt", "a", "--variant", "small"),
    ):
        line = error_of(*stage, "--path", tmp_path / "nothing")
        assert line == f"ppcl: {tmp_path / 'nothing'} does not exist; give a model file or folder"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fingerprint": "0" * 64}, "is not the teacher of this plan"),
        ({"intervals": [{"first": 1, "last": 9}]}, "interval 1-9 is not inside blocks 0-5"),
        (
            {"intervals": [{"first": 0, "last": 2}, {"first": 2, "last": 3}]},
            "intervals 0-2 and 2-3 overlap",
        ),
        ({"architecture": "sdxl"}, "the plan is for sdxl"),
        ({"speed": 3}, "unknown field 'speed'"),
    ],
)
def test_plans_that_cannot_be_applied(error_of, run_folder, teacher_file, changes, expected):
    plan_file(run_folder, teacher_file, **changes)
    assert expected in error_of("distill-depth", "--model", teacher_file, "--run", run_folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": ["x"]}, "num_attention_heads should be a valid integer"),
        ({"in_channels": None}, "in_channels should be a valid integer"),
        ({"patch_size": 10**30}, "patch_size should be less than or equal to 64"),
        ({"num_attention_heads": 1}, "num_attention_heads is 1, but"),
    ],
)
def test_a_plan_that_describes_another_model(error_of, run_folder, teacher_file, changes, expected):
    from ppcl_engine.models.weights import Weights

    plan_file(run_folder, teacher_file, config={**Weights(teacher_file).config, **changes})
    line = error_of("export", "--model", teacher_file, "--run", run_folder)
    assert f"plan.json: configuration: {expected}" in line
    assert not (run_folder / "exports").exists()


def test_stages_out_of_order_say_what_to_run_first(error_of, tmp_path, run_folder, teacher_file):
    assert "run calibrate first" in error_of(
        "probe", "--model", teacher_file, "--run", tmp_path / "empty"
    )
    assert "run detect first" in error_of(
        "distill-depth", "--model", teacher_file, "--run", run_folder
    )
    assert "run probe first" in error_of("detect", "--model", teacher_file, "--run", run_folder)


def test_a_read_only_place_and_a_full_disk(error_of, run_folder, teacher_file, monkeypatch):
    """A folder that cannot be made (root may write anywhere, /proc takes no file), and a disk
    without space."""
    line = error_of("demo", "--run", "/proc/ppcl")
    assert "/proc/ppcl" in line

    def full(*arguments, **named):
        raise OSError(
            errno.ENOSPC,
            "No space left on device",
            str(run_folder / "block_000.safetensors"),
        )

    monkeypatch.setattr(atomic.os, "fsync", full)
    line = error_of("probe", "--model", teacher_file, "--run", run_folder)
    assert "No space left on device" in line and "block_000" in line
    assert not list(run_folder.rglob("*.partial")) and not list(
        run_folder.glob("probes/*.safetensors")
    )


def test_a_loss_that_is_not_a_number_names_step_and_interval(
    error_of, run_folder, teacher_file, monkeypatch
):
    plan_file(run_folder, teacher_file, intervals=[{"first": 1, "last": 2}])
    poison(monkeypatch, step=4)
    line = error_of(
        "distill-depth", "--model", teacher_file, "--run", run_folder, "--rounds", 2, "--updates", 4
    )
    assert "step 4 of interval 1-2" in line and "the last good state (step 4) is kept" in line


def test_a_run_file_is_checked_before_anything_starts(tmp_path, error_of):
    path = tmp_path / "run.toml"
    path.write_text('[common]\nmodel = "m"\nrun = "r"\n[probe]\n[detect]\nlongestt = 3\n')
    assert "[detect]: unknown setting 'longestt'" in error_of("run", path)
    path.write_text('[common]\nmodel = "m"\nrun = "r"\n[detect]\nkernel = "cubic"\n')
    assert "kernel = 'cubic'; choose from linear, rbf" in error_of("run", path)
    path.write_text("[prune]\n")
    assert "unknown stage [prune]" in error_of("run", path)
    path.write_text(
        '[common]\nmodel = "m"\nrun = "r"\nstreamed = true\n[distill-depth]\nlearning_rate = 1\n[probe]\n'
    )
    assert [stage for stage, _ in read_run_file(path)] == ["distill-depth", "probe"]


def test_dry_run_of_the_twenty_billion_model_needs_no_weights(capsys, tmp_path):
    assert (
        main(["distill-depth", "--model", "qwen_image", "--run", str(tmp_path), "--dry-run"]) == 0
    )
    text = capsys.readouterr().out
    assert "60 blocks, 20.43 B" in text and "resident" in text and "streamed" in text
    assert "distill-depth with these settings" in text and "GB of files" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", ["--help", "inspect --architectures"])
def test_output_that_cannot_be_written_is_one_line(arguments):
    """As on a full disk behind standard output."""
    command = f"{sys.executable} -m ppcl_engine {arguments} > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"{sys.executable} -m ppcl_engine --help | true"
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ""


def test_a_lack_of_memory_is_one_line(error_of, teacher_file, monkeypatch):
    def greedy(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(bench_stage, "bench", greedy)
    assert "bench ran out of memory; use --streamed" in error_of("bench", "--path", teacher_file)


def test_a_run_file_without_a_stage_says_so(error_of, tmp_path):
    (tmp_path / "run.toml").write_text("[common]\nseed = 1\n")
    assert "names no stage" in error_of("run", tmp_path / "run.toml")
