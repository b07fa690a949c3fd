// RUN: llmir-opt %s -p rewrite-positions | filecheck %s
// RUN: llmir-opt %s -p rewrite-positions,rewrite-positions | filecheck %s
// RUN: llmir-opt %s -p rewrite-positions,check-token-axis | filecheck %s
// RUN: llmir-opt %s -p "check-token-axis{annotate=true}" | filecheck %s --check-prefix DIMS

// Traced at 13 tokens: the count of tokens becomes the positions input, rows of a table from a fixed one on a gather.
// A count along another dim is none of its business, nor is a slice that takes part of another dim.

// CHECK: func.func @main({{.*}}[[P:%[0-9a-z]+]]: tensor<13xi32> {llmir.role = "positions"}) -> tensor<1x13x4xf32>
// CHECK-NOT: stablehlo.slice %table
// CHECK: stablehlo.iota dim = 0 : tensor<4xf32>
// CHECK-NOT: stablehlo.iota
// CHECK: stablehlo.convert [[P]] : (tensor<13xi32>) -> tensor<13xf32>
// CHECK: stablehlo.add [[P]]
// CHECK: "stablehlo.gather"(%table, %{{.*}} -> tensor<13x8xf32>
// CHECK: stablehlo.slice %{{.*}} [0:13, 0:4]
// CHECK-NOT: stablehlo.iota

// DIMS: "stablehlo.gather"(%embed{{.*}}llmir.token_dims = array<i64: 1>
// DIMS: stablehlo.iota dim = 0 : tensor<4xf32>
// DIMS: stablehlo.broadcast_in_dim {{.*}} {llmir.token_dims = array<i64: 0>} : (tensor<4xf32>) -> tensor<13x4xf32>
// DIMS: stablehlo.iota dim = 0 {llmir.token_dims = array<i64: 0>} : tensor<13xf32>
// DIMS: stablehlo.slice %table {{.*}} {llmir.token_dims = array<i64: 0>}

builtin.module attributes {llmir.length = 13 : i64} {
  func.func @main(%embed: tensor<5x4xf32> {llmir.path = "e"}, %table: tensor<32x8xf32> {llmir.path = "t"},
                  %tokens: tensor<1x13xi32> {llmir.role = "tokens"}) -> tensor<1x13x4xf32> {
    %ids = stablehlo.reshape %tokens : (tensor<1x13xi32>) -> tensor<1x13x1xi32>
    %e = "stablehlo.gather"(%embed, %ids) <{dimension_numbers = #stablehlo.gather<offset_dims = [2], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 2>, slice_sizes = array<i64: 1, 4>, indices_are_sorted = false}>
      : (tensor<5x4xf32>, tensor<1x13x1xi32>) -> tensor<1x13x4xf32>
    %c = stablehlo.iota dim = 0 : tensor<4xf32>
    %cb = stablehlo.broadcast_in_dim %c, dims = [1] : (tensor<4xf32>) -> tensor<13x4xf32>
    %p = stablehlo.iota dim = 0 : tensor<13xf32>
    %pb = stablehlo.broadcast_in_dim %p, dims = [0] : (tensor<13xf32>) -> tensor<13x4xf32>
    %rows = stablehlo.slice %table [2:15, 0:4] : (tensor<32x8xf32>) -> tensor<13x4xf32>
    %s0 = stablehlo.multiply %pb, %cb : tensor<13x4xf32>
    %s1 = stablehlo.add %s0, %rows : tensor<13x4xf32>
    %sb = stablehlo.broadcast_in_dim %s1, dims = [1, 2] : (tensor<13x4xf32>) -> tensor<1x13x4xf32>
    %r = stablehlo.add %e, %sb : tensor<1x13x4xf32>
    func.return %r : tensor<1x13x4xf32>
  }
}
