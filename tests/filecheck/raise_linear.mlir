// RUN: llmir-opt %s -p raise-linear | filecheck %s
// RUN: llmir-opt %s -p raise-linear,raise-linear | filecheck %s

// Into heads, with a bias: one weight of two dims, the result reshaped.
// CHECK: [[W:%[0-9a-z]+]] = stablehlo.reshape %w {{.*}}: (tensor<12x3x4xf32>) -> tensor<12x12xf32>
// CHECK: [[B:%[0-9a-z]+]] = stablehlo.reshape %b {{.*}}: (tensor<3x4xf32>) -> tensor<12xf32>
// CHECK: [[Y:%[0-9a-z]+]] = llm.linear %x, [[W]], [[B]] {llmir.loc = "model.py:3 (project)"} : (tensor<1x7x12xf32>,
// CHECK-NEXT: [[HEADS:%[0-9a-z]+]] = stablehlo.reshape [[Y]] {{.*}}: (tensor<1x7x12xf32>) -> tensor<1x7x3x4xf32>

// One of a stack, transposed.
// CHECK: [[ONE:%[0-9a-z]+]] = stablehlo.reshape %{{.*}} : (tensor<1x5x12xf32>) -> tensor<5x12xf32>
// CHECK: [[OUT:%[0-9a-z]+]] = llm.linear %x, [[ONE]] {transpose_w = true} : (tensor<1x7x12xf32>, tensor<5x12xf32>) -> tensor<1x7x5xf32>

// Products with what is no parameter, or of a precision of its own, stay.
// CHECK-NOT: llm.linear
// CHECK: stablehlo.dot_general %x, %v, contracting_dims = [2] x [0]
// CHECK: stablehlo.dot_general %x, {{.*}}, precision = [HIGHEST, HIGHEST]
// CHECK: func.return [[HEADS]], [[OUT]]

builtin.module {
  func.func @main(%x: tensor<1x7x12xf32>, %w: tensor<12x3x4xf32> {llmir.path = "w"}, %b: tensor<3x4xf32> {llmir.path = "b"},
                  %stack: tensor<2x5x12xf32> {llmir.path = "stack"}, %v: tensor<12x6xf32>)
      -> (tensor<1x7x3x4xf32>, tensor<1x7x5xf32>, tensor<1x7x6xf32>, tensor<1x7x5xf32>) {
    %0 = stablehlo.dot_general %x, %w, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] {llmir.loc = "model.py:3 (project)"}
      : (tensor<1x7x12xf32>, tensor<12x3x4xf32>) -> tensor<1x7x3x4xf32>
    %1 = stablehlo.broadcast_in_dim %b, dims = [2, 3] : (tensor<3x4xf32>) -> tensor<1x7x3x4xf32>
    %2 = stablehlo.add %0, %1 : tensor<1x7x3x4xf32>
    %3 = stablehlo.slice %stack [1:2, 0:5, 0:12] : (tensor<2x5x12xf32>) -> tensor<1x5x12xf32>
    %4 = stablehlo.reshape %3 : (tensor<1x5x12xf32>) -> tensor<5x12xf32>
    %5 = stablehlo.transpose %4, dims = [1, 0] : (tensor<5x12xf32>) -> tensor<12x5xf32>
    %6 = stablehlo.dot_general %x, %5, contracting_dims = [2] x [0] : (tensor<1x7x12xf32>, tensor<12x5xf32>) -> tensor<1x7x5xf32>
    %7 = stablehlo.dot_general %x, %v, contracting_dims = [2] x [0] : (tensor<1x7x12xf32>, tensor<12x6xf32>) -> tensor<1x7x6xf32>
    %8 = stablehlo.dot_general %x, %5, contracting_dims = [2] x [0], precision = [HIGHEST, HIGHEST]
      : (tensor<1x7x12xf32>, tensor<12x5xf32>) -> tensor<1x7x5xf32>
    func.return %2, %6, %7, %8 : tensor<1x7x3x4xf32>, tensor<1x7x5xf32>, tensor<1x7x6xf32>, tensor<1x7x5xf32>
  }
}
