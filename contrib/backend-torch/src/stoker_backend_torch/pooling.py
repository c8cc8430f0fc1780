"""How a model's vectors are made: what its folder says in the files of sentence-transformers.

Such a folder lists its modules in ``modules.json``: the transformer, the pooling, perhaps dense layers, a
last normalization; each with a folder and a ``config.json`` of its own
(https://sbert.net/docs/sentence_transformer/usage/custom_models.html).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from stoker import EmbeddingInfo, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stoker_backend_torch.options import TorchOptions

__all__ = [
    "DenseLayer",
    "EmbeddingPlan",
    "Pooling",
    "Recipe",
    "is_embedding_only",
    "makes_embeddings",
    "plan_embedding",
    "read_recipe",
]

Pooling = Literal["mean", "cls", "last", "max"]
_T = TypeVar("_T")

_MODULES = "modules.json"
_OWN = "sentence_transformers."
_MAX_INPUTS = 64
_NO_LIMIT = 10**6  # tokenizers without one say 10**30
_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
}
# What a base model is called, and what is made for guessing words: all of them have vectors for tokens.
_BASE_MODELS = ("Model", "ForMaskedLM", "ForPreTraining", "EncoderModel")
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class _Module(msgspec.Struct):
    type: str
    path: str = ""


class _TransformerFile(msgspec.Struct):
    max_seq_length: Annotated[int, msgspec.Meta(ge=1)] | None = None
    do_lower_case: bool = False
    transformer_task: str = "feature-extraction"


class _DenseFile(msgspec.Struct):
    in_features: Annotated[int, msgspec.Meta(ge=1)]
    out_features: Annotated[int, msgspec.Meta(ge=1)]
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: str = "sentence_embedding"


class _ModelFile(msgspec.Struct):
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None


class _TokenizerFile(msgspec.Struct):
    model_max_length: float | None = None


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A layer that pooled vectors go through.

    Attributes:
        folder: Where its weights are.
        in_features: Numbers of a vector before it.
        out_features: And behind it.
        bias: Whether it adds one.
        activation: The name of the function at its end, in ``torch.nn``.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a folder says about embedding.

    Attributes:
        pooling: How the vectors of a text's tokens become one; ``None`` if it does not say.
        max_tokens: Most tokens of a text; ``None`` if it does not say.
        heads: What pooled vectors go through, in order; ``None`` stands for bringing them to length 1.
        normalizes: Whether the last thing it says is to bring them to length 1.
        lower_case: Whether texts are to be lower-cased first.
        prompts: What is to stand before a text, by its purpose.
        default_prompt: The purpose that is assumed where none is named.
        similarity: What vectors are to be compared by; ``None`` if it does not say.
    """

    pooling: Pooling | None = None
    max_tokens: int | None = None
    heads: tuple[DenseLayer | None, ...] = ()
    normalizes: bool = False
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """How a model embeds.

    Attributes:
        info: For the core.
        pooling: How the vectors of a text's tokens become one.
        heads: See ``Recipe``.
        warnings: What the user should know, in full sentences.
    """

    info: EmbeddingInfo
    pooling: Pooling
    heads: tuple[DenseLayer | None, ...] = ()
    warnings: tuple[str, ...] = ()


# --------------------------------------------------------------------------- deciding


def is_embedding_only(folder: Path, architectures: Sequence[str]) -> bool:
    """Whether a model is there to embed and not to write.

    Args:
        folder: The model's.
        architectures: What its ``config.json`` names.
    """
    if (folder / _MODULES).is_file():
        return True
    if any(name.endswith(_WRITERS) for name in architectures):
        return False
    return any(name.endswith(_BASE_MODELS) for name in architectures)


def makes_embeddings(architectures: Sequence[str]) -> bool:
    """Whether the vectors of a model's last layer mean something; also if nobody says what it is.

    Args:
        architectures: What its ``config.json`` names.
    """
    made_for = (*_BASE_MODELS, *_WRITERS)
    return not architectures or any(name.endswith(made_for) for name in architectures)


def plan_embedding(
    recipe: Recipe,
    options: TorchOptions,
    *,
    width: int,
    limit: int | None,
    context_length: int | None = None,
) -> EmbeddingPlan | None:
    """How a model embeds; ``None`` if it is not to.

    Args:
        recipe: What its folder says.
        options: The user's; ``pooling`` is stronger than the recipe.
        width: Numbers of the vector of a token.
        limit: Most tokens for which the model has positions; ``None`` if there is no such number.
        context_length: What the user wants to be the most; stronger than the recipe.

    Raises:
        ModelError: The dense layers do not fit, or nobody says how long a text may be.
    """
    if not options.embeddings:
        return None
    warnings = _warnings(recipe)
    most = min(filter(None, (context_length or recipe.max_tokens, limit)), default=None)
    if most is None:
        raise ModelError(
            "neither config.json nor sentence_bert_config.json says how long a text may be; set `context` "
            "for this model"
        )
    if context_length is not None and most < context_length:
        warnings.append(
            f"texts to embed may have {most} tokens, not {context_length}: the model has no more positions"
        )
    for layer in filter(None, recipe.heads):
        if layer.in_features != width:
            raise ModelError(
                f"{layer.folder}: its dense layer takes vectors of {layer.in_features} numbers, not {width}"
            )
        width = layer.out_features
    pooling = options.pooling or recipe.pooling or "mean"
    info = EmbeddingInfo(
        width=width,
        max_input_tokens=most,
        pooling=pooling,
        max_inputs=_MAX_INPUTS,
        truncatable=options.matryoshka,
    )
    return EmbeddingPlan(info, pooling, recipe.heads, tuple(warnings))


