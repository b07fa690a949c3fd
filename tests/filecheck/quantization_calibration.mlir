// RUN: llmir-opt %s -p "quantization-calibration{statistics=\"absmax,gram\"}" | filecheck %s
// RUN: llmir-opt %s -p "quantization-calibration{statistics=histogram},lower-to-reference" | filecheck %s --check-prefix LOWERED
// RUN: not llmir-opt %s -p "quantization-calibration{statistics=mean}" 2>&1 | filecheck %s --check-prefix UNKNOWN

// Two weights with one input share its statistics; the table has no input of its own; nothing is observed of a norm, nor
// of a weight that cannot be quantized; and what only the logits needed is gone.
// CHECK: func.func @main({{.*}}) -> (tensor<16xf32> {llmir.path = "q+k"}, tensor<16x16xf32> {llmir.path = "q+k"}, tensor<8xf32> {llmir.path = "o"}, tensor<8x8xf32> {llmir.path = "o"})
// CHECK: [[X:%[0-9a-z]+]] = stablehlo.multiply
// CHECK: llm.observe [[X]] {statistic = "absmax"} : (tensor<1x7x16xf32>) -> tensor<16xf32>
// CHECK-NEXT: llm.observe [[X]] {statistic = "gram"} : (tensor<1x7x16xf32>) -> tensor<16x16xf32>
// CHECK: [[T:%[0-9a-z]+]] = stablehlo.reshape %heads
// CHECK-NEXT: llm.observe [[T]] {statistic = "absmax"} : (tensor<7x8xf32>) -> tensor<8xf32>
// CHECK-NOT: llm.observe{{.*}}absmax
// CHECK-NOT: stablehlo.tanh

// LOWERED: -> (tensor<16x320xi32> {llmir.path = "q+k"}, tensor<8x320xi32> {llmir.path = "o"})
// LOWERED-NOT: llm.observe

// UNKNOWN: error: quantization-calibration: unknown statistic 'mean'; expected absmax, gram, histogram

func.func @main(
    %embed: tensor<32x16xf32> {llmir.path = "embed"}, %norm: tensor<1x7x16xf32> {llmir.path = "norm"},
    %q: tensor<16x8xf32> {llmir.path = "q"}, %k: tensor<16x8xf32> {llmir.path = "k"},
    %o: tensor<2x4x6xf32> {llmir.path = "o"}, %batch: tensor<7x8x5xf32> {llmir.path = "batch"},
    %tokens: tensor<1x7xi32> {llmir.role = "tokens"}) -> tensor<7x6xf32> {
  %ids = stablehlo.reshape %tokens : (tensor<1x7xi32>) -> tensor<1x7x1xi32>
  %rows = "stablehlo.gather"(%embed, %ids) <{
    dimension_numbers = #stablehlo.gather<offset_dims = [2], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 2>,
    slice_sizes = array<i64: 1, 16>}> : (tensor<32x16xf32>, tensor<1x7x1xi32>) -> tensor<1x7x16xf32>
  %x = stablehlo.multiply %rows, %norm : tensor<1x7x16xf32>
  %a = llm.linear %x, %q : (tensor<1x7x16xf32>, tensor<16x8xf32>) -> tensor<1x7x8xf32>
  %b = llm.linear %x, %k : (tensor<1x7x16xf32>, tensor<16x8xf32>) -> tensor<1x7x8xf32>
  %y = stablehlo.add %a, %b : tensor<1x7x8xf32>
  %heads = stablehlo.reshape %y : (tensor<1x7x8xf32>) -> tensor<7x2x4xf32>
  %z = "stablehlo.dot_general"(%heads, %o) <{dot_dimension_numbers = #stablehlo.dot<
    lhs_batching_dimensions = [], rhs_batching_dimensions = [],
    lhs_contracting_dimensions = [1, 2], rhs_contracting_dimensions = [0, 1]>}>
    : (tensor<7x2x4xf32>, tensor<2x4x6xf32>) -> tensor<7x6xf32>
  %logits = stablehlo.tanh %z : tensor<7x6xf32>
  func.return %logits : tensor<7x6xf32>
}
