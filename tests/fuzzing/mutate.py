"""Damage a sound file where it hurts: at lengths, counts, names and values, and blindly.

A seed says where its parts lie (`Mark`) and which fields hold the length of what (`Length`), so
that a changed part is still found by a reader and not only the first broken length.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: No input is larger than this, whatever it is grown by, bytes.
MOST_BYTES = 1 << 20

INTEGERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 100, 127, 128, 255, 256, 257, 4095),
    *(4096, 32767, 32768, 65535, 65536, 10**6, 2 * 10**9, 2**24, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -128, -(2**31), -(2**63)),
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-30,
    3.4e38,
    float("inf"),
    -float("inf"),
    float("nan"),
)
TEXTS = (
    *("", "a", "b", "ab", " ", "▁", "▁a", "▁▁", "\0", "\n", "\x1b[2J", "\u2028", "ü", "코", "😀"),
    *("<unk>", "<s>", "</s>", "<0x00>", "<0x41>", "<0xff>", "[PAD3]", "<|x|>", "Ġ", "Ġa", "gptq"),
    *("../x", "/etc/passwd", "..", ".", "x.safetensors", "model.safetensors", "true", "null", "-1"),
    *("0", "1", "007", "²", "１", "1e999", "nan", "float16", "BF16", "F32", "I32", "BPE", "llama"),
    *("mistral", "MistralForCausalLM", "silu", "gelu", "yarn", "llama3", "%s%n{0}", "9" * 19),
    *("9" * 5000, "-" + "0" * 5000, "A" * 5000, "é" * 3000, "a" * 99, "model.layers.0.mlp.x"),
    *("blk", "blk.x.y", "blk.-1.a", "blk.9999999999.x", "blk.0.attn_q.weight", "model.layers.x"),
    *("blk." + "1" * 4400 + ".x", "model.layers." + "1" * 4400 + ".x", "model.layers.9999999999.x"),
)
#: JSON as no library would write it.
_LITERALS = (
    *("null", "true", "false", "[]", "{}", '""', "[[]]", "[{}]", "[null]", "[1,2]", '["a"]', "0"),
    *("-0", "1", "-1", "0.5", "-0.0", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity"),
    *("9" * 400, "9" * 5000, "1." + "0" * 400 + "1", '"\\ud800"', '"\\udc00a"', '"\\u0000"'),
    *('"\\ud83d\\ude00"', "\ufeff1", "01", "+1", "0x10", "'a'", "undefined", "1,", "/**/1", "tru"),
    *(
        '{"a":1,"a":2}',
        '{"a":1,"a":1}',
        '{"type":"Sequence"}',
        '{"content":"a"}',
        "[0,[1,[2,[3]]]]",
    ),
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A part of a file: bytes from `start` to `end`.

    Attributes:
        kind: one of `MAKERS`, what may stand there; or ``chunk:x``, another chunk of which may.
        group: parts that belong together. A group is drawn first, then a part of it, so that a
            list of 300 entries is not hit 300 times as often as what stands beside it.
    """

    start: int
    end: int
    kind: str
    group: int = 0


@dataclass(frozen=True, slots=True)
class Length:
    """A 64-bit number at `at` that counts the bytes from `start` to `end`."""

    at: int
    start: int
    end: int


@dataclass(frozen=True)
class Seed:
    """Sound files, by name, with their parts.

    Attributes:
        files: what a reader takes without a complaint.
        marks: by file name; files without any are changed blindly only, those in `fixed` never.
        lengths: by file name.
        fixed: names of files that stay as they are.
    """

    name: str
    files: Mapping[str, bytes]
    marks: Mapping[str, tuple[Mark, ...]] = field(default_factory=dict)
    lengths: Mapping[str, tuple[Length, ...]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()


def mutated(seed: Seed, rng: random.Random) -> dict[str, bytes | None]:
    """The files of a seed that are changed; None where one is taken away."""
    names = [name for name in seed.files if name not in seed.fixed]
    changed: dict[str, bytes | None] = {}
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 1, 1, 2, 3)))):
        if len(seed.files) > 1 and rng.random() < 0.005:
            changed[name] = None
        else:
            changed[name] = _mutated_file(seed, name, rng)
    return changed


def _mutated_file(seed: Seed, name: str, rng: random.Random) -> bytes:
    data, marks = seed.files[name], seed.marks.get(name, ())
    if marks and rng.random() < 0.9:
        data = _at_marks(data, marks, seed.lengths.get(name, ()), rng)
        blind = rng.random() < 0.15
    else:
        blind = True
    if blind:
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            data = rng.choice(_BLIND)(data, rng)
    if rng.random() < 0.004:
        data = _grown(data, rng)
    return data[:MOST_BYTES]