def _warnings(recipe: Recipe) -> list[str]:
    found = []
    prompts = {name: text for name, text in recipe.prompts.items() if text}
    if prompts:
        shown = ", ".join(f"{name}: {text[:200]!r}" for name, text in list(prompts.items())[:4])
        assumed = ""
        if recipe.default_prompt in prompts:
            assumed = (
                f" (sentence-transformers takes {recipe.default_prompt!r} where none is named)"
            )
        found.append(
            "the model was trained with prompts before its texts, which clients have to put there "
            f"themselves: {shown}{', ...' if len(prompts) > 4 else ''}{assumed}"
        )
    if recipe.similarity not in (None, "cosine") and not recipe.normalizes:
        found.append(
            f"the model was made to compare vectors by {recipe.similarity!r}, which depends on their length; "
            "the vectors served here have length 1, so that only their cosine is known"
        )
    return found


# --------------------------------------------------------------------------- reading


def read_recipe(folder: Path) -> Recipe:
    """What a folder says about embedding; an empty recipe if it is silent.

    Raises:
        ModelError: A file is damaged, or asks for something that is not supported; names the file.
    """
    tokenizer = _read(folder / "tokenizer_config.json", _TokenizerFile) or _TokenizerFile()
    length = tokenizer.model_max_length
    tokenizer_limit = int(length) if length is not None and 0 < length < _NO_LIMIT else None
    modules = _read(folder / _MODULES, list[_Module])
    if modules is None:
        return Recipe(max_tokens=tokenizer_limit)
    kinds = [_kind(folder / _MODULES, module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ModelError(
            f"{folder / _MODULES}: its modules are {', '.join(kinds) or 'none'}; only models that begin with "
            "Transformer and Pooling can be served"
        )
    if modules[0].path not in ("", "."):
        raise ModelError(
            f"{folder / _MODULES}: its transformer lies in {modules[0].path!r}, an old layout; save it again "
            "with a current sentence-transformers"
        )
    heads: list[DenseLayer | None] = []
    for kind, module in zip(kinds[2:], modules[2:], strict=True):
        if kind not in ("Dense", "Normalize"):
            raise ModelError(
                f"{folder / _MODULES}: modules of type {module.type} are not supported"
            )
        heads.append(None if kind == "Normalize" else _read_dense(folder / module.path))
    normalizes = bool(heads) and heads[-1] is None
    while heads and heads[-1] is None:
        heads.pop()  # the core does it anyway
    own = _transformer_file(folder)
    about = _read(folder / "config_sentence_transformers.json", _ModelFile) or _ModelFile()
    return Recipe(
        pooling=_read_pooling(folder / modules[1].path),
        max_tokens=own.max_seq_length or tokenizer_limit,
        heads=tuple(heads),
        normalizes=normalizes,
        lower_case=own.do_lower_case,
        prompts=about.prompts,
        default_prompt=about.default_prompt_name,
        similarity=about.similarity_fn_name,
    )


def _kind(file: Path, module: _Module) -> str:
    if not module.type.startswith(_OWN):
        raise ModelError(
            f"{file}: the module {module.type} is code of the model's own, which cannot be served"
        )
    return module.type.rpartition(".")[2]


def _transformer_file(folder: Path) -> _TransformerFile:
    # Older versions named it after the kind of model: sentence_roberta_config.json.
    for file in sorted(folder.glob("sentence_*_config.json")):
        found = _read(file, _TransformerFile) or _TransformerFile()
        if found.transformer_task != "feature-extraction":
            raise ModelError(
                f"{file}: it is made for the task {found.transformer_task!r}, which cannot be served"
            )
        return found
    return _TransformerFile()


def _read_pooling(folder: Path) -> Pooling:
    file = folder / "config.json"
    raw = _read(file, dict[str, Any])
    if raw is None:
        raise ModelError(
            f"{file} is missing: it says how vectors are pooled; fetch it with the model"
        )
    modes = [name for name in raw if name.startswith("pooling_mode_") and raw[name] is True]
    known: Mapping[str, Pooling] = _POOLING_FLAGS
    if "pooling_mode" in raw:
        named = raw["pooling_mode"]
        modes, known = ([named] if isinstance(named, str) else list(named)), _POOLING_NAMES
    if len(modes) != 1 or modes[0] not in known:
        raise ModelError(
            f"{file}: it pools by {' and '.join(map(str, modes)) or 'nothing'}; one of {', '.join(known)} is "
            "supported"
        )
    return known[modes[0]]


def _read_dense(folder: Path) -> DenseLayer:
    file = folder / "config.json"
    found = _read(file, _DenseFile)
    if found is None:
        raise ModelError(f"{file} is missing; fetch it with the model")
    if found.module_input_name != "sentence_embedding":
        raise ModelError(
            f"{file}: it is applied to {found.module_input_name!r}, not to pooled vectors"
        )
    module, _, activation = found.activation_function.rpartition(".")
    if not module.startswith("torch.nn.modules."):
        raise ModelError(
            f"{file}: its activation {found.activation_function} is not one of torch's"
        )
    return DenseLayer(folder, found.in_features, found.out_features, found.bias, activation)


def _read(file: Path, kind: type[_T]) -> _T | None:
    """What a JSON file holds; ``None`` if there is none.

    Raises:
        ModelError: It cannot be read, or holds something else.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind, strict=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: {error}; fetch it again") from error
