// RUN: llmir-opt %s -p raise-linear,raise-gated-mlp | filecheck %s
// RUN: llmir-opt %s -p raise-linear,raise-gated-mlp,raise-gated-mlp | filecheck %s

// CHECK: func.func @main
// CHECK-NEXT: [[MLP:%[0-9a-z]+]] = llm.gated_mlp %x, %gate, %up, %down {activation = "silu", llmir.loc = "model.py:4 (mlp)"}
// CHECK-SAME: (tensor<7x4xf32>, tensor<4x6xf32>, tensor<4x6xf32>, tensor<6x4xf32>) -> tensor<7x4xf32>

// A sigmoid alone is no activation of a gated MLP: its three layers stay.
// CHECK: llm.linear %x, %up
// CHECK: llm.linear %x, %gate
// CHECK: stablehlo.logistic
// CHECK: [[STAYS:%[0-9a-z]+]] = llm.linear %{{.*}}, %down
// CHECK-NEXT: func.return [[MLP]], [[STAYS]]

builtin.module {
  func.func @main(%x: tensor<7x4xf32>, %gate: tensor<4x6xf32> {llmir.path = "gate"}, %up: tensor<4x6xf32> {llmir.path = "up"},
                  %down: tensor<6x4xf32> {llmir.path = "down"}) -> (tensor<7x4xf32>, tensor<7x4xf32>) {
    %one = stablehlo.constant dense<1.0> : tensor<7x6xf32>
    %g = stablehlo.dot_general %x, %gate, contracting_dims = [1] x [0] : (tensor<7x4xf32>, tensor<4x6xf32>) -> tensor<7x6xf32>
    %0 = stablehlo.negate %g : tensor<7x6xf32>
    %1 = stablehlo.exponential %0 : tensor<7x6xf32>
    %2 = stablehlo.add %one, %1 : tensor<7x6xf32>
    %3 = stablehlo.divide %one, %2 : tensor<7x6xf32>
    %4 = stablehlo.multiply %g, %3 : tensor<7x6xf32>
    %u = stablehlo.dot_general %x, %up, contracting_dims = [1] x [0] : (tensor<7x4xf32>, tensor<4x6xf32>) -> tensor<7x6xf32>
    %5 = stablehlo.multiply %4, %u : tensor<7x6xf32>
    %6 = stablehlo.dot_general %5, %down, contracting_dims = [1] x [0] {llmir.loc = "model.py:4 (mlp)"}
      : (tensor<7x6xf32>, tensor<6x4xf32>) -> tensor<7x4xf32>

    %u2 = stablehlo.dot_general %x, %up, contracting_dims = [1] x [0] : (tensor<7x4xf32>, tensor<4x6xf32>) -> tensor<7x6xf32>
    %g2 = stablehlo.dot_general %x, %gate, contracting_dims = [1] x [0] : (tensor<7x4xf32>, tensor<4x6xf32>) -> tensor<7x6xf32>
    %7 = stablehlo.logistic %g2 : tensor<7x6xf32>
    %8 = stablehlo.multiply %7, %u2 : tensor<7x6xf32>
    %9 = stablehlo.dot_general %8, %down, contracting_dims = [1] x [0] : (tensor<7x6xf32>, tensor<6x4xf32>) -> tensor<7x4xf32>
    func.return %6, %9 : tensor<7x4xf32>, tensor<7x4xf32>
  }
}
