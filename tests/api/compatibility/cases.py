"""The table: which parameter does what at which endpoint, and the probe that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from api.compatibility.harness import ENDPOINTS, Ask, Endpoint

Probe = Callable[[Ask], None]

WORKS, REFUSED, NEEDLESS, DEPENDS = "works", "refused", "needless", "depends"
_PROBES: dict[tuple[str, str], tuple[str, Probe]] = {}


def _register(
    outcome: str, names: str, endpoints: tuple[Endpoint, ...]
) -> Callable[[Probe], Probe]:
    def register(probe: Probe) -> Probe:
        for name in names.split():
            for endpoint in endpoints:
                key = (name, endpoint.name)
                if key in _PROBES:
                    raise ValueError(f"{key} has two probes")
                _PROBES[key] = (outcome, probe)
        return probe

    return register


def works(names: str, *endpoints: Endpoint) -> Callable[[Probe], Probe]:
    """These parameters do something, which the probe sees."""
    return _register(WORKS, names, endpoints)


def refused(names: str, *endpoints: Endpoint) -> Callable[[Probe], Probe]:
    """These parameters are refused, always: without what they ask for the answer would be another one."""
    return _register(REFUSED, names, endpoints)


def needless(names: str, *endpoints: Endpoint) -> Callable[[Probe], Probe]:
    """What these parameters ask for happens anyway, which the probe sees; they change nothing."""
    return _register(NEEDLESS, names, endpoints)


def depends(names: str, *endpoints: Endpoint) -> Callable[[Probe], Probe]:
    """Not every model has what these parameters need; the probe sees the server say so of the default one."""
    return _register(DEPENDS, names, endpoints)


def probes() -> Iterator[tuple[str, Endpoint, str, Probe]]:
    """All cells with a probe: the parameter, the endpoint, the outcome and the probe."""
    endpoints = {endpoint.name: endpoint for endpoint in ENDPOINTS}
    for (name, endpoint), (outcome, probe) in _PROBES.items():
        yield name, endpoints[endpoint], outcome, probe


def outcome(name: str, endpoint: Endpoint) -> str:
    """What becomes of a parameter; empty if it is named in a warning, or refused by a strict server."""
    return _PROBES.get((name, endpoint.name), ("", None))[0]
