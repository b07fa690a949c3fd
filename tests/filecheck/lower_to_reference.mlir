// RUN: llmir-opt %s -p lower-to-reference --split-input-file | filecheck %s
// RUN: llmir-opt %s -p lower-to-reference,lower-to-reference --split-input-file | filecheck %s

// One function serves ops that are alike; another property or type makes another. The op's location stays on the call.

// CHECK-LABEL: func.func @shared
// CHECK-NOT: llm.
// CHECK: func.call @llm_rms_norm(%x, %w) {llmir.loc = "model.py:3 (norm)"}
// CHECK-NEXT: func.call @llm_rms_norm(%{{.*}}, %w) :
// CHECK-NEXT: func.call @llm_rms_norm_1(%{{.*}}, %w) :
// CHECK-NEXT: stablehlo.add
// CHECK: func.func private @llm_rms_norm(
// CHECK-NOT: llmir.loc
// CHECK: stablehlo.rsqrt
// CHECK: func.func private @llm_rms_norm_1(
func.func @shared(%x: tensor<7x32xf32>, %w: tensor<32xf32>) -> tensor<7x32xf32> {
  %0 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32, llmir.loc = "model.py:3 (norm)"}
    : (tensor<7x32xf32>, tensor<32xf32>) -> tensor<7x32xf32>
  %1 = llm.rms_norm %0, %w {epsilon = 1.0e-5 : f32} : (tensor<7x32xf32>, tensor<32xf32>) -> tensor<7x32xf32>
  %2 = llm.rms_norm %1, %w {epsilon = 1.0e-6 : f32} : (tensor<7x32xf32>, tensor<32xf32>) -> tensor<7x32xf32>
  %3 = stablehlo.add %2, %x : tensor<7x32xf32>
  func.return %3 : tensor<7x32xf32>
}

// -----
// A name that is taken is left to its owner; ops in regions are lowered too; a cost annotation goes.

// CHECK-LABEL: func.func @regions
// CHECK: func.call @llm_rms_norm_1(
// CHECK-NOT: cost_annotation
// CHECK: func.func private @llm_rms_norm(%{{.*}}: tensor<f32>)
func.func @regions(%p: tensor<i1>, %x: tensor<7x32xf32>, %w: tensor<32xf32>) -> tensor<7x32xf32> {
  %0 = "stablehlo.if"(%p) ({
    %1 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32} : (tensor<7x32xf32>, tensor<32xf32>) -> tensor<7x32xf32>
    llm.cost_annotation(%1) {compute_flops = 1000 : i64} : (tensor<7x32xf32>) -> ()
    stablehlo.return %1 : tensor<7x32xf32>
  }, {
    stablehlo.return %x : tensor<7x32xf32>
  }) : (tensor<i1>) -> tensor<7x32xf32>
  func.return %0 : tensor<7x32xf32>
}
func.func private @llm_rms_norm(%x: tensor<f32>) -> tensor<f32> {
  func.return %x : tensor<f32>
}

// -----
// Quantized and sharded values become the tensors that hold them.

// CHECK-LABEL: func.func @composites
// CHECK-SAME: (%x: tensor<3x16xf32>, %{{.*}}: tensor<8x8xui8> {llmir.path = "w"}, %{{.*}}: tensor<8x2xf32> {llmir.path = "w"}, %{{.*}}: tensor<8x2xf32> {llmir.path = "w"}, %{{.*}}: tensor<8x4xf32>) -> tensor<3x4xf32>
// CHECK: func.call @llm_quantized_matmul(%x, %{{.*}}, %{{.*}}, %{{.*}}) : (tensor<3x16xf32>, tensor<8x8xui8>, tensor<8x2xf32>, tensor<8x2xf32>) -> tensor<3x8xf32>
// CHECK: func.call @llm_sharded_linear({{.*}}) : (tensor<3x8xf32>, tensor<8x4xf32>) -> tensor<3x4xf32>
func.func @composites(
    %x: tensor<3x16xf32>,
    %w: !llm.quantized_tensor<8x16xi4, scale=f32, min=f32, group_size=8> {llmir.path = "w"},
    %v: !llm.sharded_tensor<tensor<8x8xf32>, 1, 2, 0>) -> tensor<3x4xf32> {
  %0 = llm.quantized_matmul(%x, %w) {transpose_w = true}
    : (tensor<3x16xf32>, !llm.quantized_tensor<8x16xi4, scale=f32, min=f32, group_size=8>) -> tensor<3x8xf32>
  %1 = llm.sharded_linear(%0, %v) {shard_dim = 1 : i32, num_shards = 2 : i32, shard_id = 0 : i32}
    : (tensor<3x8xf32>, !llm.sharded_tensor<tensor<8x8xf32>, 1, 2, 0>) -> tensor<3x4xf32>
  func.return %1 : tensor<3x4xf32>
}

// -----
// A receive takes what was sent to its stage; sends from one stage to another are received in order.

// CHECK-LABEL: func.func @pipeline
// CHECK-NEXT: %{{.*}} = stablehlo.add %x, %x
// CHECK-NEXT: %{{.*}} = stablehlo.multiply %{{.*}}, %x
// CHECK-NEXT: %{{.*}} = stablehlo.subtract %{{.*}}, %{{.*}}
// CHECK-NEXT: func.return
func.func @pipeline(%x: tensor<4xf32>) -> tensor<4xf32> {
  %s0 = llm.pipeline_stage(%x) {stage_id = 0 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  %a = stablehlo.add %s0, %x : tensor<4xf32>
  %b = stablehlo.multiply %a, %x : tensor<4xf32>
  llm.pipeline_send(%a) {dest_stage = 1 : i32} : (tensor<4xf32>) -> ()
  llm.pipeline_send(%b) {dest_stage = 1 : i32} : (tensor<4xf32>) -> ()
  %r0 = llm.pipeline_recv() {source_stage = 0 : i32} : () -> tensor<4xf32>
  %r1 = llm.pipeline_recv() {source_stage = 0 : i32} : () -> tensor<4xf32>
  %s1 = llm.pipeline_stage(%r0) {stage_id = 1 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  %t1 = llm.pipeline_stage(%r1) {stage_id = 1 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  %d = stablehlo.subtract %s1, %t1 : tensor<4xf32>
  func.return %d : tensor<4xf32>
}

// -----
// What is no llm op is left alone.

// CHECK-LABEL: func.func @untouched
// CHECK-NEXT: stablehlo.add
// CHECK-NEXT: func.return
// CHECK-NOT: func.func private
func.func @untouched(%x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = stablehlo.add %x, %x : tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
