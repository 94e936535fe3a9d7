"""What a new run begins with: hard links to what is still valid, and nothing that it does changes
another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppcl_engine.jobs import reuse
from ppcl_engine.jobs.spec import configs, read_spec
from ppcl_engine.jobs.state import read_state
from ppcl_engine.jobs.store import RunStore
from ppcl_engine.plan import plan_from_json
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage
from ppcl_engine.system.atomic import write_text

from .conftest import files_of, finish, recording


def test_links_become_copies_where_there_are_none(store, prepare, monkeypatch):
    def impossible(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(reuse.os, "link", impossible)
    path = prepare("probe", "probe")
    assert (path / "calibration.safetensors").stat().st_nlink == 1
    assert (path / "calibration.safetensors").read_bytes() == (
        store.path(recording(store)) / "calibration.safetensors"
    ).read_bytes()


def test_products_are_what_stages_exchange(tmp_path):
    run = Run(tmp_path)
    names = {
        p.name
        for p in (
            run.calibration,
            run.probes,
            run.curves,
            run.detection,
            run.plan,
            run.students,
            run.projections,
            run.width,
            run.alignment,
            run.tuned,
            run.polished_parts,
        )
    }
    assert set(reuse.PRODUCTS) == names and run.states.name == reuse.SCRATCH


@pytest.fixture(scope="module")
def made(tmp_path_factory, teacher_file, record, run_stages, stages_of):
    """A store with a run that is really done: probed, detected, distilled."""
    store = RunStore(tmp_path_factory.mktemp("made") / "ppcl")
    upstream = record(store, teacher_file)
    path = store.prepare("distill", stages_of("probe", "detect", "distill-depth"), upstream).path
    run_stages(
        teacher_file,
        path,
        "probe",
        "detect",
        "distill_depth",
        rounds=3,
        updates=6,
        bootstrap=4,
        longest=3,
    )
    finish(path)
    return store, path


def test_no_later_stage_changes_the_run_before(made, stages_of, run_stages, teacher_file):
    """Hard links are safe only while every file is replaced whole."""
    store, path = made
    before = files_of(path)
    later = store.prepare("later", stages_of("variants", "polish", "export"), path.name).path
    linked = [name for name in before if name.endswith(".safetensors")]
    assert linked and all((later / name).samefile(path / name) for name in linked)
    for stage, config in configs(read_spec(later), later):
        run_stage(stage, config)
    assert (later / "plan.json").read_bytes() != before["plan.json"]
    run_stages(
        teacher_file,
        later,
        "probe",
        "detect",
        "distill_depth",
        rounds=3,
        updates=6,
        bootstrap=4,
        longest=3,
    )
    assert files_of(path) == before
    assert (later / "exports").exists() and not (path / "exports").exists()
    assert not any(store.exports_of(store.path(name)) for name, _ in store.names())
    finish(later)
    assert store.exports_of(later) == [later / "exports" / "pruned.ppcl.safetensors"]
    another = store.prepare("another", stages_of("variants"), later.name).path
    assert not (another / "exports").exists()  # listed once


def test_a_changed_request_takes_what_is_still_valid(made, stages_of):
    store, path = made
    upstream = read_spec(path).upstream
    changed = store.prepare(
        "distill", stages_of("probe", "detect", "distill-depth", detect={"remove": 3}), upstream
    ).path
    assert changed.name.rpartition("-")[0] == path.name.rpartition("-")[0] and changed != path
    for part in ("probes", "depth"):
        assert {p.name for p in (changed / part).iterdir()} == {
            p.name for p in (path / part).iterdir()
        }
    assert (changed / "curves.safetensors").samefile(path / "curves.safetensors")
    assert not (changed / "plan.json").exists()
    other = {"learning_rate": 5e-3}
    slower = store.prepare(
        "distill", stages_of("probe", "detect", "distill-depth", distill_depth=other), upstream
    ).path
    assert (slower / "probes").exists() and not (slower / "depth").exists()
    assert not (store.prepare("else", stages_of("distill-depth"), upstream).path / "depth").exists()


def test_students_of_other_settings_stay_behind(made, stages_of):
    store, path = made
    same = store.prepare(
        "more", stages_of("distill-depth", distill_depth={"intervals": "1-2"}), path.name
    ).path
    other = store.prepare(
        "more", stages_of("distill-depth", distill_depth={"seed": 9}), path.name
    ).path
    assert (same / "depth").exists() and not (other / "depth").exists()
    assert (other / "plan.json").read_bytes() == (path / "plan.json").read_bytes()


def test_a_derived_run_is_done_at_once_and_made_once(made):
    store, path = made
    plan = plan_from_json((path / "plan.json").read_text())
    before, calls = files_of(path), []

    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "plan.json").write_text(plan.with_parts(intervals=(), variants=()).to_json())

    first = store.derive("plan", path.name, write, {"intervals": "first"})
    assert (
        store.derive("plan", path.name, write, {"intervals": "first"}) == first and len(calls) == 1
    )
    assert store.derive("plan", path.name, write, {"intervals": "second"}) != first
    assert read_state(first).status == "done" and read_spec(first).upstream == path.name
    assert Run(first).load_plan().intervals == () and (first / "depth").exists()
    assert files_of(path) == before
    with pytest.raises(ZeroDivisionError):
        store.derive("plan", path.name, lambda folder: 1 / 0, {})
    assert not list(store.root.glob(".new-*"))


def test_projections_of_another_plan_stay_behind(made):
    store, path = made
    trained = store.derive(
        "width",
        path.name,
        lambda folder: write_text(folder / "width" / "1.text.safetensors", "x"),
        {},
    )
    plan = json.loads((trained / "plan.json").read_text())

    def rename(folder: Path) -> None:
        write_text(folder / "plan.json", json.dumps({**plan, "variants": []}))

    def shorten(folder: Path) -> None:
        write_text(folder / "plan.json", json.dumps({**plan, "intervals": [], "variants": []}))

    assert (store.derive("plan", trained.name, rename, {"is": "renamed"}) / "width").exists()
    assert not (store.derive("plan", trained.name, shorten, {"is": "shortened"}) / "width").exists()
