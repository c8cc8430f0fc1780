"""The backend suite: what is loaded, what it says of itself, what is refused, and the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stoker.chat_template import ChatTemplate
from stoker.errors import ModelError, StokerError
from stoker.interfaces import Backend, Runtime
from stoker.testing.conformance.backend_base import BackendSuite, load, settings_of
from stoker.testing.conformance.base import check, fail
from stoker.testing.conformance.driving import LaneDriver, Run
from stoker.testing.conformance.subjects import BackendUnderTest
from stoker.types import LocalModel

__all__ = ["BackendLoading"]

_MAX_COPY = 64 * 2**20


class BackendLoading(BackendSuite):
    """A model loads and tells the truth; what is no model is refused with one clear line."""

    def test_info_is_consistent(self, backend: BackendUnderTest, runtime: Runtime) -> None:
        """``RuntimeInfo`` contradicts itself, the settings or the tokenizer.

        To fix: the message names the field.
        """
        info, asked = runtime.info, backend.settings
        tokens = {**runtime.tokenizer.special_tokens, **{f"end {t}": t for t in info.end_token_ids}}
        wrong = {text: t for text, t in tokens.items() if not 0 <= t < info.vocab_size}
        embedding = info.embedding
        for holds, problem in (
            (info.name.strip(), "name is empty"),
            (not wrong, f"vocab_size is {info.vocab_size}, which these tokens exceed: {wrong}"),
            (
                not info.capabilities.generates
                or 1 <= info.num_lanes <= (asked.lanes or info.num_lanes),
                f"num_lanes is {info.num_lanes}, and {asked.lanes} were asked for",
            ),
            (
                info.capabilities.generates or info.num_lanes == info.kv_capacity_tokens == 0,
                f"{info.num_lanes} lanes, {info.kv_capacity_tokens} KV tokens: 0, as generates is false",
            ),
            (
                info.capabilities.generates or info.capabilities.embed,
                "capabilities say that it neither generates nor embeds",
            ),
            (
                1 <= info.max_step_tokens <= asked.max_step_tokens,
                f"max_step_tokens is {info.max_step_tokens}, and {asked.max_step_tokens} was asked for",
            ),
            (info.context_length >= 1, f"context_length is {info.context_length}"),
            (
                not info.capabilities.generates or info.kv_capacity_tokens >= info.context_length,
                f"context_length={info.context_length} exceeds kv_capacity_tokens={info.kv_capacity_tokens}",
            ),
            (info.device.strip(), "device is empty"),
            (
                info.capabilities.truncation in ("any", "reset"),
                f"capabilities.truncation is {info.capabilities.truncation!r}",
            ),
            (info.capabilities.exact_block >= 0, "capabilities.exact_block is negative"),
            (
                bool(embedding) == info.capabilities.embed,
                "capabilities.embed and embedding contradict each other: describe how it embeds if it does",
            ),
            (
                all(isinstance(v, str) for v in info.settings.values()),
                f"settings has values that are no text: {dict(info.settings)}",
            ),
        ):
            check(holds, f"RuntimeInfo of {info.name!r}: {problem}", "Correct what load() reports.")

    def test_the_chat_template_renders(self, runtime: Runtime) -> None:
        """The model's chat template cannot be rendered in stoker's sandbox.

        To fix: report the template as the model's author wrote it, with the texts of its BOS and EOS tokens;
        ``None`` if there is none.
        """
        info = runtime.info
        if info.chat_template is None:
            pytest.skip("the model has no chat template")
        template = ChatTemplate(
            info.chat_template,
            runtime.tokenizer,
            bos_token=info.bos_token,
            eos_token=info.eos_token,
        )
        try:
            text = template.render([{"role": "user", "content": "hello"}])
        except StokerError as error:
            fail(f"the chat template does not render: {error}")
        check("hello" in str(text), "the rendered chat template does not contain the message")

    def test_accepts_its_model(
        self, backend: BackendUnderTest, build: Callable[[], Backend]
    ) -> None:
        """``accepts`` says no to a model that the backend loads, or no bool.

        To fix: look at the name and the first bytes, no more; ``backend = "auto"`` asks every backend.
        """
        answer = build().accepts(backend.model)
        check(
            answer is True,
            f"accepts({backend.model.path}) returned {answer!r}",
            "Return True for what load() can probably load, and only for that.",
        )

    def test_bad_files_are_refused(
        self, backend: BackendUnderTest, build: Callable[[], Backend], tmp_path: Path
    ) -> None:
        """A file that is no model is loaded, or its refusal does not say what is wrong with which file.

        To fix: raise ``stoker.ModelError`` with one line that names the file; check sizes and magic bytes
        before native code reads the file. ``accepts`` may say either, but must not raise.
        """
        bad = list(backend.bad_files)
        if backend.model.path.exists():
            bad += _spoil(backend.model.path, tmp_path)
        elif not bad:
            pytest.skip(
                f"the model has no file ({backend.model.path}), and no bad_files were given"
            )
        made = build()
        for path in bad:
            model = LocalModel(path=path, model_id="bad", reference=str(path))
            answer = made.accepts(model)
            check(isinstance(answer, bool), f"accepts({path}) returned {answer!r}, not a bool")
            try:
                made.load(model, settings_of(backend)).close()
            except ModelError as error:
                message = str(error)
                check(
                    path.name in message and "\n" not in message.strip(),
                    f"the refusal of {path} does not name the file in one line: {message!r}",
                    f"Name the file: `raise ModelError(f'{{model.path}}: ...')`, here {path.name}.",
                )
            except Exception as error:  # noqa: BLE001 - whatever it raises, it is the wrong thing
                fail(
                    f"load({path}) raised {error!r}",
                    "Raise stoker.ModelError, in one line that names the file and says what is wrong.",
                )
            else:
                fail(f"{path} was loaded", "Refuse it with stoker.ModelError, naming the file.")

    def test_close_twice(self, backend: BackendUnderTest, runtime: Runtime) -> None:
        """Closing a runtime twice fails, or breaks another one of the same model.

        To fix: ``close`` remembers that it was called; runtimes own their memory.
        """
        other = load(backend)
        for which in ("first", "second"):
            try:
                other.close()
            except Exception as error:  # noqa: BLE001 - whatever it raises
                fail(f"the {which} close() raised {error!r}", "close() may be called twice.")
        if runtime.info.capabilities.generates:
            tokens = runtime.tokenizer.encode("one", add_special=False, parse_special=False)
            logits = LaneDriver(runtime).step(Run(0, tokens[:1]))
            check(len(logits) == 1, "a runtime does not compute once another one was closed")


def _spoil(good: Path, folder: Path) -> Iterator[Path]:
    """Files and folders that look like a model by their names."""
    yield folder / f"missing{good.suffix}"
    empty = folder / f"empty{good.suffix}"
    text = folder / f"text{good.suffix}"
    cut = folder / f"cut{good.suffix}"
    if good.is_dir():
        for made in (empty, text, cut):
            made.mkdir()
        (text / "README.txt").write_text("This folder holds no model.\n")
        largest = max((f for f in good.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        for file in good.iterdir():
            if file.is_file() and file != largest:
                (cut / file.name).symlink_to(file.resolve())
        _cut(largest, cut / largest.name)
    else:
        empty.touch()
        text.write_text("This is a text, and no model, whatever its name says.\n" * 100)
        _cut(good, cut)
        a_folder = folder / f"folder{good.suffix}"
        a_folder.mkdir()
        yield a_folder
    yield from (empty, text, cut)


def _cut(source: Path, target: Path) -> None:
    """The first half of a file, or a part of it if that is large."""
    left = min(source.stat().st_size // 2, _MAX_COPY)
    with source.open("rb") as whole, target.open("wb") as part:
        while left > 0 and (data := whole.read(min(left, 1 << 20))):
            part.write(data)
            left -= len(data)
    shutil.copymode(source, target)
