"""Serve an embedding model and a reranker on Ray: the routes of text-embeddings-inference (TEI), and /v1/embeddings.

python examples/serve_ray.py --embedder FOLDER --reranker FOLDER --replicas 2 --port 3000

A folder is one that ``save_pretrained`` wrote, pruned or dense. One process reads requests and answers them. Each
replica has both models, and makes batches of the texts of concurrent requests, by tokens. A request whose replica dies
goes to another one. RAY_ADDRESS names a cluster; without it this machine is one.
"""

import argparse
import asyncio
import base64
import copy
import logging
import os
import signal
import threading
import time
from collections import deque
from typing import Any, Literal, NamedTuple

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import prometheus_client as prometheus
import pydantic_core
import ray
from pydantic import BaseModel, Field, PositiveInt, ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

TRIES = 3  # replicas that may die with a request before it is taken for the cause


class Settings(BaseModel):
    """The command line. Names are TEI's where it has such."""

    embedder: str = Field("", description="folder of a SentenceTransformer")
    reranker: str = Field("", description="folder of a CrossEncoder with one label")
    replicas: PositiveInt = Field(2, description="processes with models")
    threads: PositiveInt = Field(1, description="cores of each")
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field("auto", description="of products")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(3000, description="port to listen on")
    max_batch_tokens: PositiveInt = Field(2048, description="tokens of a batch; a longer text is a batch of its own")
    max_client_batch_size: PositiveInt = Field(32, description="texts of a request")
    max_ongoing_requests: PositiveInt = Field(64, description="requests that a replica takes at a time")
    max_queued_requests: PositiveInt = Field(512, description="requests that wait for a replica; more are refused")
    payload_limit: PositiveInt = Field(2_000_000, description="bytes of a request")
    auto_truncate: bool = Field(True, description="whether to truncate long texts where a request does not say")


class Asked(BaseModel, strict=True):
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] = "right"


class Rerank(Asked):
    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class Embed(Asked):
    inputs: str | list[str]
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: PositiveInt | None = None


class OpenAI(BaseModel, strict=True):
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: PositiveInt | None = None


class Refused(Exception):
    """An answer other than 200: its status, TEI's ``error_type``, and a sentence."""

    def __init__(self, status: int, kind: str, sentence: str) -> None:
        self.status, self.kind, self.sentence = status, kind, sentence


def load(name: str, folder: str, settings: Settings) -> Any:
    """The compiled model of a folder."""
    from sentence_transformers import CrossEncoder, SentenceTransformer  # the processes without models do without

    import token_pruning as tp

    model = {"embedder": SentenceTransformer, "reranker": CrossEncoder}[name](folder, device="cpu")
    if hasattr(model[0].model.config, "prune_mode"):
        model = tp.from_pretrained(folder)
    return tp.compile(model, settings.dtype, settings.threads)


class Text(NamedTuple):
    """A text, or a pair of them, that waits. Those of one kind (a model and a prompt) can share a batch."""

    kind: tuple[str, str | None]
    text: Any
    tokens: int
    row: asyncio.Future[Any]


