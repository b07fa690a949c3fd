// RUN: llmir-opt %s -p sink-logits-rows | filecheck %s --check-prefix SINK
// RUN: llmir-opt %s -p sink-logits-rows,sink-logits-rows | filecheck %s --check-prefix SINK
// RUN: llmir-opt %s -p "sink-logits-rows{at_logits=true}" | filecheck %s --check-prefix STAY
// RUN: llmir-opt %s -p "sink-logits-rows,specialize-tokens{tokens=32}" | filecheck %s --check-prefix TOKENS
// RUN: llmir-opt %s -p "sink-logits-rows,specialize-tokens{tokens=4},specialize-tokens{tokens=4}" | filecheck %s --check-prefix FOUR
// RUN: not llmir-opt %s -p "specialize-tokens{tokens=0}" 2>&1 | filecheck %s --check-prefix ZERO

// A step derived at 7 tokens: the rows that are sampled are taken before the head, of what the cache needs anyway.

// SINK: [[H:%[0-9a-z]+]] = stablehlo.tanh %x
// SINK: [[ROWS:%[0-9a-z]+]] = "stablehlo.gather"([[H]], %{{.*}}){{.*}} -> tensor<1x3x4xf32>
// SINK-NEXT: [[NORMED:%[0-9a-z]+]] = stablehlo.negate [[ROWS]]
// SINK-NEXT: stablehlo.dot_general [[NORMED]], %head{{.*}} -> tensor<1x3x11xf32>
// SINK-NOT: tensor<1x7x11xf32>
// SINK: func.return %{{.*}}, [[H]] : tensor<1x3x11xf32>, tensor<1x7x4xf32>

// With at_logits nothing sinks: the rows are taken of the logits.
// STAY: stablehlo.dot_general {{.*}} -> tensor<1x7x11xf32>
// STAY: "stablehlo.gather"({{.*}} -> tensor<1x3x11xf32>
// STAY: func.return %{{.*}}, %{{.*}} : tensor<1x3x11xf32>, tensor<1x7x4xf32>

// Then for 32 tokens: only what runs over tokens changes.
// TOKENS: llmir.length = 32 : i64
// TOKENS: func.func @main(%x: tensor<1x32x4xf32>
// TOKENS: func.return %{{.*}}, %{{.*}} : tensor<1x3x11xf32>, tensor<1x32x4xf32>

// Done already, nothing changes, though the model has sizes of 4 of its own.
// FOUR: func.func @main(%x: tensor<1x4x4xf32> {llmir.path = "x"}, %head: tensor<4x11xf32>
// FOUR: func.return %{{.*}}, %{{.*}} : tensor<1x3x11xf32>, tensor<1x4x4xf32>

// ZERO: llmir-opt: error: specialize-tokens: tokens must be at least 1, got 0

builtin.module attributes {llmir.length = 7 : i64} {
  func.func @main(%x: tensor<1x7x4xf32> {llmir.path = "x"}, %head: tensor<4x11xf32> {llmir.path = "head"},
                  %rows: tensor<3xi32> {llmir.role = "logits_rows"}) -> (tensor<1x7x11xf32>, tensor<1x7x4xf32>) {
    %0 = stablehlo.tanh %x : tensor<1x7x4xf32>
    %1 = stablehlo.negate %0 : tensor<1x7x4xf32>
    %2 = stablehlo.dot_general %1, %head, contracting_dims = [2] x [0]
      : (tensor<1x7x4xf32>, tensor<4x11xf32>) -> tensor<1x7x11xf32>
    func.return %2, %0 : tensor<1x7x11xf32>, tensor<1x7x4xf32>
  }
}
