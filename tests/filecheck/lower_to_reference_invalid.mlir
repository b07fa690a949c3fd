// RUN: llmir-opt %s -p lower-to-reference --split-input-file --verify-diagnostics | filecheck %s

// CHECK: llm.lookup_kv at model.py:7 (attend): the KV cache is not allocated yet; run the pass kv-cache-allocation before
func.func @f(%cache: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %tables: tensor<4x8xi32>) {
  %0, %1 = llm.lookup_kv %cache, %tables {llmir.loc = "model.py:7 (attend)"}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>) -> (tensor<4x30x2x16xf16>, tensor<4x30x2x16xf16>)
  func.return
}

// -----
// CHECK: llm.rms_norm: expected operands of static shape to lower it, got tensor<?x32xf32>
func.func @f(%x: tensor<?x32xf32>, %w: tensor<32xf32>) {
  %0 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32} : (tensor<?x32xf32>, tensor<32xf32>) -> tensor<?x32xf32>
  func.return
}

// -----
// CHECK: llm.rms_norm: expected types of at most 32 bits, got tensor<7x32xf64>; jax_enable_x64 allows it
func.func @f(%x: tensor<7x32xf64>, %w: tensor<32xf64>) {
  %0 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32} : (tensor<7x32xf64>, tensor<32xf64>) -> tensor<7x32xf64>
  func.return
}

// -----
// CHECK: func.call: expected a tensor, got !llm.quantized_tensor<4x8xi8, scale=f32, symmetric=true>; only llm ops take such a value
func.func @f(%x: !llm.quantized_tensor<4x8xi8, scale=f32, symmetric=true>) {
  func.call @g(%x) : (!llm.quantized_tensor<4x8xi8, scale=f32, symmetric=true>) -> ()
  func.return
}
func.func private @g(!llm.quantized_tensor<4x8xi8, scale=f32, symmetric=true>)

// -----
// CHECK: llm.pipeline_send: expected an llm.pipeline_stage before it, which says where it is
func.func @f(%x: tensor<4xf32>) {
  llm.pipeline_send(%x) {dest_stage = 1 : i32} : (tensor<4xf32>) -> ()
  func.return
}

// -----
// CHECK: llm.pipeline_send: stage 1 never receives what stage 0 sends
func.func @f(%x: tensor<4xf32>) {
  %0 = llm.pipeline_stage(%x) {stage_id = 0 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  llm.pipeline_send(%0) {dest_stage = 1 : i32} : (tensor<4xf32>) -> ()
  func.return
}

// -----
// CHECK: llm.pipeline_recv: expected an earlier send from stage 0 to stage 1, got none
func.func @f() -> tensor<4xf32> {
  %0 = llm.pipeline_recv() {source_stage = 0 : i32} : () -> tensor<4xf32>
  %1 = llm.pipeline_stage(%0) {stage_id = 1 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  func.return %1 : tensor<4xf32>
}

// -----
// CHECK: llm.pipeline_recv: expected one llm.pipeline_stage to take its result, got 0
func.func @f() -> tensor<4xf32> {
  %0 = llm.pipeline_recv() {source_stage = 0 : i32} : () -> tensor<4xf32>
  func.return %0 : tensor<4xf32>
}

// -----
// CHECK: llm.pipeline_recv: expected the type that was sent, tensor<4xf32>, got tensor<5xf32>
func.func @f(%x: tensor<4xf32>) -> tensor<5xf32> {
  %0 = llm.pipeline_stage(%x) {stage_id = 0 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
  llm.pipeline_send(%0) {dest_stage = 1 : i32} : (tensor<4xf32>) -> ()
  %1 = llm.pipeline_recv() {source_stage = 0 : i32} : () -> tensor<5xf32>
  %2 = llm.pipeline_stage(%1) {stage_id = 1 : i32, num_stages = 2 : i32} : (tensor<5xf32>) -> tensor<5xf32>
  func.return %2 : tensor<5xf32>
}

// -----
// CHECK: llm.pipeline_stage: expected pipeline stages in the body of a function, not in a region
func.func @f(%p: tensor<i1>, %x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = "stablehlo.if"(%p) ({
    %1 = llm.pipeline_stage(%x) {stage_id = 0 : i32, num_stages = 2 : i32} : (tensor<4xf32>) -> tensor<4xf32>
    stablehlo.return %1 : tensor<4xf32>
  }, {
    stablehlo.return %x : tensor<4xf32>
  }) : (tensor<i1>) -> tensor<4xf32>
  func.return %0 : tensor<4xf32>
}
