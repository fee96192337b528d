"""Slices of GLUE training sets to choose recipes on: DESTINATION gets train and dev files, both made of train rows.

    python results/glue/slices.py GLUE_FOLDER DESTINATION

The same rows every time; tried.md has what was chosen on them.
"""

import random
import sys
from pathlib import Path

DEV_ROWS = {"MRPC": 600, "RTE": 500, "STS-B": 900, "SST-2": 2000}
SST2_TRAIN_ROWS = 22_000  # a third: enough to compare recipes


def main(glue: Path, destination: Path) -> None:
    for task, count in DEV_ROWS.items():
        head, *rows = (glue / task / "train.tsv").read_text(encoding="utf-8-sig").split("\n")
        rows = [row for row in rows if row.strip()]
        random.Random(0).shuffle(rows)
        dev, train = whole_sentences(rows, count) if task == "SST-2" else (rows[:count], rows[count:])
        folder = destination / task
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("dev", dev), ("train", train)):
            (folder / f"{name}.tsv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")


def whole_sentences(rows: list[str], count: int) -> tuple[list[str], list[str]]:
    """SST-2's training rows are sentences and their phrases; those of a sentence in the dev file are left out."""
    texts = {row: row.rpartition("\t")[0].strip() for row in rows}
    dev = [row for row in rows if texts[row].endswith(".")][:count]
    seen = "\n".join(f" {texts[row]} " for row in dev)
    return dev, [row for row in rows if f" {texts[row]} " not in seen][:SST2_TRAIN_ROWS]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
