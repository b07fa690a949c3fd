// RUN: llmir-opt %s -p "weight-quantization{rules=\"w|stack|middle=int8-channel,embed=int4-g8-min\"}" | filecheck %s
// RUN: llmir-opt %s -p "weight-quantization{rules=\"w|stack|middle=int8-channel,embed=int4-g8-min\"},activation-quantization{group_size=4}" | filecheck %s --check-prefix ACTIVATIONS
// RUN: llmir-opt %s -p "weight-quantization{rules=\"w|stack|middle=int8-channel,embed=int4-g8-min\"},lower-to-reference" | filecheck %s --check-prefix LOWERED
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"nothing=int8\"}" 2>&1 | filecheck %s --check-prefix NOTHING
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"w=int5\"}" 2>&1 | filecheck %s --check-prefix UNKNOWN
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"norm=int8\"}" 2>&1 | filecheck %s --check-prefix VECTOR
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"w=int8-g5\"}" 2>&1 | filecheck %s --check-prefix GROUP
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"batch=int8\"}" 2>&1 | filecheck %s --check-prefix VECTOR
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"int8\"}" 2>&1 | filecheck %s --check-prefix FORM
// RUN: not llmir-opt %s -p "weight-quantization{rules=\"w=int8-channel\"},activation-quantization{group_size=5}" 2>&1 | filecheck %s --check-prefix ACTIVATION_GROUP

// A kernel [K, N] and a table [N, K] become matrices of N rows; a stack becomes one argument a layer, at its offset; tied
// embeddings are one argument; a weight that is contracted between kept dims is laid out as it must be.
// CHECK: func.func @main(
// CHECK-SAME: [[W:%[0-9a-z]+]]: !llm.quantized_tensor<6x16xi8, scale=f32, symmetric=true> {llmir.path = "w", llmir.rows = array<i64: 6, 1>, llmir.columns = array<i64: 16, 6>}
// CHECK-SAME: !llm.quantized_tensor<16x16xi8, scale=f32, symmetric=true> {llmir.path = "stack", llmir.rows = array<i64: 16, 1>, llmir.columns = array<i64: 16, 16>}
// CHECK-SAME: !llm.quantized_tensor<16x16xi8, scale=f32, symmetric=true> {llmir.path = "stack", llmir.offset = 256 : i64
// CHECK-SAME: [[M:%[0-9a-z]+]]: !llm.quantized_tensor<6x16xi8, scale=f32, symmetric=true> {llmir.path = "middle", llmir.rows = array<i64: 2, 48, 3, 1>, llmir.columns = array<i64: 16, 3>}
// CHECK-SAME: [[E:%[0-9a-z]+]]: !llm.quantized_tensor<32x16xi4, scale=f16, min=f16, group_size=8> {llmir.path = "embed"
// CHECK-SAME: tensor<2x16x4xf32> {llmir.path = "batch"}
// CHECK-SAME: tensor<32x16xf32> {llmir.path = "twice"}
// CHECK: llm.quantized_gather([[E]], %tokens) : ({{.*}}, tensor<7xi32>) -> tensor<7x16xf32>
// CHECK: [[Y:%[0-9a-z]+]] = llm.quantized_matmul(%{{.*}}, [[W]]) {bits = 8 : i32, transpose_w = true} : ({{.*}}) -> tensor<7x6xf32>
// CHECK-NEXT: stablehlo.broadcast_in_dim %b
// CHECK-NEXT: stablehlo.add [[Y]]
// CHECK-COUNT-2: llm.quantized_matmul({{.*}}) -> tensor<7x16xf32>
// CHECK: llm.quantized_matmul({{.*}}, [[M]]) {{.*}} -> tensor<7x6xf32>
// CHECK-NEXT: stablehlo.reshape {{.*}} : (tensor<7x6xf32>) -> tensor<7x2x3xf32>
// CHECK: llm.quantized_matmul({{.*}}, [[E]]) {bits = 4 : i32, transpose_w = true}
// CHECK: stablehlo.dot_general
// CHECK: llm.linear
// CHECK-NOT: llm.quantized_matmul

// ACTIVATIONS-COUNT-5: activation_bits = 8 : i32, activation_group_size = 4 : i32
// ACTIVATIONS-NOT: activation_bits

// LOWERED: func.func @main(
// LOWERED-SAME: tensor<6x16xi8> {llmir.path = "w"
// LOWERED-SAME: tensor<6x1xf32> {llmir.path = "w"
// LOWERED-SAME: tensor<32x8xui8> {llmir.path = "embed"
// LOWERED-SAME: tensor<32x2xf16> {llmir.path = "embed"
// LOWERED-SAME: tensor<32x2xf16> {llmir.path = "embed"
// LOWERED-NOT: llm.quantized

