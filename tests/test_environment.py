"""Poor surroundings: no home, few open files, one core, a small group, ASCII, a narrow window."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dus_edge import machine
from dus_edge.checkpoint.builtin import model_dir
from dus_edge.stream import OpenFiles

from .cases import check_each

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
FOLDER = "from dus_edge.quant.kernels import cache_folder; print(cache_folder())"


def run(
    *command: object, cwd: Path, few: int = 0, cores: int = 0, **env: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a command of ours, or Python code, with other surroundings; None unsets a variable."""

    def hold() -> None:
        if few:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
        if cores:
            os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:cores]))

    merged = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=merged,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        preexec_fn=hold,
        timeout=300,
        check=False,
    )


HOMELESS = {
    "no HOME and no entry": {"HOME": None, "XDG_CACHE_HOME": "/dev/null/cache"},
    "a HOME that is not there": {"HOME": "/dev/null/home", "XDG_CACHE_HOME": None},
}


def test_kernels_are_kept_without_a_home_and_in_nobody_elses_folder(tmp_path):
    def check(name: str) -> None:
        temporary = tmp_path / name.replace(" ", "-")
        temporary.mkdir()
        surroundings = {"TMPDIR": str(temporary), "NUMBA_CACHE_DIR": None, **HOMELESS[name]}
        first, second = (
            run(sys.executable, "-c", FOLDER, cwd=tmp_path, **surroundings) for _ in range(2)
        )
        assert first.returncode == 0, first.stderr
        assert first.stdout == second.stdout
        assert [p.name for p in temporary.iterdir()] == [f"dus-edge-{os.getuid()}"]
        # Anybody may write to it: code from there is not run, and nothing is left behind.
        (temporary / f"dus-edge-{os.getuid()}").chmod(0o777)
        third = run(sys.executable, "-c", FOLDER, cwd=tmp_path, **surroundings)
        assert "dus-edge-kernels-" in third.stdout, third.stdout + third.stderr
        assert not Path(third.stdout.strip()).exists()

    check_each(check, HOMELESS)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """pico in 74 shards, one tensor each and one with the last."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    folder.mkdir()
    weights, index = load_file(model_dir() / "model.safetensors"), {}
    names = sorted(weights)
    for i in range(74):
        mine = names[i:] if i == 73 else names[i : i + 1]
        shard = f"model-{i + 1:05}-of-00074.safetensors"
        save_file({n: weights[n] for n in mine}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(mine, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file in model_dir().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


UPSCALE = """
import sys
from dus_edge.export import hf
plan_shards = hf.plan_shards
hf.plan_shards = lambda specs, **more: plan_shards(specs, 100_000, **more)
from dus_edge.cli.main import main
main()
"""


def test_more_shards_than_files_may_be_open(sharded, tmp_path):
    quiet = {"OMP_NUM_THREADS": "1"}
    done = run(*CLI, "gguf", sharded, "-q", "q4_0,q8_0", "-o", "b", cwd=tmp_path, few=64, **quiet)
    assert done.returncode == 0, done.stderr
    whole = run(*CLI, "gguf", "pico", "-q", "q4_0,q8_0", "-o", "a", cwd=tmp_path, **quiet)
    assert whole.returncode == 0, whole.stderr
    for few, all_open in zip(
        sorted((tmp_path / "b").glob("*.gguf")),
        sorted((tmp_path / "a").glob("*.gguf")),
        strict=True,
    ):
        # The names of the base differ, the weights do not.
        assert few.read_bytes()[-4_000_000:] == all_open.read_bytes()[-4_000_000:]

    command = [sys.executable, "-c", UPSCALE, "upscale", sharded, "-o", "up"]
    done = run(*command, cwd=tmp_path, few=64, **quiet)
    assert done.returncode == 0, done.stderr
    shards = sorted((tmp_path / "up").glob("*.safetensors"))
    assert len(shards) > 64
    written = {k: v for shard in shards for k, v in load_file(shard).items()}
    base = load_file(model_dir() / "model.safetensors")
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(written[name.format(11)], base[name.format(7)])
    assert torch.equal(written[name.format(6)], base[name.format(2)])


def test_files_in_use_stay_open_and_others_make_room(tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(os.O_RDONLY, most=2)
    with files.use(paths[0]) as first:
        for path in paths[1:]:
            with files.use(path) as fd:
                assert os.pread(fd, 1, 0).decode() == path.name
        assert os.pread(first, 1, 0) == b"0"
        with files.use(paths[0]) as again:
            assert again == first
    files.close()
    with pytest.raises(OSError):
        os.fstat(first)


def test_one_core_and_a_small_group_give_the_same_bytes(tmp_path):
    def make(name: str, **surroundings: int) -> bytes:
        done = run(*CLI, "gguf", "pico", "-q", "q4_0", "-o", name, cwd=tmp_path, **surroundings)
        assert done.returncode == 0, done.stderr
        return next((tmp_path / name).glob("*.gguf")).read_bytes()

    assert make("one", cores=1) == make("all")


@pytest.mark.parametrize(
    ("own", "files", "shares"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/app\n", {"app/cpu.max": "max 100000\n", "cpu.max": "400000 100000\n"}, [4.0]),
        (
            "3:cpu,cpuacct:/a\n2:memory:/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            [0.5],
        ),
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            [],
        ),
        ("nonsense\n0::/\n", {"cpu.max": "many of them\n"}, []),
    ],
)
def test_a_groups_share_of_the_cores(tmp_path, own, files, shares):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine._group_shares(tmp_path / "root", tmp_path / "own") == shares


def test_no_more_threads_than_a_groups_share(monkeypatch):
    monkeypatch.setattr(machine, "_group_shares", lambda: [0.3])
    assert machine.default_threads() == 1
    monkeypatch.setattr(machine, "_group_shares", lambda: [10_000.0])
    assert machine.default_threads() == len(os.sched_getaffinity(0))


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
COMMANDS = {
    "help": ("--help",),
    "help of a command": ("gguf", "--help"),
    "inspect": ("inspect", "pico"),
    "fit": ("fit", "pico", "--device", "rtx-4070"),
    "devices": ("devices",),
    "gguf": ("gguf", "pico", "-q", "q4_0", "-o", "out", "--overwrite"),
    "a bad name": ("inspect", "ünï-코드"),
}


def test_ascii_and_a_narrow_window(tmp_path):
    def check(name: str, surroundings: str) -> None:
        env = {"ascii": ASCII, "narrow": {"COLUMNS": "40"}}[surroundings]
        done = run(*CLI, *COMMANDS[name], cwd=tmp_path, **env)
        assert done.returncode == (2 if name == "a bad name" else 0), done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        if surroundings == "narrow" and name.startswith("help"):
            # What click wraps; a list of choices has no place to break.
            long = [x for x in done.stdout.splitlines() if len(x) > 50]
            assert not [x for x in long if not re.search(r"[|\]]", x)], long

    check_each(check, COMMANDS, ["ascii", "narrow"])
