"""Each benchmark's own files become prompts with questions, words or a text to fit; what is wrong with a
file is said in one line."""

from __future__ import annotations

import pytest

from ppcl_engine.data.benchmarks import BENCHMARKS
from ppcl_engine.data.benchmarks.items import spread

from ...tiny.benchmark_files import (
    dpg_file,
    geneval_file,
    longtext_file,
    oneig_file,
    t2i_compbench_folder,
    write_csv,
    write_lines,
)


def asked(item) -> list[str]:
    return [question.text for question in item.questions]


def test_dpg_has_questions_that_depend_on_others(tmp_path):
    first, *others = BENCHMARKS["dpg"].items(dpg_file(tmp_path))
    assert (first.name, first.prompt, len(others)) == ("item0", "a red cat", 2)
    assert [question.parents for question in first.questions] == [(), (0,), (0, 1)]


def test_dpg_draws_from_the_text_files_where_they_are(tmp_path):
    path = dpg_file(tmp_path, ["in the csv"])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "item0.txt").write_text("in the folder\n")
    assert BENCHMARKS["dpg"].items(path)[0].prompt == "in the folder"


def test_geneval_asks_for_objects_numbers_colours_and_places(tmp_path):
    items = BENCHMARKS["geneval"].items(geneval_file(tmp_path))
    assert [item.category for item in items] == ["single_object", "colors", "position", "counting"]
    assert [asked(item) for item in items] == [
        ["Is there a bench in this picture?"],
        ["Is there a red dog in this picture?"],
        [
            "Is there a bench in this picture?",
            "Is there a clock in this picture?",
            "Is the clock to the left of the bench in this picture?",
        ],
        ["Are there exactly three buses in this picture?"],
    ]
    assert {item.rule for item in items} == {"all"}


def test_longtext_has_words_to_read(tmp_path):
    items = BENCHMARKS["longtext"].items(longtext_file(tmp_path))
    assert [item.words for item in items] == ["OPEN, daily! Don't wait", "SALE"]
    assert {item.needs for item in items} == {"read"}


def test_oneig_is_judged_in_three_ways(tmp_path):
    people, slide, mountains = BENCHMARKS["oneig"].items(oneig_file(tmp_path))
    assert asked(people) == ["Are there people?", "Are there two?"]
    assert people.questions[1].parents == (0,)
    assert (slide.category, slide.words) == ("text", "['Five G', 'Urban']")
    assert (mountains.category, mountains.fits[:11]) == ("reasoning", "The highest")


def test_t2i_compbench_reads_its_validation_files(tmp_path):
    items = BENCHMARKS["t2i_compbench"].items(t2i_compbench_folder(tmp_path))
    assert [item.category for item in items] == ["color", "color", "spatial", "non_spatial"]
    parts = ["Does this picture show a green bench?", "Does this picture show a blue bowl?"]
    assert asked(items[0]) == parts and items[0].rule == "product"
    assert items[3].needs == "similarity"
    assert len(BENCHMARKS["t2i_compbench"].items(tmp_path / "color_train.txt")) == 1


WRONG = {
    "missing": ("dpg", lambda folder: folder / "no.csv", "does not exist; give dpg_bench.csv"),
    "empty": ("longtext", lambda folder: write_lines(folder / "f", []), "has no prompt"),
    "no column": (
        "dpg",
        lambda folder: write_csv(folder / "f", ("item_id", "text"), [("1", "a")]),
        "has no column 'proposition_id'; it has item_id, text",
    ),
    "short row": (
        "oneig",
        lambda folder: write_csv(folder / "f", ("category", "id", "prompt_en"), [("Portrait",)]),
        "line 2 has no id",
    ),
    "no such parent": (
        "dpg",
        lambda folder: write_csv(
            folder / "f",
            ("item_id", "text", "proposition_id", "dependency", "question_natural_language"),
            [("1", "a", "1", "4", "Is it?")],
        ),
        "line 2 depends on question 4, which its prompt lacks",
    ),
    "not json": (
        "geneval",
        lambda folder: (folder / "f").write_text("{") and folder / "f",
        "line 1",
    ),
    "no text": (
        "longtext",
        lambda folder: write_lines(folder / "f", [{"prompt": "a"}]),
        "line 1 has no 'text', or one of another kind",
    ),
    "no word": (
        "longtext",
        lambda folder: write_lines(folder / "f", [{"prompt": "a", "text": ["?"]}]),
        "nothing is said of prompt 0",
    ),
    "no place": (
        "geneval",
        lambda folder: write_lines(
            folder / "f",
            [{"tag": "t", "prompt": "a", "include": [{"class": "c", "count": 1, "position": 3}]}],
        ),
        "line 1: 'include' does not give class, count and position",
    ),
    "unknown category": (
        "t2i_compbench",
        lambda folder: (folder / "f.txt").write_text("a\n") and folder / "f.txt",
        "does not name a category",
    ),
    "no repository": (
        "oneig",
        lambda folder: write_csv(
            folder / "f", ("category", "id", "prompt_en"), [("Portrait", "000", "a")]
        ),
        "give the csv in a copy of OneIG-Bench's repository",
    ),
}


@pytest.mark.parametrize("name, make, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, name, make, message):
    with pytest.raises(ValueError) as caught:
        BENCHMARKS[name].items(make(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_fewer_prompts_are_spread_over_the_file():
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(2), 5) == [0, 1]
