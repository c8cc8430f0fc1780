"""What folders in sentence-transformers' format say about embedding, and what is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stoker import ModelError
from stoker_backend_torch.options import TorchOptions
from stoker_backend_torch.pooling import (
    DenseLayer,
    Recipe,
    is_embedding_only,
    makes_embeddings,
    plan_embedding,
    read_recipe,
)

OWN = "sentence_transformers.models"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{OWN}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{OWN}.Pooling"},
]
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{OWN}.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{OWN}.Dense"}
POOLING, LAYER = "1_Pooling/config.json", "2_Dense/config.json"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the files of a folder: ``write({"1_Pooling/config.json": {...}}, modules=[...])``."""

    def make(files: dict[str, Any] | None = None, *, modules: Any = MODULES) -> Path:
        usual = {"modules.json": modules, POOLING: {"pooling_mode_mean_tokens": True}}
        for name, content in (usual | (files or {})).items():
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


def test_a_folder_without_a_word_about_it(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) == Recipe()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert read_recipe(tmp_path) == Recipe()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert read_recipe(tmp_path) == Recipe(max_tokens=512)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_poolings(write: Write, config: dict[str, Any], pooling: str) -> None:
    assert read_recipe(write({POOLING: config})).pooling == pooling


def test_all_there_is_to_say(write: Write) -> None:
    layer = {"in_features": 8, "out_features": 4, "bias": False}
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    folder = write(
        {
            "tokenizer_config.json": {"model_max_length": 512},
            "sentence_roberta_config.json": {"max_seq_length": 128, "do_lower_case": True},
            LAYER: layer | activation,
            "config_sentence_transformers.json": {
                "prompts": {"query": "Query: ", "document": ""},
                "default_prompt_name": "query",
                "similarity_fn_name": "dot",
            },
        },
        modules=[*MODULES, DENSE, NORMALIZE | {"path": "3_Normalize"}],
    )
    assert read_recipe(folder) == Recipe(
        pooling="mean",
        max_tokens=128,
        heads=(DenseLayer(folder / "2_Dense", 8, 4, bias=False, activation="Identity"),),
        normalizes=True,
        lower_case=True,
        prompts={"query": "Query: ", "document": ""},
        default_prompt="query",
        similarity="dot",
    )


def test_a_normalization_before_a_layer_is_kept(write: Write) -> None:
    dense = {LAYER: {"in_features": 8, "out_features": 4}}
    recipe = read_recipe(write(dense, modules=[*MODULES, NORMALIZE, DENSE]))
    assert [layer is None for layer in recipe.heads] == [True, False]
    assert not recipe.normalizes
    assert read_recipe(write(modules=[*MODULES, NORMALIZE])).heads == ()


def layer(**fields: Any) -> dict[str, Any]:
    return {LAYER: {"in_features": 1, "out_features": 1, **fields}}


@pytest.mark.parametrize(
    ("files", "modules", "match"),
    [
        ({}, [MODULES[1]], "only models that begin with Transformer and Pooling"),
        ({}, [], "its modules are none"),
        ({}, [MODULES[0], DENSE, MODULES[1]], "begin with Transformer and Pooling"),
        ({}, [*MODULES, {"path": "x", "type": f"{OWN}.LayerNorm"}], "LayerNorm are not supported"),
        ({}, [{"path": "", "type": "custom_st.Transformer"}], "code of the model's own"),
        ({}, [MODULES[0] | {"path": "0_Transformer"}, MODULES[1]], "an old layout"),
        ({"modules.json": "[{]"}, None, r"modules\.json: JSON is malformed"),
        ({POOLING: {}}, MODULES, "pools by nothing"),
        (
            {POOLING: {"pooling_mode_weightedmean_tokens": True}},
            MODULES,
            r"1_Pooling.config\.json: it pools by pooling_mode_weightedmean_tokens; one of",
        ),
        (
            {POOLING: {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}},
            MODULES,
            "pools by pooling_mode_mean_tokens and pooling_mode_max_tokens",
        ),
        ({}, [MODULES[0], MODULES[1] | {"path": "elsewhere"}], "elsewhere.config.json is missing"),
        ({}, [*MODULES, DENSE], "2_Dense.config.json is missing"),
        (layer(in_features=0), [*MODULES, DENSE], "Expected `int` >= 1"),
        (layer(activation_function="os.system"), [*MODULES, DENSE], "is not one of torch's"),
        (layer(module_input_name="tokens"), [*MODULES, DENSE], "not to pooled vectors"),
        ({"sentence_bert_config.json": {"transformer_task": "x"}}, MODULES, "for the task 'x'"),
        ({"sentence_bert_config.json": {"max_seq_length": "long"}}, MODULES, "Expected `int"),
    ],
)
def test_what_cannot_be_done_is_refused(
    write: Write, files: dict[str, Any], modules: Any, match: str
) -> None:
    with pytest.raises(ModelError, match=match):
        read_recipe(write(files, modules=modules))


