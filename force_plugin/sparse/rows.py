"""Kernels that go over each row of planes several times, and sum up between.

Batch normalisation is such a kernel: mean, variance, result. A row is a channel, which
stays in the cache while the kernel goes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from force_plugin.sparse import code as kernels
from force_plugin.sparse import team
from force_plugin.sparse.activations import Lines
from force_plugin.sparse.code import (
    INTEGER,
    POINTER,
    Host,
    compiled,
    declarations,
    lanes,
    spread,
)
from force_plugin.sparse.geometry import Geometry

Loaded = Mapping[str, str]
Body = Callable[[Lines, Loaded], tuple[Mapping[str, str], Sequence[str]]]


class Code(Lines):
    """The code of a kernel over rows.

    Args:
        dtype: ``torch.float32`` or ``torch.float64``.
        planes: Names of the planes.
        columns: Names of the arrays with a number for each row.
        numbers: Names of single numbers.
    """

    def __init__(  # noqa: D107
        self,
        dtype: torch.dtype,
        planes: Sequence[str],
        columns: Sequence[str],
        numbers: Sequence[str],
    ) -> None:
        super().__init__(dtype, lanes(dtype), "row")
        self._dtype, self._planes, self._columns = dtype, planes, columns
        self._numbers, self._block, self._loops = numbers, "row", 0

    def column(self, name: str) -> str:
        """Return the row's number in an array, in every lane."""
        at = self.line(f"getelementptr {self.number}, ptr %{name}, i64 %r")
        return self._spread(self.line(f"load {self.number}, ptr {at}"))

    def single(self, name: str) -> str:
        """Return a single number, in every lane."""
        return self._spread(self.line(f"load {self.number}, ptr %{name}"))

    def put(self, name: str, value: str) -> None:
        """Write the first lane into the row's number of an array."""
        at = self.line(f"getelementptr {self.number}, ptr %{name}, i64 %r")
        one = self.line(f"extractelement {self.type} {value}, i32 0")
        self.lines.append(f"  store {self.number} {one}, ptr {at}")

    def _spread(self, value: str) -> str:
        name = f"{self.prefix}.s{len(self.lines)}"
        self.lines.append(spread(name, self.number, value, self.width))
        return f"%{name}"

    def loop(self, names: Iterable[str], body: Body) -> list[str]:
        """Go over the row, and return sums over it, in every lane.

        Args:
            names: Planes that are read.
            body: Returns what is written to planes, and what is summed up. Its values
                have the key ``"inside"`` for :meth:`inside`.
        """
        label, self._loops = f"loop{self._loops}", self._loops + 1
        inner = Lines(self._dtype, self.width, label)
        values = {}
        for name in names:
            at = inner.line(
                f"getelementptr {self.number}, ptr %{name}.row, i64 %{label}.p"
            )
            values[name] = inner.line(f"load {self.type}, ptr {at}, align 4")
        at = inner.line(f"getelementptr i8, ptr %mask, i64 %{label}.p")
        bits = inner.line(f"load <{self.width} x i8>, ptr {at}, align 1")
        values["inside"] = inner.line(
            f"icmp ne <{self.width} x i8> {bits}, zeroinitializer"
        )
        stores, sums = body(inner, values)
        totals = [inner.add(f"%{label}.sum{n}", value) for n, value in enumerate(sums)]
        for name, value in stores.items():
            at = inner.line(
                f"getelementptr {self.number}, ptr %{name}.row, i64 %{label}.p"
            )
            inner.lines.append(f"  store {self.type} {value}, ptr {at}, align 4")
        self.lines += [
            f"  br label %{label}",
            f"{label}:",
            f"  %{label}.p = phi i64 [ 0, %{self._block} ], [ %{label}.n, %{label} ]",
            *(
                f"  %{label}.sum{n} = phi {self.type} "
                f"[ zeroinitializer, %{self._block} ], [ {total}, %{label} ]"
                for n, total in enumerate(totals)
            ),
            *inner.lines,
            f"  %{label}.n = add i64 %{label}.p, {self.width}",
            f"  %{label}.c = icmp ult i64 %{label}.n, %positions",
            f"  br i1 %{label}.c, label %{label}, label %{label}.end",
            f"{label}.end:",
        ]
        self._block = f"{label}.end"
        name = f"v{self.width}{self.suffix}"
        return [
            self._spread(
                self.line(
                    f"call reassoc {self.number} @llvm.vector.reduce.fadd.{name}"
                    f"({self.number} 0.0, {self.type} {total})"
                )
            )
            for total in totals
        ]

    @staticmethod
    def inside(v: Lines, values: Loaded, value: str) -> str:
        """Return a vector with zeros outside of the images."""
        return v.line(
            f"select <{v.width} x i1> {values['inside']}, {v.type} {value}, "
            f"{v.type} zeroinitializer"
        )

    def text(self) -> str:
        """Return the module."""
        number, width = self.number, self.width
        given = [f"ptr %{name}" for name in self._planes]
        given += [f"ptr %{name}" for name in (*self._columns, *self._numbers)]
        return "\n".join(
            [
                declarations(number, self.suffix, width),
                f"declare {number} @llvm.vector.reduce.fadd.v{width}{self.suffix}"
                f"({number}, {self.type})",
                f"define void @rows({', '.join(given)}, ptr %mask, i64 %step, "
                "i64 %first, i64 %last, i64 %positions) {",
                "entry:",
                "  br label %row",
                "row:",
                f"  %r = phi i64 [ %first, %entry ], [ %next, %{self._block} ]",
                "  %down = mul i64 %r, %step",
                *(
                    f"  %{name}.row = getelementptr {number}, ptr %{name}, i64 %down"
                    for name in self._planes
                ),
                *self.lines,
                "  %next = add i64 %r, 1",
                "  %more = icmp ult i64 %next, %last",
                "  br i1 %more, label %row, label %exit",
                "exit:",
                "  ret void",
                "}",
            ]
        )

    def compile(self) -> Callable[..., None]:
        """Return the kernel."""
        count = len(self._planes) + len(self._columns) + len(self._numbers)
        given = *[POINTER] * (count + 1), *[INTEGER] * 4
        return compiled("rows", self.text(), given, kernels.host())


