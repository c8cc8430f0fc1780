"""Backends with one mistake each, and which tests of the suite say so (run by test_catches.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

import stoker_plugins
from stoker import (
    Backend,
    LoadSettings,
    LocalModel,
    ModelError,
    SampleInput,
    StepInput,
    StepOutput,
)
from stoker.testing import (
    BackendConformance,
    BackendUnderTest,
    ScriptedBackend,
    ScriptedOptions,
    ScriptedRuntime,
    ScriptedTokenizer,
)


class Broken(BackendConformance):
    """Base: ``Runtime`` is what is broken, ``fails`` the tests that must say so, and no others."""

    Runtime: ClassVar[type[ScriptedRuntime]] = ScriptedRuntime
    options: ClassVar[ScriptedOptions] = ScriptedOptions(snapshot=True)
    fails: ClassVar[set[str]]

    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return self.under_test(Path("scripted"))

    def under_test(self, path: Path, made: Backend | None = None) -> BackendUnderTest:
        (info,) = stoker_plugins.stoker_register_backends()
        kind = self.Runtime

        class Factory(ScriptedBackend):
            def load(self, model: LocalModel, settings: LoadSettings) -> ScriptedRuntime:
                return kind(
                    lanes=settings.lanes or 4,
                    context_length=settings.context_length or 100,
                    max_step_tokens=settings.max_step_tokens,
                    options=settings.options,
                )

        return BackendUnderTest(
            info=msgspec.structs.replace(info, factory=lambda: made or Factory()),
            model=LocalModel(path=path, model_id="m", reference="scripted:m"),
            settings=LoadSettings(
                lanes=4, context_length=120, max_step_tokens=128, options=self.options
            ),
            entry_module="stoker_plugins",
            texts=("some text or other", "this is another one"),
            num_tokens=6,
        )


# --------------------------------------------------------------------------- rows and lanes


class TestRowsByLane(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            if output.no_room:
                return output
            return StepOutput(
                output.logits[np.argsort(step.lanes[step.wants_logits], kind="stable")]
            )

    fails: ClassVar = {
        "test_batched_is_as_alone",
        "test_prefill_and_decode_mix",
        "test_rows_are_those_that_were_asked_for",
    }


class TestOnlyTheLastRowOfALane(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            if output.no_room:
                return output
            lanes = step.lanes[step.wants_logits]
            last = {int(lane): row for row, lane in enumerate(lanes)}
            return StepOutput(output.logits[[last[int(lane)] for lane in lanes]])

    fails: ClassVar = {
        "test_rows_are_those_that_were_asked_for",
        "test_several_tokens_of_a_lane_at_once",
    }


class TestDoublePrecision(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            return StepOutput(output.logits.astype(np.float64), output.no_room)  # type: ignore[arg-type]

    fails: ClassVar = {"test_step_output_has_the_shape_and_type"}


class TestALaneSeesItsNeighbour(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            if not output.no_room and len(set(step.lanes.tolist())) > 1:
                return StepOutput(output.logits + 0.5 * output.logits[::-1])
            return output

    fails: ClassVar = {
        "test_batched_is_as_alone",
        "test_prefill_and_decode_mix",
        "test_rows_are_those_that_were_asked_for",
    }


class TestChunksForgetTheirPast(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            first = int(step.positions[0])
            if first and len(step.positions) > 1 and len(set(step.lanes.tolist())) == 1:
                self._states[step.lanes[0], first] = 0
            return super().step(step)

    fails: ClassVar = {
        "test_chunked_is_as_whole",
        "test_prefill_and_decode_mix",
        "test_any_chunks_are_as_whole",
        "test_promised_cuts_give_the_same_bits",
        "test_several_tokens_of_a_lane_at_once",
        "test_truncate_and_go_on",
        "test_a_copied_prefix_is_as_computed",
    }


class TestPromisesTooMuch(Broken):
    class Runtime(ScriptedRuntime):
        """A lane's logits differ in the last bits by how its prompt was cut."""

        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            self.cuts = getattr(self, "cuts", {})
            for lane in set(step.lanes.tolist()):
                rows = np.flatnonzero(step.lanes == lane)
                if step.positions[rows[0]] == 0:
                    self.cuts[lane] = len(rows)
            if output.no_room:
                return output
            noise = [
                self.cuts.get(lane, 0) * 1e-5 for lane in step.lanes[step.wants_logits].tolist()
            ]
            return StepOutput(output.logits + np.array(noise, np.float32).reshape(-1, 1))

    fails: ClassVar = {"test_promised_cuts_give_the_same_bits"}


