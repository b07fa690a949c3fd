"""Says where the KV cache lives on a mesh: heads over `tensor`, the positions of every page over `sequence`.

    @main(%k: tensor<512x16x4x64xf32> {llmir.role = "k_pages"}, …)
      →  mesh=sequence=2,tensor=4
    @main(%k: tensor<512x16x4x64xf32> {llmir.role = "k_pages", llmir.sharding = [[], ["sequence"], ["tensor"], []]}, …)
    llm.attend_pages %q, %k, %v, … {shards = 2}

A page of 16 positions on two devices along `sequence` is two pages of 8, the first on one and the second on the other:
whichever pages a sequence has, each device has its share of them, and block tables are the same for all. Each attends
to its own positions, and the partial softmaxes are merged. With more devices along `tensor` than KV heads, its inner
part, `tensor_copies`, splits nothing here, so that the devices along it have the same heads. Runs after
``kv-cache-allocation`` and ``kv-cache-quantization``.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, TensorType, i64
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import LlmirError
from llmir_jax.transforms import signature
from llmir_jax.transforms.sharding_attributes import SHARDING, has, mesh_of, split_of, to_attribute
from sharding.mesh import SEQUENCE, TENSOR


@dataclass(frozen=True)
class KVCacheShardingPass(ModulePass):
    """Shardings of the cache on a `mesh`, such as tensor=3,sequence=2."""

    name = "kv-cache-sharding"

    mesh: str

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        mesh, main = mesh_of(self.mesh), main_function(op)
        attributes = signature.argument_attributes(main)
        spec = ((), has(mesh, (SEQUENCE,)), has(mesh, (TENSOR,)), ())
        pages = [arg for role in ("k_pages", "v_pages") for arg in signature.arguments(main, role)]
        for arg in pages:
            kind = arg.type
            assert isinstance(kind, TensorType | llm.QuantizedTensorType)
            _, page_size, num_kv_heads, _ = kind.get_shape()
            parts = split_of(spec, 1, mesh)
            if page_size % parts:
                raise LlmirError(f"mesh: pages of {page_size} tokens cannot be divided over sequence = {parts}")
            if num_kv_heads % split_of(spec, 2, mesh):
                raise LlmirError(
                    f"mesh: {num_kv_heads} KV heads cannot be divided over tensor = {split_of(spec, 2, mesh)}"
                )
            attributes[arg.index][SHARDING] = to_attribute(spec)
        signature.store_attributes(main, attributes)
        if (shards := split_of(spec, 1, mesh)) > 1:
            for inner in main.body.walk():
                if isinstance(inner, llm.WritePagesOp | llm.AttendPagesOp):
                    inner.properties["shards"] = IntegerAttr(shards, i64)
