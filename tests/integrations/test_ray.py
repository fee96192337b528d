"""The examples on Ray, run as a user runs them: a server with two replicas, and a folder of Parquet files."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

import token_pruning as tp
from tests.pages import ROOT
from tests.workspace import WORDS, write_checkpoint

if find_spec("ray") is None:  # without importing it
    pytest.skip("Ray has no wheel for this Python or system", allow_module_level=True)

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import CrossEncoder, SentenceTransformer
from tei_client.clients.http_client import HttpClient

LONGEST = 64  # tokens
PATIENCE = 300  # seconds, for a machine that does much else
STARTS = 3  # Ray gives its own start 30 seconds, which a busy machine may not have
REPLICA = "ServeReplica:default:Models"
PRUNER = tp.FixedThreshold(thresholds=[0.3, 0.5, 0.7, 0.9], scoring_mode="relative")


def text(length: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng([seed, length]).choice(WORDS, length))


def wait(what: Callable[[], Any], process: Any = None) -> Any:
    """What a function gives as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, "it takes too long"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.05)
    return found


def until(what: Callable[[], Any], start: Callable[..., Any], command: tuple[Any, ...]) -> Any:
    """A process for which something is true; started again if it ends before."""
    for _ in range(STARTS):
        process = start(*command)
        wait(lambda process=process: what() or process.poll() is not None)
        if process.poll() is None:
            return process
    raise AssertionError(f"{command[0]} has ended {STARTS} times")


def processes(of: subprocess.Popen[bytes], name: str = "") -> list[psutil.Process]:
    """Those that a process has started, and they; of Ray's actors those of a name."""
    return [each for each in psutil.Process(of.pid).children(recursive=True) if alive(each, name)]