class TestSmallSteps(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            if len(step.token_ids) > 126:
                raise RuntimeError("too many tokens")
            return super().step(step)

    fails: ClassVar = {"test_a_step_of_max_step_tokens"}


# --------------------------------------------------------------------------- memory


class TestTruncatesOneTooMany(Broken):
    class Runtime(ScriptedRuntime):
        def truncate(self, lane: int, num_tokens: int) -> int:
            length = int(self._lengths[lane])
            kept = super().truncate(lane, num_tokens)
            if 1 < kept < length:
                self._states[lane, kept] = self._states[lane, kept - 1]
            return kept

    fails: ClassVar = {"test_truncate_and_go_on", "test_several_tokens_of_a_lane_at_once"}


class TestTruncateBoasts(Broken):
    class Runtime(ScriptedRuntime):
        def truncate(self, lane: int, num_tokens: int) -> int:
            super().truncate(lane, num_tokens)
            return num_tokens

    fails: ClassVar = {"test_truncate_keeps_no_more_than_there_is"}


class TestLeaks(Broken):
    class Runtime(ScriptedRuntime):
        """An aborted prefill leaves something behind."""

        def truncate(self, lane: int, num_tokens: int) -> int:
            if self._lengths[lane] == 10 and num_tokens == 0 and lane == 3:
                self._states[lane, 0] = 99
            return super().truncate(lane, num_tokens)

    fails: ClassVar = {"test_a_reused_lane_leaks_nothing"}


class TestTruncateTouchesOthers(Broken):
    class Runtime(ScriptedRuntime):
        def truncate(self, lane: int, num_tokens: int) -> int:
            length = int(self._lengths[1])
            if lane == 0 and length > 2 and num_tokens == 0 and self._lengths[0]:
                self._states[1, length] = 5
            return super().truncate(lane, num_tokens)

    fails: ClassVar = {
        "test_an_abort_does_not_disturb_others",
        "test_a_copy_and_its_source_go_their_own_ways",
    }


class TestCopiesOneLess(Broken):
    class Runtime(ScriptedRuntime):
        def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
            super().copy_prefix(source, target, num_tokens)
            if num_tokens:
                self._states[target, num_tokens] = self._states[target, num_tokens - 1]

    fails: ClassVar = {
        "test_a_copied_prefix_is_as_computed",
        "test_a_copy_and_its_source_go_their_own_ways",
    }


class TestCopiesStayTied(Broken):
    class Runtime(ScriptedRuntime):
        """A copy is the source's own memory."""

        def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
            super().copy_prefix(source, target, num_tokens)
            self.tie = (source, target)

        def truncate(self, lane: int, num_tokens: int) -> int:
            source, target = getattr(self, "tie", (-1, -1))
            if lane == source and num_tokens == 0 and self._lengths[source] > 2:
                self._states[target] = 0
                self.tie = (-1, -1)
            return super().truncate(lane, num_tokens)

    fails: ClassVar = {"test_a_copy_and_its_source_go_their_own_ways"}


class TestCopyingNothingDoesNothing(Broken):
    class Runtime(ScriptedRuntime):
        def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
            if num_tokens:
                super().copy_prefix(source, target, num_tokens)

    fails: ClassVar = {"test_copying_nothing_empties_the_target"}


class TestSnapshotsOneLess(Broken):
    class Runtime(ScriptedRuntime):
        def snapshot(self, lane: int) -> bytes:
            return super().snapshot(lane)[:-8]

    fails: ClassVar = {"test_a_restored_snapshot_is_as_computed"}


class TestRaisesWhenFull(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            if output.no_room:
                raise MemoryError("full")
            return output

    fails: ClassVar = {"test_a_full_lane_is_an_answer"}


class TestWritesBeforeItLooks(Broken):
    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            output = super().step(step)
            if output.no_room and step.positions[0]:
                self._states[step.lanes[0], step.positions[0]] = 1
            return output

    fails: ClassVar = {"test_a_full_lane_is_an_answer", "test_full_memory_is_an_answer"}
    options = ScriptedOptions(kv_capacity_tokens=300)


class TestOneLaneTooMuch(Broken):
    class Runtime(ScriptedRuntime):
        """Its memory holds more than it says."""

        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            said = self.info
            self.truth = said
            self.info = msgspec.structs.replace(
                said, kv_capacity_tokens=said.kv_capacity_tokens - 40
            )

        def _has_room(self, step: StepInput) -> bool:
            mine, self.info = self.info, self.truth
            try:
                return super()._has_room(step)
            finally:
                self.info = mine

    fails: ClassVar = {"test_full_memory_is_an_answer"}
    options = ScriptedOptions(kv_capacity_tokens=300)


class TestDeniesItsTruncation(Broken):
    """It says ``any`` and resets."""

    class Runtime(ScriptedRuntime):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            self.said = self.info
            lies = msgspec.structs.replace(self.info.capabilities, truncation="any")
            self.info = msgspec.structs.replace(self.info, capabilities=lies)

        def truncate(self, lane: int, num_tokens: int) -> int:
            lies, self.info = self.info, self.said
            try:
                return super().truncate(lane, num_tokens)
            finally:
                self.info = lies

    options = ScriptedOptions(truncation="reset")
    fails: ClassVar = {"test_truncate_and_go_on", "test_several_tokens_of_a_lane_at_once"}


# --------------------------------------------------------------------------- loading, tokens, vectors


class TestClosesOnce(Broken):
    class Runtime(ScriptedRuntime):
        closed = False

        def close(self) -> None:
            if self.closed:
                raise RuntimeError("closed already")
            self.closed = True

    fails: ClassVar = {"test_close_twice"}


class TestTakesAnyFile(Broken):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        path = tmp_path / "model.bin"
        path.write_bytes(b"x" * 1000)
        return self.under_test(path)

    fails: ClassVar = {"test_bad_files_are_refused"}


class TestRefusesInRiddles(Broken):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        class Made(ScriptedBackend):
            def load(self, model: LocalModel, settings: LoadSettings) -> ScriptedRuntime:
                if not model.path.is_file() or model.path.stat().st_size != 1000:
                    raise ModelError("error 7")
                return super().load(model, settings)

        path = tmp_path / "model.bin"
        path.write_bytes(b"x" * 1000)
        return self.under_test(path, Made())

    fails: ClassVar = {"test_bad_files_are_refused"}


class TestAcceptsNothing(Broken):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        class Made(ScriptedBackend):
            def accepts(self, model: LocalModel) -> bool:
                return False

        return self.under_test(Path("scripted"), Made())

    fails: ClassVar = {"test_accepts_its_model"}


class TestWrongInfo(Broken):
    class Runtime(ScriptedRuntime):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            self.info = msgspec.structs.replace(self.info, end_token_ids=frozenset({261}))

    fails: ClassVar = {"test_info_is_consistent"}


class TestUsersForgeTurns(Broken):
    class Runtime(ScriptedRuntime):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)

            class Tokens(ScriptedTokenizer):
                def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
                    return super().encode(text, add_special=add_special, parse_special=True)

            self.tokenizer = Tokens()

    fails: ClassVar = {"test_user_text_becomes_no_control_token"}


class TestTidiesText(Broken):
    class Runtime(ScriptedRuntime):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)

            class Tokens(ScriptedTokenizer):
                def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
                    text = " ".join(text.split())
                    return super().encode(
                        text, add_special=add_special, parse_special=parse_special
                    )

            self.tokenizer = Tokens()

    fails: ClassVar = {"test_texts_come_back"}


