// RUN: llmir-opt %s -p 'model-partitioning{mesh="tensor=2,sequence=2"},kv-cache-sharding{mesh="tensor=2,sequence=2"},memory-planning{mesh="tensor=2,sequence=2"},communication-insertion{mesh="tensor=2,sequence=2"}' | filecheck %s
// RUN: not llmir-opt %s -p 'model-partitioning{mesh="tensor=3"},kv-cache-sharding{mesh="tensor=3"}' 2>&1 | filecheck %s --check-prefix HEADS
// RUN: not llmir-opt %s -p 'kv-cache-sharding{mesh="sequence=3"}' 2>&1 | filecheck %s --check-prefix PAGES
// RUN: not llmir-opt %s -p 'memory-planning{mesh="tensor=1" device_bytes=1000}' 2>&1 | filecheck %s --check-prefix MEMORY
// RUN: not llmir-opt %s -p 'memory-planning{mesh="tensor"}' 2>&1 | filecheck %s --check-prefix MESH

// Kernels in pairs, columns and then rows; what no rule matches is whole. Weights 2 · 32·32·4 / 2 + 32·4, pages 2 · 32·4·2·8·4 / 4.
// CHECK: llmir.device_bytes = 8320 : i64
// CHECK: func.func @main(
// CHECK-SAME: llmir.path = "attn.q.kernel", llmir.sharding = {{\[}}[], ["tensor"]]
// CHECK-SAME: llmir.path = "attn.o.kernel", llmir.sharding = {{\[}}["tensor"], []]
// CHECK-SAME: llmir.path = "norm.scale", llmir.sharding = {{\[}}[]]
// CHECK-SAME: llmir.role = "k_pages", llmir.sharding = {{\[}}[], ["sequence"], ["tensor"], []]

// Queries by heads; no constraint on what columns give.
// CHECK: %[[Q:.*]] = llm.linear %{{.*}}, %{{.*}} : (tensor<7x32xf32>, tensor<32x32xf32>)
// CHECK-NEXT: %[[R:.*]] = stablehlo.reshape %[[Q]]
// CHECK: "sdy.sharding_constraint"(%[[R]]) {sharding = #sdy.sharding<mesh<["tensor"=2, "sequence"=2]>, [{}, {"tensor"}, {}]>}
// CHECK: llm.attend_pages {{.*}}shards = 2
// What rows give is whole on every device: the all-reduce.
// CHECK: %[[O:.*]] = llm.linear
// CHECK-NEXT: %[[W:.*]] = "sdy.sharding_constraint"(%[[O]]) {sharding = #sdy.sharding<mesh<["tensor"=2, "sequence"=2]>, [{}, {}]>}
// CHECK: stablehlo.add %[[W]]

// HEADS: mesh: 2 KV heads cannot be divided over tensor = 3
// PAGES: mesh: pages of 4 tokens cannot be divided over sequence = 3
// MEMORY: mesh: tensor=1 needs 0.00 GiB on each device
// MESH: mesh: expected axes and sizes such as tensor=3,sequence=2, got 'tensor'

builtin.module {
  func.func @main(%wq: tensor<32x32xf32> {llmir.path = "attn.q.kernel"}, %wo: tensor<32x32xf32> {llmir.path = "attn.o.kernel"},
                  %g: tensor<32xf32> {llmir.path = "norm.scale"},
                  %kp: tensor<32x4x2x8xf32> {llmir.role = "k_pages"}, %vp: tensor<32x4x2x8xf32> {llmir.role = "v_pages"},
                  %x: tensor<7x32xf32>, %ids: tensor<7xi32>, %at: tensor<7xi32>,
                  %t: tensor<3x8xi32>, %lens: tensor<3xi32>, %n: tensor<i32>) -> tensor<7x32xf32> {
    %0 = llm.linear %x, %wq : (tensor<7x32xf32>, tensor<32x32xf32>) -> tensor<7x32xf32>
    %1 = stablehlo.reshape %0 : (tensor<7x32xf32>) -> tensor<7x4x8xf32>
    %2 = llm.attend_pages %1, %kp, %vp, %t, %lens, %ids, %at, %n {scale = 0.25 : f32}
      : (tensor<7x4x8xf32>, tensor<32x4x2x8xf32>, tensor<32x4x2x8xf32>, tensor<3x8xi32>, tensor<3xi32>, tensor<7xi32>,
      tensor<7xi32>, tensor<i32>) -> tensor<7x4x8xf32>
    %3 = stablehlo.reshape %2 : (tensor<7x4x8xf32>) -> tensor<7x32xf32>
    %4 = llm.linear %3, %wo : (tensor<7x32xf32>, tensor<32x32xf32>) -> tensor<7x32xf32>
    %5 = stablehlo.add %4, %x : tensor<7x32xf32>
    func.return %5 : tensor<7x32xf32>
  }
}
