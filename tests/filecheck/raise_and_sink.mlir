// RUN: llmir-opt %s -p "sink-logits-rows,specialize-tokens{tokens=32}" | filecheck %s

// Rows of the logits are taken before the last norm and MLP, which treat each token on its own, but of the results of
// attention, which does not; types follow the number of tokens, attributes stay.

// CHECK: [[A:%[0-9a-z]+]] = llm.attention {{.*}} -> tensor<32x2x4xf32>
// CHECK: [[ROWS:%[0-9a-z]+]] = "stablehlo.gather"([[A]], {{.*}} -> tensor<3x2x4xf32>
// CHECK: stablehlo.reshape [[ROWS]] : (tensor<3x2x4xf32>) -> tensor<3x8xf32>
// CHECK: llm.rms_norm {{.*}} -> tensor<3x8xf32>
// CHECK: llm.gated_mlp {{.*}} -> tensor<3x8xf32>
// CHECK: [[LOGITS:%[0-9a-z]+]] = llm.linear %{{.*}}, %head {transpose_w = true} : (tensor<3x8xf32>, tensor<11x8xf32>) -> tensor<3x11xf32>
// CHECK: func.return [[LOGITS]], [[A]]

builtin.module attributes {llmir.length = 7 : i64} {
  func.func @main(%q: tensor<7x2x4xf32>, %w: tensor<8xf32> {llmir.path = "w"}, %m: tensor<8x8xf32> {llmir.path = "m"},
                  %head: tensor<11x8xf32> {llmir.path = "head"}, %rows: tensor<3xi32> {llmir.role = "logits_rows"})
      -> (tensor<7x11xf32>, tensor<7x2x4xf32>) {
    %a = llm.attention %q, %q, %q {scale = 5.000000e-01 : f32} : (tensor<7x2x4xf32>, tensor<7x2x4xf32>, tensor<7x2x4xf32>) -> tensor<7x2x4xf32>
    %0 = stablehlo.reshape %a : (tensor<7x2x4xf32>) -> tensor<7x8xf32>
    %1 = llm.rms_norm %0, %w {epsilon = 1.0e-5 : f32} : (tensor<7x8xf32>, tensor<8xf32>) -> tensor<7x8xf32>
    %2 = llm.gated_mlp %1, %m, %m, %m {activation = "silu"}
      : (tensor<7x8xf32>, tensor<8x8xf32>, tensor<8x8xf32>, tensor<8x8xf32>) -> tensor<7x8xf32>
    %3 = llm.linear %2, %head {transpose_w = true} : (tensor<7x8xf32>, tensor<11x8xf32>) -> tensor<7x11xf32>
    func.return %3, %a : tensor<7x11xf32>, tensor<7x2x4xf32>
  }
}
