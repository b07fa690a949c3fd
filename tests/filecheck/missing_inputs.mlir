// RUN: not llmir-opt %s -p insert-kv-cache 2>&1 | filecheck %s --check-prefix POSITIONS
// RUN: not llmir-opt %s -p paged-attention-rewrite 2>&1 | filecheck %s --check-prefix LENS
// RUN: not llmir-opt %s -p simplify-inputs 2>&1 | filecheck %s --check-prefix TOKENS
// RUN: not llmir-opt %s -p sink-logits-rows 2>&1 | filecheck %s --check-prefix LENGTH
// RUN: not llmir-opt %s -p specialize-tokens 2>&1 | filecheck %s --check-prefix LENGTH

// A module that has not been derived: the passes that need a step's inputs say which is missing.

// POSITIONS: llmir-opt: error: @main: expected one argument of llmir.role = "positions", got 0
// LENS: llmir-opt: error: @main: expected one argument of llmir.role = "seq_lens", got 0
// TOKENS: llmir-opt: error: @main: expected one argument of llmir.role = "tokens", got 0
// LENGTH: the module has no attribute llmir.length
func.func @main(%q: tensor<7x4x16xf32>) -> tensor<7x4x16xf32> {
  %0 = llm.attention %q, %q, %q {scale = 0.25 : f32}
    : (tensor<7x4x16xf32>, tensor<7x4x16xf32>, tensor<7x4x16xf32>) -> tensor<7x4x16xf32>
  func.return %0 : tensor<7x4x16xf32>
}
