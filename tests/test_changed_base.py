"""A base that cannot be read, or changes under us: who is to blame is said, and nothing is left."""

from __future__ import annotations

import errno
import os

import pytest

from dus_edge.errors import CheckpointError
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.recipe import PRESETS
from dus_edge.upscale.model import plan_chooser

CHOOSE = plan_chooser(None, None, (), True)


def export(kind, base, out):
    if kind == "gguf":
        export_gguf(str(base), CHOOSE, [PRESETS["f16"]], out)
    else:
        export_checkpoint(str(base), CHOOSE, out / "up")


@pytest.mark.parametrize("kind", ["gguf", "upscale"])
def test_a_disk_that_fails_while_the_base_is_read(make_checkpoint, tmp_path, monkeypatch, kind):
    base = make_checkpoint()

    def failing(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cannot be read") as e:
        export(kind, base, tmp_path / "out")
    assert "written" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["replaced", "written to", "touched", "gone"])
@pytest.mark.parametrize("kind", ["gguf", "upscale"])
def test_a_base_that_changes_in_mid_run(make_checkpoint, tmp_path, monkeypatch, kind, how):
    base, other = make_checkpoint(), make_checkpoint("other", seed=1)
    weights = base / "model.safetensors"
    before, calls = os.preadv, []

    def changing(fd, buffers, offset):
        calls.append(offset)
        if len(calls) == 5:
            if how == "replaced":
                (other / weights.name).replace(weights)
            elif how == "written to":
                with weights.open("r+b") as f:
                    f.seek(-64, os.SEEK_END)
                    f.write(bytes(64))
            elif how == "touched":
                os.utime(weights)
            else:
                weights.unlink()
        return before(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", changing)
    with pytest.raises(CheckpointError, match=r"changed while it was read|cannot be read"):
        export(kind, base, tmp_path / "out")
    assert len(calls) > 5
    assert not (tmp_path / "out").exists()
