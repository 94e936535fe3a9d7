"""Every setting states what it may be, once; the command line and run files refuse the rest in one
line, exit code 2."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from ppcl_engine.__main__ import USER_ERROR, main, read_run_file
from ppcl_engine.jobs.spec import JobSpec
from ppcl_engine.settings import convert_settings, prune_settings
from ppcl_engine.settings.base_settings import from_mapping
from ppcl_engine.settings.ranges import OutOfRange, Range, Settings, rules_of
from ppcl_engine.stages import STAGES
from ppcl_engine.system.machine import resolve_device
from ppcl_engine.system.wording import MOST_SHOWN, known_names, one_line, shown

KINDS = {stage: kind for stage, (kind, _) in STAGES.items()} | {"job": JobSpec}
NUMBERS = [
    (stage, name, rule)
    for stage, kind in KINDS.items()
    for name, rule in rules_of(kind).items()
    if isinstance(rule, Range)
]
WRONG = [
    ("distill-depth", "--rounds", "-1"),
    ("distill-depth", "--learning-rate", "1e30"),
    ("distill-depth", "--weight-decay", "inf"),
    ("calibrate", "--batch", "0"),
    ("calibrate", "--samples", "0"),
    ("calibrate", "--height", "-16"),
    ("calibrate", "--seed", str(2**64)),
    ("generate", "--steps", "0"),
    ("generate", "--guidance", "nan"),
    ("detect", "--remove", "-1"),
    ("detect-width", "--cache-gb", "0"),
    ("polish", "--all-on", "nan"),
    ("polish", "--ema", "1"),
    ("probe", "--ridge", "0"),
    ("probe", "--ridge", "abc"),
    ("probe", "--held-out", "9" * 5000),
    ("probe", "--dtype", "float16"),
    ("probe", "--ridge", "x" * 5000),
    ("probe", "--device", "\x1b[31m\nred"),
    ("bench", "--rows", "-3"),
    ("fold", "--rank", "0"),
    ("sparsify", "--sparsity", "-0.5"),
    ("export", "--name", "../up"),
    ("finetune", "--name", "n" * 81),
    ("distill-depth", "--correction", "\u00b2"),
]


def needed(stage: str) -> dict:
    """Values for the settings of a stage that have no default."""
    missing = [f.name for f in dataclasses.fields(KINDS[stage]) if f.default is dataclasses.MISSING]
    return {name: () if name == "stages" else "m" for name in missing}


@pytest.fixture
def line_of(capsys):
    """Runs a command that must fail; returns all that it said, one line."""

    def run(*arguments) -> str:
        assert main([str(a) for a in arguments]) == USER_ERROR
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert said.err.startswith("ppcl: ") and said.err[:-1].isprintable()
        return said.err[:-1]

    return run


def required(stage: str) -> list[str]:
    return [word for name in needed(stage) for word in (f"--{name}", "m")]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_number_has_a_range_that_holds_its_default(kind):
    assert issubclass(kind, Settings)
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if {int, float} & {hint, *typing.get_args(hint)}:
            rule = rules_of(kind)[field.name]
            assert field.default is None or rule.holds(field.default), field.name
            whole = int in (hint, *typing.get_args(hint))
            assert {type(rule.least), type(rule.most)} == {int if whole else float}, field.name
    if "device" in {field.name for field in dataclasses.fields(kind)}:
        assert "device" in rules_of(kind)


@pytest.mark.parametrize(
    "stage, name, rule", NUMBERS, ids=[f"{stage} {name}" for stage, name, _ in NUMBERS]
)
def test_a_number_outside_its_range_is_refused(stage, name, rule):
    kind, whole = KINDS[stage], isinstance(rule.least, int)
    outside = [
        rule.least - 1,
        rule.most + 1,
        *([2**64, -(2**64)] if whole else [math.nan, math.inf, -math.inf, 1e30]),
    ]
    for value in outside:
        with pytest.raises(OutOfRange) as caught:
            kind(**needed(stage), **{name: value})
        assert str(caught.value) == f"--{name.replace('_', '-')} {value}: choose {rule}"
        if kind is not JobSpec:  # which is not read field by field
            with pytest.raises(
                ValueError, match=f"^here: {name} = .*; choose a (whole )?number from"
            ):
                from_mapping(kind, {**needed(stage), name: value}, "here")
    for value in (rule.least, rule.most):
        assert getattr(kind(**needed(stage), **{name: value}), name) == value


@pytest.mark.parametrize("stage, setting, value", WRONG)
def test_the_command_line_says_it_in_one_line(line_of, stage, setting, value):
    line = line_of(stage, *required(stage), setting, value)
    assert setting in line and f"ppcl {stage} --help" in line
    assert len(line) < 250


@pytest.mark.parametrize(
    "name", ["gpu", "", "x", "cuda:", "cuda:x", "CPU", "cuda:99999", "cuda:\u0663", "cpu\n"]
)
def test_a_device_that_is_none(line_of, name):
    for stage in ("probe", "fold", "generate", "bench", "demo", "import", "sparsify"):
        assert "choose auto, cpu, cuda or cuda:1" in line_of(
            stage, *required(stage), "--device", name
        )
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or cuda:1"):
        resolve_device(name)


def test_a_gpu_that_is_not_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(
        ValueError, match="device cuda:99 is not on this machine; its GPUs are cuda:0 to cuda:1"
    ):
        resolve_device("cuda:99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda:99 is not on this machine; use --device cpu"):
        resolve_device("cuda:99")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["prob"], "unknown stage 'prob'; did you mean 'probe'? known: data,"),
        (["x" * 5000], f"unknown stage '{'x' * (MOST_SHOWN - 2)}…; known: data,"),
        (
            ["detect", "--longestt", "3"],
            "detect has no setting '--longestt'; did you mean '--longest'? known: --biased,",
        ),
        (["detect", "--no-explane"], "detect has no setting '--no-explane'; did you mean"),
        (["detect", f"--{'y' * 5000}=3"], "detect has no setting '--yyy"),
        (["detect"], "detect needs --model and --run; ppcl detect --help lists the settings"),
        (["detect", "--model", "m"], "detect needs --run;"),
        (
            ["detect", "--model", "m", "--run", "r", "more"],
            "Unrecognized options: more; ppcl detect --help",
        ),
        (
            ["detect", "--model", "m", "--run", "r", "--device"],
            "Missing value for argument '--device'",
        ),
        (["run"], "run needs a file; write ppcl run FILE"),
        (["run", "a", "b"], "Unrecognized options: b;"),
        (["run", "--tinny"], "run has no setting '--tinny'; did you mean '--tiny'?"),
        (["probe", "--model", "z" * 5000, "--run", "r"], f"{'z' * 70}"),
    ],
)
def test_a_misspelt_word_names_the_nearest(line_of, arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = line_of(*arguments)
    assert line in found
    assert not any(len(word) > MOST_SHOWN + 1 for word in found.replace("'", " ").split())


def test_help_is_not_in_one_line(capsys):
    assert main(["probe", "--help"]) == 0
    assert capsys.readouterr().out.count("\n") > 20


@pytest.mark.parametrize(
    "text, line",
    [
        ("[probe]\nridge = nan\n", "[probe]: ridge = nan; choose a number from 1e-09 to 1"),
        ("[probe]\nridge = inf\n", "[probe]: ridge = inf; choose a number"),
        (f"[probe]\nridge = {10**400}\n", "[probe]: ridge = 1e+300; choose a number"),
        (
            f"[probe]\nheld_out = {2**70}\n",
            f"[probe]: held_out = {2**70}; choose a whole number from 1",
        ),
        ("[probe]\nheld_out = true\n", "[probe]: held_out = True is not int"),
        (
            "[probe]\nheld_outt = 1\n",
            "[probe]: unknown setting 'held_outt'; did you mean 'held_out'? known: device",
        ),
        (
            "[polish]\nparallel = 'intervals'\n",
            "[polish]: --parallel intervals: this stage trains all parts on one loss",
        ),
        (f"[detect]\ndevice = '{'x' * 5000}'\n", "[detect]: device = 'xxxx"),
        ("[detekt]\n", "unknown stage [detekt]; did you mean 'detect'? known:"),
        (
            "probe = 3\n[common]\n",
            "'probe' is not a table; write [probe] and its settings below it",
        ),
        ("[[probe]]\nridge = 0.1\n", "'probe' is not a table"),
        ("common = 3\n", "'common' is not a table"),
    ],
)
def test_run_files_take_the_same(tmp_path, line_of, text, line):
    path = tmp_path / "run.toml"
    path.write_text(
        text.replace("]\n", "]\nmodel = 'm'\nrun = 'r'\n", 1) if text[0] == "[" else text
    )
    found = line_of("run", path)
    assert f"{path}" in found and line in found and len(found) < len(str(path)) + 400


def test_a_run_file_at_the_edges_is_taken(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[common]\nmodel = 'm'\nrun = 'r'\n[probe]\nridge = 1\nseed = 2147483647\n[polish]\nema = 0\n"
    )
    (_, probe), (_, polish) = read_run_file(path)
    assert (probe.ridge, probe.seed, polish.ema) == (1.0, 2**31 - 1, 0.0)


def test_lines_are_one_and_short():
    assert one_line("a\nb\tc\x1b[1m\u2028d") == "a b c\\x1b[1m d"
    assert one_line("no 'aaaa' here", ["aaaa"]) == "no 'aaaa' here"
    assert len(one_line(f"{'p' * 300} and '{'q r ' * 300}' and {'s ' * 300}", ["s " * 300])) < 300
    between = f"a '\\' here, {'and so on ' * 20}as 'C:\\models'"
    assert one_line(between) == between
    assert one_line(f'it\'s "{"it is " * 30}"') == f'it\'s "{("it is " * 30)[:79]}…"'
    assert shown("a" * 100) == f"'{'a' * 78}…" and shown(3) == "3"
    assert known_names("red", ["reed", "blue"]) == "did you mean 'reed'? known: reed, blue"
    assert known_names("zzz", ["reed"]) == "known: reed"


def test_a_path_whose_folder_is_there_stays_whole(tmp_path):
    path = tmp_path / ("n" * 200)
    assert (
        one_line(f"{path} does not exist; give '{path}'") == f"{path} does not exist; give '{path}'"
    )
    assert len(one_line(f"/nowhere/{'n' * 200}: gone")) < 100


def test_settings_of_nodes_and_files_are_the_same_class():
    assert (
        rules_of(prune_settings.ProbeConfig)["device"]
        is rules_of(convert_settings.FoldConfig)["device"]
    )


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="--run .* is not UTF-8"):
        prune_settings.ProbeConfig(model=tmp_path, run=tmp_path / "f\udcff")
