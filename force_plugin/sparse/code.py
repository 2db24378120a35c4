"""Kernels in LLVM's intermediate language, compiled for the machine at hand.

A kernel works on planes: rows of numbers, a row for each channel, see ``geometry``. It
computes, for a row r of the output and every position p,

    y[r, p] = f(bias[r] + z[r, p] + sum over j of value[j] * x[p + offset[j]])

where j runs over the non-zeros of the row, z is another tensor of the same layout, or
missing, and f is an activation. A tile of positions stays in registers until its row is
done, so each number of the input that is loaded counts for a whole tile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

try:
    import llvmlite.binding as llvm
except ImportError as error:
    raise ImportError(
        "sparsify needs llvmlite, which compiles its kernels on this machine: "
        "pip install 'force-plugin[sparse]'"
    ) from error

from force_plugin.sparse.activations import ACTIVATIONS, Lines

TYPES = {torch.float32: ("float", "f32", 4), torch.float64: ("double", "f64", 8)}
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
_engines: list[Any] = []
# The largest number of vectors in a tile: as many as stay in registers.
MOST = 8


class Kind(NamedTuple):
    """What a kernel computes, beside products.

    Attributes:
        dtype: ``torch.float32`` or ``torch.float64``.
        vectors: Number of vectors in the smaller of its two tiles; the other tile has a
            vector more.
        adds: Whether another tensor is added.
        masks: Whether positions outside of the images are set to 0.
        activation: A name of :data:`ACTIVATIONS`.
    """

    dtype: torch.dtype
    vectors: int
    adds: bool = False
    masks: bool = False
    activation: str = "none"


class Host(NamedTuple):
    """The processor for which kernels are compiled.

    Attributes:
        cpu: Its name.
        features: What it has, as LLVM writes it.
        register: Bytes of a vector register.
    """

    cpu: str
    features: str
    register: int


@cache
def host() -> Host:
    """Return the processor of this machine."""
    found = llvm.get_host_cpu_features()
    register = 64 if found.get("avx512f") else 32 if found.get("avx2") else 16
    return Host(llvm.get_host_cpu_name(), found.flatten(), register)


def lanes(dtype: torch.dtype) -> int:
    """Return how many numbers a vector register of this machine holds."""
    return host().register // TYPES[dtype][2]


def multiply(kind: Kind) -> Callable[..., None]:
    """Return a compiled kernel.

    Its arguments are addresses and numbers: of x, y, the distance of y's rows, the
    starts of the rows' non-zeros, offsets, values, bias, z, the distance of z's rows,
    the mask, the number of rows, and the numbers of larger and of smaller tiles.
    """
    p, n = POINTER, INTEGER
    given = p, p, n, p, p, p, p, p, n, p, n, n, n
    return compiled("multiply", text(kind, lanes(kind.dtype)), given, host())


@cache
def compiled(
    name: str,
    code: str,
    given: tuple[type, ...],
    machine: Host,
    result: type | None = None,
) -> Callable[..., Any]:
    """Return a function of a module in LLVM's language."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3
    )
    module = llvm.parse_assembly(code)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _engines.append(engine)  # the function's code lives in its memory
    return ctypes.CFUNCTYPE(result, *given)(engine.get_function_address(name))


def text(kind: Kind, width: int) -> str:
    """Return the code of a kernel.

    Args:
        kind: What it computes.
        width: Number of numbers in a vector.
    """
    number, suffix, _ = TYPES[kind.dtype]
    counts = [kind.vectors + 1, kind.vectors]
    rows = [_rows(kind, number, suffix, width, n) for n in counts if n]
    declared = declarations(number, suffix, width)
    moving = {"x": number, "y": number, "z": number, "mask": "i8"}
    driver = _driver("multiply", number, width, counts, _ARGUMENTS, moving)
    return "\n".join([declared, *rows, driver])


_ARGUMENTS = (
    "ptr noalias readonly %x, ptr noalias %y, i64 %ystep, ptr noalias readonly %starts,"
    " ptr noalias readonly %offsets, ptr noalias readonly %values,"
    " ptr noalias readonly %bias, ptr readonly %z, i64 %zstep,"
    " ptr noalias readonly %mask, i64 %rows"
)


