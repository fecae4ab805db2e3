"""Triton kernels for linear layers with low-rank factors: the sum of a layer's weights, and the gradients of factors.

Legend: rows of activations; `inputs` of a layer, `outputs` of each of its parts (q, k and v of a projection, say, which
read the same activations); `rank` of a part's factors, RANK the power of two at or above it, PARTS that of their
number. Products read the precision of the activations and are summed in float32.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(
    weight, down, up, scale, out, tile, outputs: tl.constexpr, inputs: tl.constexpr, rank: tl.constexpr,
    RANK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """A tile of out = weight + scale * up down, in bfloat16, rounded up or down by a fixed draw for each place."""
    across = (inputs + IN - 1) // IN
    row, column = tile // across * OUT + tl.arange(0, OUT), tile % across * IN + tl.arange(0, IN)
    r = tl.arange(0, RANK)
    inside = (row < outputs)[:, None] & (column < inputs)[None, :]
    place = row[:, None] * inputs + column[None, :]
    total = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    held = (row < outputs)[:, None] & (r < rank)[None, :]
    ups = tl.load(up + row[:, None] * rank + r[None, :], mask=held, other=0.0).to(tl.float32)
    held = (r < rank)[:, None] & (column < inputs)[None, :]
    downs = tl.load(down + r[:, None] * inputs + column[None, :], mask=held, other=0.0).to(tl.float32)
    total += scale * tl.dot(ups, downs)
    draw = place.to(tl.uint32) * 2654435761
    draw = (draw ^ (draw >> 15)) * 2246822519
    # The upper half of a float32 is a bfloat16; carrying into it rounds up, as often as the lower half is large.
    bits = (total.to(tl.uint32, bitcast=True) + (draw >> 16)) & 0xFFFF0000
    tl.store(out + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)


@triton.jit
def sum_weights(weights, downs, ups, scales, out, SHAPES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """Sums of several layers, one after another in `out`; SHAPES: outputs, inputs, rank and RANK of each."""
    tile, place = tl.program_id(0), 0
    for layer in tl.static_range(len(SHAPES)):
        tiles = ((SHAPES[layer][0] + OUT - 1) // OUT) * ((SHAPES[layer][1] + IN - 1) // IN)
        if (tile >= 0) & (tile < tiles):
            _sum(
                weights[layer], downs[layer], ups[layer], scales[layer], out + place, tile, SHAPES[layer][0],
                SHAPES[layer][1], SHAPES[layer][2], SHAPES[layer][3], OUT, IN,
            )  # fmt: skip
        tile -= tiles
        place += SHAPES[layer][0] * SHAPES[layer][1]


@triton.jit
def _project(
    given, given_stride, width, factors, factor_stride, held, out, out_stride, first, rows, scale,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out (rows, COLUMNS) = scale * given (rows, width) factors (width, COLUMNS), of which `held` are there; of a sum
    over a program's share of the width."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    share = tl.cdiv(tl.cdiv(width, tl.num_programs(2)), BLOCK) * BLOCK
    begin = tl.program_id(2) * share
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, tl.minimum(begin + share, width), BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = (place < width)[:, None] & held[None, :]
        part = tl.load(factors + place[:, None] * factor_stride, mask=inside, other=0.0)
        inside = (row < rows)[:, None] & (place < width)[None, :]
        tokens = tl.load(given + row[:, None].to(tl.int64) * given_stride + place[None, :], mask=inside, other=0.0)
        if WIDE:  # Triton's interpreter has no products of bfloat16
            tokens = tokens.to(tl.float32)
        total += tl.dot(tokens, part.to(tokens.dtype))
    tl.store(out + row[:, None] * out_stride + column[None, :], scale * total, mask=(row < rows)[:, None])


@triton.jit
def project(
    x, grad, down, up, below, above, rows, inputs, outputs, parts, rank, scale, x_stride, grad_stride,
    PARTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """below = scale * x down^T and above = scale * grad up of each part, both (shares, rows, PARTS * RANK) in float32:
    sums over a share of the width each."""
    below += tl.program_id(2) * rows * PARTS * RANK
    above += tl.program_id(2) * rows * PARTS * RANK
    first, part, r = tl.program_id(0) * ROWS, tl.program_id(1) - 1, tl.arange(0, RANK)
    column = tl.arange(0, PARTS * RANK)  # of all parts, RANK apart
    if part < 0:
        of_downs = down + ((column // RANK * rank + column % RANK) * inputs)[None, :]
        held = (column % RANK < rank) & (column // RANK < parts)
        _project(
            x, x_stride, inputs, of_downs, 1, held, below, PARTS * RANK, first, rows, scale, PARTS * RANK, ROWS, BLOCK,
            WIDE,
        )  # fmt: skip
    else:
        of_ups = up + (part * outputs * rank + r)[None, :]
        _project(
            grad + part * outputs, grad_stride, outputs, of_ups, rank, r < rank, above + part * RANK, PARTS * RANK,
            first, rows, scale, RANK, ROWS, BLOCK, WIDE,
        )  # fmt: skip


@triton.jit
def _gradient(
    given, given_stride, width, projected, projected_stride, out, out_stride, held, tile, first, last, rows,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of given^T projected, (width, COLUMNS), over the rows from first to last."""
    place, column = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (place < width)[:, None] & (row < last)[None, :]
        tokens = tl.load(given + row[None, :].to(tl.int64) * given_stride + place[:, None], mask=inside, other=0.0)
        if WIDE:
            tokens = tokens.to(tl.float32)
        inside = (row < last)[:, None]
        at = row[:, None] * projected_stride + column[None, :]
        part = tl.load(projected + at, mask=inside, other=0.0)
        for share in tl.static_range(1, SHARES):
            part += tl.load(projected + share * rows * projected_stride + at, mask=inside, other=0.0)
        total += tl.dot(tokens, part.to(tokens.dtype))
    tl.store(out + place[:, None] * out_stride, total, mask=(place < width)[:, None] & held[None, :])


@triton.jit
def gradients(
    x, grad, below, above, sums, rows, inputs, outputs, parts, rank, span, x_stride, grad_stride,
    PARTS: tl.constexpr, RANK: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Of `up` (parts * outputs, rank) and, behind it, `down` (parts * rank, inputs); each sum is over `span` rows."""
    tile, first, r = tl.program_id(0), tl.program_id(1) * span, tl.arange(0, RANK)
    column = tl.arange(0, PARTS * RANK)  # of all parts, RANK apart
    last, tiles = tl.minimum(first + span, rows), tl.cdiv(outputs, BLOCK)
    part, out = tile // tiles, sums + tl.program_id(1) * parts * rank * (outputs + inputs)
    if part < parts:
        of_ups = out + (part * outputs * rank + r)[None, :]
        _gradient(
            grad + part * outputs, grad_stride, outputs, below + part * RANK, PARTS * RANK, of_ups, rank, r < rank,
            tile % tiles, first, last, rows, RANK, SHARES, ROWS, BLOCK, WIDE,
        )  # fmt: skip
    else:
        of_downs = out + (parts * outputs * rank + (column // RANK * rank + column % RANK) * inputs)[None, :]
        held = (column % RANK < rank) & (column // RANK < parts)
        _gradient(
            x, x_stride, inputs, above, PARTS * RANK, of_downs, 1, held, tile - parts * tiles, first, last,
            rows, PARTS * RANK, SHARES, ROWS, BLOCK, WIDE,
        )  # fmt: skip
