"""Functions of float32 vectors, as straight code on any number of lanes.

exp, log and tanh by range reduction and polynomials (coefficients of Cephes, S. Moshier), errors of a few units in the
last place; sine and cosine in double precision, so that large angles keep all digits.
"""

from collections.abc import Sequence

from llmir_jax.targets.cpu.llvm import Function, Value, constant, lanes_of, vector

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_SIN = (
    1.58962301576546568060e-10,
    -2.50507477628578072866e-8,
    2.75573136213857245213e-6,
    -1.98412698295895385996e-4,
    8.33333333332211858878e-3,
    -1.66666666666666307295e-1,
)
_COS = (
    -1.13585365213876817300e-11,
    2.08757008419747316778e-9,
    -2.75573141792967388112e-7,
    2.48015872888517045348e-5,
    -1.38888888888730564116e-3,
    4.16666666666665929218e-2,
)
_HALF_PI = (1.57079625129699707031, 7.54978941586159635335e-8, 5.39030285815811905290e-15)
# A rational form of erf on |x| < 4, the one that XLA and Eigen use.
_ERF_ALPHA = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BETA = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _of(x: Value, value: float) -> Value:
    return constant("double" if "double" in x.type else "float", value, lanes_of(x.type))


def polynomial(f: Function, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, the highest power first."""
    result = _of(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = f.fma(result, x, _of(x, coefficient))
    return result


def _integer(f: Function, x: Value) -> Value:
    return f.cast("fptosi", x, "i32")


def _power_of_two(f: Function, n: Value) -> Value:
    """2ⁿ of i32 n from -126 to 127."""
    lanes = lanes_of(n.type)
    shifted = f.binary("shl", f.binary("add", n, constant("i32", 127, lanes)), constant("i32", 23, lanes))
    return f.bitcast(shifted, vector("float", lanes))


def exp(f: Function, x: Value) -> Value:
    """eˣ; 0 below -87.3, infinity above 88.7."""
    bounded = f.overloaded("llvm.minnum", [x, _of(x, 88.8)])
    bounded = f.overloaded("llvm.maxnum", [bounded, _of(x, -88.0)])
    n = f.overloaded("llvm.rint", [f.binary("fmul", bounded, _of(x, 1.44269504088896341))])
    r = f.fma(n, _of(x, -0.693359375), bounded)
    r = f.fma(n, _of(x, 2.12194440e-4), r)
    y = f.fma(polynomial(f, r, _EXP), f.binary("fmul", r, r), f.binary("fadd", r, _of(x, 1.0)))
    # in two steps, since 2¹²⁸ is not a float
    half = f.cast("sitofp", _integer(f, f.binary("fmul", n, _of(x, 0.5))), "float")
    rest = f.binary("fsub", n, half)
    y = f.binary("fmul", f.binary("fmul", y, _power_of_two(f, _integer(f, half))), _power_of_two(f, _integer(f, rest)))
    y = f.select(f.fcompare("olt", x, _of(x, -87.33)), _of(x, 0.0), y)
    return f.select(f.fcompare("uno", x, x), x, y)


def fast_exp(f: Function, x: Value) -> Value:
    """eˣ of x ≤ 0 that is no NaN: 0 below -87."""
    x = f.overloaded("llvm.maxnum", [x, _of(x, -88.0)])
    n = f.overloaded("llvm.rint", [f.binary("fmul", x, _of(x, 1.44269504088896341))])
    r = f.fma(n, _of(x, -0.693359375), x)
    r = f.fma(n, _of(x, 2.12194440e-4), r)
    y = f.fma(polynomial(f, r, _EXP), f.binary("fmul", r, r), f.binary("fadd", r, _of(x, 1.0)))
    return f.binary("fmul", y, _power_of_two(f, _integer(f, n)))


def log(f: Function, x: Value) -> Value:
    """ln x; -infinity at 0, NaN below."""
    lanes = lanes_of(x.type)
    bits = f.bitcast(f.overloaded("llvm.maxnum", [x, _of(x, 1.17549435e-38)]), vector("i32", lanes))
    exponent = f.binary("sub", f.binary("lshr", bits, constant("i32", 23, lanes)), constant("i32", 126, lanes))
    mantissa = f.binary(
        "or", f.binary("and", bits, constant("i32", 0x807FFFFF, lanes)), constant("i32", 0x3F000000, lanes)
    )
    m = f.bitcast(mantissa, vector("float", lanes))
    e = f.cast("sitofp", exponent, "float")
    small = f.fcompare("olt", m, _of(x, 0.707106781186547524))
    e = f.binary("fsub", e, f.select(small, _of(x, 1.0), _of(x, 0.0)))
    r = f.binary("fsub", f.binary("fadd", m, f.select(small, m, _of(x, 0.0))), _of(x, 1.0))
    z = f.binary("fmul", r, r)
    y = f.binary("fmul", f.binary("fmul", polynomial(f, r, _LOG), r), z)
    y = f.fma(e, _of(x, -2.12194440e-4), y)
    y = f.fma(z, _of(x, -0.5), y)
    y = f.fma(e, _of(x, 0.693359375), f.binary("fadd", r, y))
    y = f.select(f.fcompare("oeq", x, _of(x, 0.0)), _of(x, float("-inf")), y)
    y = f.select(f.fcompare("ult", x, _of(x, 0.0)), _of(x, float("nan")), y)
    return f.select(f.fcompare("oeq", x, _of(x, float("inf"))), x, y)


def tanh(f: Function, x: Value) -> Value:
    """Hyperbolic tangent."""
    z = f.binary("fmul", x, x)
    small = f.fma(f.binary("fmul", polynomial(f, z, _TANH), z), x, x)
    size = f.overloaded("llvm.fabs", [x])
    e = exp(f, f.binary("fadd", size, size))
    large = f.binary("fsub", _of(x, 1.0), f.binary("fdiv", _of(x, 2.0), f.binary("fadd", e, _of(x, 1.0))))
    large = f.overloaded("llvm.copysign", [large, x])
    return f.select(f.fcompare("olt", size, _of(x, 0.625)), small, large)


def logistic(f: Function, x: Value) -> Value:
    """1 / (1 + e⁻ˣ)."""
    one = _of(x, 1.0)
    return f.binary("fdiv", one, f.binary("fadd", one, exp(f, f.emit(x.type, f"fneg {x.type} {x.ref}"))))


def erf(f: Function, x: Value) -> Value:
    """The error function."""
    bounded = f.overloaded("llvm.maxnum", [f.overloaded("llvm.minnum", [x, _of(x, 4.0)]), _of(x, -4.0)])
    z = f.binary("fmul", bounded, bounded)
    return f.binary("fdiv", f.binary("fmul", bounded, polynomial(f, z, _ERF_ALPHA)), polynomial(f, z, _ERF_BETA))


def sine_or_cosine(f: Function, x: Value, *, quarter: int) -> Value:
    """sin(x + quarter · π/2): quarter 0 for the sine, 1 for the cosine."""
    wide = f.cast("fpext", x, "double")
    lanes = lanes_of(x.type)
    n = f.overloaded("llvm.rint", [f.binary("fmul", wide, _of(wide, 0.636619772367581343))])
    r = wide
    for part in _HALF_PI:
        r = f.fma(n, _of(wide, -part), r)
    z = f.binary("fmul", r, r)
    sin = f.fma(f.binary("fmul", polynomial(f, z, _SIN), z), r, r)
    cos = f.fma(f.binary("fmul", polynomial(f, z, _COS), z), z, f.fma(z, _of(wide, -0.5), _of(wide, 1.0)))
    turn = f.binary("add", f.cast("fptosi", n, "i32"), constant("i32", quarter, lanes))
    zero = constant("i32", 0, lanes)
    odd = f.compare("ne", f.binary("and", turn, constant("i32", 1, lanes)), zero)
    flip = f.compare("ne", f.binary("and", turn, constant("i32", 2, lanes)), zero)
    y = f.select(odd, cos, sin)
    y = f.select(flip, f.emit(y.type, f"fneg {y.type} {y.ref}"), y)
    return f.cast("fptrunc", y, "float")


__all__ = ["erf", "exp", "fast_exp", "log", "logistic", "polynomial", "sine_or_cosine", "tanh"]