def replicas(of: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Those of a server; not what they have just forked, which has their name until it runs something else."""
    found = processes(of, REPLICA)
    numbers = {each.pid for each in found}
    return [each for each in found if not forked(each, numbers)]


def forked(process: psutil.Process, by: set[int]) -> bool:
    try:
        return process.ppid() in by
    except psutil.NoSuchProcess:
        return True


def alive(process: psutil.Process, name: str = "") -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``embedder``, pruned, and ``reranker``, dense."""
    home = tmp_path_factory.mktemp("home")
    write_checkpoint(home / "encoder", head="encoder", initializer_range=0.3)
    write_checkpoint(home / "ranker", labels=1, initializer_range=0.3)
    embedder = SentenceTransformer(str(home / "encoder"), device="cpu")
    embedder.prompts = {"query": "good cat: "}
    reranker = CrossEncoder(str(home / "ranker"), num_labels=1, device="cpu")
    embedder.max_seq_length = reranker.max_seq_length = LONGEST
    tp.prune(embedder, PRUNER)
    embedder.save_pretrained(str(home / "embedder"))
    reranker.save_pretrained(str(home / "reranker"))
    return home


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts an example on a cluster of its own; all of its processes are gone afterwards."""
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets are short
    settings = {
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 * 2**20),
        "RAY_TMPDIR": scratch,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    running: list[subprocess.Popen[bytes]] = []

    def start(script: str, *arguments: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
        running.append(subprocess.Popen(command, env=environment))
        return running[-1]

    yield start
    started = [each for process in running if process.poll() is None for each in processes(process)]
    for process in running:
        process.kill()
        process.wait()
    for each in started:
        if alive(each):
            each.kill()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def server(home: Path, start: Callable[..., subprocess.Popen[bytes]]) -> Any:
    """A server with two replicas, and the models that it has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (
        "serve_ray.py",
        *("--embedder", home / "embedder", "--reranker", home / "reranker", "--replicas", 2, "--port", port),
        *("--max-ongoing-requests", 16, "--max-queued-requests", 100, "--max-batch-tokens", 256),
        *("--payload-limit", 100_000),
    )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    process = until(ready, start, command)
    wait(lambda: len(replicas(process)) == 2, process)
    embedder = tp.compile(tp.from_pretrained(home / "embedder"), threads=1)
    reranker = tp.compile(CrossEncoder(str(home / "reranker"), device="cpu"), threads=1)
    return SimpleNamespace(url=url, process=process, embedder=embedder, reranker=reranker, ready=ready)


def module(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of the repository, imported."""
    monkeypatch.syspath_prepend(str(ROOT / folder))
    with warnings.catch_warnings(action="ignore"):  # Ray Serve's own, of pydantic
        return import_module(name)


def post(server: Any, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=PATIENCE)


def metric(server: Any, name: str) -> float:
    """A metric, summed over its labels."""
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", lines, re.M))


def assert_close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-6)


TEXTS = [text(3), text(20), text(7, seed=1), "", text(200)]


@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_the_model_s(server: Any, normalize: bool) -> None:
    expected = server.embedder.encode(TEXTS, normalize_embeddings=normalize)
    assert_close(post(server, "/embed", {"inputs": TEXTS, "normalize": normalize}).json(), expected)
    found = post(server, "/embed", {"inputs": TEXTS[1], "normalize": normalize, "truncate": True}).json()
    assert_close(found, expected[1:2])
    short = post(server, "/embed", {"inputs": TEXTS, "normalize": normalize, "dimensions": 8}).json()
    assert_close(short, server.embedder.encode(TEXTS, normalize_embeddings=normalize, truncate_dim=8))
    asked = post(server, "/embed", {"inputs": TEXTS, "normalize": normalize, "prompt_name": "query"}).json()
    assert_close(asked, server.embedder.encode(TEXTS, normalize_embeddings=normalize, prompt_name="query"))


def test_ranks_are_the_model_s(server: Any) -> None:
    query = text(5, seed=2)
    logits = server.reranker.predict([(query, each) for each in TEXTS], activation_fn=lambda scores: scores)
    found = post(server, "/rerank", {"query": query, "texts": TEXTS, "raw_scores": True}).json()
    assert [rank["index"] for rank in found] == np.argsort(-logits, kind="stable").tolist()
    assert_close([rank["score"] for rank in found], np.sort(logits)[::-1])
    found = post(server, "/rerank", {"query": query, "texts": TEXTS, "return_text": True}).json()
    assert [rank["text"] for rank in found] == [TEXTS[rank["index"]] for rank in found]
    assert_close([rank["score"] for rank in found], np.sort(1 / (1 + np.exp(-logits)))[::-1])


def test_openai_s_route(server: Any) -> None:
    expected = server.embedder.encode(TEXTS, normalize_embeddings=True)
    found = post(server, "/v1/embeddings", {"input": TEXTS, "model": "any"}).json()
    assert found["object"] == "list" and found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 5
    assert [(row["object"], row["index"]) for row in found["data"]] == [("embedding", place) for place in range(5)]
    assert_close([row["embedding"] for row in found["data"]], expected)
    (row,) = post(server, "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"}).json()["data"]
    assert_close(np.frombuffer(base64.b64decode(row["embedding"]), np.float32), expected[0])


def test_a_client_of_text_embeddings_inference(server: Any) -> None:
    client = HttpClient(server.url, timeout=PATIENCE)
    with client.client:
        assert client.health() and client.info().max_input_length == LONGEST
        assert_close(client.embed(TEXTS, truncate=True), server.embedder.encode(TEXTS, normalize_embeddings=True))
    client = HttpClient(f"{server.url}/reranker", timeout=PATIENCE)
    with client.client:
        ranks = client.rerank(TEXTS[0], TEXTS[1:3], return_text=True).ranks
    assert {rank.text for rank in ranks} == {*TEXTS[1:3]} and ranks[0].score >= ranks[1].score


HUGE = {"inputs": "good " * 200_000}
BAD: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": ("/embed", b"{nope", 400, "Validation"),
    "no text": ("/embed", b"", 400, "Validation"),
    "not UTF-8": ("/embed", b'{"inputs": "\xff"}', 400, "Validation"),
    "half a character": ("/embed", b'{"inputs": "\\ud800"}', 400, "Validation"),
    "deep": ("/embed", b"[" * 90_000, 400, "Validation"),
    "a list": ("/embed", [], 422, "Validation"),
    "no inputs": ("/embed", {}, 422, "Validation"),
    "a number": ("/embed", {"inputs": 3}, 422, "Validation"),
    "a number among texts": ("/embed", {"inputs": ["a", 3]}, 422, "Validation"),
    "nothing in it": ("/embed", {"inputs": []}, 400, "Empty"),
    "a word for truth": ("/embed", {"inputs": "a", "normalize": "yes"}, 422, "Validation"),
    "too many": ("/embed", {"inputs": ["a"] * 33}, 422, "Validation"),
    "too long": ("/embed", {"inputs": text(200), "truncate": False}, 422, "Validation"),
    "too many dimensions": ("/embed", {"inputs": "a", "dimensions": 999}, 422, "Validation"),
    "an unknown prompt": ("/embed", {"inputs": "a", "prompt_name": "none"}, 422, "Validation"),
    "huge": ("/embed", HUGE, 413, "Validation"),
    "no texts": ("/rerank", {"query": "a", "texts": []}, 400, "Empty"),
    "no query": ("/rerank", {"texts": ["a"]}, 422, "Validation"),
    "a list of queries": ("/rerank", {"query": ["a"], "texts": ["a"]}, 422, "Validation"),
    "a long pair": ("/rerank", {"query": text(60), "texts": [text(60)], "truncate": False}, 422, "Validation"),
    "another side": ("/rerank", {"query": "a", "texts": ["a"], "truncation_direction": "left"}, 422, "Validation"),
    "token ids": ("/v1/embeddings", {"input": [[1, 2]]}, 422, "Validation"),
    "no input": ("/v1/embeddings", {"input": []}, 400, "Empty"),
    "another format": ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 422, "Validation"),
    "another route": ("/embedd", {"inputs": "a"}, 404, "Validation"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_a_sentence(server: Any, case: str) -> None:
    path, body, status, kind = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = httpx.post(server.url + path, content=content, timeout=PATIENCE)
    assert found.status_code == status, found.text
    if path == "/v1/embeddings":
        assert found.json().keys() == {"message", "code", "type"}
        assert found.json()["type"] == kind and found.json()["code"] == status
        sentence = found.json()["message"]
    else:
        assert found.json().keys() == {"error", "error_type"} and found.json()["error_type"] == kind
        sentence = found.json()["error"]
    assert 0 < len(sentence) < 200 and "\n" not in sentence and "Traceback" not in sentence
    assert httpx.get(f"{server.url}/embed").status_code == 405


def test_clients_that_go_away_do_no_harm(server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"inputs": [text(50, seed=each) for each in range(32)]}).encode()
    head = f"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head, head + body[:100], head + body, head + body):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert post(server, "/embed", {"inputs": "good cat"}).status_code == 200
    wait(lambda: metric(server, "te_queue_size") == 0)


def work(server: Any, bodies: list[list[str]], count: int, clients: int = 64) -> Iterator[None]:
    """Requests by many clients at a time; each answer is checked, and gives one None."""
    expected = [server.embedder.encode(body, normalize_embeddings=True) for body in bodies]
    with httpx.Client(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=clients)) as client:

        def ask(number: int) -> None:
            found = client.post("/embed", json={"inputs": bodies[number % len(bodies)]})
            assert found.status_code == 200, found.text
            assert_close(found.json(), expected[number % len(bodies)])

        with ThreadPoolExecutor(clients) as pool:
            yield from pool.map(ask, range(count))


def test_texts_of_64_clients_share_batches(server: Any) -> None:
    batches, texts = metric(server, "te_batch_next_size_count"), metric(server, "te_batch_next_size_sum")
    bodies = [[text(1 + (7 * number) % 60, seed=each) for each in range(1 + number % 4)] for number in range(40)]
    assert len(list(work(server, bodies, 256))) == 256
    batches = metric(server, "te_batch_next_size_count") - batches
    texts = metric(server, "te_batch_next_size_sum") - texts
    assert texts > 2 * batches  # a request has 2.5 texts on average, and is often in a batch with others
    assert metric(server, "te_request_duration_count") >= 256


def test_more_requests_than_the_queue_takes_are_refused(server: Any) -> None:
    wait(lambda: len(replicas(server.process)) == 2, server.process)  # not while Ray replaces one
    suspended = replicas(server.process)
    requests = 300  # replicas and queue may hold 132; half as many requests were all taken once
    with ThreadPoolExecutor(requests) as pool:
        for each in suspended:
            each.suspend()
        try:
            asked = [pool.submit(post, server, "/embed", {"inputs": "good cat"}) for _ in range(requests)]
            wait(lambda: sum(each.done() for each in asked) >= 1)
            assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        finally:
            for each in suspended:
                with contextlib.suppress(psutil.NoSuchProcess):  # Ray replaces one that does not answer for long
                    each.resume()
        found = [each.result() for each in asked]
    refused = [each for each in found if each.status_code == 429]
    assert refused and all(each.status_code in (200, 429) for each in found)
    assert all(each.json() == {"error": "Model is overloaded", "error_type": "Overloaded"} for each in refused)


def test_no_request_is_lost_with_a_replica(server: Any) -> None:
    victim, *_ = replicas(server.process)
    answers = work(server, [[text(60, seed=each) for each in range(16)]], 200)
    for _ in range(20):
        next(answers)
    victim.kill()  # with 16 requests or so
    assert sum(1 for _ in answers) == 180
    wait(lambda: len(replicas(server.process)) == 2, server.process)


def test_it_stops_when_it_has_answered(server: Any) -> None:
    """The last of the server's tests."""
    wait(server.ready)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, server, "/embed", {"inputs": [text(60)] * 32}) for _ in range(8)]
        wait(lambda: metric(server, "te_queue_size") > 0 or all(each.done() for each in asked))
        started = processes(server.process)
        server.process.send_signal(signal.SIGTERM)
        assert {each.result().status_code for each in asked} <= {200, 503}
    assert server.process.wait(PATIENCE) == 0
    wait(lambda: not any(map(alive, started)))


