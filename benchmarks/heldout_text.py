"""Write pico's held-out text as files: what its quality is measured on.

    python benchmarks/heldout_text.py FOLDER [--bytes 250000]

pico knows Python sources and nothing else, so on the built-in evaluation text, which is English,
Korean and code, it would be judged on what it never learned. These files are of the standard
library of the Python that runs this, drawn by hash and left out of pico's training
(`dus_edge/train/pico/corpus.py`); no calibration reads them. The folder is emptied of such files
first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_perplexity import choose_text

from dus_edge.train.pico.corpus import load_split


def write(folder: Path, max_bytes: int) -> list[Path]:
    """Whole files up to `max_bytes`; their names keep the order."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]-*.py"):
        old.unlink()
    paths = []
    for i, file in enumerate(choose_text(load_split().heldout, max_bytes)):
        paths.append(folder / f"{i:03}-{Path(file.path).name}")
        paths[-1].write_text(file.text, encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=int, default=250_000, help="of text, in whole files")
    args = parser.parse_args()
    paths = write(args.folder, args.bytes)
    print(f"{args.folder}: {len(paths)} held-out files")


if __name__ == "__main__":
    main()
