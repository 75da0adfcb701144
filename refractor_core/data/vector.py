"""Sixty-four bytes of text at a time in compiled code: what numba's own language cannot say, written in LLVM's vector types.

Each function is called from ``njit`` code with a contiguous uint8 array and a place in it, from which as many bytes as it says must be
there. LLVM turns them into the widest instructions of the machine (AVX-512, AVX2, SSE2, NEON).
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WIDTH = 64
"""Bytes that ``word_bytes``, ``high_bytes`` and ``space_bytes`` look at."""


def _load(context, builder, signature, args, kind: ir.Type) -> ir.Value:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.load(builder.bitcast(builder.gep(data, [args[1]]), kind.as_pointer()), align=1)


def _bytes_where(test: Callable[[ir.IRBuilder, ir.Value, Callable[[int], ir.Constant]], ir.Value]):
    """An intrinsic (text, place) → uint64 whose bit i says whether ``test`` holds for byte place + i."""

    def bits(typingctx, text, place):
        def code(context, builder, signature, args):
            vector = ir.VectorType(ir.IntType(8), WIDTH)
            found = test(builder, _load(context, builder, signature, args, vector), lambda byte: ir.Constant(vector, [byte] * WIDTH))
            return builder.bitcast(found, ir.IntType(WIDTH))

        return types.uint64(text, types.int64), code

    return bits


def _is_word(builder, text, all_of):
    letters = builder.icmp_unsigned("<", builder.sub(builder.or_(text, all_of(0x20)), all_of(ord("a"))), all_of(26))
    digits = builder.icmp_unsigned("<", builder.sub(text, all_of(ord("0"))), all_of(10))
    return builder.or_(builder.or_(letters, digits), builder.icmp_unsigned("==", text, all_of(ord("_"))))


def _is_high(builder, text, all_of):
    return builder.icmp_signed("<", text, all_of(0))


def _is_space(builder, text, all_of):
    controls = builder.icmp_unsigned("<", builder.sub(text, all_of(9)), all_of(5))  # tab, line feed, vertical tab, form feed, return
    separators = builder.icmp_unsigned("<", builder.sub(text, all_of(0x1C)), all_of(5))  # four separators and the space
    return builder.or_(controls, separators)


word_bytes = intrinsic(_bytes_where(_is_word))
"""Bits of ASCII letters, digits and underscores."""
high_bytes = intrinsic(_bytes_where(_is_high))
"""Bits of bytes outside ASCII."""
space_bytes = intrinsic(_bytes_where(_is_space))
"""Bits of the ASCII characters that ``str.isspace`` calls white space."""


@intrinsic
def eight_bytes(typingctx, text, place):
    """The next eight bytes as a uint64, the first one lowest."""

    def code(context, builder, signature, args):
        return _load(context, builder, signature, args, ir.IntType(64))

    return types.uint64(text, types.int64), code


@intrinsic
def lowest_bit(typingctx, bits):
    """Number of the lowest set bit of a uint64 that is not 0."""

    def code(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), code


@intrinsic
def put_eight_bytes(typingctx, text, place, block):
    """Writes a uint64 to the next eight bytes, the lowest one first."""

    def code(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        at = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(64).as_pointer())
        builder.store(args[2], at, align=1)
        return context.get_dummy_value()

    return types.void(text, types.int64, types.uint64), code
