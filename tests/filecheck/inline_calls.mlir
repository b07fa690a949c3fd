// RUN: llmir-opt %s -p inline-calls | filecheck %s
// RUN: llmir-opt %s -p inline-calls,inline-calls | filecheck %s

// Calls go, calls inside of what was inlined and inside of regions too; a function that is not private stays.

// CHECK-LABEL: func.func public @main
// CHECK-NOT: func.call
// CHECK: stablehlo.tanh %x {llmir.loc = "model.py:9 (f)"}
// CHECK-NEXT: stablehlo.negate
// CHECK-NEXT: stablehlo.if
// CHECK: stablehlo.tanh
// CHECK: stablehlo.negate
// CHECK-NOT: @inner
// CHECK-NOT: @outer
// CHECK: func.func public @other
func.func public @main(%x: tensor<4xf32>, %p: tensor<i1>) -> tensor<4xf32> {
  %0 = func.call @outer(%x) {llmir.loc = "model.py:9 (f)"} : (tensor<4xf32>) -> tensor<4xf32>
  %1 = "stablehlo.if"(%p) ({
    %2 = func.call @outer(%0) : (tensor<4xf32>) -> tensor<4xf32>
    stablehlo.return %2 : tensor<4xf32>
  }, {
    stablehlo.return %0 : tensor<4xf32>
  }) : (tensor<i1>) -> tensor<4xf32>
  func.return %1 : tensor<4xf32>
}
func.func private @outer(%x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = stablehlo.tanh %x : tensor<4xf32>
  %1 = func.call @inner(%0) : (tensor<4xf32>) -> tensor<4xf32>
  func.return %1 : tensor<4xf32>
}
func.func private @inner(%x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = stablehlo.negate %x : tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
func.func public @other() {
  func.return
}