class Models:
    """A replica. It computes one batch at a time; what arrives meanwhile makes the next ones."""

    def __init__(self, settings: Settings, load: Any) -> None:
        self.settings, folders = settings, {"embedder": settings.embedder, "reranker": settings.reranker}
        self.models = {name: load(name, folder, settings) for name, folder in folders.items() if folder}
        if getattr(self.models.get("reranker"), "num_labels", 1) != 1:
            raise ValueError(f"{settings.reranker} has several labels; a reranker has one")
        # A tokenizer is not for two threads: with these one counts tokens while another one encodes.
        self.tokenizers = {name: copy.deepcopy(model.tokenizer) for name, model in self.models.items()}
        self.waiting: deque[Text] = deque()
        self.batches: list[tuple[int, int, float]] = []  # texts, tokens and seconds, until an answer takes them along
        self.worker: asyncio.Task[None] | None = None

    def longest(self, name: str) -> int | None:
        """Tokens of a text that a model reads; None for all, in a model that was pruned with ``max_tokens``."""
        model = self.models[name]
        engine = getattr(model[0].model, "engine", None)
        whole = engine is not None and engine.token_pruner.pruner.max_tokens is not None
        return None if whole else model.max_seq_length

    def info(self, name: str) -> dict[str, Any]:
        model, given, folder = self.models[name], self.settings, getattr(self.settings, name)
        config, pooling = model[0].model.config, [getattr(module, "pooling_mode", None) for module in model][1:2]
        kinds = {
            "embedder": {"embedding": {"pooling": str(*pooling)}},
            "reranker": {"reranker": {"id2label": config.id2label, "label2id": config.label2id}},
        }
        return {
            "model_id": folder,
            "model_sha": None,
            "model_dtype": given.dtype,
            "served_model_name": folder,
            "model_type": kinds[name],
            "max_concurrent_requests": given.replicas * given.max_ongoing_requests + given.max_queued_requests,
            "max_input_length": self.longest(name),
            "max_batch_requests": None,
            **given.model_dump(include={"max_batch_tokens", "max_client_batch_size", "auto_truncate"}),
            "tokenization_workers": given.replicas,
            "version": "token-pruning",
            "sha": None,
            "docker_label": None,
        }

    async def run(self, name: str, texts: list[Any], prompt_name: str | None, truncate: bool) -> dict[str, Any]:
        """float32 ``rows`` of texts or pairs, and what /metrics counts; or why there are none, under ``refused``."""
        prompts, most = self.models[name].prompts, self.longest(name)
        if prompt_name is not None and prompt_name not in prompts:
            return {"refused": f"`prompt_name` is {prompt_name!r}; it must be one of {', '.join(prompts)}"}
        prompt = prompts.get(prompt_name or self.models[name].default_prompt_name or "", "")
        sides = [[prompt + text for text in texts]] if name == "embedder" else map(list, zip(*texts, strict=True))
        counts = [len(ids) for ids in self.tokenizers[name](*sides, verbose=False)["input_ids"]]
        if most and max(counts) > most and not truncate:
            return {"refused": f"`inputs` must have less than {most} tokens. Given: {max(counts)}"}
        counts = [min(count, most or count) for count in counts]
        rows = [asyncio.get_running_loop().create_future() for _ in texts]
        kind = (name, prompt_name)
        self.waiting.extend(Text(kind, *each) for each in zip(texts, counts, rows, strict=True))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self.work())
        found = np.stack(await asyncio.gather(*rows))  # where the client goes away, this cancels them
        batches, self.batches = self.batches, []
        return {"rows": found, "tokens": sum(counts), "batches": batches}

    def take(self) -> list[Text]:
        """The text that has waited longest, and all others of its kind that fit into the budget."""
        batch: list[Text] = []
        rest: deque[Text] = deque()
        for each in (each for each in self.waiting if not each.row.done()):
            room = self.settings.max_batch_tokens - sum(taken.tokens for taken in batch)
            fits = not batch or (each.kind == batch[0].kind and each.tokens <= room)
            (batch if fits else rest).append(each)
        self.waiting = rest
        return batch

    async def work(self) -> None:
        """Compute batches until nothing waits."""
        while batch := self.take():
            started = time.perf_counter()
            rows = await asyncio.to_thread(self.rows, batch[0].kind, [each.text for each in batch])
            self.batches.append((len(batch), sum(each.tokens for each in batch), time.perf_counter() - started))
            for each, row in zip(batch, rows, strict=True):
                if not each.row.done():
                    each.row.set_exception(row) if isinstance(row, Exception) else each.row.set_result(row)

    def rows(self, kind: tuple[str, str | None], texts: list[Any]) -> Any:
        """A vector or a score for each text, or an exception: what breaks a batch must not harm others in it."""
        name, prompt_name = kind
        try:
            if name == "embedder":
                return self.models[name].encode(texts, prompt_name=prompt_name, show_progress_bar=False)
            return self.models[name].predict(texts, activation_fn=lambda scores: scores, show_progress_bar=False)
        except Exception as error:
            return [error] if len(texts) == 1 else [row for text in texts for row in self.rows(kind, [text])]


