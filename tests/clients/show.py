"""Shared by the scripts beside it: run their functions and print what they returned, as JSON."""

import json
import os
from collections.abc import Callable
from typing import Any

BASE_URL = os.environ.get("STOKER_URL", "http://127.0.0.1:8000")
MODEL = "SmolLM2-135M-Instruct"


def show(*functions: Callable[[], Any]) -> None:
    """One line of JSON: what each function returned, by its name."""
    print(json.dumps({function.__name__: function() for function in functions}))
