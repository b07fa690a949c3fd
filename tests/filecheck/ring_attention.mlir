// RUN: llmir-opt %s -p 'kv-cache-sharding{mesh="sequence=2"},ring-attention{mesh="sequence=2"},communication-insertion{mesh="sequence=2"}' | filecheck %s
// RUN: llmir-opt %s -p 'kv-cache-sharding{mesh="sequence=2"},ring-attention{mesh="sequence=2"},ring-attention{mesh="sequence=2"},lower-to-reference' | filecheck %s --check-prefix LOWERED
// RUN: llmir-opt %s -p 'kv-cache-sharding{mesh="sequence=4"},ring-attention{mesh="sequence=4"}' | filecheck %s --check-prefix FEW

// 64 tokens on two devices: queries, and what attention gives, are split by tokens, and so are rows of the table.
// CHECK: "stablehlo.gather"
// CHECK-NEXT: "sdy.sharding_constraint"({{.*}}[{"sequence"}, {}]
// CHECK: "sdy.sharding_constraint"({{.*}}[{"sequence"}, {}, {}]
// CHECK: llm.attend_pages {{.*}}ring = "sequence=2"
// CHECK: "sdy.sharding_constraint"({{.*}}[{"sequence"}, {}, {}]

// LOWERED: "sdy.manual_computation"
// LOWERED: "stablehlo.collective_permute"
// LOWERED-NOT: @mesh

// 16 tokens a device: nothing to divide.
// FEW: llm.attend_pages {{.*}}shards = 4
// FEW-NOT: ring =

builtin.module {
  func.func @main(%w: tensor<9x32xf32> {llmir.path = "embed.embedding", llmir.sharding = [[], []]}, %tokens: tensor<64x1xi32>,
                  %kp: tensor<32x4x2x8xf32> {llmir.role = "k_pages"}, %vp: tensor<32x4x2x8xf32> {llmir.role = "v_pages"},
                  %ids: tensor<64xi32>, %at: tensor<64xi32>,
                  %t: tensor<3x8xi32>, %lens: tensor<3xi32>, %n: tensor<i32>) -> tensor<64x4x8xf32> {
    %0 = "stablehlo.gather"(%w, %tokens) {dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0],
      start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1, 32>, indices_are_sorted = false}
      : (tensor<9x32xf32>, tensor<64x1xi32>) -> tensor<64x32xf32>
    %1 = stablehlo.reshape %0 : (tensor<64x32xf32>) -> tensor<64x4x8xf32>
    %2 = llm.attend_pages %1, %kp, %vp, %t, %lens, %ids, %at, %n {scale = 0.25 : f32}
      : (tensor<64x4x8xf32>, tensor<32x4x2x8xf32>, tensor<32x4x2x8xf32>, tensor<3x8xi32>, tensor<3xi32>, tensor<64xi32>,
      tensor<64xi32>, tensor<i32>) -> tensor<64x4x8xf32>
    func.return %2 : tensor<64x4x8xf32>
  }
}
