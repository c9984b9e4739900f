"""Explicit SIMD for Numba: vectors of 16 lanes as values, and the few operations on them.

A kernel written with these works on 16 blocks at once, one block per lane, so that a search that
is scalar by nature (candidates, comparisons, divisions) becomes straight vector code. LLVM gets
vector types instead of loops, so nothing depends on its loop vectorizer: accumulators stay in
registers, and 16 lanes become two AVX2, one AVX-512 or four NEON registers.

Rounding and comparing follow IEEE 754; no fast-math. Vectors exist only inside compiled functions.
See https://numba.readthedocs.io/en/stable/extending/ and https://llvm.org/docs/LangRef.html.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
    type_callable,
)

#: Blocks that a kernel works on at once. 16 hides the latency of multiply-add on two units; 8 was
#: 1.3 times slower in the Q4_K search on AVX2, see benchmarks/LOG.md.
LANES = 16

_ELEMENT = {"f32": ir.FloatType(), "i32": ir.IntType(32), "i1": ir.IntType(1)}


class Vector(types.Type):
    """Numba's type of a vector of `LANES` elements of one kind: f32, i32 or i1 (a mask)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(name=f"Vector({kind} x {LANES})")

    @property
    def ll(self) -> ir.VectorType:
        """The LLVM type."""
        return ir.VectorType(_ELEMENT[self.kind], LANES)


F32, I32, MASK = Vector("f32"), Vector("i32"), Vector("i1")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ll)


def _operator(op: Callable[..., Any], emit: dict[Vector, Callable[..., Any]], result: Any) -> None:
    """Let `a op b` work on two vectors of one kind."""

    @type_callable(op)
    def typer(context: Any) -> Any:
        def of(a: types.Type, b: types.Type) -> types.Type | None:
            return result(a) if isinstance(a, Vector) and a is b and a in emit else None

        return of

    for vector, build in emit.items():

        @lower_builtin(op, vector, vector)
        def lower(context: Any, builder: Any, sig: Any, args: Any, build: Any = build) -> Any:
            return build(builder, *args)


def _same(vector: Vector) -> Vector:
    return vector


def _mask(vector: Vector) -> Vector:
    return MASK


_B = ir.IRBuilder
_operator(operator.add, {F32: _B.fadd, I32: _B.add}, _same)
_operator(operator.sub, {F32: _B.fsub, I32: _B.sub}, _same)
_operator(operator.mul, {F32: _B.fmul, I32: _B.mul}, _same)
_operator(operator.truediv, {F32: _B.fdiv}, _same)
_operator(operator.and_, {I32: _B.and_, MASK: _B.and_}, _same)
_operator(operator.or_, {I32: _B.or_, MASK: _B.or_}, _same)
_operator(operator.xor, {I32: _B.xor, MASK: _B.xor}, _same)
_operator(operator.lshift, {I32: _B.shl}, _same)
_operator(operator.rshift, {I32: _B.lshr}, _same)
for _op, _sign in ((operator.lt, "<"), (operator.gt, ">"), (operator.ge, ">=")):
    _operator(
        _op,
        {
            F32: lambda b, x, y, sign=_sign: b.fcmp_ordered(sign, x, y),
            I32: lambda b, x, y, sign=_sign: b.icmp_signed(sign, x, y),
        },
        _mask,
    )


def _splat(builder: Any, value: Any, vector: Vector) -> Any:
    none = ir.Constant(vector.ll, ir.Undefined)
    one = builder.insert_element(none, value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, none, zeros)


@intrinsic
def f32(context: Any, x: Any) -> Any:
    """Every lane the number `x`, as float32."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, cg.cast(builder, args[0], x, types.float32), F32)

    return F32(x), emit


@intrinsic
def i32(context: Any, x: Any) -> Any:
    """Every lane the integer `x`, as int32."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, cg.cast(builder, args[0], x, types.int32), I32)

    return I32(x), emit


