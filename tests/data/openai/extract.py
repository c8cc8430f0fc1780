"""Makes ``schemas.json`` from OpenAI's API specification: ``python extract.py PATH/TO/openapi.json``.

What is kept are the schemas named below and all that they refer to, without descriptions and examples. They
are turned from OpenAPI's dialect into JSON Schema 2020-12: ``nullable`` becomes a ``null`` type,
``$recursiveRef`` an ordinary reference, and ``oneOf`` becomes ``anyOf``, for members overlap that only a
discriminator tells apart.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOTS = (
    *("Response", "ResponseStreamEvent", "ResponseItemList", "TokenCountsResource"),
    *("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    *("CreateCompletionResponse", "CreateEmbeddingResponse"),
    *("ListModelsResponse", "Model", "DeleteModelResponse", "ErrorResponse"),
    *("OpenAIFile", "ListFilesResponse", "DeleteFileResponse", "Batch", "ListBatchesResponse"),
    *("CreateResponse", "CreateChatCompletionRequest", "CreateCompletionRequest"),
    *("CreateEmbeddingRequest", "CreateFileRequest"),
)
PREFIX = "#/components/schemas/"
DROPPED = {"description", "example", "examples", "title", "discriminator", "nullable", "deprecated"}
MAPS = {"properties", "patternProperties", "$defs"}


def main(specification: Path) -> None:
    """Write the extract beside this file."""
    schemas = json.loads(specification.read_text())["components"]["schemas"]
    wanted, found = list(ROOTS), {}
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = convert(schemas[name], name)
            wanted += references(found[name])
    text = json.dumps({"$defs": dict(sorted(found.items()))}, indent=1, ensure_ascii=False)
    Path(__file__).with_name("schemas.json").write_text(text + "\n")


def references(schema: Any) -> Iterator[str]:
    """The names that a converted schema refers to."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield value.removeprefix("#/$defs/")
            else:
                yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def convert(schema: Any, root: str) -> Any:
    """One schema in plain JSON Schema; ``root`` is the named schema that it is in."""
    if isinstance(schema, list):
        return [convert(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key in DROPPED or key.startswith("x-") or key == "$recursiveAnchor":
            continue
        if key in MAPS:
            plain[key] = {name: convert(item, root) for name, item in value.items()}
        elif key == "$ref":
            plain[key] = "#/$defs/" + value.removeprefix(PREFIX)
        elif key == "$recursiveRef":
            plain["$ref"] = "#/$defs/" + root
        elif key in {"enum", "const", "default", "required"}:
            plain[key] = value
        else:
            plain["anyOf" if key == "oneOf" else key] = convert(value, root)
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") else plain


if __name__ == "__main__":
    main(Path(sys.argv[1]))
