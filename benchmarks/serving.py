"""Requests a second of examples/serve_ray.py with this package's engine and with others inside, and what a kill costs.

    python benchmarks/serving.py embed --output results/serving/embed
    python benchmarks/serving.py rerank --model FOLDER --output results/serving/rerank
    python benchmarks/serving.py embed --quick

64 clients ask one server on this machine, each as soon as it has its last answer. A request has 1 to 8 texts of 8 to
240 words, log-uniform: docstrings of Python's own library, several to a longer text. ``rerank`` has a query besides.
The server is the same for all rows, with batches of the same budget of tokens; only what computes in its replicas
differs: sentence-transformers as installed, the same with its best batch size, ONNX Runtime and OpenVINO under it
(backends.py), and this package's engine, unpruned and pruned. FOLDER is of ``benchmarks/reranking.py train``. Pruning
is calibrated on other docstrings, without labels.

All servers are there from the start, some hundred MB a replica; those that are not asked do nothing. They take turns,
PASSES times: warmed up, and measured for SECONDS. At the end each is asked for as long once more, and one of its
replicas is killed (SIGKILL) after a third of that time. Lost is what was not answered by 200.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "examples"))
os.environ.setdefault("RAY_worker_niceness", "0")  # by default replicas get what clients and others leave them
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # Ray's 5 are few where clients share the cores

import backends
import comparison
import httpx
import numpy as np
import psutil
import ray
import serve_ray
import torch
from output import spread
from ray import serve
from sentence_transformers import CrossEncoder, SentenceTransformer

import token_pruning as tp
from token_pruning.engine.machine import cpu_flags
from token_pruning.lab.data import find_minilm, load_docstrings

CLIENTS, PORT = 64, 3017
CALIBRATION = 400  # texts
BATCH_SIZES = (4, 8, 16, 32)
INSTALLED = "sentence-transformers, as installed"
PRUNED = "token-pruning, pruned"


class Row(NamedTuple):
    """What computes: its name, dtype, the folder of its model, and a function from a model to one that runs on it."""

    what: str
    dtype: str
    folder: Path
    change: Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.what}, {self.dtype}"


class Measured(NamedTuple):
    """What the clients saw: answers a second, latencies in milliseconds, and how many were lost."""

    rate: float
    p50: float
    p99: float
    answered: int
    lost: int


# Models


def make(command: str, folder: Path) -> Any:
    if command == "rerank":
        return CrossEncoder(str(folder), num_labels=1, device="cpu")
    return SentenceTransformer(str(folder), device="cpu")


def in_batches(size: int, model: Any) -> Any:
    """The model with another default for its batches."""
    name = "predict" if isinstance(model, CrossEncoder) else "encode"
    setattr(model, name, partial(getattr(model, name), batch_size=size))
    return model


def outside(start: Callable[..., Any], file: Path, names: tuple[str, ...], size: int, threads: int, model: Any) -> Any:
    """The model on ONNX Runtime or OpenVINO."""
    return in_batches(size, backends.put(model, start(file, threads), names))


def load(row: Row, command: str, name: str, folder: str, settings: serve_ray.Settings) -> Any:
    """For the server, in a replica."""
    if row.change is None:
        return serve_ray.load(name, folder, settings)
    torch.set_num_threads(settings.threads)
    return row.change(make(command, Path(folder)))


def best_size(run: Callable[[int], Any]) -> int:
    """The batch size that is the fastest, by the better of two calls each."""

    def seconds(size: int) -> float:
        started = time.perf_counter()
        run(size)
        return time.perf_counter() - started

    run(BATCH_SIZES[0])
    return min(BATCH_SIZES, key=lambda size: min(seconds(size), seconds(size)))


def rows_of(arguments: argparse.Namespace, scratch: Path, texts: Sequence[Any], sample: Sequence[Any]) -> list[Row]:
    """All that is measured; ``sample`` finds their batch sizes."""
    command, folder, threads = arguments.command, arguments.model, arguments.threads
    half = bool({"amx_bf16", "avx512_bf16", "bf16"} & cpu_flags())

    def size(model: Any) -> int:
        call = model.predict if command == "rerank" else model.encode
        return best_size(lambda size: call(list(sample), batch_size=size, show_progress_bar=False))

    rows = [Row(INSTALLED, "float32", folder, partial(in_batches, 32))]
    if "sentence-transformers" in arguments.rows:
        rows.append(Row("sentence-transformers", "float32", folder, partial(in_batches, size(make(command, folder)))))
    for which, export, forms in (
        ("onnxruntime", backends.export_onnx, [("ONNX Runtime", "float32", "fused.onnx", backends.onnx_runtime)]),
        (
            "openvino",
            backends.export_openvino,
            [
                ("OpenVINO", "float32", "float32.xml", backends.openvino_engine),
                ("OpenVINO", "bfloat16", "float32.xml", partial(backends.openvino_engine, precision="bf16")),
            ][: 2 if half else 1],
        ),
    ):
        if which in arguments.rows:
            model = make(command, folder)
            names = tuple(backends.inputs_of(model, texts[:1]))
            export(model, texts, scratch)
            for what, dtype, file, start in forms:
                best = size(backends.put(make(command, folder), start(scratch / file, threads), names))
                rows.append(Row(what, dtype, folder, partial(outside, start, scratch / file, names, best, threads)))
    dtypes = ["float32", *(["bfloat16"] if half else []), "int8"] if "dtypes" in arguments.rows else ["auto"]
    if "unpruned" in arguments.rows:
        rows += [Row("token-pruning, unpruned", dtype, folder) for dtype in dtypes]
    model = make(command, folder)
    if arguments.quick:
        tp.prune(model, tp.TopK(token_keep_rate=-0.2, keep_all_layers=1))  # of about the same cost, at once
    else:
        tp.calibrate(model, list(texts), target_flops=arguments.target_flops)
    model.save_pretrained(str(scratch / "pruned"))
    return [*rows, *(Row(PRUNED, dtype, scratch / "pruned") for dtype in dtypes)]


# Requests


def requests(command: str, count: int) -> list[dict[str, Any]]:
    """Bodies of requests, always the same."""
    generator, words = random.Random(0), " ".join(load_docstrings().train.first[CALIBRATION:]).split()
    bodies = []
    for _ in range(count):
        texts = []
        for _ in range(generator.randint(1, 8)):
            length = round(2 ** generator.uniform(3, np.log2(240)))
            start = generator.randrange(len(words) - length)
            texts.append(" ".join(words[start : start + length]))
        query = {"query": " ".join(texts[0].split()[:8])}
        bodies.append({**query, "texts": texts} if command == "rerank" else {"inputs": texts})
    return bodies


def to_calibrate(command: str) -> list[Any]:
    texts = load_docstrings().train.first[:CALIBRATION]
    if command == "embed":
        return texts
    pairs = [(first, rest) for first, _, rest in (text.partition(". ") for text in texts) if rest]
    return [(query, passage) for query, _ in pairs[:40] for _, passage in pairs[:8]]


def ask(path: str, bodies: Sequence[Any], seconds: float, kill: Callable[[], None] | None = None) -> Measured:
    """What 64 clients see; after a third of the time ``kill`` is called."""
    took: list[float] = []
    lost = 0
    started = time.perf_counter()

    def client(number: int, http: httpx.Client) -> None:
        nonlocal lost
        while time.perf_counter() < started + seconds:
            begun = time.perf_counter()
            try:
                answered = http.post(path, json=bodies[number % len(bodies)]).status_code == 200
            except httpx.HTTPError:
                answered = False
            took.append(time.perf_counter() - begun)
            lost += not answered
            number += CLIENTS

    limits = httpx.Limits(max_connections=CLIENTS)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=limits) as http,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        clients = [pool.submit(client, number, http) for number in range(CLIENTS)]
        if kill is not None:
            time.sleep(seconds / 3)
            kill()
        for each in clients:
            each.result()
    passed = time.perf_counter() - started
    p50, p99 = 1000 * np.quantile(took, [0.5, 0.99])
    return Measured((len(took) - lost) / passed, float(p50), float(p99), len(took) - lost, lost)


def replicas(application: str) -> list[psutil.Process]:
    """A server's processes with models."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if f"ServeReplica:{application}:Models" in " ".join(each.cmdline())]


