// RUN: llmir-opt %s --split-input-file --verify-diagnostics --parsing-diagnostics | filecheck %s

// CHECK: !llm.paged_kv_cache: element type: expected a floating-point type, got i8
func.func private @f(!llm.paged_kv_cache<i8, 12, 16, 64, 16, 4096>)

// -----
// CHECK: !llm.paged_kv_cache: block size: expected a positive number, got 0
func.func private @f(!llm.paged_kv_cache<f16, 12, 16, 64, 0, 4096>)

// -----
// CHECK: Expected ','
func.func private @f(!llm.paged_kv_cache<f16, 12, 16>)

// -----
// CHECK: !llm.sharded_kv_cache: shards: expected a positive number, got 0
func.func private @f(!llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=0>)

// -----
// CHECK: !llm.sharded_kv_cache: maximum sequence length: expected a multiple of shards x block size = 3 x 16, got 32768
func.func private @f(!llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=3>)

// -----
// CHECK: !llm.quantized_tensor: element type: expected an integer of 2, 4 or 8 bits, got f32
func.func private @f(!llm.quantized_tensor<4x1024xf32, scale=f32, symmetric=true>)

// -----
// CHECK: !llm.quantized_tensor: scale: expected a floating-point type, got i8
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=i8, symmetric=true>)

// -----
// CHECK: !llm.quantized_tensor: group_size: expected a divisor of the last dimension 1024, got 100
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true, group_size=100>)

// -----
// CHECK: !llm.quantized_tensor: zp: expected an integer type of at least 8 bits, got i4
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, zp=i4>)

// -----
// CHECK: !llm.quantized_tensor: min: expected a floating-point type, got i8
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, min=i8>)

// -----
// CHECK: !llm.quantized_tensor: expected exactly one of symmetric=true, zp= and min=
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, min=f32, zp=i8>)

// -----
// CHECK: !llm.quantized_tensor: expected exactly one of symmetric=true, zp= and min=
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32>)

// -----
// CHECK: symmetric: expected true
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=false>)

// -----
// CHECK: !llm.quantized_tensor: scale is given twice
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, scale=f32>)

// -----
// CHECK: unknown parameter sclae: expected scale, zp, min, symmetric, group_size or layout
func.func private @f(!llm.quantized_tensor<4x1024xi8, sclae=f32>)

// -----
// CHECK: !llm.quantized_tensor: expected scale=, the type of the scales
func.func private @f(!llm.quantized_tensor<4x1024xi8, symmetric=true>)

// -----
// CHECK: !llm.quantized_tensor: shape: expected at least one dimension, all positive, got 4x?
func.func private @f(!llm.quantized_tensor<4x?xi8, scale=f32, symmetric=true>)

// -----
// CHECK: !llm.mixed: expected the wider type first, got i4, i8
func.func private @f(!llm.mixed_quantized_tensor<4x1024x!llm.mixed<i4,i8>, scale=f32>)

// -----
// CHECK: !llm.mixed_quantized_tensor: shape: expected a matrix, got 2x4x1024
func.func private @f(!llm.mixed_quantized_tensor<2x4x1024x!llm.mixed<i8,i4>, scale=f32>)

// -----
// CHECK: !llm.sharded_tensor: dim: expected a dimension of tensor<4096x4096xf16>, got 2
func.func private @f(!llm.sharded_tensor<tensor<4096x4096xf16>, 2, 4, 2>)

// -----
// CHECK: !llm.sharded_tensor: number of shards: expected a divisor of 4096, got 3
func.func private @f(!llm.sharded_tensor<tensor<4096x4096xf16>, 1, 3, 2>)

// -----
// CHECK: !llm.sharded_tensor: shard: expected between 0 and 3, got 4
func.func private @f(!llm.sharded_tensor<tensor<4096x4096xf16>, 1, 4, 4>)

// -----
// CHECK: !llm.quantized_tensor: last dimension: expected a multiple of 2, which share a byte, got 7
func.func @f(%w: !llm.quantized_tensor<8x7xi4, scale=f32, symmetric=true>) {
  func.return
}

// -----
// CHECK: !llm.quantized_tensor: layout: expected rows or columns, got diagonals
func.func private @f(!llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true, layout=diagonals>)

// -----
// CHECK: !llm.quantized_tensor: layout=columns: expected a matrix of integers of 4 or 8 bits, got 4x1024 of i2
func.func private @f(!llm.quantized_tensor<4x1024xi2, scale=f32, symmetric=true, layout=columns>)

// -----
// CHECK: !llm.quantized_tensor: layout=columns: expected a matrix of integers of 4 or 8 bits, got 2x4x1024 of i4
func.func private @f(!llm.quantized_tensor<2x4x1024xi4, scale=f32, symmetric=true, layout=columns>)
