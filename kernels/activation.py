"""Device functions that the kernels share: BN-ReLU, roundings, the product of two tiles."""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN, which a plain maximum would turn into 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bn_relu(x, scale, shift):
    """relu(x * scale + shift) in float32. x: [P, C] in any dtype; scale, shift: [C] float32."""
    return relu(x.to(tl.float32) * scale[None, :] + shift[None, :])


@triton.jit
def round_tf32(x):
    """x: float32, rounded to 11 significant bits, ties to even; infinities and NaN stay.

    A tensor core drops the low 13 bits of its operands. Rounding them first makes the error half as large and the result the
    same on every architecture.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded.to(tl.float32, bitcast=True))


# Whether these kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported), on CPU tensors.
INTERPRETED = tl.constexpr(not isinstance(relu, triton.JITFunction))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x: float32, rounded to `dtype`, ties to even.

    The interpreter cuts float32 to bfloat16 without rounding; there, the rounding is done on the bits first.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def product(a, b, total, TF32: tl.constexpr):
    """total + a @ b, summed in float32. a: [M, K], b: [K, N], one dtype; TF32: float32 operands that are rounded already.

    The interpreter multiplies the bit patterns of bfloat16 as integers; there, operands are widened first, which is exact.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="tf32" if TF32 else "ieee")