// NOTHING: error: quantize: rule 'nothing' matches no parameter
// UNKNOWN: error: quantize: rule 'w' has scheme 'int5'; expected
// VECTOR: error: quantize: rule '{{norm|batch}}' matches only parameters that cannot be quantized
// GROUP: error: w: group_size 5 does not divide its 16 inputs
// FORM: error: weight-quantization: expected rules of the form path-regex=scheme, got 'int8'
// ACTIVATION_GROUP: error: activation-quantization: group_size 5 does not divide the 16 inputs of a matmul

builtin.module {
  func.func @main(%w: tensor<16x6xf32> {llmir.path = "w"}, %b: tensor<6xf32> {llmir.path = "b"},
                  %stack: tensor<2x16x16xf32> {llmir.path = "stack"}, %middle: tensor<2x16x3xf32> {llmir.path = "middle"},
                  %embed: tensor<32x16xf32> {llmir.path = "embed"}, %norm: tensor<16xf32> {llmir.path = "norm"},
                  %batch: tensor<2x16x4xf32> {llmir.path = "batch"}, %twice: tensor<32x16xf32> {llmir.path = "twice"},
                  %tokens: tensor<7xi32> {llmir.role = "tokens"})
      -> (tensor<7x6xf32>, tensor<7x16xf32>, tensor<7x2x3xf32>, tensor<7x32xf32>, tensor<2x7x4xf32>, tensor<7x32xf32>) {
    %ids = stablehlo.reshape %tokens : (tensor<7xi32>) -> tensor<7x1xi32>
    %x = "stablehlo.gather"(%embed, %ids) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, indices_are_sorted = false, slice_sizes = array<i64: 1, 16>}>
      : (tensor<32x16xf32>, tensor<7x1xi32>) -> tensor<7x16xf32>
    %n = llm.rms_norm %x, %norm {epsilon = 1.0e-5 : f32} : (tensor<7x16xf32>, tensor<16xf32>) -> tensor<7x16xf32>
    %0 = llm.linear %n, %w, %b : (tensor<7x16xf32>, tensor<16x6xf32>, tensor<6xf32>) -> tensor<7x6xf32>
    %1 = stablehlo.slice %stack [0:1, 0:16, 0:16] : (tensor<2x16x16xf32>) -> tensor<1x16x16xf32>
    %2 = stablehlo.reshape %1 : (tensor<1x16x16xf32>) -> tensor<16x16xf32>
    %3 = llm.linear %n, %2 : (tensor<7x16xf32>, tensor<16x16xf32>) -> tensor<7x16xf32>
    %4 = stablehlo.slice %stack [1:2, 0:16, 0:16] : (tensor<2x16x16xf32>) -> tensor<1x16x16xf32>
    %5 = stablehlo.reshape %4 : (tensor<1x16x16xf32>) -> tensor<16x16xf32>
    %6 = llm.linear %3, %5 : (tensor<7x16xf32>, tensor<16x16xf32>) -> tensor<7x16xf32>
    %7 = stablehlo.dot_general %n, %middle, contracting_dims = [1] x [1] : (tensor<7x16xf32>, tensor<2x16x3xf32>) -> tensor<7x2x3xf32>
    %8 = llm.linear %6, %embed {transpose_w = true} : (tensor<7x16xf32>, tensor<32x16xf32>) -> tensor<7x32xf32>
    %9 = stablehlo.broadcast_in_dim %n, dims = [1, 2] : (tensor<7x16xf32>) -> tensor<2x7x16xf32>
    %10 = stablehlo.dot_general %9, %batch, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<2x7x16xf32>, tensor<2x16x4xf32>) -> tensor<2x7x4xf32>
    %11 = llm.linear %n, %twice {transpose_w = true} : (tensor<7x16xf32>, tensor<32x16xf32>) -> tensor<7x32xf32>
    %12 = stablehlo.slice %twice [0:7, 0:16] : (tensor<32x16xf32>) -> tensor<7x16xf32>
    %13 = stablehlo.add %6, %12 : tensor<7x16xf32>
    func.return %0, %13, %7, %8, %10, %11 : tensor<7x6xf32>, tensor<7x16xf32>, tensor<7x2x3xf32>, tensor<7x32xf32>, tensor<2x7x4xf32>, tensor<7x32xf32>
  }
}
