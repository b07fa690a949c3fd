"""What a direct call of a forward runs: the program as it was traced, and on a chip with kernels the same program whose
attention is flash attention.

The second is made as a decoder's step is, up to where that gets its cache: attention is found by structure, its masks
are evaluated, and each other operation is proved to treat tokens alone. Sequences of a batch stay as they are: to the
attention they are more heads. What cannot be shown to be the same stays as it was traced, and the report says why.

A kernel is of one device, which is known when the call is compiled: on several, XLA partitions the traced program.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.transforms.common_subexpression_elimination import cse

from llmir_jax.analysis.align import main_function
from llmir_jax.derive import LENGTHS, raise_forward
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dtype_of, shape_of
from llmir_jax.dialects.llm.common import optional_float_of, optional_int_of
from llmir_jax.errors import InvalidIRError, LlmirError
from llmir_jax.interop import OnOneDevice, call_module, executable, outside_of_traces
from llmir_jax.pipeline import Recorder, text_of
from llmir_jax.report import AttentionEntry, CallReport
from llmir_jax.trace import Traced
from llmir_jax.transforms import signature
from llmir_jax.transforms.lower_to_flash import LowerToFlashPass, attentions_of
from llmir_jax.transforms.specialize_tokens import SpecializeTokensPass

SHORTEST = LENGTHS[0] + 1
"""Tokens of the shortest sequence that gets flash attention: longer than what is analysed, so that the trace of the
call itself is among those that are compared."""

TraceAt = Callable[[int], Traced]
"""Traces the forward at a number of tokens a sequence, of the call's batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectCall:
    """The programs of a forward for one shape of tokens."""

    traced: Traced
    module: ModuleOp
    """As it was traced."""
    flash: ModuleOp | None
    """With flash attention, for one device; None without any."""
    platform: str = ""
    """What `flash` is for, in JAX's words."""
    report: CallReport = field(default_factory=lambda: CallReport(attention=(), notes=()))
    text: str = ""
    """After the passes, before attention is lowered."""

    def __call__(self, params: list[jax.Array], tokens: jax.Array) -> object:
        """What the forward returns."""
        one = None if self.flash is None else OnOneDevice(platform=self.platform, executable=executable(self.flash))
        results = call_module(self.module, *params, tokens, original=self.traced.flat_fn, on_one_device=one)
        return self.traced.unflatten_result(results)


def direct_call(traced: Traced, trace_at: TraceAt, lower: LowerToFlashPass | str) -> DirectCall:
    """What a call runs that was traced.

    Args:
        traced: the forward at the shapes of the call.
        trace_at: traces it at other lengths; without folding, see `trace`.
        lower: to flash attention; or why not.

    Raises:
        InvalidIRError: a module does not verify.
    """
    module = traced.module.clone()
    module.verify()
    if isinstance(lower, str):
        return _as_traced(traced, module, lower)
    shape = traced.tokens.shape
    if len(shape) != 2 or not jnp.issubdtype(traced.tokens.dtype, jnp.integer):
        return _as_traced(traced, module, f"tokens are {traced.tokens.dtype}{list(shape)}, not integers [batch, seq]")
    if shape[1] < SHORTEST:
        return _as_traced(traced, module, f"sequences of {shape[1]} tokens are shorter than {SHORTEST}")
    try:
        with outside_of_traces():  # the call is traced, but masks are evaluated
            raised = _raised(traced, trace_at)
    except LlmirError as error:
        return _as_traced(traced, module, str(error))
    text = text_of(raised)
    lower = replace(lower, batch=shape[0])
    entries, any_served = _entries(raised, shape[0], lower)
    if not any_served:
        report = CallReport(attention=entries, notes=())
        return DirectCall(traced=traced, module=module, flash=None, text=text, report=report)
    notes = ["on one device; on several, XLA partitions the program as it was traced"]
    if any(op.name == "stablehlo.while" for op in module.walk()):
        notes.append("loops over layers are unrolled")
    Recorder().run(raised, lower)
    return DirectCall(
        traced=traced,
        module=module,
        flash=raised,
        platform=lower.platform or jax.default_backend(),
        text=text,
        report=CallReport(attention=entries, notes=tuple(notes)),
    )


def _as_traced(traced: Traced, module: ModuleOp, reason: str) -> DirectCall:
    report = CallReport(attention=(), notes=(f"attention is compiled by XLA as it is written: {reason}",))
    return DirectCall(traced=traced, module=module, flash=None, text=text_of(module), report=report)


def _raised(traced: Traced, trace_at: TraceAt) -> ModuleOp:
    """The program of the call with its attention raised. Raises LlmirError where it cannot be shown to be the same."""
    batch, seq_len = traced.tokens.shape
    raised = raise_forward(trace_at, None, max_seq_len=seq_len, forbidden=(batch,))
    if raised.max_seq_len < seq_len:
        raise LlmirError("; ".join(raised.notes))
    module = raised.module
    if not attentions_of(module):
        raise LlmirError("no attention was found")
    Recorder().run(module, SpecializeTokensPass(tokens=seq_len))
    main = main_function(module)
    positions = signature.argument(main, "positions")
    first = main.body.block.first_op
    assert first is not None
    positions.replace_all_uses_with(OpBuilder(first).constant(np.arange(seq_len, dtype=np.int32)))
    signature.remove_argument(main, positions)
    expected = main_function(traced.module).function_type
    if main.function_type != expected:
        raise InvalidIRError(f"@main became {main.function_type}, from {expected}")
    cse(module)
    module.verify()
    return module


def _entries(module: ModuleOp, batch: int, lower: LowerToFlashPass) -> tuple[tuple[AttentionEntry, ...], bool]:
    """Layers by the form of their attention and what serves it, and whether a kernel serves any."""
    found: Counter[AttentionEntry] = Counter()
    any_served = False
    for op in attentions_of(module):
        choice = lower.choice(op)
        any_served = any_served or choice.backend is not None
        found[_entry(op, batch, lower.title(choice))] += 1
    return tuple(AttentionEntry(**{**vars(entry), "layers": count}) for entry, count in found.items()), any_served


def _entry(op: llm.AttentionOp, batch: int, served_by: str) -> AttentionEntry:
    """Of one layer. The sequences of a batch are among the operation's heads."""
    (_, num_heads, head_dim), num_kv_heads = shape_of(op.q), shape_of(op.k)[1]
    return AttentionEntry(
        layers=1,
        num_heads=num_heads // batch,
        num_kv_heads=max(1, num_kv_heads // batch),
        head_dim=head_dim,
        window=optional_int_of(op.window),
        softcap=optional_float_of(op.softcap),
        alibi=op.slopes is not None,
        dtype=str(dtype_of(op.q)),
        served_by=served_by,
    )


__all__ = ["SHORTEST", "DirectCall", "direct_call"]
