"""docs/policies.md says what the policies do: its pictures, its figures and its options are the code's."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from stoker_plugins.policies.options import (
    DeadlineOptions,
    FairOptions,
    FcfsOptions,
    TokenBudgetOptions,
)
from stoker_policy_priority import Options as PriorityOptions

pytestmark = pytest.mark.contrib

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "policies.md").read_text()
POLICIES = ["fcfs", "token-budget", "fair", "deadline", "priority"]


@cache
def script() -> ModuleType:
    """The script that draws; dataclasses look their module up by name."""
    path = DOCS / "pictures" / "draw_policies.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@cache
def played(name: str) -> Any:
    return script().play(script().POLICIES[name]())


def section(name: str) -> str:
    start = PAGE.index(f"### {name}\n")
    return PAGE[start:].split("\n### ")[0]


def test_the_page_shows_every_policy_that_is_drawn() -> None:
    assert list(script().POLICIES) == POLICIES
    assert re.findall(r"^### (.+)$", PAGE, re.MULTILINE) == POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_the_pictures_are_what_the_script_draws(name: str) -> None:
    file = DOCS / "pictures" / f"policy-{name}.svg"
    assert file.read_text() == script().picture(name, played(name)), (
        "python docs/pictures/draw_policies.py draws them anew"
    )
    ElementTree.parse(file)
    assert f"![{name}](pictures/{file.name})" in section(name)


@pytest.mark.slow
def test_the_table_is_what_the_script_computes() -> None:
    shown = re.search(r"<!-- table: \S+ -->\n(.*?)<!-- end of table -->", PAGE, re.DOTALL)
    assert shown is not None
    assert shown[1] == script().table()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_the_whole_trace(name: str) -> None:
    """What is not ended by its deadline gets all of its tokens, one lane at a time."""
    requests = played(name)
    assert sorted(one.arrival.at_s for one in requests) == [a.at_s for a in script().trace()]
    for one in requests:
        assert one.is_missed or one.first_s is not None
        assert not one.is_missed or one.arrival.timeout_s is not None
        ends = [end_s for _, end_s, _, _ in one.spans]
        starts = [start_s for start_s, _, _, _ in one.spans]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    by_lane: dict[int, list[tuple[float, float]]] = {}
    for one in requests:
        for start_s, end_s, lane, _ in one.spans:
            by_lane.setdefault(lane, []).append((start_s, end_s))
    for spans in by_lane.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_the_page_says_truly_who_wins() -> None:
    """The sentences beside the pictures, as far as they compare."""
    rows = {name: script().row(name, played(name)).split("|") for name in POLICIES}
    chat = {name: float(row[2]) for name, row in rows.items()}
    missed = {name: int(row[4].split()[0]) for name, row in rows.items()}
    preemptions = {name: int(row[5]) for name, row in rows.items()}
    done = {name: float(row[6]) for name, row in rows.items()}
    assert max(chat["fair"], chat["priority"]) < chat["token-budget"] < chat["fcfs"]
    assert chat["deadline"] > chat["token-budget"]
    assert missed["deadline"] == 0 < min(missed["fcfs"], missed["priority"])
    assert preemptions["fcfs"] == 0
    assert min(done, key=lambda name: done[name]) == "fcfs"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcfs", FcfsOptions),
        ("token-budget", TokenBudgetOptions),
        ("fair", FairOptions),
        ("deadline", DeadlineOptions),
        ("priority", PriorityOptions),
    ],
)
def test_every_option_stands_on_the_page_with_its_default(
    name: str, options: type[msgspec.Struct]
) -> None:
    fields = msgspec.structs.fields(options)
    for field in fields:
        default = msgspec.json.encode(field.default).decode()
        assert f"| `{field.name}` | `{default}` |" in section(name)
    assert len(re.findall(r"^\| `\w+` \| `", section(name), re.MULTILINE)) == len(fields)
