"""Measure what an importance matrix is worth: divergence from F16 with and without one.

    python benchmarks/bench_imatrix.py [--presets q4_k_m,q3_k_m,q2_k] [--bytes 100000] [--work DIR]
    python benchmarks/bench_imatrix.py --markdown

pico is up-scaled by the default plan and exported to every preset three times: without an
importance matrix, with one from the built-in calibration mix, and with one from Python sources that
are neither in the held-out text nor in pico's training text (this program's own). `dus-edge
quality` compares all with F16 on pico's held-out text: the second half of every chunk of 512
tokens counts. One line for each file goes to `results/imatrix.jsonl`, the plot to
`results/imatrix.png` and `.svg`; `--markdown` renders the newest run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import HERE, RESULTS, append, machine, read

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.export.imatrix import imatrix_source
from dus_edge.quality import compare as quality_run
from dus_edge.quality import plot as quality_plot
from dus_edge.quant.recipe import find_preset
from dus_edge.train.pico.corpus import choose_text, load_split
from dus_edge.upscale.model import plan_chooser
from dus_edge.words import markdown_table

PRESETS = ("q4_k_m", "q3_k_m", "q2_k")
KINDS = ("none", "built-in mix", "Python sources")
OUT = RESULTS / "imatrix.jsonl"


def held_out(folder: Path, max_bytes: int) -> list[Path]:
    """pico's held-out text as files."""
    folder.mkdir()
    files = choose_text(load_split().heldout, max_bytes)
    paths = []
    for i, file in enumerate(files):
        paths.append(folder / f"{i:03}.txt")
        paths[-1].write_text(file.text, encoding="utf-8")
    return paths


def python_sources(folder: Path) -> Path:
    """This program's own modules, in a folder of their own."""
    folder.mkdir()
    root = HERE.parent / "dus_edge"
    for path in sorted(root.rglob("*.py")):
        name = "-".join(path.relative_to(root).parts)
        (folder / name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def export(presets: list[str], work: Path) -> dict[tuple[str, str], Path]:
    """All files by (preset, kind of importance matrix)."""
    choose = plan_chooser(None, None, (), True)
    texts = {"built-in mix": (), "Python sources": (python_sources(work / "python"),)}
    found = {}
    for kind in KINDS:
        folder = work / kind.replace(" ", "-")
        source = None
        if kind != "none":
            choice = TextChoice(texts[kind])
            source = imatrix_source("auto", choice, Machine("cpu"), folder, print)
        wanted = [*presets, "f16"] if kind == "none" else presets
        result = export_gguf(
            BUILTIN, choose, [find_preset(p) for p in wanted], folder, imatrix=source
        )
        for output in result.outputs:
            path = output.path.with_name(f"{output.preset} {kind}.gguf".replace(" none", ""))
            found[str(output.preset), kind] = output.path.rename(path)
    return found


def run(presets: list[str], max_bytes: int, work: Path) -> None:
    """Measure and write the results."""
    files = export(presets, work)
    reference = files.pop(("f16", "none"))
    results = quality_run.quality(
        str(reference), [str(p) for p in files.values()], texts=held_out(work / "text", max_bytes)
    )
    facts = machine()
    for (preset, kind), candidate in zip(files, results.candidates, strict=True):
        total = candidate.total
        line = {
            "preset": preset,
            "imatrix": kind,
            "bytes": candidate.info.n_bytes,
            "kl": total.kl.value,
            "kl_error": total.kl.error,
            "kl_p99": total.kl_p99,
            "same_top": total.same_top.value,
            "perplexity": total.perplexity.value,
            "perplexity_reference": total.perplexity_reference.value,
            "n_tokens": total.n_tokens,
            "digest": results.digest,
        }
        append(OUT, [line | facts])
        print(f"{preset:7} {kind:15} KL {line['kl']:.5f} ± {line['kl_error']:.5f}")
    for suffix in ("png", "svg"):
        quality_plot.plot(results, RESULTS / f"imatrix.{suffix}")


def markdown() -> str:
    """The newest run as a table."""
    lines = read(OUT)
    last = [line for line in lines if line["digest"] == lines[-1]["digest"]]
    newest = {(line["preset"], line["imatrix"]): line for line in last}
    head = ["preset", *(f"KL, {kind}" for kind in KINDS), *(f"top-1, {kind}" for kind in KINDS)]
    rows = []
    for preset in dict.fromkeys(preset for preset, _ in newest):
        mine = [newest[preset, kind] for kind in KINDS]
        rows.append(
            [
                preset.upper(),
                *(f"{line['kl']:.5f} ± {line['kl_error']:.5f}" for line in mine),
                *(f"{100 * line['same_top']:.2f} %" for line in mine),
            ]
        )
    line = last[-1]
    about = (
        f"{line['n_tokens']:,} scored tokens; KL in nats a token, ± its standard error over chunks "
        f"(commit {line['commit']}, {line['date']}):"
    )
    return f"{about}\n\n{markdown_table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--bytes", type=int, default=100_000, help="of text, in whole files")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()
    if args.markdown:
        print(markdown())
        return
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        run(args.presets.split(","), args.bytes, Path(work))


if __name__ == "__main__":
    main()
