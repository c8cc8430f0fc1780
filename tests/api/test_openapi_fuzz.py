"""The served OpenAPI document, taken at its word: schemathesis sends what it allows, and what it does not.

All operations are taken from the document, so that a new one is here by itself. Cases are the same in every
run; ``STOKER_FUZZ_CASES=1000`` tries so many random ones of each kind and operation instead.

Checks that are left out, and why: ``positive_data_acceptance`` (the document cannot say what depends on the
server, such as the vocabulary, or on another field, such as ``stream_options`` on ``stream``), and
``missing_required_header`` and ``ignored_auth`` (none is asked for; ``test_access.py`` looks at keys).
Paths of the OpenAI API that are answered with 501 are not in the document; ``test_unserved_paths`` has them.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from litestar.routes import HTTPRoute
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from stoker.api.unserved import UNSERVED

if TYPE_CHECKING:
    from conftest import Running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0 if "STOKER_FUZZ_CASES" in os.environ else 300),
]

RANDOM = int(os.environ.get("STOKER_FUZZ_CASES", "0"))
NUM_CASES = RANDOM or 5  # of each mode of each operation
NUM_BORDERS = 10_000 if RANDOM else 60  # of each mode of each operation
NUM_WALKS = RANDOM or 20
SETTINGS = settings(
    max_examples=NUM_CASES,
    derandomize=not RANDOM,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    stateful_step_count=8,
)
CHECK_NAMES = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
}
# What is served, or wrong, or there no longer, or too much, or late.
STATUSES = {200, 204, 400, 404, 405, 408, 409, 413, 429}
TEXT = "/v1/completions"
CONVERSATION = [{"role": "user", "content": "hi"}]
# Fields that make a request of it that is served, where the document cannot say how.
AIMS: dict[str, dict[str, Any]] = {
    "create_chat_completion": {"messages": CONVERSATION},
    "create_completion": {"prompt": "hi"},
    "create_response": {"input": "hi", "previous_response_id": None},
    "count_input_tokens": {"input": "hi", "previous_response_id": None},
    "create_message": {"messages": CONVERSATION},
    "count_message_tokens": {"messages": CONVERSATION},
    "create_embedding": {"input": "hi"},
    "tokenize": {"prompt": "hi", "content": None, "messages": None},
    "apply_template": {"messages": CONVERSATION},
}
ALL_AIMS = {"model": None, "tools": None, "n": None, "stream_options": None}


@pytest.fixture(scope="module")
def fuzzed(
    start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Answers are short, so that there can be many; every bundled route is served."""
    folder = str(tmp_path_factory.mktemp("batches"))
    batches = {"directory": folder, "max_file_bytes": 100_000, "max_total_bytes": 10_000_000}
    return start_server(
        models=[{"model": "scripted:org/scripted", "lanes": 8, "context": 96}],
        plugins={"batches": batches},
        admission={"request_timeout_s": 20.0},
        responses={"path": ":memory:", "max_responses": 50},
    )


@pytest.fixture(scope="module")
def schema(fuzzed: Running) -> Any:
    load_all_checks()
    inference: dict[str, Any] = {"algorithms": []}  # the document names all links
    config = schemathesis.Config.from_dict(
        {
            "generation": {"deterministic": not RANDOM, "database": "none"},
            # What is too large is refused before it is looked at.
            "checks": {"negative_data_rejection": {"expected-statuses": [400, 404, 405, 413, 429]}},
            "phases": {"stateful": {"inference": inference}},
        }
    )
    return schemathesis.openapi.from_url(f"{fuzzed.url}/schema/openapi.json", config=config)


