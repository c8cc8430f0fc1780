"""The backend's options: ``[plugins.ctransformers]``, or ``options`` of one model in ``[[models]]``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["CTransformersOptions"]


class CTransformersOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How ctransformers loads a model.

    Attributes:
        model_type: The architecture, where neither the file nor its name tells: ``gpt2``, ``gptj``,
            ``gpt_neox``, ``dolly-v2``, ``mpt``, ``starcoder``, ``falcon`` or ``llama``.
        batch_size: Most tokens that it computes at once.
        library: Which of its builds to use; by default the best one for this CPU.
        truncation: ``any`` keeps a lane's first tokens when a conversation goes on; ``reset`` computes
            every prompt from its first token, as is always done with falcon.
        chat_template: A file with a Jinja chat template; such model files hold none.
        self_test: Try the model in a child process first.
        check_memory: Refuse what exceeds the free memory.
    """

    model_type: str | None = None
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=512)] = 64
    library: Literal["avx2", "avx", "basic"] | None = None
    truncation: Literal["any", "reset"] = "any"
    chat_template: str | None = None
    self_test: bool = True
    check_memory: bool = True
