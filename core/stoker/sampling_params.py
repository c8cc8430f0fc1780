"""How to choose tokens: the parameters of one request."""

from __future__ import annotations

import msgspec

__all__ = ["SamplingParams"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Ranges are validated by the API; see ``engine/sampler.py`` for the order.

    Attributes:
        max_tokens: Most tokens to generate; ``None`` means up to the context length.
        temperature: 0 is greedy. Range 0 to 2.
        top_p: Nucleus mass, in (0, 1]; 1 is off.
        top_k: Keep the k likeliest tokens; 0 is off.
        min_p: Drop tokens less likely than this share of the likeliest one, in [0, 1]; 0 is off.
        typical_p: Keep the tokens whose surprise is nearest to what is expected, up to this mass
            (locally typical sampling, Meister et al. 2022), in (0, 1]; 1 is off.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in the
            prompt or output (CTRL, Keskar et al. 2019); 1 is off.
        presence_penalty: Subtracted once from the logit of each token seen in the output.
        frequency_penalty: Subtracted once per occurrence of the token in the output.
        dry_multiplier: Strength of the penalty on tokens that would go on repeating what is there (DRY, as
            llama.cpp names its parameters); 0 is off.
        dry_base: Base of that penalty's growth with the length of the repetition.
        dry_allowed_length: Longest repetition that costs nothing, in tokens.
        dry_penalty_last_n: How many of the last tokens are searched for it; -1 for all, 0 is off.
        dry_sequence_breakers: Strings that no repetition reaches across.
        xtc_probability: How often all but the least likely of the tokens above ``xtc_threshold`` are
            dropped (exclude top choices, as llama.cpp names its parameters); 0 is off.
        xtc_threshold: See ``xtc_probability``; above 0.5 is off.
        logit_bias: Added to the logit of a token id.
        seed: Makes a request's draws reproducible; ``None`` draws a fresh seed.
        stop: Strings that end the output; they are not part of it.
        stop_token_ids: Tokens that end the output.
        include_stop: Make the stop string or stop token's text part of the output.
        min_tokens: Tokens before which neither an end token nor a stop string ends the output.
        ignore_eos: Go on after an end token.
        logprobs: Tell the log-probability of each token, and of so many of the likeliest at its place.
        prompt_logprobs: The same for the tokens of the prompt.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
