"""The child's side of a measurement: ``stoker tune --worker`` reads a job, does it, writes the answer.

Whatever goes wrong here, up to a crash of native code, ends this process and nothing else. It leaves by
itself after its time, is the first to go when memory runs out, and writes no core file.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import msgspec
import numpy as np

from stoker import LoadSettings, LocalModel, StokerError
from stoker.config import Config
from stoker.testing import EngineHarness
from stoker_plugins.tune.drive import Rates, busy_neighbour, run_load
from stoker_plugins.tune.loads import LOADS
from stoker_plugins.tune.messages import Answer, Figures, Job, Quality
from stoker_plugins.tune.quality import compare, distributions, num_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker import BackendInfo, PolicyInfo, Runtime, SchedulingPolicy
    from stoker_plugins.tune.host import Host

__all__ = ["TEXT", "serve_job", "text_tokens", "work"]

TEXT = Path(__file__).with_name("text.txt")
_OOM_SCORE = "900"  # of 1000: rather this process than another
_LEAST_CONTEXT = 64
_BESIDE_FACTOR = 4.0  # a run in company may take so many times as long before it is given up


def serve_job(host: Host, source: BinaryIO, sink: BinaryIO) -> int:
    """Read a job, do it, write the answer; returns the exit code."""
    job = msgspec.json.decode(source.read(), type=Job)
    _limit(job)
    sink.write(msgspec.json.encode(work(host, job)) + b"\n")
    sink.flush()
    return 0


def work(host: Host, job: Job) -> Answer:
    """Do a job; what goes wrong on purpose is in the answer."""
    started_s = time.monotonic()
    try:
        answer = _requantize(host, job) if job.kind == "requantize" else _measure(host, job)
    except (StokerError, RuntimeError) as error:
        answer = Answer(failure=" ".join(str(error).split()))
    except MemoryError:
        answer = Answer(failure="out of memory")
    return msgspec.structs.replace(answer, seconds=time.monotonic() - started_s)


def _limit(job: Job) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if job.memory_bytes and sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_DATA, (job.memory_bytes, job.memory_bytes))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    if hasattr(signal, "alarm"):
        # Ends the process even inside native code, should its parent be gone.
        signal.alarm(int(job.limit_s) + 10)


def _requantize(host: Host, job: Job) -> Answer:
    info = cast("BackendInfo", host.plugins.require("backend", job.backend))
    target = Path(job.target)
    info.factory().requantize(_local(job), job.type_name, target)
    return Answer(size_bytes=target.stat().st_size)


def _local(job: Job) -> LocalModel:
    return LocalModel(
        path=Path(job.model.path),
        model_id=job.model.model_id,
        reference=job.model.reference,
        size_bytes=job.model.size_bytes,
    )


def _measure(host: Host, job: Job) -> Answer:
    runtime = _load(host, job)
    try:
        quality = _look_at_quality(runtime, job)
        runs = _run(host, job, runtime)
        return Answer(runs=runs, quality=quality, lanes=runtime.info.num_lanes)
    finally:
        runtime.close()


def _config(job: Job) -> Config:
    return Config(plugins=job.sections, scheduler=job.scheduler)


def _load(host: Host, job: Job) -> Runtime:
    info = cast("BackendInfo", host.plugins.require("backend", job.backend))
    options = dict(job.options)
    if info.options is not None and "self_test" in info.options.__struct_fields__:
        options["self_test"] = False  # this process is the test
    runtime = info.factory().load(
        _local(job),
        LoadSettings(
            lanes=job.lanes,
            context_length=job.context,
            threads=job.threads,
            max_step_tokens=job.scheduler.max_num_batched_tokens,
            options=host.plugins.options(info, _config(job), extra=options),
        ),
    )
    if not runtime.info.capabilities.generates:
        runtime.close()
        raise RuntimeError("it only embeds, and what is measured here is writing")
    return runtime


def _policy(host: Host, job: Job) -> SchedulingPolicy:
    info = cast("PolicyInfo", host.plugins.require("policy", job.scheduler.policy))
    options = host.plugins.options(info, _config(job))
    return info.factory() if options is None else info.factory(options)


def text_tokens(runtime: Runtime) -> list[int]:
    """The bundled text as the model's tokens."""
    text = TEXT.read_text(encoding="utf-8")
    return runtime.tokenizer.encode(text, add_special=True, parse_special=False)


def _look_at_quality(runtime: Runtime, job: Job) -> Quality | None:
    if job.quality is None:
        return None
    info = runtime.info
    tokens = text_tokens(runtime)
    tokens = tokens[: num_positions(info.vocab_size, len(tokens), info.context_length)]
    found = distributions(runtime, tokens)
    path = Path(job.quality.path)
    if job.quality.write:
        with path.open("wb") as file:
            np.save(file, found)
        return None
    reference = np.load(path, mmap_mode="r")
    if reference.shape != found.shape:
        raise RuntimeError("its context or its vocabulary is another than the reference's")
    return compare(reference, found)


def _run(host: Host, job: Job, runtime: Runtime) -> dict[str, Figures]:
    info = runtime.info
    if min(info.context_length, info.kv_capacity_tokens) < _LEAST_CONTEXT:
        raise RuntimeError(f"a context below {_LEAST_CONTEXT} tokens is too short to measure")
    rates = Rates()
    harness = EngineHarness(
        _policy(host, job),
        runtime=runtime,
        scheduler=job.scheduler,
        observers=[rates],
        clock=time.monotonic,
    )
    stream = text_tokens(runtime)
    deadline_s = time.monotonic() + job.limit_s * 0.9
    _warm_up(harness, stream, deadline_s)
    load = LOADS[job.load]
    found: dict[str, Figures] = {}
    if "alone" in job.runs:
        left_s = deadline_s - time.monotonic()
        found["alone"] = run_load(
            harness, load, stream, scale=job.scale, limit_s=left_s, rates=rates, salt=1
        )
    if "beside" in job.runs:
        left_s = max(deadline_s - time.monotonic(), 0.5)
        if "alone" in found:
            left_s = min(left_s, _BESIDE_FACTOR * found["alone"].seconds + 1.0)
        with busy_neighbour(2 * left_s + 10):
            found["beside"] = run_load(
                harness, load, stream, scale=job.scale, limit_s=left_s, rates=rates, salt=2
            )
    return found


def _warm_up(harness: EngineHarness, stream: Sequence[int], deadline_s: float) -> None:
    """Some steps of both kinds, so that what is allocated on first use is."""
    count = min(4, harness.runtime.info.num_lanes)
    requests = [
        harness.submit(stream[31 * i : 31 * i + 24], max_tokens=3, ignore_eos=True)
        for i in range(count)
    ]
    while any(request.finish() is None for request in requests):
        if time.monotonic() > deadline_s:
            raise RuntimeError("its first steps took longer than a whole measurement may")
        harness.step()
    failed = [request.finish() for request in requests]
    for delta in failed:
        if delta is not None and delta.error is not None:
            raise RuntimeError(f"a request failed: {delta.error}")