class Counting:
    """Stands in for a model: a token is a word, and a text's vector is how many it has."""

    prompts: ClassVar = {"query": ""}
    default_prompt_name, max_seq_length = None, 50

    def __init__(self) -> None:
        self.batches: list[tuple[str | None, list[str]]] = []

    def __getitem__(self, place: int) -> Any:
        return SimpleNamespace(model=None)

    def tokenizer(self, texts: list[str], verbose: bool) -> dict[str, Any]:
        return {"input_ids": [each.split() for each in texts]}

    def encode(self, texts: list[str], prompt_name: str | None, show_progress_bar: bool) -> Any:
        self.batches.append((prompt_name, texts))
        if "broken" in texts:
            raise MemoryError("no more")
        return np.array([[len(each.split())] for each in texts], np.float32)


def test_batches_keep_to_the_budget_and_to_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_ray, model = module("examples", "serve_ray", monkeypatch), Counting()
    settings = serve_ray.Settings(embedder="any", max_batch_tokens=10)
    asked = [(["a b c d", "a b c d e"], None), (["a " * 20], None), (["a b", "a"], "query"), (["a", "a b"], None)]

    async def run() -> list[Any]:
        models = serve_ray.Models(settings, lambda *_: model)
        gone = asyncio.ensure_future(models.run("embedder", ["gone"], None, True))
        found = [asyncio.ensure_future(models.run("embedder", texts, prompt, True)) for texts, prompt in asked]
        await asyncio.sleep(0)
        gone.cancel()
        found.append(asyncio.ensure_future(models.run("embedder", ["broken", "fine"], "query", True)))
        found.append(asyncio.ensure_future(models.run("embedder", ["a"] * 11, "query", True)))
        return await asyncio.gather(*found, return_exceptions=True)

    *found, broken, many = asyncio.run(run())
    assert [each["rows"].ravel().tolist() for each in found] == [[4, 5], [20], [2, 1], [1, 2]]
    assert [each["tokens"] for each in found] == [9, 20, 3, 3] and many["rows"].ravel().tolist() == [1] * 11
    assert isinstance(broken, MemoryError)
    assert model.batches[:2] == [(None, ["a b c d", "a b c d e", "a"]), (None, ["a " * 20])]  # the oldest comes first
    for prompt, texts in model.batches:
        assert "gone" not in texts and (sum(len(each.split()) for each in texts) <= 10 or len(texts) == 1)
        assert prompt is None or all(len(each.split()) < 3 for each in texts)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--embedder nowhere", "given: nowhere"),
        ("--embedder . --replicas 0", "--replicas is '0': Input should be greater than 0"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(arguments: str, sentence: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "serve_ray.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]


def test_routes_under_a_prefix_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_ray = module("examples", "serve_ray", monkeypatch)

    async def run(path: str, prefix: str) -> int:
        scope = {"type": "http", "method": "GET", "path": path, "root_path": prefix, "headers": [], "query_string": b""}
        ingress = serve_ray.Ingress(None, serve_ray.Settings(embedder="any"))
        return int((await ingress(serve_ray.Request({**scope, "server": ("host", 80), "scheme": "http"}))).status_code)

    assert asyncio.run(run("/some/metrics", "/some")) == asyncio.run(run("/metrics", "")) == 200
    assert asyncio.run(run("/some/metrics", "")) == 404


def test_the_benchmark_s_rows_are_servers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = module("benchmarks", "serving", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["benchmarks/serving.py", "embed", "--quick", "--model", "any"])
    arguments = serving.parse_arguments()
    assert arguments.rows == [] and arguments.passes == 1
    rows = [serving.Row("one", "float32", Path("a"), lambda model: model), serving.Row("two", "int8", Path("b"))]
    targets = [serving.server(row, number, arguments) for number, row in enumerate(rows)]
    assert [(each.name, each.route_prefix) for each in targets] == [("row0", "/row0"), ("row1", "/row1")]


def test_a_folder_is_embedded_once_however_often_it_is_killed(
    home: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    rng = np.random.default_rng(0)
    texts: list[str | None] = [" ".join(words) for words in rng.choice(WORDS, (50_000, 4))]
    texts[7] = None
    for part in range(3):
        folder = tmp_path / "texts" / f"part{part % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = range(part * 20_000, min((part + 1) * 20_000, len(texts)))
        table = pa.table({"id": list(rows), "text": [texts[row] for row in rows]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=7_500)
    out = tmp_path / "vectors"
    command = ("embed_ray_data.py", home / "embedder", tmp_path / "texts", out, "--actors", 2)

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}

    process = until(lambda: len(made()) > 4, start, command)
    started = processes(process)
    process.kill()
    process.wait()
    wait(lambda: not any(map(alive, started)))
    before = made()
    assert any(start(*command).wait(PATIENCE) == 0 for _ in range(STARTS))
    assert len(before) < len(made()) and before.items() <= made().items()  # nothing is made twice
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".parquet", ".json"}
    found = pq.read_table(out).sort_by("id")
    assert found["id"].to_pylist() == list(range(len(texts)))
    assert found["text"].to_pylist() == texts
    vectors = found["embedding"].to_pylist()
    assert vectors[7] is None
    some = [*range(7), *range(8, len(texts), 997)]
    model = tp.compile(tp.from_pretrained(home / "embedder"), threads=1)
    assert_close([vectors[row] for row in some], model.encode([texts[row] for row in some]))
    assert start(*command, "--column", "id2").wait(PATIENCE) == 1


def test_the_benchmark_s_requests_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = module("benchmarks", "serving", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["benchmarks/serving.py", "embed", "--quick"])
    bodies = serving.requests("embed", 300)
    lengths = [len(text.split()) for body in bodies for text in body["inputs"]]
    assert bodies == serving.requests("embed", 300) and {len(body["inputs"]) for body in bodies} == {*range(1, 9)}
    assert min(lengths) == 8 and max(lengths) > 200 and np.median(lengths) < 60
    installed = [[serving.Measured(10.0, 5.0, 9.0, 100, 0)], [serving.Measured(10.0, 5.0, 9.0, 100, 0)] * 2]
    pruned = [[serving.Measured(20.0, 2.0, 4.0, 200, 0)], [serving.Measured(22.0, 2.0, 4.0, 200, 3)] * 2]
    found = {f"{serving.INSTALLED}, float32": installed, f"{serving.PRUNED}, auto": pruned}
    table = serving.table(serving.parse_arguments(), found)
    assert [row["to_installed"] for row in table["rows"]] == [1.0, 2.1] and table["rows"][1]["killed"]["lost"] == 3
    line = "| token-pruning, pruned, auto | 21.0 (20.0 – 22.0) | 2.10 | 2.10 | 2 | 4 | 22.0 | 4 | 200 | 3 |"
    assert line in serving.lines(table)
