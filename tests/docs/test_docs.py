"""The documentation says what the code does: its examples run, its includes are the files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec
import pytest

import stoker
from stoker import config, hookspecs
from stoker.testing import EngineHarness, ScriptedRuntime
from stoker_plugins.batches.options import BatchesOptions

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_included_files_are_what_the_page_shows(page: Path) -> None:
    text = page.read_text()
    for name, shown in re.findall(r"<!-- include: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        assert shown == (ROOT / name).read_text(), f"{page.name} shows an old {name}"


def test_the_tutorials_policy_registers_and_orders_as_it_says() -> None:
    module = load(DOCS / "examples" / "shortest_prompt.py")
    assert len((DOCS / "examples" / "shortest_prompt.py").read_text().split("\n")) <= 21
    (info,) = module.stoker_register_policies()
    assert isinstance(info, stoker.PolicyInfo)
    harness = EngineHarness(info.factory(), runtime=ScriptedRuntime(lanes=1, context_length=500))
    prompts = ["medium prompt", "a much longer prompt than that", "short"]
    requests = {prompt: harness.submit(prompt, max_tokens=3) for prompt in prompts}
    ended: list[str] = []
    while harness.engine.has_work:
        harness.step()
        ended += [p for p in prompts if requests[p].finish() is not None and p not in ended]
    assert ended == sorted(prompts, key=len)
    assert harness.engine.scheduler.policy.num_errors == 0


def test_the_pages_python_blocks_run() -> None:
    """The harness example follows the policy it tests: run the page's blocks in order, as one program."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "plugins.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks), "plugins.md", "exec"), {})


async def test_the_middleware_of_the_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "plugins.md").read_text(), re.DOTALL)
    (text,) = [block for block in blocks if "class Pause" in block]
    module = {"__name__": "pause"}
    exec(compile(text, "plugins.md", "exec"), module)
    register = cast(Any, module["stoker_register_middleware"])
    (info,) = register()
    middleware = info.factory(None)
    request = stoker.Request(
        request_id="1", model="m", prompt_token_ids=[1], sampling=stoker.SamplingParams()
    )
    monkeypatch.chdir(tmp_path)
    assert await middleware.on_request(request) is request
    (tmp_path / "pause").touch()
    with pytest.raises(stoker.UnavailableError) as refused:
        await middleware.on_request(request)
    assert (refused.value.status_code, refused.value.code) == (503, "paused")
    request.tenant = "operators"
    assert await middleware.on_request(request) is request


def specs() -> dict[str, str]:
    return {
        name: getattr(hookspecs, name).__doc__ or ""
        for name in dir(hookspecs)
        if name.startswith("stoker_")
    }


def test_every_hook_has_all_sections_and_stands_in_the_table() -> None:
    page = (DOCS / "plugins.md").read_text()
    assert len(specs()) == 12
    for name, text in specs().items():
        for section in ("When:", "Returns:", "Ordering:", "Errors:", "Example:", "Since:"):
            assert section in text, f"{name} has no section {section}"
        assert f"`{name}(" in page


def test_relative_links_and_named_files_exist() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md"), *ROOT.glob("bench/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for target in re.findall(
            r"`((?:core|docs|bench|contrib|plugins|tests)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / target).exists(), f"{page.name} names {target}"


@pytest.mark.parametrize("name", [name for name in config.__all__ if name != "Config"])
def test_every_setting_stands_in_the_reference_with_its_default(name: str) -> None:
    page = (DOCS / "configuration.md").read_text()
    section = name.removesuffix("Config").lower()
    section = {"model": "models", "tenant": "tenants"}.get(section, section)
    start = re.search(rf"^## `\[+{section}\]+`$", page, re.MULTILINE)
    assert start is not None
    table = page[start.end() :].split("\n## ")[0]
    for field in msgspec.structs.fields(getattr(config, name)):
        default = field.default
        if field.required:
            default = None
        elif default is msgspec.NODEFAULT:
            default = field.default_factory()
        shown = "" if default is None else f"`{msgspec.json.encode(default).decode()}`"
        assert f"| `{field.name}` | {shown} |" in table


def test_the_options_of_batches_stand_on_their_page_with_their_defaults() -> None:
    page = (DOCS / "batches.md").read_text()
    for field in msgspec.structs.fields(BatchesOptions):
        shown = "" if field.default is None else f"`{msgspec.json.encode(field.default).decode()}`"
        assert f"| `{field.name}` | {shown} |" in page


def test_the_tool_format_of_the_page_works() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tools.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "tools.md", "exec"), {})
