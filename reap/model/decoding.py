"""From the tensors in which a quantised weight is stored to the weight, exactly as the format says.

Shapes are those of torch's linear layers, [N, K] for N outputs and K inputs, with the experts in
front where one tensor holds several. What comes out is in the data type in which the format's own
library multiplies; each element is rounded once. It is made in bands of rows, which stay in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from reap.errors import ReapError

Parts = Mapping[str, Tensor]  # what a tensor is for -> the tensor

BAND = 1 << 18  # elements
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The nibble of a word in which AWQ has each of eight columns.
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def integers(words: Tensor, bits: int) -> Tensor:
    """[..., W] int32 -> [..., floor(32 * W / bits)] uint8: numbers of `bits` (1 to 8) one behind
    the other, lowest bits first, some across two words."""
    packed = words.contiguous().view(torch.uint8)
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        fields = [packed >> shift & mask for shift in range(0, 8, bits)]
        return torch.stack(fields, dim=-1).flatten(-2)
    count = packed.shape[-1] * 8 // bits
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
    of_eight = packed.unflatten(-1, (-1, bits)).long()  # as many bytes as a number has bits
    whole = torch.zeros_like(of_eight[..., 0])
    for byte in range(bits):
        whole |= of_eight[..., byte] << 8 * byte
    fields = [(whole >> shift & mask).to(torch.uint8) for shift in range(0, 8 * bits, bits)]
    return torch.stack(fields, dim=-1).flatten(-2)[..., :count]


def halves(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., K/2] bytes -> [..., K] in fp16 or bf16: two FP4 numbers each (a sign, two bits of
    exponent, one of mantissa), the lower half first."""
    values = torch.tensor([*_E2M1, *(-x for x in _E2M1)], dtype=dtype)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)
    index = packed.contiguous().view(torch.uint8).flatten().int()
    found = pairs.view(torch.int32).flatten().index_select(0, index)  # both as one: four times fast
    return found.view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def eighths(packed: Tensor) -> Tensor:
    """FP8 -> fp32. Of E4M3 six times as fast as torch's own conversion: as the bits of an fp16
    number they are 2^8 too small."""
    if packed.dtype != torch.float8_e4m3fn:
        return packed.float()
    raw = packed.view(torch.int8)
    if raw.numel() and int((raw & 0x7F).max()) == 0x7F:  # not a number
        return packed.float()
    bits = raw.to(torch.int16)  # its sign in all of the upper bits
    bits <<= 7
    bits &= ~0x4000
    return bits.view(torch.float16).float().mul_(256)


def powers(scale: Tensor) -> Tensor:
    """fp32 scales; of bytes and of E8M0, the powers of two whose exponents, plus 127, they are."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def floats(
    parts: Parts,
    shape: tuple[int, ...],
    block: tuple[int, int],
    *,
    into: torch.dtype = torch.float32,
) -> Tensor:
    """FP8, or two FP4 in a byte, by fp32 or power-of-two scales of blocks -> fp32 products, rounded
    to `into`."""
    scale = _grid(powers(parts["scale"]), shape)
    fp4 = parts["weight"].dtype in (torch.int8, torch.uint8)

    def band(weight: Tensor) -> Tensor:
        return halves(weight, torch.float16).float() if fp4 else eighths(weight)

    return _banded(parts["weight"], scale, block, shape, into, band)


def scaled(parts: Parts, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """FP8 or int8, less a zero point where there is one -> in the scale's data type, as
    compressed-tensors multiplies."""
    dtype = parts["scale"].dtype
    zero = _grid(parts["zero"].to(dtype), shape) if "zero" in parts else None

    def band(weight: Tensor) -> Tensor:
        values = eighths(weight) if weight.is_floating_point() else weight
        return values.to(dtype)

    scale = _grid(parts["scale"], shape)
    return _banded(parts["weight"], scale, block, shape, dtype, band, zero)


def two_scales(
    parts: Parts, shape: tuple[int, ...], *, inverse: bool, into: torch.dtype = torch.float32
) -> Tensor:
    """NVFP4: bytes of two FP4 numbers, an FP8 scale per 16 of them, and one fp32 scale of all,
    which compressed-tensors divides by (`inverse`) and ModelOpt multiplies with -> fp32 products,
    rounded to `into`."""
    whole = parts["whole"].float().reshape(-1)[:1]
    scale = parts["scale"].float()
    scale = scale / whole if inverse else scale * whole

    def band(weight: Tensor) -> Tensor:
        return halves(weight, torch.float16).float()

    return _banded(parts["weight"], scale, (1, 16), shape, into, band)


# Those that may round their fp32 products to another data type as they are written, which saves
# memory and half of the time.
ROUNDING = (floats, two_scales)


def microscaled(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """MXFP4: [..., K/2] bytes of two FP4 numbers, [..., K/32] exponents -> bf16, which holds every
    product."""
    scale = powers(parts["scale"]).bfloat16()

    def band(weight: Tensor) -> Tensor:
        return halves(weight, torch.bfloat16)

    return _banded(parts["weight"], scale, (1, 32), shape, torch.bfloat16, band)


def microscaled_blocks(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The same as gpt-oss has it, [E, N, K/32, 16] and [E, N, K/32] -> [E, K, N] bf16."""
    made = torch.empty(shape, dtype=torch.bfloat16)
    for expert, (blocks, scale) in enumerate(zip(parts["weight"], parts["scale"], strict=True)):
        of_one = {"weight": blocks.flatten(-2), "scale": scale}
        made[expert] = microscaled(of_one, (shape[2], shape[1])).t()
    return made


