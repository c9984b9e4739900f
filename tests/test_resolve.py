"""The real hub client against a small hub on this machine, and local folders.

The client reads HF_ENDPOINT when it is imported, so each test runs it in a process of its own.
"""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save

from dus_edge.checkpoint.hub import fetch as hub_files
from dus_edge.checkpoint.hub.fetch import indexed_shards, is_small_file
from dus_edge.checkpoint.resolve import parse_hub_id, resolve_base
from dus_edge.errors import CheckpointError, DusEdgeError, OutputError, UsageError

ORG = "some-org/Tiny-1B"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors(name: str, n: int = 8) -> bytes:
    return save({name: np.arange(n, dtype=np.float32)})


def small_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "generation_config.json": b"{}",
        "tokenizer.model": b"pieces",
        "tokenizer_config.json": b'{"a": 1}',
        "additional_chat_templates/tool_use.jinja": b"{{ x }}",
        "LICENSE.txt": b"All rights reserved",
        "README.md": b"---\nlicense: Apache-2.0\n---\n# Tiny\n",
    }


def unwanted_files() -> dict[str, bytes]:
    return dict.fromkeys(
        (
            ".gitattributes",
            "pytorch_model.bin",
            "consolidated.00.pth",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "onnx/model.onnx",
            "tiny.Q4_0.gguf",
            "original/config.json",
            "training_args.bin",
            "modeling_tiny.py",
        ),
        b"never fetched",
    )


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": s for i, s in enumerate(shards)}}).encode()


def sharded_files() -> dict[str, bytes]:
    return small_files() | {
        INDEX: index(FIRST, SECOND),
        FIRST: tensors("t0"),
        SECOND: tensors("t1", 9),
    }


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    token: str | None = None


