"""Activation functions of vectors, as lines of LLVM's intermediate language.

Exponential and error functions are approximations in float32. Their coefficients are
fits of least relative error; they are off by less than a rounding in float32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import e, log2, pi, sqrt

import torch

# 2**f for |f| <= 1/2, in powers of f: relative error 2e-9.
_POWER_OF_TWO = (
    1.0000000005542016,
    0.6931472057371473,
    0.24022646890368254,
    0.05550328777158653,
    0.009618488985880235,
    0.0013399931157065546,
    0.00015345804265807025,
)
# erf(t) = t * P(t**2) / Q(t**2) for |t| <= 4, in powers of t**2: absolute error 2e-8.
_ERF_P = (
    1.128378976646344,
    0.19624697439906297,
    0.05346719355515812,
    0.0040035491012849,
    0.0002880373437929021,
    1.9748236597148332e-06,
)
_ERF_Q = (
    1.0,
    0.5072505135086242,
    0.11647557789634488,
    0.01544423729788445,
    0.0012163324502052148,
    3.7480575832174587e-05,
)


def _in_float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


_LOG_E = _in_float32(log2(e))


class Lines:
    """Lines of code that compute with vectors.

    Args:
        dtype: ``torch.float32`` or ``torch.float64``.
        width: Number of numbers in a vector.
        prefix: What the names of the results begin with.
    """

    def __init__(self, dtype: torch.dtype, width: int, prefix: str) -> None:  # noqa: D107
        single = dtype == torch.float32
        self.number, self.suffix = ("float", "f32") if single else ("double", "f64")
        self.width, self.prefix = width, prefix
        self.type = f"<{width} x {self.number}>"
        self.lines: list[str] = []

    def constant(self, value: float) -> str:
        """Return a vector of one number."""
        if self.number == "float":  # LLVM wants a double that float32 holds exactly
            value = _in_float32(value)
        bits = struct.unpack("<Q", struct.pack("<d", value))[0]
        return "<" + ", ".join([f"{self.number} 0x{bits:016X}"] * self.width) + ">"

    def line(self, code: str) -> str:
        """Add an operation, and return the name of its result."""
        name = f"%{self.prefix}.{len(self.lines)}"
        self.lines.append(f"  {name} = {code}")
        return name

    def _call(self, function: str, *values: str) -> str:
        given = ", ".join(f"{self.type} {value}" for value in values)
        name = f"@llvm.{function}.v{self.width}{self.suffix}"
        return self.line(f"call {self.type} {name}({given})")

    def add(self, a: str, b: str) -> str:  # noqa: D102
        return self.line(f"fadd {self.type} {a}, {b}")

    def subtract(self, a: str, b: str) -> str:  # noqa: D102
        return self.line(f"fsub {self.type} {a}, {b}")

    def times(self, a: str, b: str) -> str:  # noqa: D102
        return self.line(f"fmul {self.type} {a}, {b}")

    def over(self, a: str, b: str) -> str:  # noqa: D102
        return self.line(f"fdiv {self.type} {a}, {b}")

    def fused(self, a: str, b: str, c: str) -> str:
        """Return a * b + c, rounded once."""
        return self._call("fma", a, b, c)

    def root(self, a: str) -> str:  # noqa: D102
        return self._call("sqrt", a)

    def largest(self, a: str, b: str) -> str:
        """Return the larger; NaN if any is NaN."""
        return self._call("maximum", a, b)

    def smallest(self, a: str, b: str) -> str:
        """Return the smaller; NaN if any is NaN."""
        return self._call("minimum", a, b)

    def between(self, a: str, low: float, high: float) -> str:  # noqa: D102
        raised = self.largest(a, self.constant(low))
        return self.smallest(raised, self.constant(high))

    def polynomial(self, x: str, coefficients: tuple[float, ...]) -> str:
        """Return the sum of coefficients times powers of x."""
        found = self.constant(coefficients[-1])
        for one in reversed(coefficients[:-1]):
            found = self.fused(found, x, self.constant(one))
        return found

    def exponential(self, x: str) -> str:
        """Return e**x in float32: e**-87 for smaller x, infinity for x above 88.4."""
        inside = self.between(x, -87.0, 89.0)
        # The sum is rounded to a whole number n, which stands in its lowest bits.
        magic = self.constant(1.5 * 2**23)
        shifted = self.fused(inside, self.constant(_LOG_E), magic)
        whole = self.subtract(shifted, magic)
        minus = self.subtract(self.constant(0.0), whole)
        rest = self.fused(inside, self.constant(_LOG_E), minus)
        rest = self.fused(inside, self.constant(log2(e) - _LOG_E), rest)
        power = self.polynomial(rest, _POWER_OF_TWO)
        # 2**n has n + 127 in the bits of its exponent.
        integers = f"<{self.width} x i32>"
        bits = self.line(f"bitcast {self.type} {shifted} to {integers}")
        above = self.line(f"shl {integers} {bits}, {self._integers(23)}")
        exponent = self.line(f"add {integers} {above}, {self._integers(127 << 23)}")
        scale = self.line(f"bitcast {integers} {exponent} to {self.type}")
        return self.times(power, scale)

    def _integers(self, value: int) -> str:
        return "<" + ", ".join([f"i32 {value}"] * self.width) + ">"

    def sigmoid(self, x: str) -> str:  # noqa: D102
        minus = self.subtract(self.constant(0.0), x)
        below = self.add(self.exponential(minus), self.constant(1.0))
        return self.over(self.constant(1.0), below)

    def erf(self, x: str) -> str:
        """Return the error function in float32."""
        t = self.between(x, -4.0, 4.0)
        square = self.times(t, t)
        above = self.times(t, self.polynomial(square, _ERF_P))
        found = self.over(above, self.polynomial(square, _ERF_Q))
        # It rounds to 1 here. A rounding less would count for a large x in GELU.
        found = self._where("oge", t, 3.92, 1.0, found)
        return self._where("ole", t, -3.92, -1.0, found)

    def _where(self, relation: str, a: str, b: float, one: float, other: str) -> str:
        truth = self.line(f"fcmp {relation} {self.type} {a}, {self.constant(b)}")
        return self.line(
            f"select <{self.width} x i1> {truth}, {self.type} {self.constant(one)}, "
            f"{self.type} {other}"
        )


def _gelu(v: Lines, x: str) -> str:
    bell = v.add(v.erf(v.times(x, v.constant(sqrt(0.5)))), v.constant(1.0))
    return v.times(v.times(x, v.constant(0.5)), bell)


def _gelu_by_tanh(v: Lines, x: str) -> str:
    # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
    inner = v.fused(v.times(x, x), v.constant(0.044715), v.constant(1.0))
    z = v.times(v.times(x, inner), v.constant(2 * sqrt(2 / pi)))
    return v.times(x, v.sigmoid(z))


def _hard_sigmoid(v: Lines, x: str) -> str:
    raised = v.between(v.add(x, v.constant(3.0)), 0.0, 6.0)
    return v.times(raised, v.constant(1 / 6))


ACTIVATIONS: dict[str, Callable[[Lines, str], str]] = {
    "none": lambda v, x: x,
    "relu": lambda v, x: v.largest(x, v.constant(0.0)),
    "relu6": lambda v, x: v.between(x, 0.0, 6.0),
    "hardswish": lambda v, x: v.times(x, _hard_sigmoid(v, x)),
    "hardsigmoid": _hard_sigmoid,
    "sigmoid": Lines.sigmoid,
    "silu": lambda v, x: v.times(x, v.sigmoid(x)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_by_tanh,
}
# They approximate, and so are for float32 alone.
APPROXIMATE = {"sigmoid", "silu", "gelu", "gelu_tanh"}