def server(row: Row, number: int, arguments: argparse.Namespace) -> serve.RunTarget:
    """What Ray is to run for a row; its routes begin with its number."""
    settings = serve_ray.Settings(
        **{"reranker" if arguments.command == "rerank" else "embedder": str(row.folder)},
        dtype="auto" if row.change else row.dtype,
        replicas=arguments.replicas,
        threads=arguments.threads,
        port=PORT,
    )
    made = serve_ray.application(settings, partial(load, row, arguments.command))
    quiet = {"enable_access_log": False, "log_level": "ERROR"}
    return serve.RunTarget(made, f"row{number}", f"/row{number}", quiet)


def wait_for(application: str, count: int) -> None:
    """Until so many replicas run."""
    while serve.status().applications[application].deployments["Models"].replica_states.get("RUNNING") != count:
        time.sleep(1)


def run(arguments: argparse.Namespace) -> None:
    bodies, texts = requests(arguments.command, 512), to_calibrate(arguments.command)
    key = "texts" if arguments.command == "rerank" else "inputs"
    sample = [text for body in bodies[:8] for text in body[key]]
    if arguments.command == "rerank":
        sample = [(text[:40], text) for text in sample]
    with tempfile.TemporaryDirectory() as scratch:
        rows = rows_of(arguments, Path(scratch), texts, sample)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of replicas, which import these modules
        cores = len(rows) * arguments.replicas * arguments.threads  # those of one server at a time
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run_many([server(row, number, arguments) for number, row in enumerate(rows)])
        path, seconds = "/rerank" if arguments.command == "rerank" else "/embed", arguments.seconds
        found: dict[str, list[list[Measured]]] = {row.name: [] for row in rows}
        for _ in range(arguments.passes):
            for number, row in enumerate(rows):
                ask(f"/row{number}{path}", bodies, seconds / 5)
                found[row.name].append([ask(f"/row{number}{path}", bodies, seconds)])
                print(f"{row.name}: {found[row.name][-1]}", file=sys.stderr, flush=True)
        for number, row in enumerate(rows):
            victim = replicas(f"row{number}")[0]
            killed = ask(f"/row{number}{path}", bodies, seconds, partial(victim.send_signal, signal.SIGKILL))
            found[row.name][-1].append(killed)
            print(f"{row.name}, a replica killed: {killed}", file=sys.stderr, flush=True)
            wait_for(f"row{number}", arguments.replicas)  # a new one loads its model, which takes the others' time
        serve.shutdown()
        ray.shutdown()
    comparison.publish(table(arguments, found), arguments, lines, whole=True)


