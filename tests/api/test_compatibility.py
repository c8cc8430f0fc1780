"""The whole table of parameters and endpoints, on the default model: see ``compatibility/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from api.compatibility.cases import Probe, probes
from api.compatibility.conversation import CONTEXT, NUM_LANES
from api.compatibility.harness import (
    CHAT,
    COMPLETIONS,
    ENDPOINTS,
    MESSAGES,
    RESPONSES,
    WARNING,
    Ask,
    Endpoint,
)
from api.compatibility.others import OTHERS
from api.compatibility.page import PAGE, render
from api.compatibility.samples import SAMPLES, SPECIFIED, parameters, unserved
from stoker.api.messages_schemas import MessagesRequest
from stoker.api.request_schemas import ChatRequest, CompletionRequest
from stoker.api.responses.request_schemas import ResponseRequest

if TYPE_CHECKING:
    from conftest import Running

CONFIG = '[scheduler]\npolicy = "priority"\n'


def name_of(value: Any) -> str | None:
    return value.name if isinstance(value, Endpoint) else value if isinstance(value, str) else ""


@pytest.fixture(scope="module")
def served(
    serve_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    arguments = ("--context", str(CONTEXT), "--lanes", str(NUM_LANES))
    with serve_once(*arguments, config=CONFIG) as served:
        yield served


@pytest.fixture(scope="module")
def asking(served: Any) -> Iterator[dict[str, Ask]]:
    with httpx.Client(base_url=served.url, timeout=120) as client:
        yield {endpoint.name: Ask(client, endpoint, served.log) for endpoint in ENDPOINTS}


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("name", "endpoint", "outcome", "probe"), list(probes()), ids=name_of)
def test_parameter(
    asking: dict[str, Ask], name: str, endpoint: Endpoint, outcome: str, probe: Probe
) -> None:
    probe(asking[endpoint.name])


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=name_of)
def test_what_is_not_served_is_named(server: Running, endpoint: Endpoint) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        ask = Ask(client, endpoint, None)
        for name, of in unserved():
            if of is endpoint:
                streams = name == "stream_options" or None
                response = ask.send(tokens=1, stream=streams, **{name: SAMPLES[name]})
                assert response.status_code == 200, f"{name}: {response.text}"
                assert f"parameter '{name}" in response.headers.get(WARNING, ""), name


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=name_of)
def test_what_is_not_served_is_refused_by_a_strict_server(
    strict_server: Running, endpoint: Endpoint
) -> None:
    with httpx.Client(base_url=strict_server.url, timeout=60) as client:
        ask = Ask(client, endpoint, None)
        for name, of in unserved():
            if of is endpoint:
                param = ask.refused(tokens=1, **{name: SAMPLES[name]})
                assert (param or "").split(".")[0] == name


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("endpoint", "names", "outcome", "probe"), OTHERS, ids=name_of)
def test_endpoint(
    asking: dict[str, Ask],
    endpoint: str,
    names: str,
    outcome: str,
    probe: Callable[[httpx.Client], None],
) -> None:
    probe(asking["chat"].client)


def test_the_table_has_every_parameter() -> None:
    table = set(parameters())
    for names in SPECIFIED.values():
        assert names <= table
    served = {(name, endpoint.name) for name, endpoint, *_ in probes()}
    structs = {
        CHAT.name: ChatRequest,
        COMPLETIONS.name: CompletionRequest,
        RESPONSES.name: ResponseRequest,
        MESSAGES.name: MessagesRequest,
    }
    for endpoint, struct in structs.items():
        for name in struct.__struct_encode_fields__:
            if (name, endpoint) != ("stream_options", RESPONSES.name):  # it has no options there
                assert (name, endpoint) in served, f"no probe for {name} of {endpoint}"


def test_the_page_is_made_from_the_table() -> None:
    assert PAGE.read_text() == render(), (
        "run PYTHONPATH=tests python tests/api/compatibility/page.py"
    )