class TestPaddingCounts(Broken):
    class Runtime(ScriptedRuntime):
        def embed(self, inputs: Any) -> Any:
            longest = max(map(len, inputs))
            return super().embed([[*tokens, *[0] * (longest - len(tokens))] for tokens in inputs])

    fails: ClassVar = {"test_embedded_together_is_as_alone"}


class TestVectorsInAnotherOrder(Broken):
    class Runtime(ScriptedRuntime):
        def embed(self, inputs: Any) -> Any:
            order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
            return super().embed([inputs[i] for i in order])

    fails: ClassVar = {"test_embedded_together_is_as_alone"}


class TestDrawsWithoutTopP(Broken):
    class Runtime(ScriptedRuntime):
        def make_logits(self, states: Any, tokens: Any) -> Any:
            return super().make_logits(states, tokens) * 0.3 + np.linspace(
                0, 1, 261, dtype=np.float32
            )

        def sample(self, batch: SampleInput) -> Any:
            batch.top_p = np.ones_like(batch.top_p)
            return super().sample(batch)

    options = ScriptedOptions(samples=True)
    fails: ClassVar = {
        "test_tokens_are_drawn_as_the_core_draws_them[top_p]",
        "test_tokens_are_drawn_as_the_core_draws_them[all of them]",
    }