def commit_id(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def one_commit(files: dict[str, bytes], **options: object) -> Repo:
    return Repo({commit_id("1"): files}, {"main": commit_id("1")}, **options)


@dataclass
class Hub:
    """A hub's answers, as far as a download needs them.

    Attributes:
        cuts: file → list of byte counts; each GET of it takes one and breaks off after it.
        outage: how many requests a cut makes the hub answer with 503.
        requests: method, path and headers of everything that was asked.
    """

    repos: dict[str, Repo]
    cuts: dict[str, list[int]] = field(default_factory=dict)
    outage: int = 0
    down: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> set[str]:
        """Names of the files that were asked for by GET."""
        gets = [p for m, p, _ in self.requests if m == "GET"]
        plain = {p.split("/", 5)[5] for p in gets if "/resolve/" in p}
        return plain | {p.split("/", 3)[3] for p in gets if p.startswith("/cdn/")}

    def ranges(self) -> list[str]:
        return [h["range"] for m, _, h in self.requests if m == "GET" and "range" in h]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {k.lower(): v for k, v in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        if self.hub.down:
            self.hub.down -= 1
            return self.error(503, "")
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":  # signed addresses need no token
            return self.file(self.blob(parts[1]), parts[2])
        if parts[0] == "datasets":
            parts = parts[1:]
        repo_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self.error(401 if "authorization" not in headers else 404, "RepoNotFound")
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if repo.token and not repo.gated and token != repo.token:
            return self.error(401, "RepoNotFound")
        if parts[0] == "api":
            return self.info(repo_id, repo, "/".join(parts[5:]) or "main")
        if repo.gated and token != repo.token:
            return self.error(403 if token else 401, "GatedRepo")
        commit = repo.refs.get(parts[3], parts[3])
        files = repo.commits.get(commit)
        if files is None:
            return self.error(404, "RevisionNotFound")
        name = "/".join(parts[4:])
        if name not in files:
            return self.error(404, "EntryNotFound")
        self.resolve(name, files[name], commit)

    def info(self, repo_id: str, repo: Repo, revision: str) -> None:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.error(404, "RevisionNotFound")
        siblings = [{"rfilename": n, "size": len(b)} for n, b in repo.commits[commit].items()]
        body = json.dumps({"id": repo_id, "sha": commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def resolve(self, name: str, body: bytes, commit: str) -> None:
        if not name.endswith(".safetensors"):
            return self.file(body, name, {"X-Repo-Commit": commit})
        digest = hashlib.sha256(body).hexdigest()
        self.send_response(302)
        # Another origin than the hub's own, as a content delivery network is.
        port = self.server.server_address[1]
        self.send_header("Location", f"http://localhost:{port}/cdn/{digest}/{name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def blob(self, digest: str) -> bytes:
        bodies = [
            b for r in self.hub.repos.values() for c in r.commits.values() for b in c.values()
        ]
        return next(b for b in bodies if hashlib.sha256(b).hexdigest() == digest)

    def file(self, body: bytes, name: str, extra: dict[str, str] | None = None) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body) - start))
        for key, value in (extra or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(name)
        if not cuts:
            self.wfile.write(body[start:])
            return
        self.hub.down = self.hub.outage
        self.wfile.write(body[start : start + cuts.pop(0)])
        self.close_connection = True

    def error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub({ORG: one_commit(sharded_files() | unwanted_files())})
    handler = type("BoundHandler", (Handler,), {"hub": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield state
        server.shutdown()
        thread.join()


CLIENT = """
import json, os, sys
from pathlib import Path
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.errors import DusEdgeError, UnsupportedError

def check(folder):
    seen.append(sorted(p.name for p in Path(folder).iterdir()))
    if refuse:
        raise UnsupportedError("no such architecture")

results = []
for base, options in json.loads(sys.argv[1]):
    lines, seen, refuse = [], [], options.pop("refuse", False)
    os.environ["HF_TOKEN"] = options.pop("token", "")
    try:
        source = resolve_base(base, progress=lines.append, on_config=check, **options)
        result = {k: getattr(source, k) for k in
                  ("label", "name", "repo_id", "revision", "licence")}
        result["folder"] = str(source.folder)
    except DusEdgeError as e:
        result = {"error": type(e).__name__, "message": str(e), "exit_code": e.exit_code}
    results.append(result | {"lines": lines, "seen": seen})
print(json.dumps(results))
"""


def client(
    home: Path, url: str, *calls: tuple[str, dict[str, object]], **env: str
) -> list[dict[str, object]]:
    """Results of `resolve_base` calls in a new process; it must write nothing else."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGINGFACE_")) and not k.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(calls)],
        env=clean | {"HF_HOME": str(home), "HF_ENDPOINT": url} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def files_under(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_fetches_what_is_needed_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    first, again = client(tmp_path, hub.url, (ORG, {}), (ORG, {}))
    assert files_under(first["folder"]) == sharded_files()
    assert hub.fetched() == set(sharded_files())
    assert first["revision"] == commit_id("1")
    assert (first["label"], first["name"], first["repo_id"]) == (ORG, "Tiny-1B", ORG)
    assert first["licence"] == "apache-2.0"
    assert len(first["lines"]) == len(sharded_files())
    assert f"fetching {FIRST} (1 of 2, " in first["lines"][-2]
    # The hook saw the small files and no weights.
    [seen] = first["seen"]
    assert "tokenizer.model" in seen and INDEX in seen and FIRST not in seen
    # The second time nothing is fetched, and one question is asked.
    assert again["lines"] == [] and again["folder"] == first["folder"]
    assert sum("/api/" in path for _, path, _ in hub.requests) == 2
    assert len([p for m, p, _ in hub.requests if m == "GET" and "/api/" not in p]) == len(
        sharded_files()
    )
    assert not any("agent-harnesses" in path for _, path, _ in hub.requests)


def test_without_weights_then_with_a_refusal(hub: Hub, tmp_path: Path) -> None:
    hub.repos[ORG] = one_commit(small_files() | {"model.safetensors": tensors("t")})
    small, refused, whole = client(
        tmp_path, hub.url, (ORG, {"weights": False}), (ORG, {"refuse": True}), (ORG, {})
    )
    assert small["folder"] == whole["folder"]
    assert refused["message"] == "no such architecture"
    assert len(small["lines"]) == len(small_files())
    assert [len(r["seen"]) for r in (small, refused, whole)] == [1, 1, 1]
    assert "model.safetensors" not in refused["seen"][0]
    assert files_under(whole["folder"]) == hub.repos[ORG].commits[commit_id("1")]


def test_another_cache_folder(hub: Hub, tmp_path: Path) -> None:
    [got] = client(tmp_path, hub.url, (ORG, {"weights": False, "cache_dir": f"{tmp_path}/c"}))
    assert got["folder"].startswith(f"{tmp_path}/c/models--some-org--Tiny-1B/snapshots/")


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    old, new = commit_id("old"), commit_id("new")
    files = {c: small_files() | {"generation_config.json": c.encode()} for c in (old, new)}
    hub.repos[ORG] = Repo(files, {"main": new, "v1": old, "refs/pr/1": old})
    calls = [
        (f"{ORG}{rev}", {"weights": False}) for rev in ("", "@v1", f"@{old}", "@refs/pr/1", "@v9")
    ]
    *found, missing = client(tmp_path, hub.url, *calls)
    assert [f["revision"] for f in found] == [new, old, old, old]
    assert files_under(found[1]["folder"])["generation_config.json"] == old.encode()
    assert found[1]["label"] == f"{ORG}@v1"
    assert missing["error"] == "UsageError" and "no revision v9" in missing["message"]


def test_cuts_are_survived(hub: Hub, tmp_path: Path) -> None:
    # More than one of the client's chunks, so that it has something to go on from.
    files = sharded_files() | {FIRST: tensors("t0", 3_000_000)}
    hub.repos[ORG] = one_commit(files)
    hub.cuts = {FIRST: [11_000_000], "config.json": [5]}
    [got] = client(tmp_path, hub.url, (ORG, {}))
    assert files_under(got["folder"]) == files
    assert hub.ranges() == [f"bytes={10 * 1024 * 1024}-"]


def test_a_download_that_breaks_off_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[SECOND] = [20]
    hub.outage = 2  # the client's second try and the next call's first question
    broken, incomplete, got = client(tmp_path, hub.url, (ORG, {}), (ORG, {}), (ORG, {}))
    assert broken["error"] == "DusEdgeError" and broken["exit_code"] == 1
    assert broken["message"] == (
        f"The download of {SECOND} from {ORG} broke off (HTTP status 503); finished files are "
        "kept, run the same command again to go on."
    )
    # While the hub is down, a copy without all its weights is not taken for a whole one.
    assert "incomplete" in incomplete["message"] and "503" in incomplete["message"]
    assert files_under(got["folder"]) == sharded_files()
    gets = [path for method, path, _ in hub.requests if method == "GET"]
    assert sum(path.endswith(FIRST) for path in gets) == 1
    assert got["lines"] == [f"{ORG}: fetching {SECOND} (1 of 1, {len(tensors('t1', 9))} B)"]


def test_offline(hub: Hub, tmp_path: Path) -> None:
    hub.repos[ORG].refs["v1"] = commit_id("1")
    [absent] = client(tmp_path, hub.url, (ORG, {}), HF_HUB_OFFLINE="1")
    assert absent["error"] == "DusEdgeError"
    assert absent["message"].startswith("HF_HUB_OFFLINE is set, and ")
    assert f"no copy of {ORG} at main" in absent["message"]
    client(tmp_path, hub.url, (f"{ORG}@v1", {}))
    hub.requests = []
    by_tag, by_commit, by_branch = client(
        tmp_path,
        hub.url,
        (f"{ORG}@v1", {}),
        (f"{ORG}@{commit_id('1')}", {}),
        (ORG, {}),
        HF_HUB_OFFLINE="1",
    )
    assert hub.requests == []
    assert by_tag["revision"] == by_commit["revision"] == commit_id("1")
    assert by_tag["licence"] == "apache-2.0" and len(by_tag["seen"]) == 1
    assert by_tag["lines"] == [f"{ORG}: using the cached copy, commit {commit_id('1')[:12]}"]
    assert "no copy" in by_branch["message"]  # main was never asked for


def test_hub_not_reachable(hub: Hub, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    client(tmp_path, hub.url, (ORG, {"weights": False}))
    absent, cached = client(tmp_path, nowhere, ("other-org/Other", {}), (ORG, {"weights": False}))
    assert absent["error"] == "DusEdgeError"
    assert absent["message"].startswith(f"The hub at {nowhere} cannot be reached (")
    assert "no copy of other-org/Other" in absent["message"]
    assert cached["revision"] == commit_id("1")


def test_not_found_gated_private(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/gated"] = one_commit(sharded_files(), gated=True, token="hf_good")
    hub.repos["org/private"] = one_commit(sharded_files(), token="hf_good")
    names = ("org/none", "org/gated", "org/private")
    calls = [(name, {"token": token}) for token in ("", "hf_other", "hf_good") for name in names]
    results = client(tmp_path, hub.url, *calls)
    for none, gated, private in (results[:3], results[3:6]):
        assert none["error"] == private["error"] == "UsageError"
        assert "no model org/none, or it is private" in none["message"]
        assert "org/private, or it is private" in private["message"]
        assert gated["error"] == "DusEdgeError"
        assert f"accept its licence on {hub.url}/org/gated and set HF_TOKEN" in gated["message"]
        assert all("\n" not in r["message"] for r in (none, gated, private))
    none, gated, private = results[6:]
    assert none["error"] == "UsageError"
    assert gated["name"] == "gated" and private["name"] == "private"
    seen = [h.get("authorization") for _, _, h in hub.requests]
    hub.requests = hub.requests[seen.index("Bearer hf_good") :]
    for method, path, headers in hub.requests:
        # The token goes to the hub and never to the network that stores the weights.
        expected = None if path.startswith("/cdn/") and method == "GET" else "Bearer hf_good"
        assert headers.get("authorization") == expected


def test_repositories_that_cannot_be_used(hub: Hub, tmp_path: Path) -> None:
    weights = {FIRST: tensors("t0")}
    repos = {
        "org/pickled": small_files() | {"pytorch_model.bin": b"pickle"},
        "org/gguf": small_files() | {"x.Q4_0.gguf": b"GGUF"},
        "org/empty": small_files(),
        "org/no-config": {"model.safetensors": tensors("t")},
        "org/outside": small_files() | weights | {INDEX: index(FIRST, "../../secret.safetensors")},
        "org/absolute": small_files() | weights | {INDEX: index("/etc/passwd")},
        "org/to-pickle": small_files() | weights | {INDEX: index(FIRST, "pytorch_model.bin")},
        "org/absent": small_files() | weights | {INDEX: index(FIRST, SECOND)},
        "org/no-index": small_files() | weights | {INDEX: b"[]"},
    }
    hub.repos = {name: one_commit(files) for name, files in repos.items()}
    results = client(tmp_path, hub.url, *((name, {}) for name in repos))
    got = {name: (r["error"], r["message"]) for name, r in zip(repos, results, strict=True)}
    expected = {
        "org/pickled": ("UnsupportedError", "M.from_pretrained('org/pickled').save_pretrained("),
        "org/gguf": ("UnsupportedError", "only GGUF files"),
        "org/empty": ("UnsupportedError", "neither model.safetensors nor"),
        "org/no-config": ("CheckpointError", "no config.json"),
        "org/outside": ("CheckpointError", "'../../secret.safetensors', outside the folder"),
        "org/absolute": ("CheckpointError", "'/etc/passwd', outside the folder"),
        "org/to-pickle": ("CheckpointError", "no safetensors file"),
        "org/absent": ("CheckpointError", f"names {SECOND}, which the repository does not have"),
        "org/no-index": ("CheckpointError", "no index of shards"),
    }
    for name, (error, words) in expected.items():
        assert got[name][0] == error
        assert words in got[name][1] and got[name][1].endswith(".") and "\n" not in got[name][1]
    assert hub.fetched() <= set(small_files()) | {INDEX}


def test_too_little_disk(tmp_path: Path) -> None:
    repo = hub_files.HubRepo(ORG, commit_id("1"), {"model.safetensors": 10**18}, tmp_path)
    repo.folder.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"needs 931322574\.6 GiB more"):
        hub_files.check_disk(repo, ["model.safetensors"])


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (OSError(errno.ENOSPC, "No space left"), OutputError, "disk of the hub cache is full"),
        (PermissionError(errno.EACCES, "no", "/cache/x"), OutputError, "/cache/x cannot be wri"),
        (
            RuntimeError("Data processing error: x\nmore"),
            DusEdgeError,
            "(Data processing error: x)",
        ),
        (OSError("Consistency check failed: y"), DusEdgeError, "broke off (Consistency"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_download_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    expected: type[BaseException],
    words: str,
) -> None:
    def download(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    repo = hub_files.HubRepo(ORG, commit_id("1"), {FIRST: None}, tmp_path)
    lines: list[str] = []
    with pytest.raises(expected) as caught:
        hub_files.fetch_files(repo, [FIRST], lines.append)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert lines[0] == f"{ORG}: fetching {FIRST} (1 of 1)"
    if expected is KeyboardInterrupt:
        assert lines[1] == f"{ORG}: interrupted; run the same command again to go on with {FIRST}"


# --- local folders -------------------------------------------------------------------------


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in ("config.json", "README.md"):
        (path / name).write_bytes(small_files()[name])
    return path


def test_local_folder(tmp_path: Path) -> None:
    folder, seen = make_folder(tmp_path / "My-Model"), []
    source = resolve_base(str(folder), on_config=seen.append)
    assert source.folder == folder and seen == [folder]
    assert (source.name, source.label, source.licence) == ("My-Model", str(folder), "apache-2.0")
    assert source.repo_id is None and source.revision is None


def test_local_folder_wins_over_hub_and_dot_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "org" / "name")
    (tmp_path / "org" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_base("org/name").folder == Path("org/name")
    with pytest.raises(CheckpointError, match=r"no config\.json; a folder wins over the hub"):
        resolve_base("org/empty")
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert resolve_base(".").name == "name"


def test_cache_snapshot_given_as_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models--some-org--Tiny-1B" / "snapshots" / commit_id("1")
    source = resolve_base(str(make_folder(folder)))
    assert (source.name, source.repo_id) == ("Tiny-1B", ORG)
    assert source.revision == commit_id("1")


def test_builtin_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    folder = make_folder(tmp_path / "model")
    monkeypatch.setattr("dus_edge.checkpoint.resolve.model_dir", lambda: folder)
    (tmp_path / "work" / "pico").mkdir(parents=True)  # a folder without a checkpoint is no rival
    monkeypatch.chdir(tmp_path / "work")
    seen: list[Path] = []
    source = resolve_base("pico", on_config=seen.append)
    assert (source.folder, source.name, source.label) == (folder, "pico", "pico")
    assert source.licence == "apache-2.0" and seen == [folder]
    (tmp_path / "work" / "pico" / "config.json").write_text("{}")
    assert resolve_base("pico").folder == Path("pico")
    monkeypatch.setattr("dus_edge.checkpoint.resolve.model_dir", lambda: tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="reinstall"):
        resolve_base("pico")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("./no/such", "There is no folder ./no/such."),
        ("/no/such", "There is no folder /no/such."),
        ("~nobody-here/x", "There is no folder"),
        ("a/b/c", "There is no folder a/b/c."),
        ("models/x.gguf", "There is no folder or file models/x.gguf."),
        ("models/x/", "There is no folder models/x/."),
        ("gpt2", "not of the form org/name"),
        ("", "not of the form org/name"),
        ("org/na me", "not of the form org/name"),
        ("org/name@", "not of the form org/name"),
        ("org/name@../../x", "not of the form org/name"),
        ("org/../name", "There is no folder"),
        ("org/na--me", "not of the form org/name"),
        ("org/" + "x" * 300, "not of the form org/name"),
        ("nul\0/name", "not of the form org/name"),
    ],
)
def test_what_is_no_base(base: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_base(base)
    assert words in str(caught.value)
    assert "pico" in str(caught.value) or "There is no folder" in str(caught.value)


def test_a_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"x\.gguf is no GGUF file of a model \(it ends"):
        resolve_base(str(tmp_path / "x.gguf"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json is a file, and a base is a folder"):
        resolve_base(str(tmp_path / "config.json"))


def test_hub_ids() -> None:
    assert parse_hub_id("org/name") == ("org/name", None)
    assert parse_hub_id("o/N-1.5_b@main") == ("o/N-1.5_b", "main")
    assert parse_hub_id("org/name@refs/pr/7") == ("org/name", "refs/pr/7")


def test_small_files() -> None:
    assert all(map(is_small_file, small_files()))
    assert not any(map(is_small_file, unwanted_files()))
    assert not is_small_file("additional_chat_templates/../x")
    assert not is_small_file("sub/LICENSE")


def test_index_must_be_readable(tmp_path: Path) -> None:
    path = tmp_path / INDEX
    for text in (b"", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"\xff"):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match="no index of shards"):
            indexed_shards(path, "org/name")
    path.write_bytes(index(SECOND, FIRST, FIRST))
    assert indexed_shards(path, "org/name") == [FIRST, SECOND]


def test_import_is_light() -> None:
    code = (
        "import sys, dus_edge.checkpoint.resolve\n"
        "print([m for m in ('huggingface_hub', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
