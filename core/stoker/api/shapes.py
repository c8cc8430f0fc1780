"""What a request says its answer must look like, whichever of the many names it uses."""

import json
from collections.abc import Mapping
from typing import Any

from stoker.api.request_schemas import ChatRequest, CompletionRequest, GenerationRequest
from stoker.errors import InvalidRequestError
from stoker.grammar import GrammarSpec

__all__ = ["read_grammar", "schema_spec"]


def read_grammar(body: GenerationRequest) -> GrammarSpec | None:
    """The shape that a request asks for; ``None`` if it asks for none.

    Raises:
        InvalidRequestError: It asks for several, or says it wrongly.
    """
    found = [spec for spec in (_format(body), *_guided(body), *_structured(body)) if spec]
    if not found:
        return None
    if len(found) > 1:
        raise _invalid(
            f"{found[0].param!r} and {found[1].param!r} both say what the answer must look like; "
            "send one of them",
            found[1].param,
        )
    return found[0]


def schema_spec(
    schema: Mapping[str, Any] | bool | str, param: str, *, strict: bool | None
) -> GrammarSpec:
    """The spec of a JSON schema.

    Args:
        schema: The schema, or its text.
        param: The field it came in.
        strict: Whether keywords that cannot be enforced are an error; otherwise they are left out.

    Raises:
        InvalidRequestError: It is no schema.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise _invalid(f"{param!r} is not the text of a JSON schema", param) from None
    if not isinstance(schema, Mapping | bool):
        raise _invalid(f"{param!r} is no JSON schema: it has to be an object", param)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return GrammarSpec(kind="json_schema", text=text, param=param, strict=bool(strict))


def _format(body: GenerationRequest) -> GrammarSpec | None:
    wanted = body.response_format if isinstance(body, ChatRequest | CompletionRequest) else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return GrammarSpec(kind="json_object", param="response_format")
    if wanted.type != "json_schema":
        raise _invalid(
            f"'response_format.type' is {wanted.type[:50]!r}; use text, json_object or json_schema",
            "response_format.type",
        )
    if wanted.json_schema is None:
        raise _missing("response_format.json_schema")
    if wanted.json_schema.schema_ is None:
        if wanted.json_schema.strict:
            raise _missing("response_format.json_schema.schema")
        return GrammarSpec(kind="json_object", param="response_format")
    return schema_spec(
        wanted.json_schema.schema_,
        "response_format.json_schema.schema",
        strict=wanted.json_schema.strict,
    )


def _guided(body: GenerationRequest) -> list[GrammarSpec | None]:
    return [
        _schema(body.guided_json, "guided_json"),
        _text("regex", body.guided_regex, "guided_regex"),
        _choice(body.guided_choice, "guided_choice"),
        _grammar(body.guided_grammar, "guided_grammar"),
        _schema(body.json_schema, "json_schema"),
        _text("gbnf", body.grammar or None, "grammar"),
    ]


def _structured(body: GenerationRequest) -> list[GrammarSpec | None]:
    wanted = body.structured_outputs
    if wanted is None:
        return []
    at = "structured_outputs."
    any_object = GrammarSpec(kind="json_object", param=f"{at}json_object")
    return [
        _schema(wanted.json, f"{at}json"),
        _text("regex", wanted.regex, f"{at}regex"),
        _choice(wanted.choice, f"{at}choice"),
        _grammar(wanted.grammar, f"{at}grammar"),
        any_object if wanted.json_object else None,
    ]


def _schema(schema: Mapping[str, Any] | str | None, param: str) -> GrammarSpec | None:
    return None if schema is None else schema_spec(schema, param, strict=True)


def _text(kind: Any, text: str | None, param: str) -> GrammarSpec | None:
    return None if text is None else GrammarSpec(kind=kind, text=text, param=param)


def _grammar(text: str | None, param: str) -> GrammarSpec | None:
    """GBNF defines its rules by ``::=``, which Lark does not have."""
    return _text("gbnf" if text is not None and "::=" in text else "lark", text, param)


def _choice(choices: list[str] | None, param: str) -> GrammarSpec | None:
    if choices is None:
        return None
    if not choices or "" in choices:
        raise _invalid(f"{param!r} needs at least one text, and no empty ones", param)
    return GrammarSpec(kind="choice", text=json.dumps(choices, ensure_ascii=False), param=param)


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param!r} is missing", param=param, code="missing_required_parameter"
    )
