"""Slices of GLUE training sets to choose recipes on: DESTINATION gets train and dev files, both made of train rows.

    python results/glue/slices.py GLUE_FOLDER DESTINATION

The same rows every time; tried.md has what was chosen on them.
"""

import random
import sys
from pathlib import Path

DEV_ROWS = {"MRPC": 600, "RTE": 500, "STS-B": 900}


def main(glue: Path, destination: Path) -> None:
    for task, count in DEV_ROWS.items():
        head, *rows = (glue / task / "train.tsv").read_text(encoding="utf-8-sig").split("\n")
        rows = [row for row in rows if row.strip()]
        random.Random(0).shuffle(rows)
        folder = destination / task
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("dev", rows[:count]), ("train", rows[count:])):
            (folder / f"{name}.tsv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
