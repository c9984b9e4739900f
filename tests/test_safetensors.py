"""Reading safetensors: every row of every dtype, and headers that somebody tampered with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint, is_plain_name, read_header
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import DusEdgeError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 1 << 65) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 4])
def test_rows_are_what_the_safetensors_package_reads(make_checkpoint, dtype, shards):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    folder = make_checkpoint(dtype=dtype, shards=shards)
    expected = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    checkpoint = SafetensorsCheckpoint(Source(folder, "x", "x"))
    assert set(checkpoint.specs()) == set(expected)
    for name, spec in checkpoint.specs().items():
        bits = torch.int16 if spec.dtype != "F32" else torch.int32
        theirs = expected[name].view(bits).numpy()
        middle = spec.n_rows // 3
        ours = np.concatenate([checkpoint.read(name, 0, middle), checkpoint.read(name, middle)])
        np.testing.assert_array_equal(ours.view(theirs.dtype), theirs)
    checkpoint.close()


def test_saved_although_tied(make_checkpoint):
    """Some checkpoints carry lm_head beside a tied embedding; transformers ignores it, so do we."""
    folder = make_checkpoint(tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" not in SafetensorsCheckpoint(Source(folder, "x", "x")).specs()


def small_file(folder: Path) -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    }
    blob = json.dumps(header).encode()
    return len(blob).to_bytes(8, "little") + blob + bytes(22)


@given(position=st.integers(0, 250), byte=st.integers(0, 255), cut=st.integers(0, 300))
def test_a_changed_byte_is_read_or_refused(tmp_path_factory, position, byte, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    data = bytearray(small_file(path))
    data[position % len(data)] = byte
    path.write_bytes(data[: max(0, len(data) - cut)] if cut < 40 else data)
    try:
        tensors = read_header(path)
    except DusEdgeError as e:
        assert "mutated.safetensors" in str(e)
        return
    assert sum(t.nbytes for t in tensors.values()) <= path.stat().st_size


@given(
    name=st.sampled_from(["a", "b"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", None]),
    value=json_values,
)
def test_a_nonsense_entry_is_read_or_refused(tmp_path_factory, name, field, value):
    path = tmp_path_factory.getbasetemp() / "nonsense.safetensors"
    data = small_file(path)
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    if field is None:
        header[name] = value
    else:
        header[name][field] = value
    blob = json.dumps(header).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + data[8 + n :])
    try:
        read_header(path)
    except DusEdgeError as e:
        assert "nonsense.safetensors" in str(e)


@pytest.mark.parametrize("name", ["a.safetensors", "model-00001-of-00002.safetensors", "..."])
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a/", "a\0b", "./a"])
def test_names_that_leave_the_folder(name):
    assert not is_plain_name(name)
