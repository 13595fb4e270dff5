# SPDX-License-Identifier: MIT OR Apache-2.0
"""Before a model is served it must give its reference vectors, by every backend's whole road."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_backends import Blocked
from in_process import serving, until
from live import run_cli, running_server
from minilm import minilm_folder
from model_folders import export_onnx
from numpy.typing import NDArray
from tiny_models import TinyModel, load_reference, make_bert, make_nomic_bert, make_static

from embedding_server import Embedder
from embedding_server.errors import ModelNotSupported
from embedding_server.models.catalog import CATALOG
from embedding_server.models.reference import REFERENCE_FILE, ReferenceVectors

MINILM = "all-MiniLM-L6-v2"
TEXTS = ["iPhone", "How do I reset my password?", "a text of the world " * 10]


def put_reference(model: TinyModel, *, off_by: float = 0.0) -> Path:
    """Write sentence-transformers' vectors into the folder, with one value of the second wrong."""
    vectors = load_reference(model).encode(TEXTS, prompt="", normalize_embeddings=True)
    vectors[1, 3] += np.float32(off_by)
    vectors[1] /= np.linalg.norm(vectors[1])
    path = model.folder / REFERENCE_FILE
    np.savez(path, texts=np.array(TEXTS), embeddings=vectors)
    return path


