"""What steps cost lately, and how long answers were: what estimates and step targets rest on."""

from __future__ import annotations

from stoker.interfaces import StepCost

__all__ = ["CostModel", "OutputModel"]

# Units in which a step's shape is measured, so that its three parts weigh about the same.
_PREFILL_UNIT = 64
_DECODE_UNIT = 8
_RATE = 0.2  # how far one step moves the estimate
_OUTLIER = 4.0  # a step that takes more than so many times the estimate counts as that many


class CostModel:
    """``seconds = base + prefill * p + decode * d``, fitted step by step.

    Normalised least mean squares (Widrow and Hoff 1960): each step corrects the estimate along its own
    shape only, so what was learned of prompts is not lost while only decodes run.
    """

    def __init__(self) -> None:
        self._weights = [0.0, 0.0, 0.0]
        self._is_new = True

    def observe(self, num_prefill_tokens: int, num_decodes: int, seconds: float) -> None:
        """Learn from a step."""
        shape = (1.0, num_prefill_tokens / _PREFILL_UNIT, num_decodes / _DECODE_UNIT)
        weights = self._weights
        estimate = sum(w * x for w, x in zip(weights, shape, strict=True))
        if estimate > 0:
            seconds = min(seconds, _OUTLIER * estimate)
        rate = 1.0 if self._is_new else _RATE
        self._is_new = False
        gain = rate * (seconds - estimate) / sum(x * x for x in shape)
        self._weights = [max(0.0, w + gain * x) for w, x in zip(weights, shape, strict=True)]

    @property
    def cost(self) -> StepCost:
        """The estimate; from any thread."""
        base, prefill, decode = self._weights
        return StepCost(
            base_s=base, prefill_s=prefill / _PREFILL_UNIT, decode_s=decode / _DECODE_UNIT
        )


class OutputModel:
    """How long answers were lately, for those that named ``max_tokens`` and those that did not.

    The first few are averaged with the values it starts with, so that those, being guesses, do not linger.

    Attributes:
        ratio: Tokens generated / tokens asked for.
        mean_tokens: Tokens generated where nobody said how many.
        prompt_ratio: Prompt tokens computed / prompt tokens.
    """

    _RATE = 0.1

    def __init__(self) -> None:
        self.ratio = 1.0
        self.mean_tokens = 256.0
        self.prompt_ratio = 1.0
        self._num_prompts = 0
        self._num_named = 0
        self._num_unnamed = 0

    def observe(self, num_output_tokens: int, asked: int | None) -> None:
        """Learn from an answer that came to its end."""
        if asked is None:
            self._num_unnamed += 1
            rate = max(self._RATE, 1 / (1 + self._num_unnamed))
            self.mean_tokens += rate * (num_output_tokens - self.mean_tokens)
        else:
            self._num_named += 1
            rate = max(self._RATE, 1 / (1 + self._num_named))
            self.ratio += rate * (num_output_tokens / max(1, asked) - self.ratio)

    def observe_prompt(self, num_tokens: int, num_cached: int) -> None:
        """Learn how much of a prompt had not to be computed."""
        self._num_prompts += 1
        rate = max(self._RATE, 1 / (1 + self._num_prompts))
        self.prompt_ratio += rate * (1 - num_cached / max(1, num_tokens) - self.prompt_ratio)

    def expect(self, asked: int | None, room: int) -> int:
        """Tokens that a request will probably generate, of at most ``room``."""
        expected = self.mean_tokens if asked is None else asked * self.ratio
        return max(1, min(room, round(expected)))