@pytest.mark.parametrize(
    ("names", "only", "makes"),
    [
        (["BertModel"], True, True),
        (["MistralModel"], True, True),
        (["ModernBertForMaskedLM"], True, True),
        (["Qwen3ForCausalLM"], False, True),
        (["GPT2LMHeadModel"], False, True),
        (["Gemma3ForConditionalGeneration"], False, True),
        (["XLMRobertaForSequenceClassification"], False, False),
        ([], False, True),
    ],
)
def test_who_only_embeds(
    tmp_path: Path, write: Write, names: list[str], only: bool, makes: bool
) -> None:
    assert is_embedding_only(tmp_path, names) is only
    assert makes_embeddings(names) is makes
    assert is_embedding_only(write(), names)


@pytest.mark.parametrize(
    ("recipe", "options", "limit", "context", "expected"),
    [
        (Recipe(), {}, 512, None, (512, "mean")),
        (Recipe("cls", 256), {}, 512, None, (256, "cls")),
        (Recipe("cls", 256), {"pooling": "max"}, 512, 300, (300, "max")),
        (Recipe("last", 2048), {}, None, None, (2048, "last")),
        (Recipe("last", 2048), {}, 512, 4096, (512, "last")),
    ],
)
def test_plans(
    recipe: Recipe,
    options: dict[str, Any],
    limit: int | None,
    context: int | None,
    expected: tuple[int, str],
) -> None:
    plan = plan_embedding(
        recipe, TorchOptions(**options), width=8, limit=limit, context_length=context
    )
    assert plan is not None
    assert (plan.info.max_input_tokens, plan.info.pooling) == expected
    assert (plan.info.width, plan.info.truncatable) == (8, False)
    assert [w for w in plan.warnings if "may have 512 tokens, not 4096" in w] == [*plan.warnings]
    assert len(plan.warnings) == (context == 4096)


def test_plans_with_layers(tmp_path: Path) -> None:
    first, second = (
        DenseLayer(tmp_path, *sizes, bias=True, activation="Tanh") for sizes in ((8, 4), (4, 6))
    )
    recipe = Recipe(heads=(None, first, second))
    plan = plan_embedding(recipe, TorchOptions(matryoshka=True), width=8, limit=10)
    assert plan is not None
    assert (plan.info.width, plan.info.truncatable) == (6, True)
    with pytest.raises(ModelError, match="takes vectors of 8 numbers, not 7"):
        plan_embedding(recipe, TorchOptions(), width=7, limit=10)


def test_no_plan() -> None:
    assert plan_embedding(Recipe(), TorchOptions(embeddings=False), width=8, limit=None) is None
    with pytest.raises(ModelError, match="set `context`"):
        plan_embedding(Recipe(), TorchOptions(), width=8, limit=None)


def test_what_the_user_should_know() -> None:
    prompts = {"query": "Query: ", "document": ""}
    recipe = Recipe(prompts=prompts, default_prompt="query", similarity="dot")
    plan = plan_embedding(recipe, TorchOptions(), width=8, limit=10)
    assert plan is not None
    assert "query: 'Query: ' (sentence-transformers takes 'query'" in plan.warnings[0]
    assert "compare vectors by 'dot'" in plan.warnings[1]
    normal = Recipe(prompts={"document": ""}, similarity="dot", normalizes=True)
    plan = plan_embedding(normal, TorchOptions(), width=8, limit=10)
    assert plan is not None
    assert plan.warnings == ()
