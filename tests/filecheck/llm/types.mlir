// RUN: llmir-opt %s | filecheck %s
// RUN: llmir-opt %s --print-op-generic | filecheck %s --check-prefix GENERIC

// Every type, in the forms that are an interface.

// CHECK: func.func private @caches(
// CHECK-SAME: !llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>
// CHECK-SAME: !llm.paged_kv_cache<f8E4M3FN, 1, 1, 8, 4, 100>
// CHECK-SAME: !llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=4>
// GENERIC: function_type = (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>
func.func private @caches(
    !llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>,
    !llm.paged_kv_cache<f8E4M3FN, 1, 1, 8, 4, 100>,
    !llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=4>)

// CHECK: func.func private @quantized(
// CHECK-SAME: !llm.quantized_tensor<4x1024xi8, scale=f32, zp=i8, group_size=128>
// CHECK-SAME: !llm.quantized_tensor<4x1024xi4, scale=f32, symmetric=true, group_size=128>
// CHECK-SAME: !llm.quantized_tensor<4x1024xi4, scale=f16, min=f16, group_size=32>
// CHECK-SAME: !llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true>
// CHECK-SAME: !llm.quantized_tensor<4x1024xi8, scale=f32, zp=i8, group_size=64>
// CHECK-SAME: !llm.quantized_tensor<4x1024xi4, scale=f16, min=f16, group_size=32, layout=columns>
// CHECK-SAME: !llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true>
// CHECK-SAME: !llm.mixed_quantized_tensor<4x1024x!llm.mixed<i8,i4>, scale=f32>
func.func private @quantized(
    !llm.quantized_tensor<4x1024xi8, scale=f32, zp=i8, group_size=128>,
    !llm.quantized_tensor<4x1024xi4, scale=f32, symmetric=true, group_size=128>,
    !llm.quantized_tensor<4x1024xi4, scale=f16, min=f16, group_size=32>,
    !llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true>,
    !llm.quantized_tensor<4x1024xi8, group_size=64, zp=i8, scale=f32>,
    !llm.quantized_tensor<4x1024xi4, layout=columns, scale=f16, min=f16, group_size=32>,
    !llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true, layout=rows>,
    !llm.mixed_quantized_tensor<4x1024x!llm.mixed<i8,i4>, scale=f32>)

// CHECK: func.func private @shards(!llm.sharded_tensor<tensor<4096x4096xf16>, 1, 4, 2>)
func.func private @shards(!llm.sharded_tensor<tensor<4096x4096xf16>, 1, 4, 2>)