def table(arguments: argparse.Namespace, found: Mapping[str, list[list[Measured]]]) -> dict[str, Any]:
    rates = {name: [each[0].rate for each in passes] for name, passes in found.items()}
    others = [name for name in rates if "token-pruning" not in name]
    best = max(others, key=lambda name: statistics.median(rates[name]))

    def ratio(name: str, other: str) -> float:
        return statistics.median(one / two for one, two in zip(rates[name], rates[other], strict=True))

    rows = [
        {
            "what": name,
            "rate": spread(rates[name]),
            "p50": spread([each[0].p50 for each in passes]),
            "p99": spread([each[0].p99 for each in passes]),
            "to_installed": ratio(name, f"{INSTALLED}, float32"),
            "to_best": ratio(name, best),
            "killed": passes[-1][1]._asdict(),
        }
        for name, passes in found.items()
    ]
    kind = "by top-k to about" if arguments.quick else "to"
    return comparison.table(
        f"{arguments.model.name}, {arguments.command}",
        f"{CLIENTS} clients on the same machine, {arguments.replicas} replicas; {arguments.passes} passes of "
        f"{arguments.seconds:g} s; pruned {kind} {arguments.target_flops} of the FLOPs.",
        "requests/s",
        rows,
        arguments,
    )


def lines(found: Mapping[str, Any]) -> list[str]:
    """A section for a reader."""
    header = ["", "requests/s (lowest – highest)", "× as installed", "× the fastest other", "p50, ms", "p99, ms"]
    header += ["with a replica killed: requests/s", "p99, ms", "answered", "lost"]
    rows = []
    for row in found["rows"]:
        rate, killed = row["rate"], row["killed"]
        rows.append(
            [
                row["what"],
                f"{rate['median']:.1f} ({rate['lowest']:.1f} – {rate['highest']:.1f})",
                *(f"{row[key]:.2f}" for key in ("to_installed", "to_best")),
                *(f"{row[key]['median']:.0f}" for key in ("p50", "p99")),
                f"{killed['rate']:.1f}",
                f"{killed['p99']:.0f}",
                str(killed["answered"]),
                str(killed["lost"]),
            ]
        )
    commands = ["```bash", *found["commands"], "```"]
    return [f"## {found['title']}", "", found["about"], "", *comparison.table_lines(header, rows), "", *commands, ""]


def parse_arguments() -> argparse.Namespace:
    choices = ("sentence-transformers", "onnxruntime", "openvino", "unpruned", "dtypes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("embed", "rerank"))
    parser.add_argument("--model", type=Path, help="folder; for embed all-MiniLM-L6-v2 of token-pruning[demo]")
    parser.add_argument("--rows", nargs="*", choices=choices, help="besides installed and pruned; default: all")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--passes", type=int, help="default: 3")
    parser.add_argument("--seconds", type=float, help="of a pass; default: 30")
    parser.add_argument("--target-flops", type=float, default=0.55)
    parser.add_argument("--quick", action="store_true", help="two rows, a short pass each; top-k, not calibrated")
    comparison.add_arguments(parser)
    parser.set_defaults(threads=1, data=None)
    arguments = parser.parse_args()
    if arguments.model is None:
        if arguments.command == "rerank":
            parser.error("rerank needs --model")
        arguments.model = find_minilm()
    if arguments.rows is None:
        arguments.rows = [] if arguments.quick else list(choices)
    arguments.passes = arguments.passes or (1 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (5 if arguments.quick else 30)
    return arguments


if __name__ == "__main__":
    given = parse_arguments()
    comparison.carry_out(given, {given.command: run})
