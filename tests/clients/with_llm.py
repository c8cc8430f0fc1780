"""``llm``: ``python tests/clients/with_llm.py``, with a server on port 8000.

Its command finds models in ``extra-openai-models.yaml``, in the folder that ``llm logs path`` shows; here
that is a temporary folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llm
from pydantic import BaseModel, ConfigDict, Field
from show import BASE_URL, MODEL, show

MODELS = f"""\
- model_id: stoker
  model_name: {MODEL}
  api_base: {BASE_URL}/v1
  supports_schema: true
  supports_tools: true
- model_id: stoker-responses
  model_name: {MODEL}
  api_base: {BASE_URL}/v1
  responses: true
"""
folder = tempfile.TemporaryDirectory()
os.environ["LLM_USER_PATH"] = folder.name
Path(folder.name, "extra-openai-models.yaml").write_text(MODELS)


def plain() -> str:
    answer = llm.get_model("stoker").prompt("Name three colors.", temperature=0, max_tokens=30)
    return answer.text()


def streamed() -> list[str]:
    return list(llm.get_model("stoker").prompt("Name three colors.", temperature=0, max_tokens=30))


class City(BaseModel):
    """A city; ``forbid`` keeps a small model from adding fields of its own."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    answer = llm.get_model("stoker").prompt("Tell me about Paris.", schema=City, temperature=0)
    return json.loads(answer.text())


def by_responses() -> str:
    answer = llm.get_model("stoker-responses").prompt("Name three colors.", temperature=0)
    return answer.text()


def by_command() -> str:
    command = [sys.executable, "-m", "llm", "-m", "stoker", "-o", "temperature", "0"]
    command += ["Name three colors."]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    show(plain, streamed, structured, by_responses, by_command)
