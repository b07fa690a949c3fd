// RUN: llmir-opt %s -p lower-to-cpu | filecheck %s

// Two calls of native code and, between them, what has none: a sort. What XLA reads of the parameters stays an argument
// (%taps), all others lie in one array. Pages are the calls' operands and results in place, those of a quantized cache as
// the arrays that hold them; the last result of a call is its scratch.
// CHECK: func.func @main([[W:%[0-9a-z]+]]: tensor<{{[0-9]+}}xui8> {llmir.role = "weights"}, %taps: tensor<16xf32> {llmir.path = "taps"}, %k_pages: tensor<8x4x2x8xf32> {llmir.role = "k_pages"}, [[V:%[0-9a-z]+]]: tensor<8x4x2x8xi8> {llmir.role = "v_pages"}, [[S:%[0-9a-z]+]]: tensor<8x4x2x1xf16> {llmir.role = "v_pages"}, %x: tensor<3x16xf32>
// CHECK-NEXT: [[R:%[0-9a-z]+]] = {{.*}}stablehlo.reverse{{.*}}%taps
// CHECK-NEXT: [[M:%[0-9a-z]+]], [[K1:%[0-9a-z]+]], [[V1:%[0-9a-z]+]], [[S1:%[0-9a-z]+]], %{{[0-9a-z]+}} = stablehlo.custom_call @llmir_cpu_{{[0-9a-f]+}}([[W]], %x, %k_pages, [[V]], [[S]], %ids, %p, %tables, %n, %lens, [[R]])
// CHECK-SAME: api_version = 4 : i32
// CHECK-SAME: output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [1], operand_index = 2, operand_tuple_indices = []>, #stablehlo.output_operand_alias<output_tuple_indices = [2], operand_index = 3, operand_tuple_indices = []>, #stablehlo.output_operand_alias<output_tuple_indices = [3], operand_index = 4, operand_tuple_indices = []>]
// CHECK-NEXT: %sorted = "stablehlo.sort"([[M]])
// CHECK-NOT: stablehlo.multiply
// CHECK: [[Y:%[0-9a-z]+]], %{{[0-9a-z]+}} = stablehlo.custom_call @llmir_cpu_{{[0-9a-f]+}}([[W]], %sorted, [[M]])
// CHECK-NEXT: func.return [[Y]], [[K1]], [[V1]], [[S1]]
// CHECK-NOT: llm.

builtin.module {
  func.func @main(%w: tensor<32x16xf32> {llmir.path = "w"}, %norm: tensor<16xf32> {llmir.path = "norm"},
                  %taps: tensor<16xf32> {llmir.path = "taps"},
                  %k_pages: tensor<8x4x2x8xf32> {llmir.role = "k_pages"}, %v_pages: !llm.quantized_tensor<8x4x2x8xi8, scale=f16, symmetric=true> {llmir.role = "v_pages"},
                  %x: tensor<3x16xf32> {llmir.role = "x"}, %ids: tensor<3xi32> {llmir.role = "seq_ids"}, %p: tensor<3xi32> {llmir.role = "positions"},
                  %tables: tensor<2x4xi32> {llmir.role = "block_tables"}, %lens: tensor<2xi32> {llmir.role = "seq_lens"}, %n: tensor<i32> {llmir.role = "num_tokens"})
      -> (tensor<3x16xf32>, tensor<8x4x2x8xf32>, !llm.quantized_tensor<8x4x2x8xi8, scale=f16, symmetric=true>) {
    %h = llm.rms_norm %x, %norm {epsilon = 1.0e-5 : f32} : (tensor<3x16xf32>, tensor<16xf32>) -> tensor<3x16xf32>
    %kv = llm.linear %h, %w {transpose_w = true} : (tensor<3x16xf32>, tensor<32x16xf32>) -> tensor<3x32xf32>
    %k0 = stablehlo.slice %kv [0:3, 0:16] : (tensor<3x32xf32>) -> tensor<3x16xf32>
    %k = stablehlo.reshape %k0 : (tensor<3x16xf32>) -> tensor<3x2x8xf32>
    %v0 = stablehlo.slice %kv [0:3, 16:32] : (tensor<3x32xf32>) -> tensor<3x16xf32>
    %v = stablehlo.reshape %v0 : (tensor<3x16xf32>) -> tensor<3x2x8xf32>
    %kp, %vp = llm.write_pages %k_pages, %v_pages, %k, %v, %ids, %p, %tables, %n : (tensor<8x4x2x8xf32>, !llm.quantized_tensor<8x4x2x8xi8, scale=f16, symmetric=true>, tensor<3x2x8xf32>, tensor<3x2x8xf32>, tensor<3xi32>, tensor<3xi32>, tensor<2x4xi32>, tensor<i32>) -> (tensor<8x4x2x8xf32>, !llm.quantized_tensor<8x4x2x8xi8, scale=f16, symmetric=true>)
    %o = llm.attend_pages %k, %kp, %vp, %tables, %lens, %ids, %p, %n {scale = 0.3 : f32} : (tensor<3x2x8xf32>, tensor<8x4x2x8xf32>, !llm.quantized_tensor<8x4x2x8xi8, scale=f16, symmetric=true>, tensor<2x4xi32>, tensor<2xi32>, tensor<3xi32>, tensor<3xi32>, tensor<i32>) -> tensor<3x2x8xf32>
    %flat = stablehlo.reshape %o : (tensor<3x2x8xf32>) -> tensor<3x16xf32>
    %r = "stablehlo.reverse"(%taps) <{dimensions = array<i64: 0>}> : (tensor<16xf32>) -> tensor<16xf32>
    %wide = stablehlo.broadcast_in_dim %r, dims = [1] : (tensor<16xf32>) -> tensor<3x16xf32>
    %m = stablehlo.add %flat, %wide : tensor<3x16xf32>
    %sorted = "stablehlo.sort"(%m) <{dimension = 1 : i64, is_stable = true}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %less = stablehlo.compare LT, %a, %b : (tensor<f32>, tensor<f32>) -> tensor<i1>
      stablehlo.return %less : tensor<i1>
    }) : (tensor<3x16xf32>) -> tensor<3x16xf32>
    %y = stablehlo.multiply %sorted, %m : tensor<3x16xf32>
    func.return %y, %kp, %vp : tensor<3x16xf32>, tensor<8x4x2x8xf32>, !llm.quantized_tensor<8x4x2x8xi8, scale=f16, symmetric=true>
  }
}