class TestEveryLaneByItself(Broken):
    """Its steps take time by the square of their tokens: batching loses (with --stoker-speed)."""

    class Runtime(ScriptedRuntime):
        def step(self, step: StepInput) -> StepOutput:
            if len(step.token_ids) < 5:
                import time

                time.sleep(0.001 * len(step.token_ids) ** 2)
            return super().step(step)

    fails: ClassVar = {"test_batching_pays"}


# --------------------------------------------------------------------------- descriptors and overrides


class TestOverridesInSilence(Broken):
    def test_close_twice(self) -> None:  # type: ignore[override]
        """Nothing."""

    fails: ClassVar = {"test_no_test_is_overridden"}


class TestOverridesWithAReason(Broken):
    @pytest.mark.xfail(reason="a test of the rule", strict=True)
    def test_close_twice(self) -> None:  # type: ignore[override]
        raise AssertionError

    fails: ClassVar = set()


class SloppyOptions(msgspec.Struct):
    """Options.

    Attributes:
        known: Described.
    """

    known: int
    unknown: int = 0


class TestSloppyOptions(Broken):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        good = self.under_test(Path("scripted"))
        return msgspec_replace(good, options=SloppyOptions)

    fails: ClassVar = {
        "test_options_round_trip",
        "test_options_are_documented",
        "test_unknown_option_is_refused",
    }


class TestHeavyEntryModule(Broken):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        from dataclasses import replace

        path = tmp_path / "heavy.py"
        path.write_text("import numpy\n")
        return replace(self.under_test(Path("scripted")), entry_module=path)

    fails: ClassVar = {"test_entry_module_is_light"}


class TestTakenName(Broken):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        return msgspec_replace(self.under_test(Path("scripted")), name="Bad Name", summary="")

    fails: ClassVar = {"test_descriptor_keeps_the_contract"}


def msgspec_replace(backend: BackendUnderTest, **changes: Any) -> BackendUnderTest:
    from dataclasses import replace

    return replace(backend, info=msgspec.structs.replace(backend.info, **changes))
