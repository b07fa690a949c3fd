// RUN: llmir-opt %s -p unroll-loops,dce --split-input-file | filecheck %s
// RUN: llmir-opt %s -p unroll-loops,unroll-loops,dce --split-input-file | filecheck %s

// A loop over two stacked layers becomes two copies of its body, and what is sliced by the counter a plain slice.

// CHECK-LABEL: func.func @layers
// CHECK-NOT: stablehlo.while
// CHECK: stablehlo.slice %w [0:1, 0:4]
// CHECK: stablehlo.multiply
// CHECK: stablehlo.slice %w [1:2, 0:4]
// CHECK: stablehlo.multiply
// CHECK-NOT: stablehlo.multiply
// CHECK: func.return
func.func @layers(%x: tensor<4xf32>, %w: tensor<2x4xf32>) -> tensor<4xf32> {
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %0, %1 = "stablehlo.while"(%zero, %x) ({
  ^bb0(%i: tensor<i32>, %y: tensor<4xf32>):
    %n = stablehlo.constant dense<2> : tensor<i32>
    %2 = stablehlo.compare LT, %i, %n, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %2 : tensor<i1>
  }, {
  ^bb0(%i: tensor<i32>, %y: tensor<4xf32>):
    %c0 = stablehlo.constant dense<0> : tensor<i32>
    %c1 = stablehlo.constant dense<1> : tensor<i32>
    %2 = "stablehlo.dynamic_slice"(%w, %i, %c0) <{slice_sizes = array<i64: 1, 4>}>
      : (tensor<2x4xf32>, tensor<i32>, tensor<i32>) -> tensor<1x4xf32>
    %3 = "stablehlo.reshape"(%2) : (tensor<1x4xf32>) -> tensor<4xf32>
    %4 = stablehlo.multiply %y, %3 : tensor<4xf32>
    %5 = stablehlo.add %i, %c1 : tensor<i32>
    stablehlo.return %5, %4 : tensor<i32>, tensor<4xf32>
  }) : (tensor<i32>, tensor<4xf32>) -> (tensor<i32>, tensor<4xf32>)
  func.return %1 : tensor<4xf32>
}

// -----
// How often a loop runs that an argument bounds is not known: it stays.

// CHECK-LABEL: func.func @unknown
// CHECK: stablehlo.while
func.func @unknown(%x: tensor<4xf32>, %n: tensor<i32>) -> tensor<4xf32> {
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %0, %1 = "stablehlo.while"(%zero, %x) ({
  ^bb0(%i: tensor<i32>, %y: tensor<4xf32>):
    %2 = stablehlo.compare LT, %i, %n, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %2 : tensor<i1>
  }, {
  ^bb0(%i: tensor<i32>, %y: tensor<4xf32>):
    %c1 = stablehlo.constant dense<1> : tensor<i32>
    %3 = stablehlo.negate %y : tensor<4xf32>
    %5 = stablehlo.add %i, %c1 : tensor<i32>
    stablehlo.return %5, %3 : tensor<i32>, tensor<4xf32>
  }) : (tensor<i32>, tensor<4xf32>) -> (tensor<i32>, tensor<4xf32>)
  func.return %1 : tensor<4xf32>
}

// -----
// A branch that a constant selects is taken; one that an argument selects stays.

// CHECK-LABEL: func.func @branches
// CHECK-NEXT: %{{.*}} = stablehlo.tanh %x
// CHECK-NEXT: %{{.*}} = "stablehlo.if"(%p)
func.func @branches(%x: tensor<4xf32>, %p: tensor<i1>) -> tensor<4xf32> {
  %c = stablehlo.constant dense<false> : tensor<i1>
  %0 = "stablehlo.if"(%c) ({
    %1 = stablehlo.negate %x : tensor<4xf32>
    stablehlo.return %1 : tensor<4xf32>
  }, {
    %1 = stablehlo.tanh %x : tensor<4xf32>
    stablehlo.return %1 : tensor<4xf32>
  }) : (tensor<i1>) -> tensor<4xf32>
  %2 = "stablehlo.if"(%p) ({
    stablehlo.return %0 : tensor<4xf32>
  }, {
    stablehlo.return %x : tensor<4xf32>
  }) : (tensor<i1>) -> tensor<4xf32>
  func.return %2 : tensor<4xf32>
}
