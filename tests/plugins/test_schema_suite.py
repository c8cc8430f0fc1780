"""A suite of JSON schemas as people write them: what compiles, what is refused and why, what comes out.

The schemas are in ``tests/data/schemas.jsonl``; docs/structured-outputs.md shows what this says.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from stoker import Grammar, GrammarSpec, InvalidRequestError
from stoker.testing import ScriptedRuntime
from stoker_plugins.grammars.compiler import LlguidanceCompiler

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/structured-outputs.md"
SCHEMAS: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "tests/data/schemas.jsonl").read_text().strip().split("\n")
]
UNCHECKABLE = {"pattern: property of unicode", "exclusive, old spelling"}  # not with jsonschema
_RUNTIME = ScriptedRuntime()
COMPILER = LlguidanceCompiler(_RUNTIME.tokenizer, _RUNTIME.info)
_END = 257


def compiled(entry: dict[str, Any], *, strict: bool = True) -> Grammar | str:
    """The grammar, or why there is none."""
    text = json.dumps(entry["schema"])
    try:
        return COMPILER.compile(
            GrammarSpec(kind="json_schema", text=text, param="schema", strict=strict)
        )
    except InvalidRequestError as error:
        return re.sub(r"\s+", " ", f"{error.param}: {error}").removeprefix("schema: ")


def table() -> str:
    """The part of the page that this suite stands for."""
    groups: dict[str, Counter[bool]] = {}
    refused = []
    for entry in SCHEMAS:
        found = compiled(entry)
        groups.setdefault(entry["group"], Counter())[isinstance(found, str)] += 1
        if isinstance(found, str):
            reason = found.removeprefix("schema cannot be used: ").removeprefix("schema ")
            refused.append(f"* {entry['group']}, {entry['name']}: {reason}")
    lines = ["| group | schemas | compile | refused |", "| --- | --- | --- | --- |"]
    for group, counts in groups.items():
        lines.append(f"| {group} | {counts.total()} | {counts[False]} | {counts[True]} |")
    total = sum(groups.values(), Counter[bool]())
    lines.append(f"| all | {total.total()} | {total[False]} | {total[True]} |")
    return "\n".join([*lines, "", "Refused, with what the answer says:", "", *refused])


@pytest.mark.slow
def test_coverage_is_what_the_page_says() -> None:
    assert len(SCHEMAS) == 236
    found = [compiled(entry) for entry in SCHEMAS]
    assert sum(isinstance(grammar, Grammar) for grammar in found) == 197
    assert table() in PAGE.read_text(), "run: python tests/plugins/test_schema_suite.py"


@pytest.mark.slow
def test_not_strict_takes_more_and_tells_what_is_left_out() -> None:
    more = []
    for entry in SCHEMAS:
        if isinstance(compiled(entry), str):
            lenient = compiled(entry, strict=False)
            if isinstance(lenient, Grammar):
                assert lenient.warnings, entry["name"]
                more.append(entry["name"])
    assert {"not in a property", "unique", "regex", "one of objects that overlap"} <= set(more)
    assert "dangling reference" not in more


def sample(grammar: Grammar, seed: int, max_tokens: int = 2500) -> str | None:
    """Text drawn from noise within the grammar; ``None`` if it does not end."""
    rng = np.random.default_rng(seed)
    matcher = grammar.start()
    mask = np.zeros(9, np.int32)
    output: list[int] = []
    while len(output) < max_tokens:
        matcher.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=261).view(np.bool_)
        logits = rng.normal(0, 3, 261)
        logits[[ord(character) for character in '"}],']] += 4  # so that it comes to an end
        token = int(np.where(bits, logits, -np.inf).argmax())
        if token == _END:
            break
        assert matcher.accept(token)
        output.append(token)
        if matcher.is_complete:
            break
    else:
        return None
    return bytes(output).decode()


@pytest.mark.slow
def test_outputs_are_valid() -> None:
    unfinished = []
    for entry in SCHEMAS:
        grammar = compiled(entry)
        if isinstance(grammar, str):
            continue
        for seed in range(3):
            text = sample(grammar, seed)
            if text is None:
                unfinished.append(entry["name"])
                continue
            instance = json.loads(text)
            if entry["name"] not in UNCHECKABLE:
                formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
                jsonschema.validate(instance, entry["schema"], format_checker=formats)
    # Of noise, what has to end in "z" comes to no end in time.
    assert set(unfinished) <= {"pattern: anchored right"}


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition("| group |")
    after = rest[rest.index("\n\n## ") :]
    PAGE.write_text(before + table() + after)
    sys.stdout.write(f"{PAGE} written\n")
