"""What a measurement's two processes say to each other: one ``Job`` in, one ``Answer`` out, as JSON."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from stoker.config import SchedulerConfig

__all__ = ["Answer", "Figures", "Job", "ModelFile", "Quality", "QualityJob"]


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""


class ModelFile(_Message, frozen=True, kw_only=True):
    """A ``LocalModel`` with its path as text."""

    path: str
    model_id: str
    reference: str
    size_bytes: int


class QualityJob(_Message, frozen=True, kw_only=True):
    """Compare the model's distributions with those of the reference setting.

    Attributes:
        path: The file of the reference's distributions.
        write: Make that file instead of comparing with it.
    """

    path: str
    write: bool = False


class Job(_Message, frozen=True, kw_only=True):
    """One measurement, or one file to write.

    Attributes:
        kind: ``measure``, or ``requantize``: write ``model`` to ``target`` as ``type_name``.
        model: What to load.
        backend: Who loads it.
        sections: ``[plugins.<name>]`` of the backend and the policy.
        options: Options of the backend on top of its section.
        lanes: As configured.
        context: As configured.
        threads: ``[performance] threads``.
        scheduler: Token budgets and the policy.
        load: Name of the load.
        scale: Its size, 1 for the usual one.
        runs: Where to run the load: alone, and beside a busy process.
        limit_s: Longest time for all of it.
        memory_bytes: Most memory that may be taken; 0 for no limit.
        quality: Also look at what the model says.
        type_name: See ``kind``.
        target: See ``kind``.
    """

    kind: Literal["measure", "requantize"] = "measure"
    model: ModelFile
    backend: str
    sections: dict[str, dict[str, Any]] = {}
    options: dict[str, Any] = {}
    lanes: int | None = None
    context: int | None = None
    threads: int | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    load: str = "interactive"
    scale: float = 1.0
    runs: tuple[Literal["alone", "beside"], ...] = ("alone",)
    limit_s: float = 120.0
    memory_bytes: int = 0
    quality: QualityJob | None = None
    type_name: str = ""
    target: str = ""


class Figures(_Message, frozen=True, kw_only=True):
    """One run of a load.

    Attributes:
        score: Its speed as the load weighs it; higher is better, and only ratios mean anything.
        seconds: How long it took.
        ttft_s: Median time to the first token.
        itl_s: Mean time between two tokens of one stream.
        tokens_per_s: Generated tokens by ``seconds``.
        prefill_tokens_per_s: Prompt tokens in steps that only prefill; 0 if there were none.
        decode_tokens_per_s: Generated tokens in steps that only decode; 0 if there were none.
        complete: Whether it ended by itself, and not at its time limit.
    """

    score: float
    seconds: float
    ttft_s: float
    itl_s: float
    tokens_per_s: float
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    complete: bool = True


class Quality(_Message, frozen=True, kw_only=True):
    """How far next-token distributions are from the reference's, over the positions of a text.

    Attributes:
        kl_mean: Mean Kullback-Leibler divergence of the reference from it, in nats.
        kl_max: The largest one.
        top1: Share of positions at which the likeliest token is the same.
        positions: How many were compared.
    """

    kl_mean: float
    kl_max: float
    top1: float
    positions: int


class Answer(_Message, frozen=True, kw_only=True):
    """What came of a job.

    Attributes:
        failure: Why there are no figures, in words for a table; empty if there are.
        runs: Figures by where the load ran.
        quality: If it was asked for and is not the reference itself.
        seconds: How long the process took.
        lanes: Lanes of the loaded model.
        size_bytes: Size of the file that was written.
    """

    failure: str = ""
    runs: dict[str, Figures] = {}
    quality: Quality | None = None
    seconds: float = 0.0
    lanes: int = 0
    size_bytes: int = 0
