"""Embed a folder of Parquet files by Ray Data's actors. Killed and started again, it goes on where it was.

python examples/embed_ray_data.py MODEL TEXTS VECTORS --column text --actors 2

VECTORS gets the rows of TEXTS with a column ``embedding``, some thousand rows a file. A file appears there when it is
whole and its name says which rows it has, so that what is there is not made again: no row is lost, none is there twice.
"""

import argparse
import json
import logging
import os
import sys
import uuid
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray


class Embedder:
    """An actor, which holds the model; ``load`` of serve_ray.py explains the loading."""

    def __init__(self, model: str, column: str, threads: int) -> None:
        from sentence_transformers import SentenceTransformer

        import token_pruning as tp

        dense = SentenceTransformer(model, device="cpu")
        pruned = hasattr(dense[0].model.config, "prune_mode")
        self.model = tp.compile(tp.from_pretrained(model) if pruned else dense, threads=threads)
        self.column = column

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        for part in zip(*(parts[name] for name in ("source", "first", "count", "target")), strict=True):
            self.embed(*part)
        return {"count": parts["count"]}

    def embed(self, source: str, first: int, count: int, target: str) -> None:
        table = rows(source, first, count)
        texts = table[self.column].to_pylist()
        known = [text for text in texts if text is not None]
        vectors = iter(self.model.encode(known, show_progress_bar=False).astype(np.float32))
        kind = pa.list_(pa.float32(), self.model.get_embedding_dimension())
        column = pa.array([None if text is None else next(vectors) for text in texts], kind)
        unfinished = Path(target).with_name(f".{uuid.uuid4().hex}")  # readers of Parquet folders skip such names
        pq.write_table(table.append_column("embedding", column), unfinished)
        unfinished.replace(target)


def rows(source: str, first: int, count: int) -> pa.Table:
    """Some rows of a file, of which only the row groups that have them are read."""
    with pq.ParquetFile(source) as file:
        groups, start, before = [], 0, 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if end <= first:
                before = end
            elif start < first + count:
                groups.append(group)
            start = end
        return file.read_row_groups(groups).slice(first - before, count)


def plan(texts: Path, vectors: Path, column: str, size: int) -> list[dict[str, Any]]:
    """The files to make. What else is in ``vectors`` is of other texts, or of a file that has changed."""
    parts = []
    for source in sorted(texts.rglob("*.parquet")):
        if column not in pq.read_schema(source).names:
            sys.exit(f"error: {source} has no column {column!r}; it has {', '.join(pq.read_schema(source).names)}")
        total, folder = pq.read_metadata(source).num_rows, vectors / source.relative_to(texts).with_suffix("")
        for first in range(0, total, size):
            count = min(size, total - first)
            target = folder / f"{first:012}-{count}.parquet"
            parts.append({"source": str(source), "first": first, "count": count, "target": str(target)})
    if not parts:
        sys.exit(f"error: {texts} has no rows in *.parquet")
    if foreign := {str(path) for path in vectors.rglob("*.parquet")} - {part["target"] for part in parts}:
        sys.exit(f"error: {min(foreign)} is not of these texts; take another folder than {vectors}")
    return parts


def same_settings(vectors: Path, settings: dict[str, Any]) -> None:
    """Vectors of two models must not end up in one folder."""
    file = vectors / "_settings.json"
    if not file.exists():
        unfinished = file.with_suffix(".new")
        unfinished.write_text(json.dumps(settings), encoding="utf-8")
        unfinished.replace(file)
    for name, before in json.loads(file.read_text(encoding="utf-8")).items():
        if settings[name] != before:
            sys.exit(f"error: {vectors} was begun with {name} {before!r}, not {settings[name]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a SentenceTransformer, pruned or dense")
    parser.add_argument("texts", type=Path, help="folder of Parquet files")
    parser.add_argument("vectors", type=Path, help="folder to write to, or to go on with")
    parser.add_argument("--column", default="text", help="that has the texts")
    parser.add_argument("--actors", type=int, default=2, help="processes with a model")
    parser.add_argument("--threads", type=int, default=1, help="cores of each")
    parser.add_argument("--rows", type=int, default=2048, help="of a file that is written")
    arguments = parser.parse_args()
    vectors = arguments.vectors
    if arguments.texts.resolve() in (vectors.resolve(), *vectors.resolve().parents):
        sys.exit(f"error: {vectors} is in {arguments.texts}, so that vectors would be taken for texts")
    parts = plan(arguments.texts, vectors, arguments.column, arguments.rows)
    vectors.mkdir(parents=True, exist_ok=True)
    same_settings(vectors, {"model": arguments.model, "column": arguments.column, "rows": arguments.rows})
    for unfinished in (path for path in vectors.rglob(".*") if path.is_file()):
        unfinished.unlink()
    missing = [part for part in parts if not Path(part["target"]).exists()]
    for folder in {Path(part["target"]).parent for part in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(parts) - len(missing)} of {len(parts)} files are there", flush=True)
    if missing:
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
        made = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
            Embedder,
            fn_constructor_args=(arguments.model, arguments.column, arguments.threads),
            batch_size=1,
            num_cpus=arguments.threads,
            compute=ray.data.ActorPoolStrategy(size=arguments.actors),
        )
        done = sum(row["count"] for row in made.iter_rows())
        print(f"{done} rows embedded", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
