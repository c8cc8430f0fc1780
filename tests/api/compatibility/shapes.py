"""Probes of the parameters that say what an answer must look like."""

from __future__ import annotations

import json
import re

from api.compatibility.cases import works
from api.compatibility.harness import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Ask

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}},
    "required": ["animal"],
    "additionalProperties": False,
}
NAMED = {"name": "animal", "schema": SCHEMA, "strict": True}


def is_animal(ask: Ask, **shape: object) -> None:
    """The answer is one of two objects, which nobody would give to the question about colors."""
    answer = ask(tokens=40, **shape)
    assert answer.ended
    assert json.loads(answer.text) in ({"animal": "cat"}, {"animal": "dog"})


@works("response_format", CHAT, COMPLETIONS)
def response_format(ask: Ask) -> None:
    is_animal(ask, response_format={"type": "json_schema", "json_schema": NAMED})
    anything = ask(response_format={"type": "json_object"}, tokens=4)
    assert anything.text.lstrip().startswith("{")
    assert ask(response_format={"type": "text"}).text == ask.greedy()


@works("text", RESPONSES)
def text_format(ask: Ask) -> None:
    is_animal(ask, text={"format": {"type": "json_schema", **NAMED}})


@works("output_config", MESSAGES)
def output_config(ask: Ask) -> None:
    is_animal(ask, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})


@works("output_format", MESSAGES)
def output_format(ask: Ask) -> None:
    is_animal(ask, output_format={"type": "json_schema", "schema": SCHEMA})


@works("guided_json", CHAT, COMPLETIONS)
def guided_json(ask: Ask) -> None:
    is_animal(ask, guided_json=SCHEMA)
    is_animal(ask, guided_json=json.dumps(SCHEMA))


@works("json_schema", CHAT, COMPLETIONS)
def json_schema(ask: Ask) -> None:
    is_animal(ask, json_schema=SCHEMA)


@works("structured_outputs", CHAT, COMPLETIONS, RESPONSES)
def structured_outputs(ask: Ask) -> None:
    is_animal(ask, structured_outputs={"json": SCHEMA})
    assert ask(structured_outputs={"choice": ["ox", "ass"]}).text in {"ox", "ass"}
    assert ask(structured_outputs={"regex": "[xyz]{4}"}).text.strip("xyz") == ""


@works("guided_regex", CHAT, COMPLETIONS)
def guided_regex(ask: Ask) -> None:
    answer = ask(guided_regex="[0-9]{3}-[0-9]{2}", tokens=20)
    first, last = answer.text.split("-")
    assert (first.isdigit(), len(first), last.isdigit(), len(last)) == (True, 3, True, 2)


@works("guided_choice", CHAT, COMPLETIONS)
def guided_choice(ask: Ask) -> None:
    assert ask(guided_choice=["horse", "donkey"]).text in {"horse", "donkey"}


@works("guided_grammar", CHAT, COMPLETIONS)
def guided_grammar(ask: Ask) -> None:
    assert re.fullmatch("ab+c?", ask(guided_grammar='root ::= "a" "b"+ "c"').text)
    assert ask(guided_grammar='start: "x" /[yz]{2}/').text in {"xyy", "xyz", "xzy", "xzz"}


@works("grammar", CHAT, COMPLETIONS)
def grammar(ask: Ask) -> None:
    assert ask(grammar='root ::= "<" ("yes" | "no") ">"', tokens=12).text in {"<yes>", "<no>"}