def packed_rows(parts: Parts, shape: tuple[int, ...], bits: int, group: int) -> Tensor:
    """compressed-tensors: `bits` of each number of a row, groups along it -> the scale's dtype.

    Zero points are packed along the outputs, and every number is stored plus 2^(bits-1).
    ReapError when the shape that is stored beside is another, or for an input of no group.
    """
    rows, columns = shape
    stated = parts["shape"].tolist() if "shape" in parts else [*shape]
    if stated != [*shape]:
        raise ReapError(f"is {[*shape]} by its other tensors, and {stated} by its weight_shape")
    zero: Tensor | int = 1 << bits - 1
    if "zero" in parts:
        zero = integers(parts["zero"].t(), bits)[:, :rows].t()

    def band(rows: slice) -> Tensor:
        return integers(parts["weight"][rows], bits)[:, :columns]

    scale = _grid(parts["scale"], shape).expand(rows, -1)
    return _grouped(band, shape, zero, scale, group, parts.get("groups"))


def packed_columns(
    parts: Parts, shape: tuple[int, ...], bits: int, group: int, above: int
) -> Tensor:
    """GPTQ: [K*bits/32, N] words, scales [K/group, N], zero points [K/group, N*bits/32] that are
    stored less `above` -> [N, K] in the scales' dtype.

    ReapError for an input of no group, and for a zero point whose value programs do not agree on.
    """
    rows, columns = shape
    zero = integers(parts["zero"], bits)[:, :rows]
    if above and bool((zero == (1 << bits) - 1).any()):
        raise ReapError(
            f"has zero points stored as {(1 << bits) - 1}, which in version 1 of GPTQ's format may "
            f"be 0 or {1 << bits}, and programs differ: save it in the format gptq_v2"
        )

    def band(rows: slice) -> Tensor:
        return integers(parts["weight"][:, rows].t(), bits)[:, :columns]

    scale = parts["scale"].t()
    return _grouped(band, shape, zero.t().int() + above, scale, group, parts.get("groups"))


