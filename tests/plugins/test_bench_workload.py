"""What ``stoker bench`` sends: arrivals, lengths, scenarios, traces."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.errors import ConfigError
from stoker_plugins.bench import scenarios
from stoker_plugins.bench.traces import BUNDLED, Scale, TraceRow, read_trace, trace_load
from stoker_plugins.bench.workload import Lengths, Load, TokensPerWord, custom_load, poisson

WORD = TokensPerWord()


def texts(load: Load) -> list[str]:
    return [shot.messages[-1]["content"] for each in load.sessions for shot in each.shots]


# ------------------------------------------------------------------ arrivals and lengths


@given(seed=st.integers(), rate=st.floats(0.1, 1000))
def test_poisson_arrivals_depend_on_the_seed_alone_and_only_grow(seed: int, rate: float) -> None:
    times = list(itertools.islice(poisson(random.Random(seed), rate), 50))
    assert times == list(itertools.islice(poisson(random.Random(seed), rate), 50))
    assert times == sorted(times)
    assert times[0] == 0
    other = list(itertools.islice(poisson(random.Random(seed + 1), rate), 50))
    assert times != other


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = list(itertools.islice(poisson(random.Random(1), 5.0), 20_000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.03)
    assert variance == pytest.approx(0.04, rel=0.06)  # the square of the mean


@given(low=st.integers(1, 500), more=st.integers(0, 500), seed=st.integers())
def test_a_range_of_lengths_keeps_to_its_ends(low: int, more: int, seed: int) -> None:
    rng = random.Random(seed)
    drawn = [Lengths.parse(f"{low}-{low + more}").draw(rng) for _ in range(20)]
    assert all(low <= length <= low + more for length in drawn)
    assert Lengths.parse(f"{low}").draw(rng) == low


@pytest.mark.parametrize("text", ["normal:2,50", "lognormal:2,3", "normal:100,0"])
def test_drawn_lengths_are_at_least_one(text: str) -> None:
    rng = random.Random(0)
    assert min(Lengths.parse(text).draw(rng) for _ in range(500)) >= 1


def test_lognormal_has_its_median() -> None:
    rng = random.Random(0)
    lengths = Lengths.parse("lognormal:200,0.5")
    drawn = sorted(lengths.draw(rng) for _ in range(4001))
    assert drawn[2000] == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize(
    "text", ["", "0", "9-3", "-4", "x", "normal:5", "normal:0,1", "lognormal:9,99"]
)
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Lengths.parse(text)


@given(slope=st.floats(0.5, 8), overhead=st.integers(0, 60), tokens=st.integers(200, 5000))
def test_words_come_out_at_about_the_tokens_asked_for(
    slope: float, overhead: int, tokens: int
) -> None:
    words = TokensPerWord.measured(
        (8, round(8 * slope + overhead)), (1008, round(1008 * slope + overhead))
    )
    got = words.words(tokens) * slope + overhead
    assert abs(got - tokens) <= 0.01 * tokens + 2 * slope + 2


def test_a_server_that_counts_nonsense_leaves_one_token_a_word() -> None:
    assert TokensPerWord.measured((8, 50), (104, 50)) == TokensPerWord()


# ------------------------------------------------------------------ loads


def own(seed: str, **options: object) -> Load:
    given = {
        "prompt": Lengths.parse("10-40"),
        "output": Lengths.parse("5"),
        "limit": 9,
        "words": WORD,
    }
    return custom_load(seed, **{**given, **options})  # type: ignore[arg-type]


def test_a_load_of_ones_own_is_drawn_from_its_seed() -> None:
    assert texts(own("1")) == texts(own("1"))
    assert texts(own("1")) != texts(own("2"))
    assert len(texts(own("1"))) == 9
    assert all(each.at_s is None for each in own("1").sessions)


def test_arrivals_do_not_depend_on_the_prompts() -> None:
    short = [each.at_s for each in own("1", rate=3.0).sessions]
    long = [each.at_s for each in own("1", rate=3.0, prompt=Lengths.parse("500")).sessions]
    assert short == long
    assert None not in short


def test_a_shared_prefix_is_shared_and_counts_for_the_prompt() -> None:
    load = own("1", shared_prefix=30, prompt=Lengths.parse("50"))
    shots = [shot for each in load.sessions for shot in each.shots]
    assert len({shot.messages[0]["content"] for shot in shots}) == 1
    assert len({shot.messages[1]["content"] for shot in shots}) == 9
    for shot in shots:
        assert sum(len(message["content"].split()) for message in shot.messages) == 50


@pytest.mark.parametrize("name", scenarios.ALL)
def test_scenarios_are_the_same_for_the_same_seed(name: str) -> None:
    assert scenarios.check(name) is None
    first, again, other = (scenarios.scenario(name, seed) for seed in ("0 0", "0 0", "0 1"))
    sent = texts(first)
    assert sent == texts(again)
    assert not set(sent) & set(texts(other))


def test_scenarios_have_the_shape_they_say() -> None:
    shots = {name: list(scenarios.scenario(name, "0").sessions) for name in scenarios.ALL}
    assert [len(shots[f"decode{n}"]) for n in (8, 16, 32)] == [16, 32, 64]
    assert scenarios.scenario("decode5", "0").concurrency == 5
    assert len({each.shots[0].messages[0]["content"] for each in shots["prefix"]}) == 1
    assert [len(each.shots) for each in shots["turns"]] == [4] * 12
    for session in shots["agents"]:
        for one, following in itertools.pairwise(session.shots):
            assert following.messages[: len(one.messages)] == one.messages
    assert len({each.shots[0].messages[0]["content"] for each in shots["agents"]}) == 1
    assert {each.shots[0].group for each in shots["mixed"]} == {"decoder", "long prompt"}
    assert shots["sampled"][0].shots[0].extra["top_k"] == 40


@pytest.mark.parametrize("name", ["", "decode", "decode0", "decode9999", "Solo", "decode8 "])
def test_other_scenarios_are_refused_by_name(name: str) -> None:
    assert repr(name) in str(scenarios.check(name))


# ------------------------------------------------------------------ traces


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_traces_are_readable_and_small(name: str) -> None:
    rows = read_trace(name, 100_000)
    assert len(rows) >= 500
    assert rows[0].timestamp == 0
    assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows)
    folder = Path(scenarios.__file__).parent / "excerpts"
    assert (folder / BUNDLED[name]).stat().st_size < 60_000
    assert BUNDLED[name] in (folder / "README.md").read_text()
    assert len(read_trace(name, 7)) == 7


def test_azure_times_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8"
    )
    first, second = read_trace(str(path), 10)
    assert (first.input_length, first.output_length) == (4808, 10)
    assert second.timestamp == pytest.approx(52.0, abs=1e-3)


@pytest.mark.slow
@given(
    ids=st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True),
    shared=st.integers(0, 6),
    rest=st.integers(1, 512),
    lengths=st.floats(0.02, 1),
)
def test_equal_hash_ids_are_equal_text_and_lengths_are_kept(
    ids: list[int], shared: int, rest: int, lengths: float
) -> None:
    shared = min(shared, len(ids))
    total = 512 * (len(ids) - 1) + rest
    one = TraceRow(0, total, 5, tuple(ids))
    other = TraceRow(5, total, 5, (*ids[:shared], *(100 + n for n in ids[shared:])))
    scale = Scale(lengths=lengths)
    a, b = (text.split() for text in texts(trace_load([one, other], "s", scale=scale, words=WORD)))
    block = max(1, round(512 * lengths))
    assert len(a) == len(b) == scale.prompt(total)
    pairs = zip(a, b, strict=True)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert common >= min(shared * block, len(a))
    if shared == 0 and len(a) > 20:
        assert common < 5


def test_a_trace_is_scaled_in_time_and_length() -> None:
    rows = [TraceRow(0, 1000, 100), TraceRow(5000, 4000, 300)]
    scale = Scale(speedup=10, lengths=0.1, max_prompt=200, max_output=20)
    one, two = trace_load(rows, "s", scale=scale, words=WORD).sessions
    assert (one.at_s, two.at_s) == (0, 0.5)
    assert [len(each.shots[0].messages[0]["content"].split()) for each in (one, two)] == [100, 200]
    assert [each.shots[0].max_tokens for each in (one, two)] == [10, 20]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown format"),
        ("a,b,c\n", "unknown format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,x,1\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnever,1,1\n", "line 2"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0}\n', "line 2"),
        ('{"timestamp": 0, "input_length": -1, "output_length": 1}\n', "must not be negative"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(str(path), 10)


def test_a_missing_trace_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no-such-trace: No such file.*azure-code"):
        read_trace("no-such-trace", 1)
