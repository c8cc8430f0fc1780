"""The policy under stoker's conformance suite."""

from __future__ import annotations

import pytest

import stoker_policy_priority
from stoker.testing import PolicyConformance, PolicyUnderTest

pytestmark = pytest.mark.slow


class TestPriority(PolicyConformance):
    @pytest.fixture
    def policy(self) -> PolicyUnderTest:
        (info,) = stoker_policy_priority.stoker_register_policies()
        return PolicyUnderTest(info=info)
