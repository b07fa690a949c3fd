// RUN: llmir-opt %s -p remove-dead-arguments | filecheck %s
// RUN: llmir-opt %s -p remove-dead-arguments,remove-dead-arguments | filecheck %s
// RUN: llmir-opt %s -p "remove-dead-arguments{keep_inputs=true}" | filecheck %s --check-prefix KEEP

// What only dead code reads goes with that code; step inputs can be kept.

// CHECK: func.func @main(%w: tensor<4xf32> {llmir.path = "w"}) -> tensor<4xf32>
// KEEP: func.func @main(%w: tensor<4xf32> {llmir.path = "w"}, %positions: tensor<7xi32> {llmir.role = "positions"}) -> tensor<4xf32>
// CHECK-NEXT: stablehlo.negate
// CHECK-NEXT: func.return
func.func @main(%w: tensor<4xf32> {llmir.path = "w"}, %unused: tensor<4xf32> {llmir.path = "b"},
                %positions: tensor<7xi32> {llmir.role = "positions"},
                %dead: tensor<4xf32> {llmir.path = "c"}) -> tensor<4xf32> {
  %0 = stablehlo.negate %w : tensor<4xf32>
  %1 = stablehlo.add %dead, %dead : tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