def declarations(number: str, suffix: str, size: int) -> str:
    """Return declarations of LLVM's functions of vectors.

    Args:
        number: LLVM's name of the type.
        suffix: The type in the names of LLVM's functions.
        size: Number of numbers in a vector.
    """
    v, name = f"<{size} x {number}>", f"v{size}{suffix}"
    return "\n".join(
        f"declare {v} @llvm.{function}.{name}({', '.join([v] * count)})"
        for function, count in (("fma", 3), ("maximum", 2), ("minimum", 2), ("sqrt", 1))
    )


def spread(result: str, number: str, value: str, size: int) -> str:
    """Return lines for a vector of one number.

    Args:
        result: Name of the vector.
        number: LLVM's name of the type.
        value: The number.
        size: Number of numbers in a vector.
    """
    v = f"<{size} x {number}>"
    return (
        f"  %{result}.one = insertelement {v} poison, {number} {value}, i32 0\n"
        f"  %{result} = shufflevector {v} %{result}.one, {v} poison, "
        f"<{size} x i32> zeroinitializer"
    )


def _rows(kind: Kind, number: str, suffix: str, width: int, count: int) -> str:
    """Return a function that computes a tile of every row.

    Args:
        kind: What it computes.
        number: LLVM's name of the type.
        suffix: The type in the names of LLVM's functions.
        width: Number of numbers in a vector.
        count: Number of vectors in a tile.
    """
    v, name = f"<{width} x {number}>", f"v{width}{suffix}"
    every = range(count)

    def each(*lines: str) -> list[str]:
        """Return lines for each vector: ~ is its number, # its first position."""
        return [
            line.replace("~", str(k)).replace("#", str(k * width))
            for k in every
            for line in lines
        ]

    end = each(f"  %a~ = phi {v} [ %b, %row ], [ %sum~, %product ]")
    values = [f"%a{k}" for k in every]
    if kind.adds:
        end += [
            "  %zo = mul i64 %r, %zstep",
            f"  %zp = getelementptr {number}, ptr %z, i64 %zo",
        ]
        end += each(
            f"  %zp~ = getelementptr {number}, ptr %zp, i64 #",
            f"  %z~ = load {v}, ptr %zp~, align 4",
            f"  %c~ = fadd {v} %a~, %z~",
        )
        values = [f"%c{k}" for k in every]
    for k in every:
        body = Lines(kind.dtype, width, f"d{k}")
        values[k] = ACTIVATIONS[kind.activation](body, values[k])
        end += body.lines
    if kind.masks:
        for k in every:
            end += [
                f"  %mp{k} = getelementptr i8, ptr %mask, i64 {k * width}",
                f"  %mb{k} = load <{width} x i8>, ptr %mp{k}, align 1",
                f"  %in{k} = icmp ne <{width} x i8> %mb{k}, zeroinitializer",
                f"  %g{k} = select <{width} x i1> %in{k}, {v} {values[k]}, "
                f"{v} zeroinitializer",
            ]
        values = [f"%g{k}" for k in every]
    lines = [
        f"define internal void @rows{count}({_ARGUMENTS}) {{",
        "entry:",
        "  br label %row",
        "row:",
        "  %r = phi i64 [ 0, %entry ], [ %next, %done ]",
        f"  %bp = getelementptr {number}, ptr %bias, i64 %r",
        f"  %b1 = load {number}, ptr %bp",
        spread("b", number, "%b1", width),
        "  %sp = getelementptr i32, ptr %starts, i64 %r",
        "  %s32 = load i32, ptr %sp",
        "  %next = add i64 %r, 1",
        "  %ep = getelementptr i32, ptr %starts, i64 %next",
        "  %e32 = load i32, ptr %ep",
        "  %s = zext i32 %s32 to i64",
        "  %e = zext i32 %e32 to i64",
        "  %any = icmp ult i64 %s, %e",
        "  br i1 %any, label %product, label %done",
        "product:",
        "  %j = phi i64 [ %s, %row ], [ %j1, %product ]",
        *each(f"  %acc~ = phi {v} [ %b, %row ], [ %sum~, %product ]"),
        "  %op = getelementptr i32, ptr %offsets, i64 %j",
        "  %o32 = load i32, ptr %op",
        "  %o = sext i32 %o32 to i64",
        f"  %xp = getelementptr {number}, ptr %x, i64 %o",
        f"  %vp = getelementptr {number}, ptr %values, i64 %j",
        f"  %w1 = load {number}, ptr %vp",
        spread("w", number, "%w1", width),
        *each(
            f"  %xp~ = getelementptr {number}, ptr %xp, i64 #",
            f"  %x~ = load {v}, ptr %xp~, align 4",
            f"  %sum~ = call {v} @llvm.fma.{name}({v} %w, {v} %x~, {v} %acc~)",
        ),
        "  %j1 = add i64 %j, 1",
        "  %more = icmp ult i64 %j1, %e",
        "  br i1 %more, label %product, label %done",
        "done:",
        *end,
        "  %yo = mul i64 %r, %ystep",
        f"  %yp = getelementptr {number}, ptr %y, i64 %yo",
        *each(f"  %yp~ = getelementptr {number}, ptr %yp, i64 #"),
        *(f"  store {v} {values[k]}, ptr %yp{k}, align 4" for k in every),
        "  %again = icmp ult i64 %next, %rows",
        "  br i1 %again, label %row, label %exit",
        "exit:",
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def _driver(
    name: str,
    number: str,
    width: int,
    vectors: list[int],
    arguments: str,
    moving: Mapping[str, str],
) -> str:
    """Return the function that goes over the tiles, the larger tiles first.

    Args:
        name: Name of the function.
        number: LLVM's name of the type.
        width: Number of numbers in a vector.
        vectors: Numbers of vectors in a larger and in a smaller tile.
        arguments: What it is given, and gives to the function of a tile.
        moving: The arguments that move on from tile to tile, and what they point to.
    """
    passed = [part.split() for part in arguments.split(",")]
    lines = [
        f"define void @{name}({arguments}, i64 %larger, i64 %smaller) {{",
        "entry:",
        "  br label %loop0",
    ]
    start = ("0", "entry")
    counts = ("%larger", "%smaller")
    for i, (many, count) in enumerate(zip(vectors, counts, strict=True)):
        after = "exit" if i == 1 or not vectors[1] else "loop1"
        at, before = start
        given = ", ".join(
            f"{words[0]} {words[-1]}" + (f".{i}" if words[-1][1:] in moving else "")
            for words in passed
        )
        lines += [
            f"loop{i}:",
            f"  %tile{i} = phi i64 [ 0, %{before} ], [ %next{i}, %body{i} ]",
            f"  %place{i} = phi i64 [ {at}, %{before} ], [ %after{i}, %body{i} ]",
            f"  %more{i} = icmp ult i64 %tile{i}, {count}",
            f"  br i1 %more{i}, label %body{i}, label %{after}",
            f"body{i}:",
            *(
                f"  %{one}.{i} = getelementptr {kind}, ptr %{one}, i64 %place{i}"
                for one, kind in moving.items()
            ),
            f"  call void @rows{many}({given})",
            f"  %next{i} = add i64 %tile{i}, 1",
            f"  %after{i} = add i64 %place{i}, {many * width}",
            f"  br label %loop{i}",
        ]
        start = (f"%place{i}", f"loop{i}")
        if after == "exit":
            break
    return "\n".join([*lines, "exit:", "  ret void", "}"])


def most_correlated() -> int:
    """Return the largest number of vectors in a tile of :func:`correlate`."""
    return 16 if host().register == 64 else MOST


def correlate(dtype: torch.dtype, vectors: int) -> Callable[..., None]:
    """Return a compiled kernel of the gradients of non-zeros.

    It adds to the number of each non-zero j of a row r

        sum over p of d[r, p] * x[p + offset[j]].

    Its arguments are addresses and numbers: of x, d, the distance of d's rows, the
    starts of the rows' non-zeros, offsets, the numbers, the number of rows, and the
    numbers of larger and of smaller tiles.

    Args:
        dtype: ``torch.float32`` or ``torch.float64``.
        vectors: Number of vectors in the smaller tile.
    """
    width = lanes(dtype)
    number, suffix, _ = TYPES[dtype]
    counts = [vectors + 1, vectors]
    code = [
        declarations(number, suffix, width),
        f"declare {number} @llvm.vector.reduce.fadd.v{width}{suffix}"
        f"({number}, <{width} x {number}>)",
        *(_correlations(number, suffix, width, n) for n in counts if n),
    ]
    moving = {"x": number, "d": number}
    code.append(_driver("correlate", number, width, counts, _CORRELATED, moving))
    p, n = POINTER, INTEGER
    given = p, p, n, p, p, p, n, n, n
    return compiled("correlate", "\n".join(code), given, host())


_CORRELATED = (
    "ptr noalias readonly %x, ptr noalias readonly %d, i64 %dstep,"
    " ptr noalias readonly %starts, ptr noalias readonly %offsets, ptr noalias %g,"
    " i64 %rows"
)


def _correlations(number: str, suffix: str, width: int, count: int) -> str:
    """Return a function that adds what a tile contributes to every non-zero.

    Args:
        number: LLVM's name of the type.
        suffix: The type in the names of LLVM's functions.
        width: Number of numbers in a vector.
        count: Number of vectors in a tile.
    """
    v, name = f"<{width} x {number}>", f"v{width}{suffix}"
    chains = min(4, count)  # sums that do not wait for each other
    lines = [
        f"define internal void @rows{count}({_CORRELATED}) {{",
        "entry:",
        "  br label %row",
        "row:",
        "  %r = phi i64 [ 0, %entry ], [ %next, %done ]",
        "  %sp = getelementptr i32, ptr %starts, i64 %r",
        "  %s32 = load i32, ptr %sp",
        "  %next = add i64 %r, 1",
        "  %ep = getelementptr i32, ptr %starts, i64 %next",
        "  %e32 = load i32, ptr %ep",
        "  %s = zext i32 %s32 to i64",
        "  %e = zext i32 %e32 to i64",
        "  %any = icmp ult i64 %s, %e",
        "  br i1 %any, label %load, label %done",
        "load:",
        "  %do = mul i64 %r, %dstep",
        f"  %dp = getelementptr {number}, ptr %d, i64 %do",
    ]
    for k in range(count):
        lines += [
            f"  %dp{k} = getelementptr {number}, ptr %dp, i64 {k * width}",
            f"  %d{k} = load {v}, ptr %dp{k}, align 4",
        ]
    lines += [
        "  br label %product",
        "product:",
        "  %j = phi i64 [ %s, %load ], [ %j1, %product ]",
        "  %op = getelementptr i32, ptr %offsets, i64 %j",
        "  %o32 = load i32, ptr %op",
        "  %o = sext i32 %o32 to i64",
        f"  %xp = getelementptr {number}, ptr %x, i64 %o",
    ]
    sums: list[str] = []
    for k in range(count):
        lines += [
            f"  %xp{k} = getelementptr {number}, ptr %xp, i64 {k * width}",
            f"  %x{k} = load {v}, ptr %xp{k}, align 4",
        ]
        if k < chains:
            lines.append(f"  %sum{k} = fmul {v} %d{k}, %x{k}")
            sums.append(f"%sum{k}")
        else:
            lines.append(
                f"  %sum{k} = call {v} @llvm.fma.{name}({v} %d{k}, {v} %x{k}, "
                f"{v} {sums[k % chains]})"
            )
            sums[k % chains] = f"%sum{k}"
    total = sums[0]
    for k, one in enumerate(sums[1:]):
        lines.append(f"  %total{k} = fadd {v} {total}, {one}")
        total = f"%total{k}"
    lines += [
        f"  %all = call reassoc {number} @llvm.vector.reduce.fadd.{name}"
        f"({number} 0.0, {v} {total})",
        f"  %gp = getelementptr {number}, ptr %g, i64 %j",
        f"  %before = load {number}, ptr %gp",
        f"  %after = fadd {number} %before, %all",
        f"  store {number} %after, ptr %gp",
        "  %j1 = add i64 %j, 1",
        "  %more = icmp ult i64 %j1, %e",
        "  br i1 %more, label %product, label %done",
        "done:",
        "  %again = icmp ult i64 %next, %rows",
        "  br i1 %again, label %row, label %exit",
        "exit:",
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def normalise(dtype: torch.dtype) -> Callable[..., None]:
    """Return a compiled kernel that normalises each position over its channels.

    Its arguments are addresses and numbers: of x, y, the distance of their rows, the
    weights and biases of the channels, the number of channels, an address of the
    number that is added to the variance, and the number of vectors.
    """
    width = lanes(dtype)
    number, suffix, _ = TYPES[dtype]
    v = f"<{width} x {number}>"
    p, n = POINTER, INTEGER

    def loop(
        name: str, before: str, after: str, body: list[str], total: str = ""
    ) -> list[str]:
        """Return a loop over the channels, r, which may sum up into ``total``."""
        head = [
            f"{name}:",
            f"  %{name}.r = phi i64 [ 0, %{before} ], [ %{name}.n, %{name} ]",
        ]
        if total:
            head.append(
                f"  %{name}.acc = phi {v} [ zeroinitializer, %{before} ], "
                f"[ {total}, %{name} ]"
            )
        return [
            *head,
            f"  %{name}.o = mul i64 %{name}.r, %step",
            f"  %{name}.at = add i64 %{name}.o, %place",
            f"  %{name}.p = getelementptr {number}, ptr %x, i64 %{name}.at",
            f"  %{name}.x = load {v}, ptr %{name}.p, align 4",
            *body,
            f"  %{name}.n = add i64 %{name}.r, 1",
            f"  %{name}.c = icmp ult i64 %{name}.n, %channels",
            f"  br i1 %{name}.c, label %{name}, label %{after}",
        ]

    one, two, three = (Lines(dtype, width, f"in.{n}") for n in ("one", "two", "three"))
    between, scale = (Lines(dtype, width, f"to.{n}") for n in ("mean", "scale"))
    total = one.add("%one.acc", "%one.x")
    mean = between.over(total, "%count")
    off = two.subtract("%two.x", mean)
    squares = two.fused(off, off, "%two.acc")
    variance = scale.over(squares, "%count")
    root = scale.root(scale.add(variance, "%epsilon"))
    factor = scale.over(scale.constant(1.0), root)
    normal = three.times(three.subtract("%three.x", mean), factor)
    out = three.fused(normal, "%w", "%b")
    lines = [
        declarations(number, suffix, width),
        "define void @normalise(ptr readonly %x, ptr %y, i64 %step, ptr readonly %ws,"
        " ptr readonly %bs, i64 %channels, ptr %eps, i64 %vectors) {",
        "entry:",
        f"  %e1 = load {number}, ptr %eps",
        spread("epsilon", number, "%e1", width),
        f"  %c1 = uitofp i64 %channels to {number}",
        spread("count", number, "%c1", width),
        "  br label %tile",
        "tile:",
        "  %t = phi i64 [ 0, %entry ], [ %tn, %end ]",
        f"  %place = mul i64 %t, {width}",
        "  br label %one",
        *loop("one", "tile", "middle", one.lines, total),
        "middle:",
        *between.lines,
        "  br label %two",
        *loop("two", "middle", "last", two.lines, squares),
        "last:",
        *scale.lines,
        "  br label %three",
        *loop(
            "three",
            "last",
            "end",
            [
                f"  %wp = getelementptr {number}, ptr %ws, i64 %three.r",
                f"  %w1 = load {number}, ptr %wp",
                spread("w", number, "%w1", width),
                f"  %bp = getelementptr {number}, ptr %bs, i64 %three.r",
                f"  %b1 = load {number}, ptr %bp",
                spread("b", number, "%b1", width),
                *three.lines,
                f"  %yp = getelementptr {number}, ptr %y, i64 %three.at",
                f"  store {v} {out}, ptr %yp, align 4",
            ],
        ),
        "end:",
        "  %tn = add i64 %t, 1",
        "  %more = icmp ult i64 %tn, %vectors",
        "  br i1 %more, label %tile, label %exit",
        "exit:",
        "  ret void",
        "}",
    ]
    given = p, p, n, p, p, n, p, n
    return compiled("normalise", "\n".join(lines), given, host())


def digest() -> Callable[[int, int], int]:
    """Return a compiled function that mixes the 32 bits at each of some addresses.

    Its arguments are the address of these addresses, and their number.
    """
    code = """
define i64 @digest(ptr readonly %places, i64 %count) {
entry:
  br label %loop
loop:
  %n = phi i64 [ 0, %entry ], [ %next, %loop ]
  %so = phi i64 [ 0, %entry ], [ %mixed, %loop ]
  %p = getelementptr ptr, ptr %places, i64 %n
  %at = load ptr, ptr %p
  %bits = load i32, ptr %at
  %wide = zext i32 %bits to i64
  %both = xor i64 %so, %wide
  %mixed = mul i64 %both, 1099511628211
  %next = add i64 %n, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %exit
exit:
  ret i64 %mixed
}
"""
    return compiled("digest", code, (POINTER, INTEGER), host(), INTEGER)
