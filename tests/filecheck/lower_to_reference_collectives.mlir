// RUN: llmir-opt %s -p "lower-to-reference{num_devices=4}" | filecheck %s
// RUN: not llmir-opt %s -p "lower-to-reference{num_devices=3}" 2>&1 | filecheck %s --check-prefix UNEVEN

// UNEVEN: num_devices: expected a multiple of the group size 2, got 3

// CHECK: func.func private @llm_all_gather(
// CHECK: "stablehlo.all_gather"(%x) {all_gather_dim = 1 : i64, {{.*}}replica_groups = dense<{{\[\[}}0, 1], [2, 3]]> : tensor<2x2xi64>
// CHECK: func.func private @llm_all_reduce(
// CHECK: "stablehlo.all_reduce"
// CHECK: stablehlo.maximum
// CHECK: replica_groups = dense<{{\[\[}}0, 1, 2, 3]]> : tensor<1x4xi64>
// CHECK: func.func private @llm_reduce_scatter(
// CHECK: "stablehlo.reduce_scatter"
// CHECK: stablehlo.add
// CHECK: scatter_dimension = 0 : i64
func.func @collectives(%x: tensor<4x6xf32>) -> (tensor<4x12xf32>, tensor<4x6xf32>, tensor<2x6xf32>) {
  %0 = llm.all_gather(%x) {dim = 1 : i32, group_size = 2 : i32} : (tensor<4x6xf32>) -> tensor<4x12xf32>
  %1 = llm.all_reduce(%x) {reduction = "max", group_size = 4 : i32} : (tensor<4x6xf32>) -> tensor<4x6xf32>
  %2 = llm.reduce_scatter(%x) {dim = 0 : i32, group_size = 2 : i32} : (tensor<4x6xf32>) -> tensor<2x6xf32>
  func.return %0, %1, %2 : tensor<4x12xf32>, tensor<4x6xf32>, tensor<2x6xf32>
}
