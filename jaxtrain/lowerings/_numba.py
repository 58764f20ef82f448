"""Convolutions that Numba compiles for this processor, and that XLA calls.

A convolution is a sum of small matrix products. `_make_tile` writes the function that computes a
tile of such a product in the processor's vector registers: some rows, and one or two vectors of
columns. Rows are pixels of the output, or, for the gradient of the kernel, taps and input channels.
Columns always are output channels. Images are read in place, so nothing is copied but the padding.

XLA calls `_handle`, which shares the images among the threads of XLA's own pool. How they are
divided depends on the shapes alone, so the results are the same bits for any number of threads.
The structures that XLA passes are those of `xla/ffi/api/c_api.h`, read as words of 8 bytes.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any, no_type_check

import jax
import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_TARGET = "jaxtrain_convolution"
_TASK = "jaxtrain_convolution_task"

_FEATURES = binding.get_host_cpu_features()
# Values of a vector register, and rows of a tile, whose sums must fit into the registers.
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4
_ROWS = 12 if LANES == 16 or platform.machine() in ("arm64", "aarch64") else 6
# Bytes of the output's gradient that stay in the nearest cache while its products are computed.
_BLOCK = 24 * 1024
# Parts of a batch that have sums of their own for the gradient of the kernel.
_GRADIENT_PARTS = 8

# Of functions with `no_type_check`, since Numba compiles them as they are written.
_OPTIONS = {"nogil": True, "cache": True}
_INT, _FLOAT, _WORD = ir.IntType(64), ir.FloatType(), types.intp

# The words of a job, which the threads share.
_REFERENCES, _NEXT, _DONE, _PARTS, _IS_GRADIENT = range(5)
_IMAGES, _OTHER, _OUT = range(5, 8)  # the other operand: the kernel, or the output's gradient
_BATCH, _HEIGHT, _WIDTH, _INPUTS, _OUTPUTS, _OUT_HEIGHT, _OUT_WIDTH = range(8, 15)
_WINDOW_HEIGHT, _WINDOW_WIDTH, _STRIDE_Y, _STRIDE_X, _PAD_Y, _PAD_X, _JOB_WORDS = range(15, 22)

_malloc = types.ExternalFunction("malloc", _WORD(_WORD))
_free = types.ExternalFunction("free", types.void(_WORD))
_memcpy = types.ExternalFunction("memcpy", _WORD(_WORD, _WORD, _WORD))
_memset = types.ExternalFunction("memset", _WORD(_WORD, types.int32, _WORD))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _make_tile(rows: int, vectors: int) -> Any:
    """Returns `tile(a, b, out, walk)`, which computes so many rows and vectors of `_multiply`."""
    vector = ir.VectorType(_FLOAT, LANES)
    undefined, splat = ir.Constant(vector, ir.Undefined), ir.VectorType(ir.IntType(32), LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, out, walk = arguments
        outer, inner, a_outer, a_inner, a_row, b_outer, b_inner, out_row, add = (
            cgutils.unpack_tuple(builder, walk)
        )
        name = f"llvm.fma.v{LANES}f32"
        multiply_add = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(vector, [vector] * 3), name
        )

        def moved(address: Any, count: Any, values: Any = 1) -> Any:
            count, values = (x if isinstance(x, ir.Value) else _INT(x) for x in (count, values))
            return builder.add(address, builder.mul(builder.mul(count, values), _INT(4)))

        def load(address: Any, type_: Any) -> Any:
            value = builder.load(builder.inttoptr(address, type_.as_pointer()))
            value.align = 4
            return value

        # LLVM keeps these in registers.
        sums = {
            (row, v): cgutils.alloca_once(builder, vector)
            for row in range(rows)
            for v in range(vectors)
        }
        places = {(row, v): moved(moved(out, row, out_row), v, LANES) for row, v in sums}
        for pointer in sums.values():
            builder.store(ir.Constant(vector, [0.0] * LANES), pointer)
        with cgutils.for_range(builder, outer) as loop:
            a_start, b_start = moved(a, loop.index, a_outer), moved(b, loop.index, b_outer)
            with cgutils.for_range(builder, inner) as loop:
                a_here = moved(a_start, loop.index, a_inner)
                b_here = moved(b_start, loop.index, b_inner)
                columns = [load(moved(b_here, v, LANES), vector) for v in range(vectors)]
                for row in range(rows):
                    value = load(moved(a_here, row, a_row), _FLOAT)
                    value = builder.insert_element(undefined, value, ir.IntType(32)(0))
                    value = builder.shuffle_vector(value, undefined, splat([0] * LANES))
                    for v in range(vectors):
                        total = builder.load(sums[row, v])
                        total = builder.call(multiply_add, [value, columns[v], total])
                        builder.store(total, sums[row, v])
        with builder.if_then(builder.icmp_signed("!=", add, _INT(0))):
            for key, pointer in sums.items():
                total = builder.fadd(builder.load(pointer), load(places[key], vector))
                builder.store(total, pointer)
        for key, pointer in sums.items():
            target = builder.inttoptr(places[key], vector.as_pointer())
            builder.store(builder.load(pointer), target).align = 4
        return context.get_dummy_value()

    @intrinsic
    def tile(_: Any, a: Any, b: Any, out: Any, walk: Any) -> Any:
        return types.void(_WORD, _WORD, _WORD, types.UniTuple(_WORD, 9)), generate

    return tile


_full_2, _four_2, _one_2 = (_make_tile(rows, 2) for rows in (_ROWS, 4, 1))
_full_1, _four_1, _one_1 = (_make_tile(rows, 1) for rows in (_ROWS, 4, 1))


@intrinsic
def _words(_: Any, address: Any) -> Any:
    """Returns the pointer to the words at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _INT.as_pointer())

    return types.CPointer(_WORD)(_WORD), generate