class Ingress:
    """Reads and checks requests, asks the replicas, answers, and counts for /metrics."""

    def __init__(self, models: Any, settings: Settings) -> None:
        self.models, self.settings, self.stopping, self.unanswered = models, settings, False, 0
        self.routes: dict[str, tuple[type[BaseModel], Any]] = {
            "/rerank": (Rerank, self.rerank),
            "/embed": (Embed, self.embed),
            "/v1/embeddings": (OpenAI, self.openai),
        }
        powers, all_ = [2.0**power for power in range(17)], prometheus.CollectorRegistry()
        self.registry = all_
        self.requests = prometheus.Counter("te_request_count", "Requests", ["path"], registry=all_)
        self.failures = prometheus.Counter("te_request_failure", "Answers other than 200", ["err"], registry=all_)
        self.retries = prometheus.Counter("te_request_retry", "Times that a replica died with a request", registry=all_)
        self.tokens = prometheus.Counter("te_request_tokens", "Tokens of answered requests", registry=all_)
        self.queue = prometheus.Gauge("te_queue_size", "Requests that are not answered yet", registry=all_)
        self.seconds = prometheus.Histogram("te_request_duration", "Seconds of a request", ["path"], registry=all_)
        self.sizes = prometheus.Histogram("te_batch_next_size", "Texts of a batch", registry=all_, buckets=powers)
        self.lengths = prometheus.Histogram("te_batch_next_tokens", "Tokens of a batch", registry=all_, buckets=powers)
        self.computing = prometheus.Histogram("te_request_inference_duration", "Seconds of a batch", registry=all_)

    async def __call__(self, request: Request) -> Response:
        path = request.url.path.removeprefix(request.scope.get("root_path", "").rstrip("/"))  # Serve's route_prefix
        name = "embedder" if self.settings.embedder else "reranker"
        for each in ("embedder", "reranker"):  # TEI has one model: /reranker/info is what its clients ask for here
            if path.startswith(f"/{each}/"):
                path, name = path.removeprefix(f"/{each}"), each
        try:
            if request.method == "GET" and path in ("/health", "/info", "/metrics"):
                return await getattr(self, path[1:])(name)
            if path not in self.routes:
                raise Refused(404, "Validation", f"there is no {path}; there are {', '.join(self.routes)}")
            if request.method != "POST":
                raise Refused(405, "Validation", f"{path} takes POST, not {request.method}")
            return await self.answer(path, request)
        except Refused as refused:
            self.failures.labels(refused.kind.lower()).inc()
            body: dict[str, Any] = {"error": refused.sentence, "error_type": refused.kind}
            if path == "/v1/embeddings":
                body = {"message": refused.sentence, "code": refused.status, "type": refused.kind}
            return as_json(body, refused.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    async def answer(self, path: str, request: Request) -> Response:
        if self.stopping:
            raise Refused(503, "Unhealthy", "the server is stopping")
        kind, answer = self.routes[path]
        self.requests.labels(path).inc()
        self.unanswered += 1
        try:
            with self.seconds.labels(path).time(), self.queue.track_inprogress():
                return as_json(await answer(kind.model_validate_json(await self.body(request))))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            sentence = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
            raise Refused(400 if first["type"] == "json_invalid" else 422, "Validation", sentence) from None
        finally:
            self.unanswered -= 1

    async def body(self, request: Request) -> bytes:
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > self.settings.payload_limit:
                raise Refused(413, "Validation", f"a request has at most {self.settings.payload_limit} bytes")
        return bytes(found)

    async def ask(self, name: str, field: str, texts: Any, truncate: bool | None, prompt: str | None = None) -> Any:
        """Rows of a replica for texts or pairs, and how many tokens these have."""
        texts, most = [texts] if isinstance(texts, str) else texts, self.settings.max_client_batch_size
        if not texts:
            raise Refused(400, "Empty", f"`{field}` cannot be empty")
        if len(texts) > most:
            raise Refused(422, "Validation", f"batch size {len(texts)} > maximum allowed batch size {most}")
        truncate = self.settings.auto_truncate if truncate is None else truncate
        for _ in range(TRIES):
            try:
                found = await self.of(name).run.remote(name, texts, prompt, truncate)
                break
            except BackPressureError:
                raise Refused(429, "Overloaded", "Model is overloaded") from None
            except RayTaskError as error:
                sentence = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
                raise Refused(424, "Backend", sentence) from None
            except RayActorError:
                self.retries.inc()
        else:
            raise Refused(424, "Backend", f"{TRIES} replicas died with this request")
        if "refused" in found:
            raise Refused(422, "Validation", f"Input validation error: {found['refused']}")
        for size, tokens, seconds in found["batches"]:
            self.sizes.observe(size), self.lengths.observe(tokens), self.computing.observe(seconds)
        self.tokens.inc(found["tokens"])
        if not np.isfinite(found["rows"]).all():
            raise Refused(424, "Backend", "score is NaN")
        return found["rows"], found["tokens"]

    def of(self, name: str) -> Any:
        if not getattr(self.settings, name):
            raise Refused(424, "Backend", f"no {name} is served here")
        return self.models

    async def rerank(self, asked: Rerank) -> list[dict[str, Any]]:
        scores, _ = await self.ask("reranker", "texts", [(asked.query, text) for text in asked.texts], asked.truncate)
        scores = scores if asked.raw_scores else 1 / (1 + np.exp(-scores))
        ranks = [{"index": place, "score": score} for place, score in enumerate(scores.tolist())]
        if asked.return_text:
            ranks = [{**rank, "text": text} for rank, text in zip(ranks, asked.texts, strict=True)]
        return sorted(ranks, key=lambda rank: rank["score"])[::-1]  # of equal ones the last first, as TEI has it

    async def embed(self, asked: Embed) -> Any:
        vectors, _ = await self.ask("embedder", "inputs", asked.inputs, asked.truncate, asked.prompt_name)
        return cut(vectors, asked.dimensions, asked.normalize).tolist()

    async def openai(self, asked: OpenAI) -> dict[str, Any]:
        vectors, tokens = await self.ask("embedder", "input", asked.input, None)
        rows = cut(vectors, asked.dimensions, True)
        coded = [base64.b64encode(row).decode() for row in rows] if asked.encoding_format == "base64" else rows.tolist()
        data = [{"object": "embedding", "embedding": row, "index": place} for place, row in enumerate(coded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.settings.embedder, "usage": usage}

    async def health(self, _: str) -> Response:
        """200 while a replica runs, however busy it is."""
        application = (await asyncio.to_thread(serve.status)).applications[serve.get_replica_context().app_name]
        if self.stopping or not application.deployments["Models"].replica_states.get("RUNNING"):
            raise Refused(503, "Unhealthy", "unhealthy")
        return Response()

    async def info(self, name: str) -> Response:
        return as_json(await self.of(name).info.remote(name))

    async def metrics(self, _: str) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def drain(self) -> None:
        """Refuse what comes from now on; return when all else is answered."""
        self.stopping = True
        while self.unanswered:
            await asyncio.sleep(0.05)


def as_json(body: Any, status: int = 200) -> Response:
    return Response(pydantic_core.to_json(body), status, media_type="application/json")


def cut(vectors: Any, dimensions: int | None, normalize: bool) -> Any:
    if dimensions is not None and dimensions > vectors.shape[1]:
        raise Refused(422, "Validation", "`dimensions` should be smaller than the maximum embedding dimension.")
    vectors = vectors[:, :dimensions]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalize else vectors


def build(settings: Settings) -> serve.Application:
    """For Ray's own command, in this folder: ``serve run --working-dir . serve_ray:build embedder=FOLDER``."""
    return application(settings, load)


def application(settings: Settings, load: Any) -> serve.Application:
    """The server; ``load`` makes a model in each replica."""
    models = serve.deployment(Models).options(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": settings.threads},
    )
    ingress = serve.deployment(Ingress).options(max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
    return ingress.bind(models.bind(settings, load), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, field in Settings.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=field.description)
    try:
        settings = Settings.model_validate(vars(parser.parse_args()))
    except ValidationError as error:
        first = error.errors()[0]
        parser.error(f"--{str(first['loc'][0]).replace('_', '-')} is {first['input']!r}: {first['msg']}")
    folders = [folder for folder in (settings.embedder, settings.reranker) if folder]
    if not folders or not all(map(os.path.isdir, folders)):
        parser.error(f"--embedder and --reranker are folders, one at least; given: {', '.join(folders) or 'none'}")
    stop = threading.Event()
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve.start(http_options={"host": settings.host, "port": settings.port})
    ingress = serve.run(build(settings), logging_config={"enable_access_log": False})
    print(f"ready: http://{settings.host}:{settings.port}", flush=True)
    stop.wait()
    ingress.drain.remote().result(timeout_s=60)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
