"""Ids of the Hugging Face hub in place of folders: from the cache without a network, else fetched, from an endpoint
that this file serves."""

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from hymeg import errors
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.errors import UserError
from hymeg.hf.hub import is_hub_id, local_folder
from hymeg.training import loaded
from hymeg.training.arguments import parse

CONVERT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Empty, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_into(cache: Path, folder: Path) -> Path:
    """As the library lays a model's files out."""
    snapshot = cache / "models--tiny--Hy-MT2" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    refs = cache / "models--tiny--Hy-MT2" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (refs / "v2").write_text(COMMIT)
    return snapshot


def test_what_is_in_the_cache_is_used_without_a_network(cache, hf_checkpoint, tmp_path, monkeypatch):
    snapshot = put_into(cache, hf_checkpoint)
    for name in ("tiny/Hy-MT2", "tiny/Hy-MT2@v2", f"tiny/Hy-MT2@{COMMIT}"):
        assert local_folder(name) == snapshot
    fetch, asked = huggingface_hub.snapshot_download, []
    noted = lambda *args, **words: (asked.append(words["local_files_only"]), fetch(*args, **words))[1]  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    assert local_folder("tiny/Hy-MT2") == snapshot and asked == [True]  # the network is not asked
    given = ["--mock-data", "--train-iters", "1", "--lr", "1e-3", "--seq-length", "64"]
    args, config = parse(["--hf-model", "tiny/Hy-MT2", "--load", "tiny/Hy-MT2@v2", *given])
    assert args.hf_model == args.load == args.tokenizer_model == str(snapshot) and config.hidden_size == 64
    next(snapshot.glob("*-00002-*.safetensors")).unlink()
    assert local_folder("tiny/Hy-MT2", weights=False) == snapshot
    with pytest.raises(UserError, match="tiny/Hy-MT2: no such folder, and a model of this name is neither in"):
        local_folder("tiny/Hy-MT2")
    with pytest.raises(UserError, match="tiny/other@x: no such folder"):
        local_folder("tiny/other@x")


def test_a_tokenizer_that_the_cache_lacks_is_fetched(cache, hf_checkpoint, monkeypatch):
    """As transformers leaves the cache that loaded config.json and the model there."""
    snapshot = put_into(cache, hf_checkpoint)
    for path in snapshot.glob("tokenizer*"):
        path.unlink()
    assert local_folder("tiny/Hy-MT2") == snapshot  # there is no network: what is there will do

    def fetch(*_, local_files_only, **__):
        if not local_files_only:
            shutil.copytree(hf_checkpoint, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert local_folder("tiny/Hy-MT2") == snapshot and (snapshot / "tokenizer.json").is_file()


def called(tool: str, *words: object) -> None:
    """A tool's `main`, in this process."""
    path = Path(__file__).parents[2] / "tools" / f"{tool}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, words)])
        runpy.run_path(str(path), run_name="__main__")


class Loaded(Exception):
    """Instead of a model."""


def test_every_tool_takes_an_id_where_a_folder_is_read(cache, hf_checkpoint, tmp_path, monkeypatch, capsys):
    snapshot = put_into(cache, hf_checkpoint)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "a b c"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")

    def not_loaded(checkpoint, flags, *, hf_model, **_):
        raise Loaded(str(checkpoint), hf_model and str(hf_model))

    monkeypatch.setattr(loaded, "load_model", not_loaded)
    monkeypatch.setattr(errors, "exit_on_user_error", contextlib.nullcontext)
    for words in (["generate", "tiny/Hy-MT2@v2", "--prompt", "a"], ["evaluate", "tiny/Hy-MT2", rows]):
        with pytest.raises(Loaded) as given:
            called(*words)
        assert given.value.args == (str(snapshot), None)
        with pytest.raises(Loaded) as given:
            called(*words[:1], hf_checkpoint, *words[2:], "--hf-model", "tiny/Hy-MT2@v2")
        assert given.value.args == (str(hf_checkpoint), str(snapshot))
        with pytest.raises(UserError, match=r"^--hf-model tiny/absent: no such folder"):
            called(*words, "--hf-model", "tiny/absent")
    called("preprocess_data", "--input", rows, "--output", tmp_path / "text", "--tokenizer", "tiny/Hy-MT2")
    assert (tmp_path / "text_text_document.bin").exists()
    called("inspect_data", rows, "--tokenizer", "tiny/Hy-MT2", "--row", 1)
    with pytest.raises(UserError, match=rf"^{snapshot}: 4 files, but no checksums in it"):
        called("convert_checkpoint", "inspect", "--verify", "tiny/Hy-MT2")
    with pytest.raises(UserError, match=r"--verify with --tensors --json: .*leave that out"):
        called("convert_checkpoint", "inspect", "--verify", "tiny/Hy-MT2", "--json", "--tensors")
    called("plan", "--hf", "tiny/Hy-MT2", "--gpus", 1, "--global-batch-size", 1, "--seq-length", 64)
    assert "H100" in capsys.readouterr().out


def test_a_folder_is_never_taken_for_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/first", "./tiny/x", "/tiny/x", "tiny", "a/b/c", "tiny/x@", "../x"):
        assert not is_hub_id(name) and local_folder(name) == Path(name)
    assert is_hub_id("tiny/x") and is_hub_id("tencent/Hy-MT2-30B-A3B@main")


class Hub(BaseHTTPRequestHandler):
    folder: Path
    fetched: list[str]

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file for file in self.folder.iterdir() if file.is_file()}
        if path.startswith("/api/models/tiny/Hy-MT2/tree/"):
            sums = {name: hashlib.sha1(file.read_bytes()).hexdigest() for name, file in files.items()}
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": sums[name]}
                for name, file in files.items()
            ]
            return self.send(json.dumps(tree).encode(), send_body)
        if path.startswith("/api/models/tiny/Hy-MT2"):
            listed = [{"rfilename": name} for name in files]
            return self.send(json.dumps({"id": "tiny/Hy-MT2", "sha": COMMIT, "siblings": listed}).encode(), send_body)
        name = path.rpartition("/")[2]
        if path.startswith("/tiny/Hy-MT2/resolve/") and name in files:
            if send_body:
                self.fetched.append(name)
            return self.send(files[name].read_bytes(), send_body)
        self.send_error(404)

    def send(self, body: bytes, send_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def endpoint(hf_checkpoint):
    Hub.folder, Hub.fetched = hf_checkpoint, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_missing_is_fetched_once(endpoint, hf_checkpoint, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    for target in ("one", "two"):
        words = [CONVERT, "hf-to-dist", "--hf", "tiny/Hy-MT2@main", "--dist", tmp_path / target, "--workers", "1"]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert compare_checkpoints(hf_checkpoint, tmp_path / target) == []
    assert sorted(Hub.fetched) == sorted(file.name for file in hf_checkpoint.iterdir())
    words = [CONVERT, "hf-to-dist", "--hf", "tiny/absent", "--dist", tmp_path / "three"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "tiny/absent: no such folder" in done.stderr
