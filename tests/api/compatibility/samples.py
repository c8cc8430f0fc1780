"""Values that ask for something, for the parameters that an endpoint does not serve."""

from __future__ import annotations

from typing import Any

from api.compatibility import conversation, ending, sampling, shapes, told, tools
from api.compatibility.cases import probes
from api.compatibility.harness import ENDPOINTS, Endpoint
from openai_schemas import properties

PROBES = (conversation, ending, sampling, shapes, told, tools)  # importing them fills the table
SAMPLES: dict[str, Any] = {
    "add_generation_prompt": True,
    "audio": {"voice": "alloy", "format": "wav"},
    "background": True,
    "bad_words": ["no"],
    "best_of": 2,
    "cache_control": {"type": "ephemeral"},
    "cache_salt": "a",
    "chat_template_kwargs": {"a": 1},
    "container": "one",
    "context_management": [{"type": "compaction"}],
    "continue_final_message": True,
    "conversation": "conv_1",
    "dry_allowed_length": 3,
    "dry_base": 2,
    "dry_multiplier": 1,
    "dry_penalty_last_n": 8,
    "dry_sequence_breakers": ["x"],
    "echo": True,
    "frequency_penalty": 1,
    "function_call": {"name": "get"},
    "functions": [{"name": "get"}],
    "grammar": 'root ::= "a"',
    "guided_choice": ["a"],
    "guided_grammar": 'root ::= "a"',
    "guided_json": {"type": "object"},
    "guided_regex": "a",
    "ignore_eos": True,
    "include": ["message.output_text.logprobs"],
    "include_stop_str_in_output": True,
    "inference_geo": "eu",
    "input": "a",
    "instructions": "a",
    "json_schema": {"type": "object"},
    "length_penalty": 2,
    "logit_bias": {"1": 1},
    "logprobs": 1,
    "max_completion_tokens": 2,
    "max_output_tokens": 2,
    "max_tokens": 2,
    "max_tool_calls": 2,
    "mcp_servers": [{"name": "a"}],
    "messages": [{"role": "user", "content": "a"}],
    "metadata": {"a": "b"},
    "min_p": 0.5,
    "min_tokens": 1,
    "modalities": ["text", "audio"],
    "moderation": {"model": "a"},
    "n": 2,
    "output_config": {"effort": "high"},
    "output_format": {"type": "json_schema", "schema": {}},
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "a"},
    "presence_penalty": 1,
    "previous_response_id": "resp_1",
    "priority": 1,
    "prompt": "a",
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "prompt_logprobs": 1,
    "reasoning": {"effort": "high"},
    "reasoning_effort": "high",
    "repetition_penalty": 2,
    "response_format": {"type": "json_object"},
    "return_progress": True,
    "return_token_ids": True,
    "safety_identifier": "a",
    "seed": 1,
    "service_tier": "flex",
    "speed": "fast",
    "stop": "a",
    "stop_sequences": ["a"],
    "stop_token_ids": [1],
    "store": True,
    "stream_options": {"include_obfuscation": True},
    "structured_outputs": {"regex": "a"},
    "suffix": "a",
    "system": "a",
    "text": {"verbosity": "low"},
    "thinking": {"type": "enabled"},
    "timeout": 60,
    "timings": True,
    "timings_per_token": True,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "get"}}],
    "top_logprobs": 1,
    "truncation": "auto",
    "typical_p": 0.5,
    "use_beam_search": True,
    "user": "a",
    "verbosity": "high",
    "web_search_options": {"search_context_size": "low"},
    "xtc_probability": 1,
    "xtc_threshold": 0.2,
}
# OpenAI's specification of the requests, and what Anthropic's API has beside what is served.
SPECIFIED = {
    "chat": properties("CreateChatCompletionRequest"),
    "completions": properties("CreateCompletionRequest"),
    "responses": properties("CreateResponse"),
    "messages": {"container", "context_management", "mcp_servers", "inference_geo"},
}


def parameters() -> list[str]:
    """All parameters of the table, in its order."""
    return sorted({name for name, *_ in probes()} | set(SAMPLES))


def is_its_own(name: str, endpoint: Endpoint) -> bool:
    """Whether a parameter means something at an endpoint that does not serve it."""
    return name in SPECIFIED[endpoint.name]


def unserved() -> list[tuple[str, Endpoint]]:
    """The cells without a probe: the parameters are named in the header, or refused by a strict server."""
    served = {(name, endpoint.name) for name, endpoint, *_ in probes()}
    return [
        (name, endpoint)
        for name in parameters()
        for endpoint in ENDPOINTS
        if (name, endpoint.name) not in served
    ]
