"""Calibration under torchrun: two processes divide the chunks and find what one finds alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dus_edge.jobs.export import gptq, imatrix, sensitivity
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.gptq import export_gptq
from dus_edge.jobs.export.imatrix import export_imatrix
from dus_edge.jobs.export.sensitivity import AssumedStorage, export_sensitivity
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.quant.imatrix import read_imatrix
from dus_edge.quant.sensitivity import read_sensitivity
from dus_edge.upscale.model import plan_chooser

pytestmark = pytest.mark.usefixtures("compiled")
CHOOSE = plan_chooser(None, None, (), True)
#: An odd number: the second process has fewer.
TEXT = TextChoice(n_ctx=32, n_chunks=5)
CPU = Machine("cpu")
#: After how many layers of gradients the processes are interrupted.
CUT = 4


def find_sensitivity(base: str, out: Path) -> None:
    export_sensitivity(base, CHOOSE, out / "s.json", TEXT, CPU, AssumedStorage())


def calibrate(base: str, out: Path) -> None:
    """Everything that runs text through a model."""
    export_imatrix(base, CHOOSE, out / "i.gguf", TEXT, CPU)
    export_gptq(base, CHOOSE, out / "gptq", GPTQSettings(group_size=32), TEXT, CPU)
    find_sensitivity(base, out)


def cut_short(base: str, out: Path) -> None:
    """Both processes end at the same place, on the way down; what is kept then lies there."""
    from dus_edge.calibrate.fisher import descent

    whole, left = descent.layer_gradients, [CUT]

    def cutting(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(descent, "layer_gradients", cutting)
        find_sensitivity(base, out)
    assert not (out / "s.json").exists()
    kept = json.loads((out / "s.json.calibration" / "downward.json").read_text())
    assert kept["n_done"] == 1 + CUT


def calibrate_joined(base: str, out: Path) -> None:
    """`calibrate`, where torchrun's store knows only one meeting of the processes."""
    from dus_edge.calibrate.world import joined_world

    with joined_world("cpu") as world:

        @contextmanager
        def joined(machine: Machine):
            yield world, machine

        for job in (imatrix, gptq, sensitivity):
            job.joined_machine = joined
        out.mkdir(exist_ok=True)
        cut_short(base, out)
        calibrate(base, out)


def start(base: Path, out: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "tests.test_many_processes", base, out],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_find_what_one_finds(make_checkpoint, tmp_path):
    base, alone, both = make_checkpoint(), tmp_path / "alone", tmp_path / "both"
    calibrate(str(base), alone)
    run = start(base, both)
    assert run.returncode == 0, run.stderr
    assert sorted(p.name for p in both.iterdir()) == sorted(p.name for p in alone.iterdir())

    one, two = (read_imatrix(folder / "i.gguf") for folder in (alone, both))
    assert one.counts == two.counts and set(one.counts.values()) == {5 * 32}
    for name, sums in one.sums.items():
        np.testing.assert_allclose(two.sums[name], sums, rtol=1e-6, err_msg=name)
    # A weight that lies between two codes may fall to either side, and what is behind it in its
    # row and in later sites takes that into account: only the first site can be compared closely.
    a, b = (load_file(folder / "gptq" / "model.safetensors") for folder in (alone, both))
    assert a.keys() == b.keys()
    differ = {k: (a[k] != b[k]).double().mean().item() for k in a if k.endswith("qweight")}
    for part in "qkv":
        assert differ[f"model.layers.0.self_attn.{part}_proj.qweight"] < 0.01, differ
    assert np.mean(list(differ.values())) < 0.2, differ

    one, two = (read_sensitivity(folder / "s.json") for folder in (alone, both))
    assert (one.identity, one.n_tokens, one.text) == (two.identity, two.n_tokens, two.text)
    costs = [(two.kl[name][k], cost) for name, found in one.kl.items() for k, cost in found.items()]
    apart = [abs(ours / theirs - 1) for ours, theirs in costs]
    # A block may take another scale where two are as good, when importance's last digit differs.
    assert np.median(apart) < 1e-6 and np.quantile(apart, 0.9) < 1e-5 and max(apart) < 0.01


def test_fewer_chunks_than_processes_is_refused(make_checkpoint, monkeypatch, tmp_path):
    from dus_edge.calibrate.engine import State
    from dus_edge.calibrate.world import ALONE, World
    from dus_edge.errors import UsageError
    from dus_edge.jobs.export.calibration import run_collector
    from dus_edge.text.chunks import Chunks

    chunks = Chunks(np.zeros((1, 8), np.int32), ("en",), 0, "")
    state = State(tmp_path, {}, World(0, 2, ALONE.device))
    with pytest.raises(UsageError, match="1 chunks of text cannot be divided among 2 processes"):
        run_collector(None, chunks, None, None, state, print)


if __name__ == "__main__":
    calibrate_joined(sys.argv[1], Path(sys.argv[2]))