@pytest.fixture(autouse=True)
def unharmed(fuzzed: Running, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Afterwards the server serves, no lane is taken, and nothing unexpected is in the log."""
    caplog.set_level(logging.WARNING)
    yield
    fuzzed.check_still_serves()
    problems = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not problems, caplog.text[-5000:]
    assert "Traceback" not in caplog.text


class Caller:
    """Sends cases and collects what is wrong with their answers.

    Attributes:
        counts: How often each status came.
        failures: Descriptions of what was wrong, one of each kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.failures: dict[tuple[str, str, int], str] = {}
        self._session = requests.Session()
        self._checks = [check for check in CHECKS.get_all() if check.__name__ in CHECK_NAMES]
        assert len(self._checks) == len(CHECK_NAMES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()
        print(f"{self.counts.total()} cases: {dict(self.counts)}")
        assert not self.failures, "\n\n".join(self.failures.values())

    @property
    def transport(self) -> dict[str, Any]:
        return {"session": self._session, "timeout": 60}

    def call(self, case: Case) -> None:
        self.check(case, case.call(**self.transport))

    def check(self, case: Case, response: Any) -> None:
        self.counts[response.status_code] += 1
        sent = f"{case.method} {case.formatted_path} {case.query} {case.body!r:.2000}"
        if response.status_code not in STATUSES:
            self._add(case, "status", response, f"{sent}\n{response.text[:500]}")
        try:
            case.validate_response(response, checks=self._checks, transport_kwargs=self.transport)
        except BaseExceptionGroup as group:
            for error in group.exceptions:
                self._add(case, type(error).__name__, response, f"{error}\n{sent}")

    def _add(self, case: Case, kind: str, response: Any, what: str) -> None:
        key = (case.operation.label, kind, response.status_code)
        self.failures.setdefault(key, f"{key}: {what}")


def operations(schema: Any) -> list[Any]:
    return [result.ok() for result in schema.get_all_operations()]


def operation_id(operation: Any) -> str:
    return str(operation.definition.raw.get("operationId"))


def aim(case: Case) -> bool:
    """Make a case more likely to get to the model; returns whether that changed it."""
    aims = AIMS.get(operation_id(case.operation))
    if aims is None or not isinstance(case.body, dict):
        return False
    before = dict(case.body)
    case.body = {**before, **aims, **{name: None for name in ALL_AIMS if name in before}}
    return bool(case.body != before)


# --------------------------------------------------------------------------- the document


def test_every_route_is_in_the_document(fuzzed: Running, schema: Any) -> None:
    documented = {(path, method.upper()) for path, methods in schema.raw_schema["paths"].items()
                  for method in methods}  # fmt: skip
    unserved = tuple(f"/v1/{name}" for name in UNSERVED)
    routes = [route for route in fuzzed.server.app.routes if isinstance(route, HTTPRoute)]
    served = {
        (route.path_format, method)
        for route in routes
        for method in set(route.methods) - {"OPTIONS"}
        if not route.path.startswith(("/schema", *unserved))
    }
    assert served == documented


def test_operations_have_names_and_links_lead_to_them(schema: Any) -> None:
    names = [operation_id(operation) for operation in operations(schema)]
    assert len(set(names)) == len(names)
    for operation in operations(schema):
        raw = operation.definition.raw
        assert raw["summary"]
        parameters = {(p["in"], p["name"]) for p in raw.get("parameters", ())}
        assert {name for where, name in parameters if where == "path"} == {
            part[1:-1] for part in operation.path.split("/") if part.startswith("{")
        }
        for response in raw["responses"].values():
            for link in response.get("links", {}).values():
                assert link["operationId"] in names


def test_every_link_leads_somewhere(fuzzed: Running, schema: Any) -> None:
    """From a good answer of each operation with links, each link is followed."""
    by_name = {operation_id(operation): operation for operation in operations(schema)}
    linked = {name for name, operation in by_name.items() if "links" in success(operation)}
    with httpx.Client(base_url=fuzzed.url, timeout=60) as client:
        file = {"file": ("a.jsonl", b'{"custom_id": "a"}'), "purpose": (None, "batch")}
        file_id = client.post("/v1/files", files=file).json()["id"]
        batch = {"input_file_id": file_id, "endpoint": TEXT, "completion_window": "24h"}
        stored = {"input": "hi", "background": True, "max_output_tokens": 20}
        bodies = {name: {"json": {**body, "max_tokens": 3}} for name, body in AIMS.items()}
        bodies["create_response"] = {"json": stored}
        bodies["create_file"], bodies["create_batch"] = {"files": file}, {"json": batch}
        paths = {}  # of what has a name of its own
        for name, path, body in (
            ("response", "/v1/responses", stored),
            ("batch", "/v1/batches", batch),
        ):
            made = client.post(path, json=body).json()["id"]
            paths |= {f"get_{name}": f"{path}/{made}", f"cancel_{name}": f"{path}/{made}/cancel"}
        for name in sorted(linked):
            operation = by_name[name]
            path = paths.get(name, operation.path)
            sent = bodies.get(name, {})
            for target, link in success(operation)["links"].items():
                answer = client.request(operation.method, path, **sent)
                if name == "cancel_batch" and answer.status_code == 400:
                    continue  # it is over already
                assert answer.status_code == 200, (name, answer.text)
                follow(client, by_name[link["operationId"]], link, answer, f"{name} -> {target}")


def success(operation: Any) -> dict[str, Any]:
    return dict(operation.definition.raw["responses"]["200"])


def follow(
    client: httpx.Client, operation: Any, link: dict[str, Any], answer: httpx.Response, what: str
) -> None:
    path = operation.path
    for parameter, expression in link.get("parameters", {}).items():
        value: Any = answer.headers.get(expression.removeprefix("$response.header."))
        if expression.startswith("$response.body#/"):
            value = answer.json()
            for key in expression.removeprefix("$response.body#/").split("/"):
                value = value[int(key) if isinstance(value, list) else key]
        assert isinstance(value, str), (what, expression)
        path = path.replace(f"{{{parameter.removeprefix('path.')}}}", value)
    body = link.get("requestBody")
    if body is not None:
        body = {**body, "input_file_id": answer.json()["id"]}
    response = client.request(operation.method, path, json=body)
    assert response.status_code in {200, 400}, (what, path, response.text)
    assert response.status_code == 200 or operation.method == "post", (what, response.text)


def test_unserved_paths(fuzzed: Running) -> None:
    with httpx.Client(base_url=fuzzed.url) as client:
        for name in UNSERVED:
            for path in (f"/v1/{name}", f"/v1/{name}/a/b%2f?x=1"):
                for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                    response = client.request(method, path, content=b"\xff")
                    assert response.status_code == 501
                    assert response.json()["error"]["code"]


# --------------------------------------------------------------------------- what is sent


def borders(schema: Any, operation: Any, mode: GenerationMode) -> list[Case]:
    """Cases at the borders of an operation's fields, spread over all of its fields."""
    config = schema.config.generation_for(operation=operation, phase="coverage")
    cases = schema.iter_coverage_cases(operation, generation_modes=[mode], generation_config=config)
    found = list(itertools.islice(cases, 10 * NUM_BORDERS))
    return found[:: -(-len(found) // NUM_BORDERS)] if found else []


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_border_of_every_field(schema: Any, mode: GenerationMode) -> None:
    """Fields at, and beyond, their limits and types; each path with other methods."""
    with Caller() as caller:
        for operation in operations(schema):
            for number, case in enumerate(borders(schema, operation, mode)):
                if mode == GenerationMode.POSITIVE and number % 2:
                    aim(case)  # every second one gets to the model
                caller.call(case)


def can_be_wrong(operation: Any) -> bool:
    """Whether there is more to a request than a path, in which all texts are fine."""
    raw = operation.definition.raw
    return "requestBody" in raw or any(p["in"] != "path" for p in raw.get("parameters", ()))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_random_requests(schema: Any, mode: GenerationMode) -> None:
    with Caller() as caller:
        for operation in operations(schema):

            def send(case: Case) -> None:
                caller.call(case)
                if mode == GenerationMode.POSITIVE and aim(case):
                    caller.call(case)

            if mode == GenerationMode.NEGATIVE and not can_be_wrong(operation):
                continue
            try:
                SETTINGS(given(operation.as_strategy(generation_mode=mode))(send))()
            except Unsatisfiable:  # what it has may be any text
                assert mode == GenerationMode.NEGATIVE
                assert "requestBody" not in operation.definition.raw


def test_walks_along_the_links(schema: Any) -> None:
    """Stateful: what one answer names is asked for, followed, cancelled and deleted by the next requests."""
    with Caller() as caller:

        class Walk(schema.as_state_machine()):  # type: ignore[misc]
            def get_call_kwargs(self, case: Case) -> dict[str, Any]:
                return caller.transport

            def validate_response(self, response: Any, case: Case, **_: Any) -> None:
                caller.check(case, response)

        Walk.run(settings=settings(SETTINGS, max_examples=NUM_WALKS))
        assert caller.counts[200]
