"""``hf:`` through the real CLI, against a local server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.slow  # starts processes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b"GGUF" + bytes(range(256)) * 4096  # about 1 MB


class Hub(ThreadingHTTPServer):
    """What the hub knows, and how it misbehaves.

    Attributes:
        files: Content by ``owner/repo/path``.
        sha256: The checksums it states, where they are not the contents'.
        break_after: Close the connection after so many bytes, once.
        token: What clients must present, if anything.
        requests: ``(method, path, range header)`` of everything that was asked.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sha256: dict[str, str] = {}
        self.break_after: int | None = None
        self.token: str | None = None
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def checksum(self, name: str) -> str:
        return self.sha256.get(name) or hashlib.sha256(self.files[name]).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        token = self.server.token
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            self.send(401, b"{}", {"X-Error-Message": "Invalid credentials"})
        elif path.startswith("api/models/"):
            self.send_listing("/".join(path.split("/")[2:4]))
        elif "/resolve/main/" in path:
            repo, _, file = path.partition("/resolve/main/")
            self.send_file(f"{repo}/{file}", body=body)
        else:
            self.send(404, b"{}")

    def send_listing(self, repo: str) -> None:
        names = [name for name in self.server.files if name.startswith(f"{repo}/")]
        if not names:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [
            {
                "rfilename": name.removeprefix(f"{repo}/"),
                "size": len(self.server.files[name]),
                "blobId": "b" * 40,
                "lfs": {
                    "sha256": self.server.checksum(name),
                    "size": len(self.server.files[name]),
                    "pointerSize": 134,
                },
            }
            for name in names
        ]
        data = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        self.send(200, json.dumps(data).encode())

    def send_file(self, name: str, *, body: bool) -> None:
        content = self.server.files.get(name)
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {
            "ETag": f'"{self.server.checksum(name)}"',
            "X-Linked-ETag": f'"{self.server.checksum(name)}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if (wanted := self.headers.get("Range")) is not None:
            status, start = 206, int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        if body and self.server.break_after is not None:
            cut, self.server.break_after = rest[: self.server.break_after], None
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(rest))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(cut)
            self.close_connection = True
            return
        self.send(status, rest, headers, body=body)

    def send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **(headers or {})}
        for key, value in fields.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.files["org/tiny/tiny.Q8_0.gguf"] = CONTENT
    server.files["org/tiny/README.md"] = b"# tiny"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Pull:
    """Runs ``stoker pull`` in an environment of its own."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "STOKER_"))},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf"),
            "STOKER_CACHE": str(folder / "cache"),
            "NO_PROXY": "127.0.0.1",
        }

    def __call__(
        self, reference: str, command: str = "pull", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "import stoker.cli, sys; sys.exit(stoker.cli.main())", command]
            + ([reference] if reference else []),
            env={**self.environ, **environ},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def path(self, reference: str, **environ: str) -> Path:
        done = self(reference, **environ)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.rsplit("  ", 1)[0])

    def error(self, reference: str, **environ: str) -> str:
        done = self(reference, **environ)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("stoker: ")]
        return line


@pytest.fixture
def pull(tmp_path: Path, hub: Hub) -> Pull:
    return Pull(tmp_path, hub.url)


def gets(hub: Hub) -> list[str | None]:
    """The range headers of the requests for content."""
    return [
        bytes_ for method, path, bytes_ in hub.requests if method == "GET" and "/resolve/" in path
    ]


def test_a_model_is_fetched_checked_and_kept(pull: Pull, hub: Hub) -> None:
    path = pull.path("hf:org/tiny/tiny.Q8_0.gguf")
    assert path.read_bytes() == CONTENT
    assert path.name == "tiny.Q8_0.gguf"
    assert (pull.folder / "cache" / "verified" / hub.checksum("org/tiny/tiny.Q8_0.gguf")).exists()
    assert gets(hub) == [None]
    assert pull.path("hf:org/tiny") == path  # the repository's only model, from the cache
    assert gets(hub) == [None]
    # Without a connection the cache serves, with and without a file's name; so does offline mode.
    hub.files.clear()
    for reference in ("hf:org/tiny", "hf:org/tiny/tiny.Q8_0.gguf"):
        assert pull.path(reference, HF_HUB_OFFLINE="1") == path
        assert pull.path(reference, HF_ENDPOINT="http://127.0.0.1:9") == path
    listing = json.loads(pull("--json", command="models").stdout)
    assert "hf:org/tiny/tiny.Q8_0.gguf" in [row["reference"] for row in listing]


def test_a_broken_connection_is_resumed(pull: Pull, hub: Hub) -> None:
    block = 10 * 1024 * 1024  # what the library writes at a time, and so can resume after
    hub.files["org/tiny/tiny.Q8_0.gguf"] = CONTENT * 12
    hub.break_after = block + 1000
    assert pull.path("hf:org/tiny").read_bytes() == CONTENT * 12
    assert gets(hub) == [None, f"bytes={block}-"]


def test_a_wrong_checksum_is_refused_and_fetched_again(pull: Pull, hub: Hub) -> None:
    hub.sha256["org/tiny/tiny.Q8_0.gguf"] = "0" * 64
    assert "tiny.Q8_0.gguf: the checksum is wrong" in pull.error("hf:org/tiny")
    assert not list((pull.folder / "hf").rglob("*.gguf"))
    assert "the checksum is wrong" in pull.error("hf:org/tiny")
    assert len(gets(hub)) == 2
    hub.sha256.clear()
    assert pull.path("hf:org/tiny").read_bytes() == CONTENT


def test_what_is_not_there_is_named(pull: Pull, hub: Hub) -> None:
    assert "hf:org/nope: there is no such repository" in pull.error("hf:org/nope")
    text = pull.error("hf:org/tiny/other.gguf")
    assert "there is no file 'other.gguf'; its GGUF files: tiny.Q8_0.gguf" in text
    assert "write hf:owner/repo" in pull.error("hf:tiny")
    text = pull.error("hf:org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in text
    assert "the cache does not hold it" in text


def test_one_of_several_quantisations_is_chosen(pull: Pull, hub: Hub) -> None:
    hub.files["org/many/m-F16.gguf"] = b"GGUF16"
    hub.files["org/many/m-Q4_K_M.gguf"] = b"GGUF4"
    assert pull.path("hf:org/many").name == "m-Q4_K_M.gguf"
    del hub.files["org/many/m-Q4_K_M.gguf"]
    hub.files["org/many/n-F16.gguf"] = b"GGUF16"
    assert "name one of them: m-F16.gguf, n-F16.gguf" in pull.error("hf:org/many")


def test_all_parts_of_a_split_model_are_fetched(pull: Pull, hub: Hub) -> None:
    for part in (1, 2):
        hub.files[f"org/big/big-0000{part}-of-00002.gguf"] = b"GGUF" + bytes([part])
    path = pull.path("hf:org/big")
    assert path.name == "big-00001-of-00002.gguf"
    assert path.with_name("big-00002-of-00002.gguf").read_bytes() == b"GGUF\x02"


FOLDER = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
    "1.safetensors": b"1",
    "2.safetensors": b"22",
    "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}]',
    "1_Pooling/config.json": b"{}",
}
OTHERS = ("README.md", "LICENSE.txt", "pytorch_model.bin", "consolidated.safetensors", "model.onnx")


def test_a_repository_without_gguf_is_fetched_as_a_folder(pull: Pull, hub: Hub) -> None:
    hub.files |= {f"org/whole/{name}": content for name, content in FOLDER.items()}
    hub.files |= {f"org/whole/{name}": b"no" for name in OTHERS}
    folder = pull.path("hf:org/whole")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == FOLDER.keys()
    assert (folder / "2.safetensors").read_bytes() == b"22"
    assert (pull.folder / "cache/verified" / hub.checksum("org/whole/tokenizer.json")).exists()
    # Without a connection the cache serves, but not what is only partly there.
    assert pull.path("hf:org/whole", HF_HUB_OFFLINE="1") == folder
    rows = {row["reference"]: row for row in json.loads(pull("--json", command="models").stdout)}
    assert rows["hf:org/whole"]["id"] == "whole"
    assert rows["hf:org/whole"]["size_bytes"] == sum(map(len, FOLDER.values()))
    (folder / "2.safetensors").unlink()
    text = pull.error("hf:org/whole", HF_HUB_OFFLINE="1")
    assert "in the cache, hf:org/whole: 2.safetensors is missing" in text


def test_the_folder_beside_gguf_files_is_taken_if_it_is_named(pull: Pull, hub: Hub) -> None:
    hub.files |= {"org/tiny/config.json": b"{}", "org/tiny/model.safetensors": b"123"}
    hub.files |= {"org/tiny/sub/config.json": b"{}", "org/tiny/sub/model.safetensors": b"4"}
    assert pull.path("hf:org/tiny").name == "tiny.Q8_0.gguf"
    folder = pull.path("hf:org/tiny/config.json")
    assert (folder / "model.safetensors").read_bytes() == b"123"
    assert pull.path("hf:org/tiny/sub/config.json") == folder / "sub"
    rows = [row["reference"] for row in json.loads(pull("--json", command="models").stdout)]
    assert {"hf:org/tiny/tiny.Q8_0.gguf", "hf:org/tiny/config.json"} <= set(rows)


def test_repositories_without_safetensors_say_why(pull: Pull, hub: Hub) -> None:
    hub.files |= {"org/old/config.json": b"{}", "org/old/pytorch_model.bin": b"x"}
    hub.files["org/data/a.csv"] = b"x"
    text = pull.error("hf:org/old")
    assert "pickle files only (pytorch_model.bin)" in text
    assert "allow_pickle = true" in text
    assert "neither GGUF files nor a model with a config.json" in pull.error("hf:org/data")
    assert gets(hub) == []


def test_a_wrong_checksum_in_a_folder_is_refused(pull: Pull, hub: Hub) -> None:
    hub.files |= {"org/old/config.json": b"{}", "org/old/model.safetensors": b"x"}
    hub.sha256["org/old/model.safetensors"] = "0" * 64
    assert "model.safetensors: the checksum is wrong" in pull.error("hf:org/old")


def test_a_token_is_presented(pull: Pull, hub: Hub) -> None:
    hub.token = "hf_secret"
    assert "set HF_TOKEN" in pull.error("hf:org/tiny")
    assert pull.path("hf:org/tiny", HF_TOKEN="hf_secret").read_bytes() == CONTENT


def test_without_the_library_the_extra_is_named(pull: Pull) -> None:
    blocked = pull.folder / "huggingface_hub.py"
    blocked.write_text("raise ImportError('blocked')\n")
    text = pull.error("hf:org/tiny", PYTHONPATH=str(pull.folder))
    assert 'pip install "stoker[hub]"' in text
