"""The scripted backend, in its variants, under the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stoker_plugins
from stoker import LoadSettings, LocalModel
from stoker.testing import BackendConformance, BackendUnderTest, ScriptedOptions


def scripted(**options: Any) -> BackendUnderTest:
    (info,) = stoker_plugins.stoker_register_backends()
    return BackendUnderTest(
        info=info,
        model=LocalModel(path=Path("scripted"), model_id="scripted", reference="scripted:scripted"),
        settings=LoadSettings(
            lanes=4, context_length=200, max_step_tokens=128, options=ScriptedOptions(**options)
        ),
    )


class TestPlain(BackendConformance):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(snapshot=True)


class TestLittleMemory(BackendConformance):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(kv_capacity_tokens=300, embed=False)


class TestNoTruncationNoCopies(BackendConformance):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(truncation="reset", copy_prefix=False)


class TestOnADevice(BackendConformance):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(samples=True)


class TestOnlyEmbeds(BackendConformance):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(generates=False)


class InBlocks(BackendConformance):
    """Where the block promise does not hold, this model does not round: it says something else."""

    @pytest.mark.xfail(reason="its KV differs by far, on purpose, outside the promise", strict=True)
    def test_any_chunks_are_as_whole(self, backend: Any, driver: Any, references: Any) -> None:
        super().test_any_chunks_are_as_whole(backend, driver, references)


class TestBlocks(InBlocks):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(exact_block=4, snapshot=True)


class TestBlocksFrom(InBlocks):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(exact_block=4, exact_from=20)


class TestWholeTails(InBlocks):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return scripted(exact_block=4, exact_tail="whole")

    @pytest.mark.xfail(reason="generated tokens keep the promise one by one only", strict=True)
    def test_several_tokens_of_a_lane_at_once(
        self, backend: Any, driver: Any, references: Any
    ) -> None:
        super().test_several_tokens_of_a_lane_at_once(backend, driver, references)