# Where a seed is known


def _at_marks(
    data: bytes, marks: tuple[Mark, ...], lengths: tuple[Length, ...], rng: random.Random
) -> bytes:
    groups: dict[int, list[Mark]] = {}
    for mark in marks:
        groups.setdefault(mark.group, []).append(mark)
    keys = list(groups)
    picked = [
        rng.choice(groups[rng.choice(keys)]) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 6)))
    ]
    grown: list[tuple[int, int]] = []
    end = len(data)
    for mark in sorted(set(picked), key=lambda m: (m.end, m.start), reverse=True):
        if mark.end > end:
            continue  # inside of one that is changed already
        old = data[mark.start : mark.end]
        new = _made(mark, old, data, marks, rng)
        data = data[: mark.start] + new + data[mark.end :]
        grown.append((mark.start, len(new) - len(old)))
        end = mark.start
    for length in lengths:
        if rng.random() < 0.9 and not any(at < length.start for at, _ in grown):
            n = length.end - length.start + sum(d for at, d in grown if at < length.end)
            data = data[: length.at] + struct.pack("<Q", n) + data[length.at + 8 :]
    return data


def _made(
    mark: Mark, old: bytes, data: bytes, marks: tuple[Mark, ...], rng: random.Random
) -> bytes:
    kind, _, label = mark.kind.partition(":")
    if kind != "chunk":
        return MAKERS[kind](rng, old)
    others = [m for m in marks if m.kind == mark.kind]
    other = rng.choice(others)
    text = data[other.start : other.end]
    choice = rng.random()
    if label == "member":  # taken out, doubled with another value, or another one's
        if choice < 0.4:
            return b'"zz":0'
        return old + b"," + text if choice < 0.5 else text
    if label.startswith("free"):  # as many as there are: taken out, doubled, repeated
        if choice < 0.3:
            return b""
        if choice < 0.6:
            return old + text
        if choice < 0.62:
            return old * rng.choice((10, 100, 1000, 5000))
    return text


def _integer(code: str) -> Callable[[random.Random, bytes], bytes]:
    width = struct.calcsize(f"<{code}")

    def make(rng: random.Random, old: bytes) -> bytes:
        value = int.from_bytes(old, "little")
        if rng.random() < 0.4:
            value += rng.choice((-8, -4, -2, -1, 1, 2, 4, 8, 32))
        elif rng.random() < 0.3:
            value ^= 1 << rng.randrange(8 * width)
        else:
            value = rng.choice(INTEGERS)
        return (value % (1 << 8 * width)).to_bytes(width, "little")

    return make


def _float(rng: random.Random, old: bytes) -> bytes:
    return struct.pack("<f", rng.choice(FLOATS))


def varint(value: int) -> bytes:
    """A number as protobuf has it."""
    out = bytearray()
    value %= 1 << 64
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(rng: random.Random, old: bytes) -> bytes:
    if rng.random() < 0.1:
        return b"\x80" * rng.choice((1, 9, 10, 11, 5000)) + rng.choice((b"", b"\0", b"\x7f"))
    return varint(rng.choice(INTEGERS))


def piece(text: bytes, score: float, kind: int) -> bytes:
    """One entry of a SentencePiece model, with the field's tag and length."""
    body = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
    body += b"\x18" + varint(kind)
    return b"\x0a" + varint(len(body)) + body


def _piece(rng: random.Random, old: bytes) -> bytes:
    text = rng.choice(TEXTS).encode()
    if rng.random() < 0.1:
        text = rng.randbytes(4)
    made = piece(text, rng.choice(FLOATS), rng.choice((0, 1, 2, 3, 4, 4, 5, 6, 7, 1 << 31)))
    return old + made if rng.random() < 0.5 else made


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf_string(rng: random.Random, old: bytes) -> bytes:
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice(INTEGERS) % 2**64) + old[8:]
    if rng.random() < 0.1:
        return gguf_string(rng.randbytes(rng.choice((1, 4, 70))))
    return gguf_string(rng.choice(TEXTS).encode())


_GGUF_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}