@intrinsic
def _fetch_add(_: Any, job: Any, word: Any, value: Any) -> Any:
    """Adds to a word of a job, as one step for all threads, and returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        job, word, value = arguments
        address = builder.add(job, builder.mul(word, _INT(8)))
        pointer = builder.inttoptr(address, _INT.as_pointer())
        return builder.atomic_rmw("add", pointer, value, "seq_cst")

    return _WORD(_WORD, _WORD, _WORD), generate


@intrinsic
def _call(_: Any, function: Any, argument: Any) -> Any:
    """Calls a function of XLA, which returns the address of an error, or 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.FunctionType(_INT, [_INT]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], pointer), [arguments[1]])

    return _WORD(_WORD, _WORD), generate


@intrinsic
def _task_address(_: Any) -> Any:
    """Returns the address of `_task`, by name: it differs in each process, cached code does not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.globals.get(_TASK) or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [_INT]), _TASK
        )
        return builder.ptrtoint(function, _INT)

    return _WORD(), generate


@numba.njit(**_OPTIONS)
@no_type_check
def _multiply(wide: bool, rows: int, a: int, b: int, out: int, walk: tuple[int, ...]) -> None:
    """Computes rows of a matrix product: `out[row] = sum of a[row, outer, inner] b[outer, inner]`.

    Args:
      wide: whether there are two vectors of columns, or one.
      rows: number of rows.
      a: address of the factor that has one value for each row and place of the sum.
      b: address of the factor that has columns for each place of the sum.
      out: address of the result.
      walk: lengths of the outer and the inner sum; how many values lie between places of the outer
        sum, places of the inner sum, and rows of `a`; between the places of both sums in `b`;
        between rows of `out`; and 1 to add to `out`, or 0 to write it.
    """
    row = 0
    while row < rows:
        x, y, left = a + 4 * row * walk[4], out + 4 * row * walk[7], rows - row
        step = _ROWS if left >= _ROWS else 4 if left >= 4 else 1
        if step == _ROWS:
            if wide:
                _full_2(x, b, y, walk)
            else:
                _full_1(x, b, y, walk)
        elif step == 4:
            if wide:
                _four_2(x, b, y, walk)
            else:
                _four_1(x, b, y, walk)
        elif wide:
            _one_2(x, b, y, walk)
        else:
            _one_1(x, b, y, walk)
        row += step


@numba.njit(**_OPTIONS)
@no_type_check
def _run_part(address: int, part: int) -> None:
    """Computes the output of some images, or their sum of the gradient of the kernel."""
    job = _words(address)
    height, width, inputs, outputs = job[_HEIGHT], job[_WIDTH], job[_INPUTS], job[_OUTPUTS]
    rows, columns = job[_OUT_HEIGHT], job[_OUT_WIDTH]
    window_rows, window = job[_WINDOW_HEIGHT], job[_WINDOW_WIDTH] * inputs
    stride_y, stride_x, pad_y, pad_x = job[_STRIDE_Y], job[_STRIDE_X], job[_PAD_Y], job[_PAD_X]
    # Rows of the output whose gradient stays in the cache, or one row for the output.
    block = max(1, _BLOCK // (4 * columns * outputs)) if job[_IS_GRADIENT] else 1
    first = job[_BATCH] * part // job[_PARTS]
    last = job[_BATCH] * (part + 1) // job[_PARTS]

    padded_height = (rows - 1) * stride_y + window_rows
    padded_width = (columns - 1) * stride_x + job[_WINDOW_WIDTH]
    copied = pad_y + pad_x > 0 or padded_height > height or padded_width > width
    copy, row_size = 0, width * inputs
    if copied:
        row_size = padded_width * inputs
        copy = _malloc(4 * padded_height * row_size)
        _memset(copy, 0, 4 * padded_height * row_size)

    for n in range(first, last):
        image = job[_IMAGES] + 4 * n * height * width * inputs
        if copied:
            length = min(width, padded_width - pad_x) * inputs
            for y in range(min(height, padded_height - pad_y)):
                target = copy + 4 * ((y + pad_y) * row_size + pad_x * inputs)
                _memcpy(target, image + 4 * y * width * inputs, 4 * length)
            image = copy

        column = 0
        while column < outputs:
            wide = outputs - column >= 2 * LANES
            for y in range(0, rows, block):
                pixels = 4 * ((n * rows + y) * columns * outputs + column)
                top = image + 4 * y * stride_y * row_size
                if job[_IS_GRADIENT]:
                    count, add = min(block, rows - y), int(n > first or y > 0)
                    lengths, a_steps = (count, columns), (stride_y * row_size, stride_x * inputs, 1)
                    b_steps, gradient = (columns * outputs, outputs), job[_OTHER] + pixels
                    for tap in range(window_rows):
                        out = job[_OUT] + 4 * (
                            (part * window_rows + tap) * window * outputs + column
                        )
                        walk = lengths + a_steps + b_steps + (outputs, add)
                        _multiply(wide, window, top + 4 * tap * row_size, gradient, out, walk)
                else:
                    lengths, a_steps = (window_rows, window), (row_size, 1, stride_x * inputs)
                    b_steps, kernel = (window * outputs, outputs), job[_OTHER] + 4 * column
                    walk = lengths + a_steps + b_steps + (outputs, 0)
                    _multiply(wide, columns, top, kernel, job[_OUT] + pixels, walk)
            column += 2 * LANES if wide else LANES
    if copied:
        _free(copy)


@numba.njit(**_OPTIONS)
@no_type_check
def _work(job: int) -> None:
    """Runs the parts of a job that no other thread has begun."""
    while True:
        part = _fetch_add(job, _NEXT, 1)
        if part >= _words(job)[_PARTS]:
            return
        _run_part(job, part)
        _fetch_add(job, _DONE, 1)


@numba.njit(**_OPTIONS)
@no_type_check
def _release(job: int) -> None:
    """Frees a job if no other thread will read it."""
    if _fetch_add(job, _REFERENCES, -1) == 1:
        _free(job)


@numba.cfunc(types.void(_WORD), **_OPTIONS)
@no_type_check
def _task(job: int) -> None:
    _work(job)
    _release(job)


binding.add_symbol(_TASK, _task.address)


@numba.njit(**_OPTIONS)
@no_type_check
def _share(api: Any, context: int, job: int) -> None:
    """Runs a job on the threads of XLA's pool and on this one, and waits until it is done.

    A task that starts late finds nothing to do. So this never waits for a task to start, which
    would wait forever if all threads of the pool did so.
    """
    schedule, count_threads = api[17], api[18]
    address = _malloc(6 * 8)
    call = _words(address)
    call[0], call[1], call[2], call[3], call[5] = 32, 0, context, address + 5 * 8, 1
    _call(count_threads, address)
    helpers = min(call[5], _words(job)[_PARTS]) - 1
    _words(job)[_REFERENCES] = helpers + 1
    call[0], call[3], call[4] = 40, _task_address(), job
    # An error is not expected, and its few bytes are never freed.
    for _ in range(helpers):
        if _call(schedule, address) != 0:
            _fetch_add(job, _REFERENCES, -1)
    _free(address)
    _work(job)
    while _fetch_add(job, _DONE, 0) < _words(job)[_PARTS]:
        _sched_yield()


@numba.cfunc(_WORD(_WORD), **_OPTIONS)
@no_type_check
def _handle(frame_address: int) -> int:
    """Computes an output or the gradient of a kernel, as XLA's `XLA_FFI_Handler`."""
    frame = _words(frame_address)
    api = _words(frame[2])
    if frame[1] != 0:  # XLA asks for the version of its interface that this expects: its own.
        _words(_words(frame[1])[3])[3] = api[4]
        return 0
    operands, results, attributes = _words(frame[9]), _words(frame[14]), _words(frame[20])
    images, other, out = _words(operands[0]), _words(operands[1]), _words(results[0])
    shape, other_shape, out_shape = _words(images[5]), _words(other[5]), _words(out[5])
    spec = _words(_words(attributes[0])[2])

    address = _malloc(8 * _JOB_WORDS)
    job = _words(address)
    job[_NEXT], job[_DONE], job[_IS_GRADIENT] = 0, 0, spec[0]
    job[_IMAGES], job[_OTHER], job[_OUT] = images[3], other[3], out[3]
    job[_BATCH], job[_HEIGHT], job[_WIDTH], job[_INPUTS] = shape[0], shape[1], shape[2], shape[3]
    job[_OUTPUTS] = other_shape[3]
    job[_STRIDE_Y], job[_STRIDE_X], job[_PAD_Y], job[_PAD_X] = spec[1], spec[2], spec[3], spec[4]
    if spec[0]:  # other: the output's gradient; out: [parts, *window, inputs, outputs]
        job[_PARTS], job[_OUT_HEIGHT], job[_OUT_WIDTH] = (
            out_shape[0],
            other_shape[1],
            other_shape[2],
        )
        job[_WINDOW_HEIGHT], job[_WINDOW_WIDTH] = out_shape[1], out_shape[2]
    else:
        job[_PARTS], job[_OUT_HEIGHT], job[_OUT_WIDTH] = shape[0], out_shape[1], out_shape[2]
        job[_WINDOW_HEIGHT], job[_WINDOW_WIDTH] = other_shape[0], other_shape[1]
    _share(api, frame[3], address)
    _release(address)
    return 0


