// RUN: llmir-opt %s -p quantized-operation-fusion | filecheck %s
// RUN: llmir-opt %s -p quantized-operation-fusion,quantized-operation-fusion | filecheck %s

// Two of one input, format and activation become one; slices give them back.
// CHECK: func.func @main(
// CHECK-SAME: [[QK:%[0-9a-z]+]]: !llm.quantized_tensor<12x16xi8, scale=f32, symmetric=true> {llmir.path = "q+k", llmir.parts = [{llmir.path = "q", llmir.rows = array<i64: 8, 1>, llmir.columns = array<i64: 16, 8>}, {llmir.path = "k", llmir.offset = 64 : i64,
// CHECK-SAME: %tied: !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true>
// CHECK: [[Y:%[0-9a-z]+]] = llm.quantized_matmul(%x, [[QK]]) {bits = 8 : i32, transpose_w = true, activation_bits = 8 : i32} : ({{.*}}) -> tensor<7x12xf32>
// CHECK-NEXT: [[Q:%[0-9a-z]+]] = stablehlo.slice [[Y]] [0:7, 0:8]
// CHECK-NEXT: [[K:%[0-9a-z]+]] = stablehlo.slice [[Y]] [0:7, 8:12]

// One of another width, one without rounded activations, one of another input, and one whose weight is read twice stay.
// CHECK-COUNT-5: llm.quantized_matmul
// CHECK-NOT: llm.quantized_matmul
// CHECK: func.return [[Q]], [[K]]

builtin.module {
  func.func @main(
      %q: !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true> {llmir.path = "q", llmir.rows = array<i64: 8, 1>, llmir.columns = array<i64: 16, 8>},
      %k: !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true> {llmir.path = "k", llmir.offset = 64 : i64, llmir.rows = array<i64: 4, 1>, llmir.columns = array<i64: 16, 4>},
      %v: !llm.quantized_tensor<4x16xi4, scale=f32, symmetric=true> {llmir.path = "v", llmir.rows = array<i64: 4, 1>, llmir.columns = array<i64: 16, 4>},
      %o: !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true> {llmir.path = "o", llmir.rows = array<i64: 4, 1>, llmir.columns = array<i64: 16, 4>},
      %p: !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true> {llmir.path = "p", llmir.rows = array<i64: 4, 1>, llmir.columns = array<i64: 16, 4>},
      %tied: !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true> {llmir.path = "tied", llmir.rows = array<i64: 4, 1>, llmir.columns = array<i64: 16, 4>},
      %x: tensor<7x16xf32>, %z: tensor<7x16xf32>)
      -> (tensor<7x8xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>) {
    %0 = llm.quantized_matmul(%x, %q) {bits = 8 : i32, transpose_w = true, activation_bits = 8 : i32} : (tensor<7x16xf32>, !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>) -> tensor<7x8xf32>
    %1 = llm.quantized_matmul(%x, %k) {bits = 8 : i32, transpose_w = true, activation_bits = 8 : i32} : (tensor<7x16xf32>, !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true>) -> tensor<7x4xf32>
    %2 = llm.quantized_matmul(%x, %v) {bits = 4 : i32, transpose_w = true, activation_bits = 8 : i32} : (tensor<7x16xf32>, !llm.quantized_tensor<4x16xi4, scale=f32, symmetric=true>) -> tensor<7x4xf32>
    %3 = llm.quantized_matmul(%x, %o) {bits = 8 : i32, transpose_w = true} : (tensor<7x16xf32>, !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true>) -> tensor<7x4xf32>
    %4 = llm.quantized_matmul(%z, %p) {bits = 8 : i32, transpose_w = true, activation_bits = 8 : i32} : (tensor<7x16xf32>, !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true>) -> tensor<7x4xf32>
    %5 = llm.quantized_matmul(%x, %tied) {bits = 8 : i32, transpose_w = true, activation_bits = 8 : i32} : (tensor<7x16xf32>, !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true>) -> tensor<7x4xf32>
    %6 = llm.quantized_matmul(%z, %tied) {bits = 8 : i32, transpose_w = true, activation_bits = 8 : i32} : (tensor<7x16xf32>, !llm.quantized_tensor<4x16xi8, scale=f32, symmetric=true>) -> tensor<7x4xf32>
    func.return %0, %1, %2, %3, %4, %5, %6 : tensor<7x8xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>, tensor<7x4xf32>
  }
}
