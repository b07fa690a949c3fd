// RUN: llmir-opt %s -p check-token-axis --split-input-file --verify-diagnostics | filecheck %s

// One line for each kind of mixing: the operation, where it is in the source, and why.

// CHECK: stablehlo.reduce at model.py:3 (f): reduces over the token axis (dim 1). Outside of causal attention
builtin.module attributes {llmir.length = 13 : i64} {
  func.func @main(%x: tensor<5x4xf32> {llmir.path = "x"}, %tokens: tensor<1x13xi32> {llmir.role = "tokens"}) -> tensor<1xi32> {
    %zero = stablehlo.constant dense<0> : tensor<i32>
    %sum = "stablehlo.reduce"(%tokens, %zero) <{dimensions = array<i64: 1>}> ({
    ^bb0(%a: tensor<i32>, %b: tensor<i32>):
      %m = stablehlo.add %a, %b : tensor<i32>
      stablehlo.return %m : tensor<i32>
    }) {llmir.loc = "model.py:3 (f)"} : (tensor<1x13xi32>, tensor<i32>) -> tensor<1xi32>
    func.return %sum : tensor<1xi32>
  }
}

// -----
// CHECK: stablehlo.slice at unknown location: takes part of the token axis (dim 1)
builtin.module attributes {llmir.length = 13 : i64} {
  func.func @main(%tokens: tensor<1x13xi32> {llmir.role = "tokens"}) -> tensor<1x1xi32> {
    %last = stablehlo.slice %tokens [0:1, 12:13] : (tensor<1x13xi32>) -> tensor<1x1xi32>
    func.return %last : tensor<1x1xi32>
  }
}

// -----
// CHECK: stablehlo.add at model.py:5 (f): uses a value of positions that cannot be served: stablehlo.constant at model.py:4 (f) is a constant that depends on the sequence length, and one trace does not tell whether it is a table of the position
builtin.module attributes {llmir.length = 3 : i64} {
  func.func @main(%tokens: tensor<1x3xi32> {llmir.role = "tokens"}) -> tensor<1x3xi32> {
    %c = stablehlo.constant {llmir.loc = "model.py:4 (f)"} dense<[[0, 1, 2]]> : tensor<1x3xi32>
    %r = stablehlo.add %tokens, %c {llmir.loc = "model.py:5 (f)"} : tensor<1x3xi32>
    func.return %r : tensor<1x3xi32>
  }
}

// -----
// CHECK: the module has no attribute llmir.length: expected the number of tokens it was traced at
func.func @main(%tokens: tensor<1x13xi32> {llmir.role = "tokens"}) -> tensor<1x13xi32> {
  func.return %tokens : tensor<1x13xi32>
}
