"""A derived step in the cache on disk: its record, its operations, what it is lowered to, and that it was checked.

    step      the record (`step_record`)
    module    the operations, as text
    lowered   for a number of tokens: the module that XLA compiles, as bytecode, and which native code it calls
    checked   the result of the self-check

All are named after what the step is derived from. Nothing is kept of a step that depends on more than that: one that
was calibrated, or whose masks were read from the weights.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

import jax
import jax.numpy as jnp
from xdsl.dialects.builtin import ModuleOp
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException
from xdsl_jax.dialects.stablehlo import CustomCallOp

from llmir_jax.dialects import llm
from llmir_jax.dialects.parser import IRParser
from llmir_jax.disk_cache import DiskCache, digest, environment
from llmir_jax.interop import Executable, make_context
from llmir_jax.step_record import StepRecord
from llmir_jax.verify import CheckResult

_IRRELEVANT = ("cache", "log", "debug", "dump", "traceback", "profiler", "distributed", "coordination")


def jax_settings() -> str:
    """JAX's settings that may change what is traced, as they are in this thread now."""
    names = sorted(name for name in jax.config.values if not any(word in name for word in _IRRELEVANT))
    return repr([(name, str(getattr(jax.config, name, jax.config.values[name]))) for name in names])


@dataclass(kw_only=True)
class StoredStep:
    """The entries of one step."""

    cache: DiskCache
    key: str
    found: list[str] = field(default_factory=list)
    """What was taken from the cache."""
    made: list[str] = field(default_factory=list)
    """What was not there, and is now."""

    @classmethod
    def of(cls, cache: DiskCache, *parts: Any) -> "StoredStep":
        """Of the step that is derived from what the parts say, in this environment and with JAX's present settings."""
        return cls(cache=cache, key=digest(jax_settings(), *environment(), *parts))

    def record(self) -> StepRecord | None:
        """The record, if it is there."""
        content = self.cache.read("step", self.key)
        if content is None:
            return None
        self.found.append("the derivation")
        return StepRecord.from_json(zlib.decompress(content))

    def keep(self, record: StepRecord, module: ModuleOp) -> None:
        """Keep the record and the operations of a step."""
        self.cache.write("step", self.key, zlib.compress(record.to_json(), 1))
        self.cache.write("module", self.key, zlib.compress(_generic(module).encode(), 1))
        self.made.append("the derivation")

    def module(self) -> ModuleOp | None:
        """The operations; None if they are not there, or reading the text does not give them back exactly."""
        content = self.cache.read("module", self.key)
        if content is None:
            return None
        text = zlib.decompress(content).decode()
        context = make_context()
        context.load_dialect(llm.LLM)
        try:
            module = IRParser(context, text).parse_module()
            module.verify()
        except (ParseError, VerifyException):
            return None
        return module if _generic(module) == text else None

    def lowered(self, num_tokens: int, native: Sequence[Any]) -> Executable | None:
        """What the step for some tokens is lowered to, with its native code at hand; None unless all of it is there.

        `native` is what native code depends on besides the step: the host, and the number of threads.
        """
        content = self.cache.read("lowered", digest(self.key, num_tokens, *native))
        if content is None:
            return None
        head, _, bytecode = content.partition(b"\n")
        data = json.loads(head)
        if data["native"]:
            from llmir_jax.targets.cpu.native import restore  # here, since other targets need no LLVM

            if not all(restore(name, self.cache) for name in data["native"]):
                return None
        self.found.append(_step_of(num_tokens, data["native"]))
        inputs, outputs = (tuple(map(_type, data[name])) for name in ("inputs", "outputs"))
        return Executable(bytecode=bytecode, inputs=inputs, outputs=outputs)

    def keep_lowered(self, num_tokens: int, native: Sequence[Any], module: ModuleOp, executable: Executable) -> None:
        """Keep what the step for some tokens is lowered to."""
        names: list[str] = []
        if native:
            from llmir_jax.targets.cpu.native import PREFIX

            targets = [op.call_target_name.data for op in module.walk() if isinstance(op, CustomCallOp)]
            names = [name for name in dict.fromkeys(targets) if name.startswith(PREFIX)]
        data = {
            "native": names,
            "inputs": [(aval.shape, aval.dtype.name) for aval in executable.inputs],
            "outputs": [(aval.shape, aval.dtype.name) for aval in executable.outputs],
        }
        content = json.dumps(data).encode() + b"\n" + executable.bytecode
        self.cache.write("lowered", digest(self.key, num_tokens, *native), content)
        self.made.append(_step_of(num_tokens, names))

    def checked(self, *parts: Any) -> CheckResult | None:
        """What the self-check found, with weights and in circumstances that the parts tell apart from others."""
        content = self.cache.read("checked", digest(self.key, *parts))
        return None if content is None else CheckResult(**json.loads(content))

    def keep_checked(self, result: CheckResult, *parts: Any) -> None:
        """Remember that the self-check was passed."""
        self.cache.write("checked", digest(self.key, *parts), json.dumps(asdict(result)).encode())


def _step_of(num_tokens: int, native: Sequence[str]) -> str:
    return f"{'native code' if native else 'the lowered step'} of {num_tokens} tokens"


def _generic(module: ModuleOp) -> str:
    out = StringIO()
    Printer(out, print_generic_format=True).print_op(module)
    return out.getvalue()


def _type(pair: Any) -> jax.core.ShapedArray:
    shape, dtype = pair
    return jax.core.ShapedArray(tuple(shape), jnp.dtype(dtype))


__all__ = ["StoredStep", "jax_settings"]
