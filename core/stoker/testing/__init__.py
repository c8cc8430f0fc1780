"""What plugin authors and stoker's own tests test with.

``ScriptedRuntime`` is a deterministic model that costs nothing; ``EngineHarness`` drives an engine step by
step; ``FakeClock`` is a clock that a test moves.
"""

from stoker.testing.clock import FakeClock
from stoker.testing.harness import EngineHarness, Submitted
from stoker.testing.scripted import (
    ScriptedBackend,
    ScriptedOptions,
    ScriptedRuntime,
    ScriptedTokenizer,
)

__all__ = [
    "EngineHarness",
    "FakeClock",
    "ScriptedBackend",
    "ScriptedOptions",
    "ScriptedRuntime",
    "ScriptedTokenizer",
    "Submitted",
]
