"""What it costs to move KV, measured, and what that is in tokens of prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.engine.costs import CostModel

__all__ = ["Mean", "TransferCosts"]

_RATE = 0.3  # how far one transfer moves the mean
_FIXED_TOKENS = (
    16.0  # what any transfer costs beside its length: a call, and a step that is not as usual
)
# What moving a token costs against computing it, as long as nobody has measured it. A runtime that keeps a
# memory for each lane may put a copy off to its next step, where no clock sees it: no copy of it is believed
# to be cheaper than this.
_COPY_GUESS = 0.01
_RESTORE_GUESS = 0.1


class Mean:
    """Seconds per token: an exponentially weighted mean.

    Attributes:
        value: Seconds per token; 0 before the first observation.
    """

    def __init__(self) -> None:
        self.value = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a transfer."""
        measured = max(0.0, seconds) / max(1, num_tokens)
        self.value = self.value + _RATE * (measured - self.value) if self.value else measured


class TransferCosts:
    """What copies, restores and snapshots cost lately.

    Args:
        shares_kv: Whether a copy shares memory.

    Attributes:
        steps: What steps cost; set by the scheduler.
        copy: Of copying, per token that the source holds.
        restore: Of restoring, per token of the snapshot.
        snapshot: Of making a snapshot.
    """

    def __init__(self, *, shares_kv: bool) -> None:
        self._shares_kv = shares_kv
        self.steps: CostModel | None = None
        self.copy = Mean()
        self.restore = Mean()
        self.snapshot = Mean()

    @property
    def prefill_s(self) -> float:
        """Seconds to compute a prompt token; 0 while unknown."""
        return 0.0 if self.steps is None else self.steps.cost.prefill_s

    def copy_tokens(self, num_tokens: int) -> float:
        """A copy from a lane that holds so many tokens, in tokens of prefill."""
        per_token = self._in_tokens(self.copy, _COPY_GUESS)
        if self._shares_kv:
            return 1.0 + (per_token if self.copy.value else 0.0) * num_tokens
        return max(_FIXED_TOKENS, max(per_token, _COPY_GUESS) * num_tokens)

    def restore_tokens(self, num_tokens: int) -> float:
        """A restore of so many tokens, in tokens of prefill."""
        return _FIXED_TOKENS + self._in_tokens(self.restore, _RESTORE_GUESS) * num_tokens

    def is_worth_storing(self, num_tokens: int, num_lost: int, chance: float = 1.0) -> bool:
        """Whether a snapshot costs less than it is expected to save.

        Args:
            num_tokens: Tokens of the snapshot.
            num_lost: How many of them would have to be computed again without it.
            chance: How often it will be restored.
        """
        saved = num_lost - self.restore_tokens(num_tokens)
        return self._in_tokens(self.snapshot, _RESTORE_GUESS) * num_tokens < chance * saved

    def _in_tokens(self, mean: Mean, guess: float) -> float:
        prefill_s = self.prefill_s
        return mean.value / prefill_s if mean.value and prefill_s else guess
