"""Splits the tokens of a step along `sequence`, where they are many: ring attention for prompts.

    llm.attend_pages %q, %k, %v, … {shards = 2}
      →  mesh=sequence=2, 64 tokens
    llm.attend_pages %q, %k, %v, … {shards = 2, ring = "sequence=2"}

Without it every device computes all tokens of the step, and a part of their attention, which is right for decoding:
weights are read once whatever the tokens are, and one exchange merges the partial softmaxes. Many tokens are bound by
arithmetic: here each device has its part of them, from the table's rows to those of logits, and queries, new keys and
new values go round the ring (`targets.ring_reference`). ``communication-insertion``, which comes next, splits the rest
of the step to suit. Runs after ``kv-cache-sharding``, on the step for a number of tokens.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.transforms.sharding_attributes import mesh_of
from sharding.mesh import SEQUENCE
from sharding.ring import why_no_ring


def attention_over_sequence(buckets: tuple[int, ...], devices: int) -> str:
    """How steps of these numbers of tokens attend over devices along `sequence`, and why, for the report."""
    rings = [bucket for bucket in buckets if why_no_ring(bucket, devices) is None]
    texts = [f"{bucket} tokens: partial softmaxes ({why_no_ring(bucket, devices)})" for bucket in buckets
             if bucket not in rings]  # fmt: skip
    texts += [f"{bucket} tokens: ring attention, {bucket // devices} tokens a device" for bucket in rings]
    return f"sequence = {devices}: {'; '.join(texts)}"


@dataclass(frozen=True)
class RingAttentionPass(ModulePass):
    """Rings along `sequence` of a `mesh`, such as tensor=3,sequence=2, if it has that and the step many tokens."""

    name = "ring-attention"

    mesh: str

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        devices = dict(mesh_of(self.mesh).shape).get(SEQUENCE, 1)
        for inner in main_function(op).body.walk() if devices > 1 else ():
            if not isinstance(inner, llm.WritePagesOp | llm.AttendPagesOp):
                continue
            tokens = shape_of(inner.positions)[0]
            if why_no_ring(tokens, devices) is None:
                inner.properties["ring"] = StringAttr(self.mesh)
