"""The protocol is whole: every architecture has all of it, and the page on adding one
names all of it."""

import re
from pathlib import Path

import pytest

from ppcl_engine.architectures import ARCHITECTURES, Architecture

MEMBERS = {
    name
    for name in {*vars(Architecture), *Architecture.__annotations__}
    if not name.startswith("_")
}
PAGE = Path(__file__).parents[2] / "docs" / "adding-an-architecture.md"


OF_FOLDING = {"reference_timesteps", "time_conditioning"}  # where modulations can be folded


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_an_architecture_has_all_of_it(architecture):
    asked = MEMBERS if architecture.timestep_modulations else MEMBERS - OF_FOLDING
    assert not [name for name in sorted(asked) if not hasattr(architecture, name)]


def test_the_page_on_adding_one_names_all_of_it():
    named = set(re.findall(r"`(\w+)[`(]", PAGE.read_text(encoding="utf-8")))
    assert sorted(MEMBERS - named) == []