@intrinsic
def where(context: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane, `a` where the mask is set, else `b`."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(mask, a, b), emit


@intrinsic
def least(context: Any, a: Any, b: Any) -> Any:
    """Lane by lane the lesser; `b` where `a` is NaN, so that a clamp is never NaN."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return F32(a, b), emit


@intrinsic
def greatest(context: Any, a: Any, b: Any) -> Any:
    """Lane by lane the greater; `b` where `a` is NaN."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return F32(a, b), emit


def _call(name: str, n_args: int) -> Callable[..., Any]:
    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(F32.ll, [F32.ll] * n_args)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return builder.call(function, args)

    return emit


@intrinsic
def absolute(context: Any, a: Any) -> Any:
    """|a|."""
    return F32(a), _call("fabs", 1)


@intrinsic
def nearest(context: Any, a: Any) -> Any:
    """`a` rounded to an integer, ties to even, still float32."""
    return F32(a), _call("rint", 1)


@intrinsic
def root(context: Any, a: Any) -> Any:
    """Square root."""
    return F32(a), _call("sqrt", 1)


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c with one rounding."""
    return F32(a, b, c), _call("fma", 3)


@intrinsic
def to_i32(context: Any, a: Any) -> Any:
    """float32 → int32, towards zero; the caller has brought the lanes into range."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], I32.ll)

    return I32(a), emit


@intrinsic
def to_f32(context: Any, a: Any) -> Any:
    """int32 → float32."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], F32.ll)

    return F32(a), emit


@intrinsic
def as_i32(context: Any, a: Any) -> Any:
    """The bits of float32 lanes."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32.ll)

    return I32(a), emit


@intrinsic
def as_f32(context: Any, a: Any) -> Any:
    """Float32 lanes of these bits."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32.ll)

    return F32(a), emit


@intrinsic
def any_lane(context: Any, mask: Any) -> Any:
    """Is any lane of the mask set?"""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(mask), emit


def _pointer(cg: Any, builder: Any, array: Any, value: Any, index: Any, pointee: Any) -> Any:
    data = cg.make_array(array)(cg, builder, value).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """`LANES` elements of a float32 or int32 array from `index` on."""
    vector = F32 if array.dtype == types.float32 else I32

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = cg.cast(builder, args[1], index, types.intp)
        return builder.load(_pointer(cg, builder, array, args[0], at, vector.ll), align=4)

    return vector(array, index), emit


@intrinsic
def store(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the lanes to `array[index : index + LANES]`."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = cg.cast(builder, args[1], index, types.intp)
        builder.store(args[2], _pointer(cg, builder, array, args[0], at, vector.ll), align=4)
        return cg.get_dummy_value()

    return types.void(array, index, vector), emit


@intrinsic
def load_bf16(context: Any, array: Any, index: Any) -> Any:
    """`LANES` bfloat16 numbers, bits in a uint16 array, as float32."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = cg.cast(builder, args[1], index, types.intp)
        row = ir.VectorType(ir.IntType(16), LANES)
        bits = builder.load(_pointer(cg, builder, array, args[0], at, row), align=2)
        return _widened(builder, bits, LANES)

    return F32(array, index), emit


@intrinsic
def store_shorts(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the low 16 bits of int32 lanes to `array[index : index + LANES]` of uint16."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = cg.cast(builder, args[1], index, types.intp)
        row = ir.VectorType(ir.IntType(16), LANES)
        short = builder.trunc(args[2], row)
        builder.store(short, _pointer(cg, builder, array, args[0], at, row), align=1)
        return cg.get_dummy_value()

    return types.void(array, index, vector), emit


@intrinsic
def store_word(context: Any, array: Any, index: Any, word: Any) -> Any:
    """Write an int32 to the four bytes `array[index : index + 4]` of a uint8 array."""

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = cg.cast(builder, args[1], index, types.intp)
        value = cg.cast(builder, args[2], word, types.int32)
        builder.store(value, _pointer(cg, builder, array, args[0], at, ir.IntType(32)), align=1)
        return cg.get_dummy_value()

    return types.void(array, index, word), emit


@intrinsic
def lookup(context: Any, table: Any, index: Any) -> Any:
    """``table[index]`` lane by lane: int32 from an int32 array; nothing checks the indices.

    Sixteen loads, so that no processor needs an instruction for it.
    """

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = ir.Constant(I32.ll, ir.Undefined)
        wide = ir.IntType(64)
        for lane in range(LANES):
            place = ir.Constant(ir.IntType(32), lane)
            at = builder.zext(builder.extract_element(args[1], place), wide)
            element = builder.load(_pointer(cg, builder, table, args[0], at, ir.IntType(32)))
            found = builder.insert_element(found, element, place)
        return found

    return I32(table, index), emit


#: Positions that one call of `gather` takes from every lane.
TILE = 8


@intrinsic
def gather(context: Any, source: Any, starts: Any, position: Any, out: Any, index: Any) -> Any:
    """Read `TILE` consecutive weights of `LANES` blocks and lay them out lane by lane.

    Lane i of ``out[index + k * LANES :]`` becomes ``source[starts[i] + position + k]``.

    Args:
        source: float32 weights, or uint16 for the bits of bfloat16.
        starts: ``(LANES,)`` int64, where each block starts.
        position: first position within the blocks.
        out: float32 scratch.
        index: where in `out` the tile goes.
    """
    narrow = source.dtype == types.uint16
    element = ir.IntType(16) if narrow else ir.FloatType()
    row = ir.VectorType(element, TILE)

    def emit(cg: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = cg.cast(builder, args[2], position, types.intp)
        to = cg.cast(builder, args[4], index, types.intp)
        rows = []
        for lane in range(LANES):
            place = ir.Constant(ir.IntType(64), lane)
            start = builder.load(_pointer(cg, builder, starts, args[1], place, ir.IntType(64)))
            pointer = _pointer(cg, builder, source, args[0], builder.add(start, at), row)
            weights = builder.load(pointer, align=2 if narrow else 4)
            rows.append(_widened(builder, weights, TILE) if narrow else weights)
        halves = [_transposed(builder, rows[h : h + TILE]) for h in range(0, LANES, TILE)]
        for k in range(TILE):
            whole = _joined(builder, [half[k] for half in halves])
            place = builder.add(to, ir.Constant(ir.IntType(64), k * LANES))
            builder.store(whole, _pointer(cg, builder, out, args[3], place, F32.ll), align=4)
        return cg.get_dummy_value()

    return types.void(source, starts, position, out, index), emit


def _widened(builder: Any, bits: Any, n: int) -> Any:
    """bfloat16 is the upper half of float32."""
    wide = ir.VectorType(ir.IntType(32), n)
    shifted = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * n))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), n))


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """8 vectors of 8 transposed in three rounds of pairwise shuffles."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = []
    for i in range(0, 8, 2):
        pairs += [_shuffled(builder, rows[i], rows[i + 1], lanes) for lanes in (low, high)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    quads = []
    for i in (0, 4):
        for j in (0, 1):
            quads += [
                _shuffled(builder, pairs[i + j], pairs[i + j + 2], lanes) for lanes in (low, high)
            ]
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [
        _shuffled(builder, quads[k], quads[k + 4], lanes) for lanes in (low, high) for k in range(4)
    ]


def _joined(builder: Any, parts: list[Any]) -> Any:
    low, high = parts
    return _shuffled(builder, low, high, list(range(LANES)))
