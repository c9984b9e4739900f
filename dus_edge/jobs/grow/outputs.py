"""What the commands that say which layers to repeat write: a page, JSON, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dus_edge.files import check_absent, check_writable, output_files, pwrite_all
from dus_edge.tables.grow.seam_plot import check_seam_plot


@dataclass(frozen=True)
class GrowOutputs:
    """Where the results are written.

    Attributes:
        stem: of the files' names.
        folder: for the files, and for what is kept while they are made; None for nowhere.
        plots: whether to draw.
        overwrite: replace files of the same names.
        tables: endings of the files before the pictures.
    """

    stem: str
    folder: Path | None = None
    plots: bool = True
    overwrite: bool = False
    tables: tuple[str, ...] = ("md", "json")

    @property
    def paths(self) -> list[Path]:
        """The files: tables, and then pictures."""
        endings = (*self.tables, "png", "svg") if self.plots else self.tables
        return [self.folder / f"{self.stem}.{ending}" for ending in endings] if self.folder else []

    def check(self) -> None:
        """See that they can be written, before any work.

        Raises:
            OutputError: one exists, or the folder cannot be written.
            DependencyError: plots are wanted and matplotlib is not installed.
        """
        if self.folder is None:
            return
        check_absent(self.paths, self.overwrite)
        check_writable(self.folder)
        if self.plots:
            check_seam_plot()

    def write(self, data: Sequence[bytes]) -> None:
        """Write the files of `paths`, all or nothing."""
        sizes = [(path, len(blob)) for path, blob in zip(self.paths, data, strict=True)]
        with output_files(sizes) as fds:
            for fd, blob in zip(fds, data, strict=True):
                pwrite_all(fd, blob, 0)
