// RUN: llmir-opt %s -p raise-rope | filecheck %s
// RUN: llmir-opt %s -p raise-rope,raise-rope | filecheck %s

// Halves of [1, T, H, D]: x is reshaped to [T, H, D] and back.
// CHECK: [[X:%[0-9a-z]+]] = stablehlo.reshape %x {{.*}}: (tensor<1x7x3x8xf32>) -> tensor<7x3x8xf32>
// CHECK-NEXT: [[ROPE:%[0-9a-z]+]] = llm.rope [[X]], %cos, %sin {rotary_dim = 8 : i64, llmir.loc = "model.py:2 (rotate)"}
// CHECK-SAME: (tensor<7x3x8xf32>, tensor<7x4xf32>, tensor<7x4xf32>) -> tensor<7x3x8xf32>
// CHECK-NEXT: [[HALVES:%[0-9a-z]+]] = stablehlo.reshape [[ROPE]] {{.*}}: (tensor<7x3x8xf32>) -> tensor<1x7x3x8xf32>

// Every other feature of the first four, the rest kept.
// CHECK: llm.rope %{{.*}} {interleaved = true, rotary_dim = 4 : i64}
// CHECK-SAME: (tensor<7x3x8xf32>, tensor<7x2xf32>, tensor<7x2xf32>) -> tensor<7x3x8xf32>

// A sine of the wrong sign is no rotation.
// CHECK-NOT: llm.
// CHECK: [[STAYS:%[0-9a-z]+]] = stablehlo.concatenate
// CHECK-NEXT: func.return [[HALVES]], %{{.*}}, [[STAYS]]

builtin.module {
  func.func @main(%x: tensor<1x7x3x8xf32>, %cos: tensor<7x4xf32>, %sin: tensor<7x4xf32>)
      -> (tensor<1x7x3x8xf32>, tensor<1x7x3x8xf32>, tensor<1x7x3x8xf32>) {
    %c = stablehlo.broadcast_in_dim %cos, dims = [1, 3] : (tensor<7x4xf32>) -> tensor<1x7x3x4xf32>
    %s = stablehlo.broadcast_in_dim %sin, dims = [1, 3] : (tensor<7x4xf32>) -> tensor<1x7x3x4xf32>
    %a = stablehlo.slice %x [0:1, 0:7, 0:3, 0:4] : (tensor<1x7x3x8xf32>) -> tensor<1x7x3x4xf32>
    %b = stablehlo.slice %x [0:1, 0:7, 0:3, 4:8] : (tensor<1x7x3x8xf32>) -> tensor<1x7x3x4xf32>
    %0 = stablehlo.multiply %a, %c : tensor<1x7x3x4xf32>
    %1 = stablehlo.multiply %b, %s : tensor<1x7x3x4xf32>
    %2 = stablehlo.subtract %0, %1 : tensor<1x7x3x4xf32>
    %3 = stablehlo.multiply %b, %c : tensor<1x7x3x4xf32>
    %4 = stablehlo.multiply %a, %s : tensor<1x7x3x4xf32>
    %5 = stablehlo.add %3, %4 : tensor<1x7x3x4xf32>
    %6 = stablehlo.concatenate %2, %5, dim = 3 {llmir.loc = "model.py:2 (rotate)"}
      : (tensor<1x7x3x4xf32>, tensor<1x7x3x4xf32>) -> tensor<1x7x3x8xf32>

    %c2 = stablehlo.slice %c [0:1, 0:7, 0:3, 0:2] : (tensor<1x7x3x4xf32>) -> tensor<1x7x3x2xf32>
    %s2 = stablehlo.slice %s [0:1, 0:7, 0:3, 0:2] : (tensor<1x7x3x4xf32>) -> tensor<1x7x3x2xf32>
    %even = stablehlo.slice %x [0:1, 0:7, 0:3, 0:4:2] : (tensor<1x7x3x8xf32>) -> tensor<1x7x3x2xf32>
    %odd = stablehlo.slice %x [0:1, 0:7, 0:3, 1:4:2] : (tensor<1x7x3x8xf32>) -> tensor<1x7x3x2xf32>
    %7 = stablehlo.multiply %even, %c2 : tensor<1x7x3x2xf32>
    %8 = stablehlo.multiply %odd, %s2 : tensor<1x7x3x2xf32>
    %9 = stablehlo.subtract %7, %8 : tensor<1x7x3x2xf32>
    %10 = stablehlo.multiply %odd, %c2 : tensor<1x7x3x2xf32>
    %11 = stablehlo.multiply %even, %s2 : tensor<1x7x3x2xf32>
    %12 = stablehlo.add %10, %11 : tensor<1x7x3x2xf32>
    %13 = stablehlo.reshape %9 : (tensor<1x7x3x2xf32>) -> tensor<1x7x3x2x1xf32>
    %14 = stablehlo.reshape %12 : (tensor<1x7x3x2xf32>) -> tensor<1x7x3x2x1xf32>
    %15 = stablehlo.concatenate %13, %14, dim = 4
      : (tensor<1x7x3x2x1xf32>, tensor<1x7x3x2x1xf32>) -> tensor<1x7x3x2x2xf32>
    %16 = stablehlo.reshape %15 : (tensor<1x7x3x2x2xf32>) -> tensor<1x7x3x4xf32>
    %17 = stablehlo.concatenate %16, %b, dim = 3 : (tensor<1x7x3x4xf32>, tensor<1x7x3x4xf32>) -> tensor<1x7x3x8xf32>

    %18 = stablehlo.subtract %3, %4 : tensor<1x7x3x4xf32>
    %19 = stablehlo.concatenate %2, %18, dim = 3 : (tensor<1x7x3x4xf32>, tensor<1x7x3x4xf32>) -> tensor<1x7x3x8xf32>
    func.return %6, %17, %19 : tensor<1x7x3x8xf32>, tensor<1x7x3x8xf32>, tensor<1x7x3x8xf32>
  }
}