def log_of(model: Path | str, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    """What is logged while ``model`` is loaded."""
    caplog.clear()
    with caplog.at_level("INFO"), Embedder(str(model), **options):
        return caplog.text


def refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(ModelNotSupported) as caught:
        Embedder(str(model), **options)
    return str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return make_bert(tmp_path / "tiny")


# ------------------------------------------------------------------------------ a folder's own


BACKENDS = {
    "onnx": (make_bert, {"backend": "onnx"}),
    "torch": (make_bert, {"backend": "torch"}),
    "static": (make_static, {}),
    "onnx-file": (make_bert, {"onnx_file": "onnx/model.onnx"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_right_vectors_pass_and_wrong_ones_do_not(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, options = BACKENDS[backend]
    model = make(tmp_path / "tiny")
    if backend == "onnx-file":
        export_onnx(model, "onnx/model.onnx")
    put_reference(model)
    log = log_of(model.folder, caplog, **options)
    assert f"tiny is ready: {backend}, " in log
    passed = re.search(r"self-check: 3 texts within 1e-04 \(largest difference (\S+)\)", log)
    assert passed is not None
    assert float(passed[1]) < 1e-5
    path = put_reference(model, off_by=0.01)
    message = refusal(model.folder, **options)
    assert f"tiny does not give the vectors in {path}" in message
    worst = re.search(r"'How do I reset my password\?' differs by (\S+), and 1e-04 is", message)
    assert worst is not None
    assert 0.009 < float(worst[1]) < 0.011
    assert "Get the model again" in message
    assert (
        f"remove that file, and write it anew with `embedding-server models verify {path.parent}"
        in message
    )


def test_a_long_text_is_shortened_in_the_message(model: TinyModel) -> None:
    put_reference(model)
    with np.load(model.folder / REFERENCE_FILE) as data:
        texts, vectors = data["texts"], data["embeddings"]
    np.savez(model.folder / REFERENCE_FILE, texts=texts, embeddings=vectors[[0, 1, 1]])
    assert f"that of {TEXTS[2][:50]!r} differs" in refusal(model.folder)


def test_the_bound(model: TinyModel) -> None:
    put_reference(model, off_by=8e-5)
    with Embedder(str(model.folder)):
        pass
    put_reference(model, off_by=1.3e-4)
    assert "differs by 1.3e-04" in refusal(model.folder)


def test_no_prompt_is_prepended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_bert(
        tmp_path / "tiny", prompts={"query": "the water of the city "}, default_prompt_name="query"
    )
    put_reference(model)
    assert "self-check: 3 texts" in log_of(model.folder, caplog)


def test_every_command_refuses(model: TinyModel) -> None:
    put_reference(model, off_by=0.5)
    for command in (
        ("serve", "--port", "0", "--model", str(model.folder)),
        ("embed", "--model", str(model.folder)),
        ("models", "info", str(model.folder)),
    ):
        done = run_cli(*command, stdin=b"text\n")
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"tiny does not give the vectors in" in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_default_model_that_fails_is_a_warning(tmp_path: Path) -> None:
    name = "nomic-embed-text-v1"
    wrong = make_nomic_bert(tmp_path / name, hidden=96)
    vectors = np.eye(2, 96, dtype=np.float32)
    np.savez(wrong.folder / REFERENCE_FILE, texts=np.array(["a", "b"]), embeddings=vectors)
    with running_server("--load-models-from", str(tmp_path)) as server:
        served = httpx.get(f"{server.url}/v1/models").json()["data"]
        metrics = httpx.get(f"{server.url}/metrics").text
        log = server.log
    assert served == [MINILM]
    assert name not in metrics
    (warning,) = [line for line in log.splitlines() if f"{name} is not served" in line]
    assert " warning " in warning
    assert "does not give the vectors in" in warning


def test_limits_of_requests_are_none_of_the_self_check() -> None:
    flags = ("--max-request-tokens", "1", "--max-queued-tokens", "1")
    with running_server("--model", MINILM, *flags) as server:
        assert "self-check: 8 texts" in server.log


def test_nobody_is_served_before_it(
    tiny_model: Path, tmp_path: Path, blocked: type[Blocked]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "tiny")
    vectors = np.full((1, blocked.dims), 1 / blocked.dims**0.5, dtype=np.float32)
    np.savez(folder / REFERENCE_FILE, texts=np.array(["a text"]), embeddings=vectors)
    request = {"model": "tiny", "input": "text"}
    with serving(model=(str(folder),), backend="onnx", wait=False) as server:
        registry = server.app.state.registry
        until(lambda: not registry.loading and registry.status() == {"tiny": "loading"})
        answer = httpx.post(f"{server.url}/v1/embeddings", json=request)
        assert answer.status_code == 503
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        blocked.release()
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
        assert httpx.post(f"{server.url}/v1/embeddings", json=request).status_code == 200
        assert 'inputs_total{model="tiny"} 1.0' in httpx.get(f"{server.url}/metrics").text


# -------------------------------------------------------------------------------- the catalog's


def test_those_of_the_catalog_are_golden(golden: tuple[list[str], NDArray[np.float32]]) -> None:
    texts, expected = golden
    path = CATALOG[MINILM].reference_vectors
    assert path is not None
    found = ReferenceVectors.read(path)
    assert len(found.texts) == 8
    places = [texts.index(text) for text in found.texts]
    assert np.array_equal(found.vectors, expected[places])
    scripts = {"Привет", "你好", "مرحبا", "café"}
    assert all(any(script in text for text in found.texts) for script in scripts)


def test_the_catalogs_are_for_the_weights_of_its_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "self-check: 8 texts within" in log_of(MINILM, caplog)
    copy = shutil.copytree(minilm_folder(), tmp_path / MINILM)
    assert "self-check: 8 texts within" in log_of(copy, caplog)
    other = make_bert(tmp_path / "other" / MINILM).folder
    assert "no self-check" in log_of(other, caplog)
    assert "no self-check" in log_of(make_bert(tmp_path / "tiny").folder, caplog)


def test_the_catalogs_are_not_for_another_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(minilm_folder(), tmp_path / MINILM)
    export_onnx(TinyModel(copy, copy), "onnx/model.onnx")
    assert "no self-check" in log_of(copy, caplog, onnx_file="onnx/model.onnx")


def test_changed_pooling_over_the_right_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(minilm_folder(), tmp_path / MINILM)
    config = copy / "1_Pooling" / "config.json"
    settings = json.loads(config.read_text())
    settings |= {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    config.write_text(json.dumps(settings))
    assert "give its folder another name" in refusal(copy)
    assert "no self-check" in log_of(copy.rename(tmp_path / "mine"), caplog)


# ----------------------------------------------------------------------------- files of no use


def arrays(**changed: Any) -> Callable[[Path], object]:
    """A file with good arrays, but for ``changed``."""
    good = {"texts": np.array(["a", "b"]), "embeddings": np.eye(2, 32, dtype=np.float32)}
    return lambda path: np.savez(path, **(good | changed))


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("texts.npy", bytes(2**24))


def endless(path: Path) -> None:
    """A header that promises more than any memory."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 32), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("texts.npy", b"\x93NUMPY\x01\x00\x76\x00" + header)
        archive.writestr("embeddings.npy", b"\x93NUMPY\x01\x00\x76\x00" + header)


def cut(path: Path) -> None:
    arrays()(path)
    path.write_bytes(path.read_bytes()[:-40])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "can't be read"),
    "cut": (cut, "can't be read"),
    "no-zip": (lambda path: path.write_bytes(b"\x93NUMPY" * 20), "can't be read"),
    "folder": (lambda path: path.mkdir(), "can't be read"),
    "endless": (endless, "can't be read"),
    "no-texts": (lambda path: np.savez(path, embeddings=np.eye(2, 32)), "texts"),
    "pickle": (arrays(texts=np.array(["a", None], dtype=object)), "can't be read (Object arrays"),
    "large": (lambda path: path.write_bytes(bytes(2**20 + 1)), "is larger than 1048576 bytes"),
    "bomb": (bomb, "is larger than 1048576 bytes"),
    "many": (
        arrays(texts=np.array(["a"] * 257), embeddings=np.eye(257, 32, dtype=np.float32)),
        "has 257 texts instead of 1 to 256",
    ),
    "none": (arrays(texts=np.array([], "U1")), "has 0 texts"),
    "bytes": (arrays(texts=np.array([b"a", b"b"])), "no list of strings"),
    "a-table": (arrays(texts=np.array([["a", "b"]])), "no list of strings"),
    "fewer": (arrays(embeddings=np.eye(1, 32, dtype=np.float32)), "no float32 vector"),
    "doubles": (arrays(embeddings=np.eye(2, 32)), "no float32 vector"),
    "flat": (arrays(embeddings=np.ones(2, dtype=np.float32)), "no float32 vector"),
    "long": (arrays(embeddings=2 * np.eye(2, 32, dtype=np.float32)), "whose length is not 1"),
    "nan": (arrays(embeddings=np.full((2, 32), np.nan, np.float32)), "whose length is not 1"),
    "other-dims": (
        arrays(embeddings=np.eye(2, 31, dtype=np.float32)),
        "has vectors of 31 values, and the model's have 32",
    ),
    "no-text": (arrays(texts=np.array(["a", "\ud800"])), "has texts that can't be embedded"),
}


@pytest.mark.parametrize(("write", "fault"), WRONG.values(), ids=WRONG.keys())
def test_a_file_of_no_use_is_refused(
    write: Callable[[Path], object], fault: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "tiny")
    write(folder / REFERENCE_FILE)
    message = refusal(folder)
    assert str(folder / REFERENCE_FILE) in message
    assert fault in message
    assert f"models verify {folder} --write {folder}`" in message
    assert "\n" not in message