def _gguf_value(rng: random.Random, old: bytes) -> bytes:
    """A typed value of another kind, arrays of arrays and of too many items included."""
    kind = rng.choice((*_GGUF_CODES, 8, 9, 9, 12, 13, 255))
    head = struct.pack("<I", kind)
    if kind == 8:
        return head + _gguf_string(rng, old)
    if kind == 9:
        n = rng.choice((0, 1, 2, 3, *INTEGERS)) % 2**64
        inner = [_gguf_value(rng, old) if rng.random() < 0.7 else b"" for _ in range(min(n, 3))]
        item = rng.choice((*range(13), 99))
        return head + struct.pack("<IQ", item, n) + b"".join(v[4:] for v in inner)
    if kind == 12:
        return head + struct.pack("<d", rng.choice(FLOATS))
    if kind not in _GGUF_CODES:
        return head
    code = _GGUF_CODES[kind]
    if code == "f":
        return head + _float(rng, old)
    width = struct.calcsize(f"<{code}")
    return head + (rng.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")


def _json_value(rng: random.Random, old: bytes) -> bytes:
    choice = rng.random()
    if choice < 0.35:
        return json.dumps(rng.choice(INTEGERS)).encode()
    if choice < 0.6:
        return rng.choice(_LITERALS).encode()
    if choice < 0.8:
        return json.dumps(rng.choice(TEXTS), ensure_ascii=rng.random() < 0.5).encode()
    if choice < 0.86:
        return b"[" + old + b"]"
    if choice < 0.92:
        return b'{"type":"Sequence","content":' + old + b"}"
    if choice < 0.98:
        return b"[" + b",".join([old] * rng.choice((2, 3, 50))) + b"]"
    depth = rng.choice((10, 500, 1200, 100_000))
    return rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))


def _json_key(rng: random.Random, old: bytes) -> bytes:
    return json.dumps(rng.choice(TEXTS)).encode()


def _text(rng: random.Random, old: bytes) -> bytes:
    return rng.choice(TEXTS).encode()


MAKERS: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    "u8": _integer("B"),
    "u32": _integer("I"),
    "u64": _integer("Q"),
    "f32": _float,
    "varint": _varint,
    "piece": _piece,
    "gguf-string": _gguf_string,
    "gguf-value": _gguf_value,
    "json-value": _json_value,
    "json-key": _json_key,
    "text": _text,
}


# Blindly


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    out = bytearray(data)
    at = rng.randrange(len(out))
    out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def _put(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    value = rng.choice(INTEGERS) % 2**64
    return data[:at] + value.to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))] + data[at:]


def _over(data: bytes, rng: random.Random) -> bytes:
    at, width = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    value = (rng.choice(INTEGERS) % 2**64).to_bytes(8, "little")[:width]
    return data[:at] + value + data[at + width :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _take(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 32, 200)) :]


def _splice(data: bytes, rng: random.Random) -> bytes:
    at, source = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    n = rng.choice((1, 4, 16, 64, 500))
    return data[:at] + data[source : source + n] + data[at + rng.choice((0, n)) :]


def _text_in(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TEXTS).encode() + data[at:]


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 7, 31, 32, 100)))


_BLIND = (_flip, _flip, _put, _over, _over, _cut, _take, _splice, _splice, _text_in, _append)


def _grown(data: bytes, rng: random.Random) -> bytes:
    """A stretch repeated many times: what takes the square of a length shows."""
    start = rng.randrange(len(data) + 1)
    stretch = data[start : start + rng.choice((1, 2, 8, 40, 300))] or b"["
    n = rng.choice((100, 3000, 50_000, 400_000)) // len(stretch) + 1
    return data[:start] + stretch * n + data[start:]


# Where things lie in JSON


def json_marks(text: str, at: int = 0) -> tuple[Mark, ...]:
    """Every value, key and member of an ASCII JSON text that begins at byte `at` of its file."""
    assert text.isascii()
    marks: list[Mark] = []
    decoder = json.JSONDecoder()

    def blank(i: int) -> int:
        while text[i] in " \n\t\r,:":
            i += 1
        return i

    def walk(i: int, group: int) -> int:
        start = i
        if text[i] not in "[{":
            end = decoder.raw_decode(text, i)[1]
        else:
            close, keyed = ("]", False) if text[i] == "[" else ("}", True)
            i = blank(i + 1)
            while text[i] != close:
                first = i
                if keyed:
                    i = decoder.raw_decode(text, i)[1]
                    marks.append(Mark(at + first, at + i, "json-key", -1 - start))
                    i = blank(i)
                i = walk(i, start)
                if keyed:
                    marks.append(Mark(at + first, at + i, "chunk:member", -1 - start))
                i = blank(i)
            end = i + 1
        marks.append(Mark(at + start, at + end, "json-value", group))
        return end

    walk(blank(0), -(1 << 30))
    return tuple(marks)