jax.ffi.register_ffi_target(
    _TARGET, jax.ffi.pycapsule(ctypes.c_void_p(_handle.address)), platform="cpu"
)


def output(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Any
) -> jax.Array:
    """Returns the convolution of images [batch, *space, inputs] with [*window, inputs, outputs].

    Args:
      images: the images.
      kernel: the kernel; `outputs` is a multiple of `LANES`.
      strides: stride along both axes.
      padding: rows and columns of zeros before and after, less than the window.
    """
    space = [
        (size + sum(pads) - taps) // stride + 1
        for size, pads, taps, stride in zip(
            images.shape[1:3], padding, kernel.shape[:2], strides, strict=True
        )
    ]
    shape = (images.shape[0], *space, kernel.shape[-1])
    return _call_target(False, images, kernel, shape, strides, padding)


def kernel_gradient(
    images: jax.Array,
    gradient: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Any,
) -> jax.Array:
    """Returns the gradient of the kernel of `output`, of shape [*window, inputs, outputs].

    Args:
      images: as in `output`.
      gradient: gradient of the output.
      window: rows and columns of the kernel.
      strides: as in `output`.
      padding: as in `output`.
    """
    parts = min(images.shape[0], _GRADIENT_PARTS)
    shape = (parts, *window, images.shape[-1], gradient.shape[-1])
    return _call_target(True, images, gradient, shape, strides, padding).sum(0)


def _call_target(
    is_gradient: bool,
    images: jax.Array,
    other: jax.Array,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Any,
) -> jax.Array:
    spec = np.array([is_gradient, *strides, padding[0][0], padding[1][0]], np.int64)
    result = jax.ShapeDtypeStruct(shape, np.float32)
    return jax.ffi.ffi_call(_TARGET, result)(images, other, spec=spec)