def packed_interleaved(parts: Parts, shape: tuple[int, ...], group: int) -> Tensor:
    """AWQ: [K, N/8] words of eight nibbles in an order of its own, scales [K/group, N], zero points
    [K/group, N/8] -> [N, K] in the scales' dtype."""

    def columns(words: Tensor) -> Tensor:  # [n, N/8] -> [N, n]
        packed = words.t().contiguous().view(torch.uint8).view(*words.t().shape, 4)
        nibbles = [packed[..., i // 2] >> 4 * (i % 2) & 15 for i in _AWQ_NIBBLES]
        return torch.stack(nibbles, dim=1).flatten(0, 1)

    def band(rows: slice) -> Tensor:
        first = rows.start // 8
        found = columns(parts["weight"][:, first : -(-rows.stop // 8)])
        return found[rows.start - 8 * first : rows.stop - 8 * first]

    return _grouped(band, shape, columns(parts["zero"]), parts["scale"].t(), group, None)


def _banded(
    weight: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    band: Callable[[Tensor], Tensor],  # rows as they are stored -> new memory, in scale's dtype
    zero: Tensor | None = None,
) -> Tensor:
    """Numbers, less `zero`, by a scale for each block of so many rows and columns; the last blocks
    of a row or column may be cut."""
    made = torch.empty(shape, dtype=dtype)
    if len(shape) > 2:
        for index in range(shape[0]):
            one = None if zero is None else zero[index]
            made[index] = _banded(weight[index], scale[index], block, shape[1:], dtype, band, one)
        return made
    flat = made.view(-1, shape[-1])
    packed = weight.view(-1, weight.shape[-1])
    for rows in _bands(flat.shape[0], flat.shape[1], block[0]):
        values = band(packed[rows])
        of_rows = slice(rows.start // block[0], -(-rows.stop // block[0]))
        if zero is not None:
            values = _by_block(torch.sub, values, zero[of_rows], block[1])
        flat[rows] = _by_block(torch.mul, values, scale[of_rows], block[1])
    return made


def _bands(rows: int, columns: int, block: int) -> list[slice]:
    """None reaches into two blocks of rows, but where a block is one row."""
    step = max(1, BAND // max(1, columns))
    size = block if block > 1 else max(1, rows)
    return [
        slice(first, min(first + step, start + size, rows))
        for start in range(0, rows, size)
        for first in range(start, min(start + size, rows), step)
    ]


def _by_block(op: Callable[..., Tensor], values: Tensor, grid: Tensor, columns: int) -> Tensor:
    """values [n, K], which are used up; grid [n or 1, ceil(K / columns)]."""
    if values.shape[1] % columns == 0:
        split = values.unflatten(-1, (-1, columns))
        return op(split, grid[:, :, None], out=split).flatten(-2)
    return op(values, grid.repeat_interleave(columns, dim=1)[:, : values.shape[1]], out=values)


def _grid(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of one number, or of one for each row, a grid of blocks of these dimensions."""
    for _ in range(scale.dim(), len(shape)):
        scale = scale.unsqueeze(-1)
    if len(shape) < 2:
        return scale.view(1, -1)
    return scale.expand(*shape[:-2], *scale.shape[-2:])


def _grouped(
    band: Callable[[slice], Tensor],  # rows -> [n, K] unsigned
    shape: tuple[int, ...],
    zero: Tensor | int,  # [N, G]
    scale: Tensor,  # [N, G]
    group: int,
    groups: Tensor | None,  # [K], of each input
) -> Tensor:
    (outputs, inputs), count = shape, scale.shape[1]
    order = _out_of_order(groups, inputs, group, count)
    # By a scale of 16 bits, products of such small numbers are exact in fp32: they are rounded as
    # they are written.
    wide = scale.float().contiguous()
    offset = zero.float().contiguous() if isinstance(zero, Tensor) else None
    made = torch.empty(shape, dtype=scale.dtype)
    for rows in _bands(outputs, inputs, 1):
        values = band(rows).float()
        if order is None:
            split = values.unflatten(-1, (count, -1))
            split -= float(zero) if offset is None else offset[rows, :, None]
            made[rows] = split.mul_(wide[rows, :, None]).flatten(-2)
        else:
            values -= float(zero) if offset is None else offset[rows].index_select(1, order)
            made[rows] = values.mul_(wide[rows].index_select(1, order))
    return made


def _out_of_order(groups: Tensor | None, columns: int, group: int, count: int) -> Tensor | None:
    """The group of each input, or None where they follow one another and are of one size."""
    in_order = torch.arange(columns, dtype=torch.int32) // group
    found = in_order if groups is None else groups.int()
    # compressed-tensors has -1 for a weight without an order of its own.
    if torch.equal(found, in_order) or bool((found == -1).all()):
        return None if columns == group * count else in_order
    if int(found.min()) < 0 or int(found.max()) >= count:
        raise ReapError(
            f"has inputs of the groups {int(found.min())} to {int(found.max())} (g_idx), and "
            f"scales of {count}"
        )
    return found
