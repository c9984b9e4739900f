"""The device database, its rules, and telling the present machine."""

from __future__ import annotations

import pytest

from dus_edge import data
from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.machine import cpu_name
from dus_edge.predict import devices
from dus_edge.predict.devices import find_device, load_devices, load_rules, parse_devices
from dus_edge.predict.memory.llama import MIB, usable_bytes

TEXT = data.read_text("devices.toml")


def test_every_device_is_there_with_its_source():
    known = load_devices()
    assert len(known) == 87
    assert all(d.source and d.bandwidth_gbps for d in known)
    ids = {d.id for d in known}
    assert {"rtx-3050-6gb", "rtx-4090", "rtx-4060-laptop", "m1-7c", "m4-max-40c"} <= ids


def test_unknown_stays_empty():
    assert find_device("m1-8c").int8_tops_dense is None
    assert find_device("rtx-4060").total_mib_reported == {}


@pytest.mark.parametrize(
    ("typed", "near"),
    [("rtx-4061", "rtx-4060"), ("Apple M3 Max 40c!", "m3-max-40c"), ("m1max-32c", "m1-max-32c")],
)
def test_an_unknown_device_gets_a_suggestion(typed, near):
    with pytest.raises(UsageError, match=f"There is no device '{typed}'; did you mean {near}\\?"):
        find_device(typed)


def test_spellings():
    assert find_device(" RTX 4090 ") is find_device("rtx-4090")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bandwidth_gbps = 168\n", "bandwidth_gbps = -1\n", "bandwidth_gbps is -1"),
        ('id = "rtx-3060-ti"', 'id = "rtx-3070"', "rtx-3070 stands there twice"),
        ('backend = "CUDA"', 'backend = "TPU"', "'TPU' is not known"),
        ("[[devices]]", "[[devices", "is damaged"),
        ('family = "nvidia-30-desktop"\n', "", "is damaged"),
        ("memory_gb_options = [6]", "memory_gb_options = []", "not ascending sizes"),
    ],
)
def test_a_damaged_database(old, new, said):
    assert old in TEXT
    with pytest.raises(DusEdgeError, match=said):
        parse_devices(TEXT.replace(old, new, 1))


@pytest.mark.parametrize(
    ("gb", "macos", "megabytes"),
    # recommendedMaxWorkingSetSize in llama.cpp's logs, 10^6 bytes
    [
        (8, "macos15", 5726.63),
        (16, "macos15", 11453.25),
        (24, "macos15", 17179.89),
        (32, "macos15", 22906.50),
        (36, "macos15", 28991.03),
        (48, "macos15", 38654.71),
        (16, "macos26", 12713.12),
        (32, "macos26", 26800.60),
        (128, "macos26", 115448.73),
    ],
)
def test_working_sets_that_were_read(gb, macos, megabytes):
    assert load_rules().apple[macos].usable(gb) == pytest.approx(megabytes * 1e6, rel=1e-4)


def test_working_sets_that_were_not_read():
    assert load_rules().apple["macos26"].usable(8) == 8 * 1024**3 * 74 // 100
    assert load_rules().apple["macos15"].usable(512) == 384 * 1024**3


def test_usable_memory_of_cards():
    # Windows: 12,287 MiB reported, less the median 1,009 that a desktop takes
    assert usable_bytes(find_device("rtx-3060-12gb"), "windows") == (12287 - 1009) * MIB
    # Linux: 11,906 reported, less 2
    assert usable_bytes(find_device("rtx-3060-12gb"), "linux-headless") == (11906 - 2) * MIB
    # nothing read of an RTX 4070: 12,288 nominal
    assert usable_bytes(find_device("rtx-4070"), "windows") == (12288 - 1009) * MIB
    # two sizes, and the report is of the larger one
    both = find_device("rtx-3080-laptop")
    assert usable_bytes(both, "windows", 16) == (16383 - 1009) * MIB
    assert usable_bytes(both, "windows", 8) == (8192 - 1009) * MIB


def test_sizes_and_platforms_that_are_not_the_devices():
    with pytest.raises(UsageError, match="m1-8c has 8 or 16 GB of memory, not 12"):
        usable_bytes(find_device("m1-8c"), "macos26", 12)
    with pytest.raises(UsageError, match="m1-8c does not run on windows"):
        usable_bytes(find_device("m1-8c"), "windows")
    with pytest.raises(UsageError, match="There is no platform 'beos'"):
        usable_bytes(find_device("rtx-4090"), "beos")


@pytest.mark.parametrize(
    ("name", "mib", "wanted"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 8192, "rtx-3060-8gb"),
        ("NVIDIA GeForce RTX 3060 Ti", 8192, "rtx-3060-ti"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "rtx-4060-laptop"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce GTX 970", 4096, None),
    ],
)
def test_cards_by_the_drivers_name(name, mib, wanted):
    found = devices.match_nvidia(name, mib)
    assert (found.id if found else None) == wanted


def test_apple_chips():
    assert devices.match_apple("Apple M3 Max", 40).id == "m3-max-40c"
    assert devices.match_apple("Apple M1", 8).id == "m1-8c"
    assert devices.match_apple("Apple M9", 99) is None
    assert devices.match_apple("Intel(R) Core(TM) i7", 0) is None


def test_a_mac_by_its_tools():
    said = {
        "machdep.cpu.brand_string": "Apple M3 Pro\n",
        "hw.memsize": str(18 * 2**30),
        "AGXAccelerator": '"gpu-core-count" = 14',
        "iogpu.wired_limit_mb": "0\n",
        "-productVersion": "26.1\n",
    }
    found = devices._apple(lambda command: said[command[-1]])
    assert found.id == "m3-pro-14c"
    assert found.memory() == 18
    assert usable_bytes(found) == pytest.approx(14302.25e6, rel=1e-4)
    said["iogpu.wired_limit_mb"] = "16000\n"
    assert usable_bytes(devices._apple(lambda command: said[command[-1]])) == 16000 * MIB


def test_a_processor_by_its_file():
    assert cpu_name("processor\t: 0\nmodel name\t: AMD Ryzen 7 5700X\n") == ("AMD Ryzen 7 5700X")
    assert cpu_name("nothing") is None


def test_the_present_machine():
    here = devices.recognise()
    assert here.name
    assert 0 < usable_bytes(here) <= here.memory() * 1.05 * 2**30
