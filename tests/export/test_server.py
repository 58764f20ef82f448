"""The server of docs/serving.md answers with the outputs of `predict`."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtrain as jt

pytestmark = pytest.mark.slow  # starts two processes
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


def program(name: str) -> str:
    blocks = re.findall(rf"^```python {name}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.M)
    assert len(blocks) == 1
    return blocks[0]


@pytest.fixture(scope="module")
def state() -> jt.TrainState:
    """A small network."""
    model = jt.models.FeedForward((8, 10))
    return jt.init_state(model, jt.optimizers.adam(0.1), IMAGES[:1], key=jax.random.key(0))


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory) -> Path:
    """A folder with its file."""
    path = tmp_path_factory.mktemp("server")
    jt.export.stablehlo(state, path / "model.stablehlo", IMAGES[:1], postprocess=jax.nn.softmax)
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The address of the running server."""
    (folder / "server.py").write_text(program("server.py"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "server.py", str(port)], cwd=folder, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            assert server.poll() is None, "the server ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def post(address: str, body: bytes) -> object:
    request = urllib.request.Request(address, body)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        assert response.headers["Content-Type"] == "application/json"
        return json.load(response)


def test_the_server_answers_with_probabilities(state, address: str) -> None:
    expected = np.asarray(jax.nn.softmax(jt.predict(state, IMAGES)))
    np.testing.assert_allclose(post(address, IMAGES.tobytes()), expected, atol=1e-6)
    np.testing.assert_allclose(post(address, IMAGES[:1].tobytes()), expected[:1], atol=1e-6)


@pytest.mark.parametrize("body", [b"1234567", b""], ids=["incomplete", "empty"])
def test_a_bad_request_is_answered_with_the_reason(state, address: str, body: bytes) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(address, body)
    with raised.value as answer:
        assert answer.code == 400
        assert json.load(answer)["error"]
    assert len(post(address, IMAGES.tobytes())) == 3  # type: ignore  # it still answers


@pytest.mark.parametrize("size", ["-1", "1" + "0" * 20, "x"], ids=["negative", "huge", "text"])
def test_a_length_out_of_range_is_answered_with_the_reason(address: str, size: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", size)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 400
    assert size in json.load(answer)["error"]
    connection.close()


def test_the_short_program_of_the_page_runs(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", program("predict.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "uint8[batch,28,28]" in result.stdout
    assert "('cpu', 'cuda')" in result.stdout
