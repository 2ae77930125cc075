"""Kernels over rows of size H: what goes into the gradient GEMMs, and what becomes of their results."""

# pyright: reportGeneralTypeIssues=false
# (it takes a function under @triton.jit for one that never returns)

import triton
import triton.language as tl

from .maths import finish, rounded
from .rows import row_sums


@triton.jit
def block(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The rows and columns of this program in a grid of blocks: [r] int64, [v], and which are there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS).to(tl.int64)  # a column step may be as large
    return row, column, row < rows, (row < rows)[:, None] & (column < cols)[None, :]


@triton.jit(do_not_specialize=["rows"])
def scaled_rows(
    x,  # [r, H]
    coef,  # [r]
    out,  # [r, H]
    rows,
    hidden,
    x_stride,
    x_step,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = coef * x, rounded to out's dtype."""
    row, column, live, inside = block(rows, hidden, ROWS, COLS)
    c = tl.load(coef + row, mask=live, other=0)
    a = tl.load(x + row[:, None] * x_stride + column[None, :] * x_step, mask=inside, other=0)
    where = out + row[:, None] * hidden + column[None, :]
    tl.store(where, rounded(a.to(c.dtype) * c[:, None], out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def close_product(
    product,  # [r, H] in place
    z,  # [r]
    ref,  # [r]
    total,  # [r]
    factor,  # [r]
    rows,
    hidden,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """product *= factor / Z."""
    row, column, live, inside = block(rows, hidden, ROWS, COLS)
    zs, refs, totals = row_sums(z, ref, total, row, live)
    _, _, inverse, _ = finish(zs, refs, totals)
    scale = (inverse * tl.load(factor + row, mask=live, other=0).to(tl.float64)).to(product.dtype.element_ty)
    where = product + row[:, None] * stride + column[None, :]
    tl.store(where, tl.load(where, mask=inside, other=0) * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["rows", "start"])
def store_hidden(
    out,  # [M, H]
    index,  # [r] | None: rows start, start + 1, ...
    product,  # [r, H]
    scale,  # [r]
    weight,  # [V, H]
    target,  # [r]
    coef,  # [r]
    on_average,  # [r] | None
    average,  # [H] | None
    rows,
    hidden,
    start,
    out_stride,
    product_stride,
    weight_stride,
    weight_step,
    OPERAND: tl.constexpr,  # the weight is rounded to this first | None
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[index] = scale * product + coef * weight[target] + on_average * average."""
    row, column, live, inside = block(rows, hidden, ROWS, COLS)
    grad = tl.load(product + row[:, None] * product_stride + column[None, :], mask=inside, other=0)
    grad *= tl.load(scale + row, mask=live, other=0)[:, None]
    y = tl.load(target + row, mask=live, other=0)
    w = tl.load(weight + y[:, None] * weight_stride + column[None, :] * weight_step, mask=inside, other=0)
    if OPERAND is not None:
        w = rounded(w, OPERAND)
    grad += w.to(grad.dtype) * tl.load(coef + row, mask=live, other=0)[:, None]
    if average is not None:
        mean = tl.load(average + column, mask=column < hidden, other=0).to(grad.dtype)
        grad += mean[None, :] * tl.load(on_average + row, mask=live, other=0)[:, None]
    place = start + row
    if index is not None:
        place = tl.load(index + row, mask=live, other=0)
    where = out + place[:, None] * out_stride + column[None, :]
    tl.store(where, rounded(grad, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "given", "columns"])
def add_rows(
    out,  # [v, H] added to
    column,  # [n] int64, rising
    order,  # [n] int64: which coefficient and row each of those has
    coef,  # [n]
    x,  # [M, H] | None: ones
    index,  # [n] | None: which row of x
    count,  # n
    given,  # M
    columns,  # v; a column that is none of these is left out
    hidden,
    out_stride,
    out_step,
    x_stride,
    x_step,
    OPERAND: tl.constexpr,  # x is rounded to this first | None
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[column] += coef * x, in the order of the list: a program adds up all rows of one column.

    The program of the first row of a column does, those of the others end at once.
    """
    first = tl.program_id(0)
    y = tl.load(column + first)
    before = tl.load(column + first - 1, mask=first > 0, other=-1)
    if (y != before) & (y < columns):
        h = tl.program_id(1) * COLS + tl.arange(0, COLS).to(tl.int64)
        sums = tl.zeros((COLS,), out.dtype.element_ty)
        more = y == y
        while more:
            place = first + tl.arange(0, ROWS)
            mine = (place < count) & (tl.load(column + place, mask=place < count, other=-1) == y)
            entry = tl.load(order + place, mask=mine, other=0)
            c = tl.load(coef + entry, mask=mine, other=0).to(sums.dtype)
            if x is None:
                sums += tl.sum(c, 0)
            else:
                row = entry
                if index is not None:
                    row = tl.load(index + entry, mask=mine, other=0)
                # padding points one past the end
                inside = (mine & (row < given))[:, None] & (h < hidden)[None, :]
                a = tl.load(x + row[:, None] * x_stride + h[None, :] * x_step, mask=inside, other=0)
                if OPERAND is not None:
                    a = rounded(a, OPERAND)
                sums += tl.sum(a.to(sums.dtype) * c[:, None], 0)
            first += ROWS
            more = tl.load(column + first, mask=first < count, other=-1) == y
        where = out + y * out_stride + h * out_step
        tl.store(where, tl.load(where, mask=h < hidden, other=0) + sums, mask=h < hidden)
