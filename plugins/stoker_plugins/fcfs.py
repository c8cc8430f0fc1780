"""First come, first served; see ``stoker_plugins.policies.fcfs``."""

from __future__ import annotations

from stoker_plugins.policies.fcfs import FirstComeFirstServed

__all__ = ["FirstComeFirstServed"]
