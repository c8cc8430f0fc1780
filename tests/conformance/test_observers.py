"""The bundled observer under the suite."""

from __future__ import annotations

import pytest

import stoker_plugins
from stoker.testing import ObserverConformance, ObserverUnderTest

pytestmark = pytest.mark.slow


class TestMetrics(ObserverConformance):
    @pytest.fixture
    def observer(self) -> ObserverUnderTest:
        (info,) = stoker_plugins.stoker_register_observers()
        return ObserverUnderTest(info=info)