class Norm:
    """Batch normalisation with a sum and a ReLU, in training mode, on planes.

    Args:
        geometry: The geometry of the planes.
        dtype: Type of their numbers.
        epsilon: Is added to the variance.
        adds: Whether a value is added after the normalisation.
        relu: Whether a ReLU follows.
    """

    def __init__(  # noqa: D107
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        epsilon: float,
        adds: bool,
        relu: bool,
    ) -> None:
        self.geometry, self.adds, self.relu = geometry, adds, relu
        count = geometry.batch * geometry.height * geometry.width
        self.share = torch.tensor(1 / count, dtype=dtype)
        self.epsilon = torch.tensor(epsilon, dtype=dtype)
        self.inside = geometry.inside()
        self._forward = _forward(dtype, adds, relu, kernels.host())
        self._backward = _backward(dtype, adds, relu, kernels.host())

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        y: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write the result, and return mean and variance of each row.

        Args:
            x: The planes that are normalised.
            weight: A factor for each row.
            bias: A number for each row.
            added: The planes that are added, if any.
            y: The planes of the result.
        """
        mean, variance = torch.empty_like(weight), torch.empty_like(weight)
        planes = [x, *([] if added is None else [added]), y]
        columns = [weight, bias, mean, variance]
        self._run(self._forward, planes, columns, [self.share, self.epsilon])
        return mean, variance

    def backward(
        self,
        d: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        mean: Tensor,
        variance: Tensor,
        result: Tensor,
        added: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Write the gradients of planes, and return those of weight and bias.

        Args:
            d: The gradient of the result, with a halo of zeros.
            x: The planes that were normalised.
            y: The result.
            weight: The factor of each row.
            mean: Mean of each row.
            variance: Variance of each row.
            result: The planes of the gradient of x. They may be d.
            added: The planes of the gradient of what was added, if any. They may be d.
        """
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(weight)
        planes = [d, x, y, result, *([] if added is None else [added])]
        columns = [weight, mean, variance, of_weight, of_bias]
        self._run(self._backward, planes, columns, [self.share, self.epsilon])
        return of_weight, of_bias

    def _run(
        self,
        kernel: Callable[..., None],
        planes: Sequence[Tensor],
        columns: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> None:
        geometry, rows = self.geometry, len(planes[0])
        # A position costs about as much as ten products.
        threads = min(rows, team.members(10 * rows * geometry.positions))
        given: list[Any] = [geometry.first(one) for one in planes]
        given += [one.data_ptr() for one in (*columns, *numbers)]
        given += [self.inside.ctypes.data, geometry.step]
        team.run(
            kernel,
            [(*given, *part, geometry.positions) for part in team.parts(rows, threads)],
        )


@cache
def _forward(
    dtype: torch.dtype, adds: bool, relu: bool, machine: Host
) -> Callable[..., None]:
    del machine  # for the cache: code of another machine has other vectors
    planes = ["x", *(["z"] if adds else []), "y"]
    code = Code(dtype, planes, ["w", "b", "mean", "var"], ["share", "eps"])
    (total,) = code.loop(["x"], lambda v, of: ({}, [of["x"]]))  # the halo is 0
    mean = code.times(total, code.single("share"))

    def squares(v: Lines, of: Loaded) -> tuple[Mapping[str, str], Sequence[str]]:
        off = code.inside(v, of, v.subtract(of["x"], mean))
        return {}, [v.times(off, off)]

    (total,) = code.loop(["x"], squares)
    variance = code.times(total, code.single("share"))
    root = code.root(code.add(variance, code.single("eps")))
    scale = code.over(code.column("w"), root)
    shift = code.subtract(code.column("b"), code.times(mean, scale))

    def result(v: Lines, of: Loaded) -> tuple[Mapping[str, str], Sequence[str]]:
        y = v.fused(of["x"], scale, shift)
        if adds:
            y = v.add(y, of["z"])
        if relu:
            y = v.largest(y, v.constant(0.0))
        return {"y": code.inside(v, of, y)}, []

    code.loop(planes[:-1], result)
    code.put("mean", mean)
    code.put("var", variance)
    return code.compile()


@cache
def _backward(
    dtype: torch.dtype, adds: bool, relu: bool, machine: Host
) -> Callable[..., None]:
    del machine
    planes = ["d", "x", "y", "dx", *(["dz"] if adds else [])]
    columns = ["w", "mean", "var", "dw", "db"]
    code = Code(dtype, planes, columns, ["share", "eps"])
    mean, share = code.column("mean"), code.single("share")
    root = code.root(code.add(code.column("var"), code.single("eps")))
    inverse = code.over(code.constant(1.0), root)
    read = ["d", "x", *(["y"] if relu else [])]

    def before(v: Lines, of: Loaded) -> str:
        """Return the gradient before the ReLU."""
        if not relu:
            return of["d"]
        truth = v.line(f"fcmp ugt {v.type} {of['y']}, zeroinitializer")
        return v.line(
            f"select <{v.width} x i1> {truth}, {v.type} {of['d']}, "
            f"{v.type} zeroinitializer"
        )

    def products(v: Lines, of: Loaded) -> tuple[Mapping[str, str], Sequence[str]]:
        e = before(v, of)
        return {}, [e, v.times(e, v.subtract(of["x"], mean))]

    total, along = code.loop(read, products)
    of_weight = code.times(along, inverse)
    scale = code.times(code.column("w"), inverse)
    level = code.times(code.times(total, share), scale)
    slope = code.times(code.times(of_weight, inverse), code.times(scale, share))

    def result(v: Lines, of: Loaded) -> tuple[Mapping[str, str], Sequence[str]]:
        e = before(v, of)
        off = v.times(v.subtract(of["x"], mean), slope)
        dx = v.subtract(v.subtract(v.times(e, scale), level), off)
        stores = {"dx": code.inside(v, of, dx)}
        return stores | ({"dz": e} if adds else {}), []

    code.loop(read, result)
    code.put("dw", of_weight)
    code.put("db", total)
    return code.compile()
