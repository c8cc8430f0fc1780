"""Makes docs/compatibility.md of the table: ``PYTHONPATH=tests python tests/api/compatibility/page.py``."""

from __future__ import annotations

from pathlib import Path

from api.compatibility.cases import outcome
from api.compatibility.harness import ENDPOINTS, Endpoint
from api.compatibility.others import OTHERS
from api.compatibility.samples import is_its_own, parameters

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
HEAD = """\
# Compatibility

<!-- Made by tests/api/compatibility/page.py from the cases that tests/api/test_compatibility.py runs. -->

Each cell is a test: it asks a server with the default model, over HTTP, and looks at the effect. Answers are
checked against OpenAI's own schemas.

* **works**: it does what it says; the test saw its effect.
* **needless**: what it asks for happens anyway; it changes nothing.
* **model**: works with models that have what it takes (a template that asks for it, tokens for gaps, vectors
  that may be cut). The default model does not, and the test saw the server say so.
* **refused**: 400 that names it, always.
* **named**: not served, though the API that the endpoint comes from has it. The header `x-stoker-warning`
  names it; with `server.strict` it is a 400 that names it.
* **-**: not meaningful there; named or refused in the same way.

## Generation

| parameter | chat completions | completions | responses | messages |
|---|---|---|---|---|
"""
OTHER_HEAD = """
The columns are `POST /v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/messages`. What the
parameters do: [Sampling](sampling.md), [Structured outputs](structured-outputs.md), [Tools](tools.md),
[Responses](responses.md), [Anthropic's API](messages.md).

## Everything else

| endpoint | parameters | |
|---|---|---|
"""


def cell(name: str, endpoint: Endpoint) -> str:
    """What the page says of a parameter at an endpoint."""
    return {"depends": "model"}.get(found := outcome(name, endpoint), found) or (
        "named" if is_its_own(name, endpoint) else "-"
    )


def render() -> str:
    """The page."""
    rows = [
        f"| `{name}` | " + " | ".join(cell(name, endpoint) for endpoint in ENDPOINTS) + " |\n"
        for name in parameters()
    ]
    others = [
        f"| `{endpoint}` | {', '.join(f'`{name}`' for name in names.split())} | "
        f"{ {'depends': 'model'}.get(found, found) } |\n"
        for endpoint, names, found, _ in sorted(OTHERS, key=lambda row: row[:2])
    ]
    return HEAD + "".join(rows) + OTHER_HEAD + "".join(others)


if __name__ == "__main__":
    PAGE.write_text(render())
