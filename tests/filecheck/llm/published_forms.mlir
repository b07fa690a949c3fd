// RUN: llmir-opt %s | filecheck %s

// The forms that the dialect's documentation publishes, written as they are there.

// CHECK: func.func @forms
func.func @forms(
    %cache: !llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>,
    %sharded_cache: !llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=4>,
    %quantized: !llm.quantized_tensor<4x1024xi8, scale=f32, zp=i8, group_size=128>,
    %mixed: !llm.mixed_quantized_tensor<4x1024x!llm.mixed<i8,i4>, scale=f32>,
    %shard: !llm.sharded_tensor<tensor<4096x4096xf16>, 1, 4, 2>,
    %k: tensor<2x16x64xf16>, %v: tensor<2x16x64xf16>, %q: tensor<2x16x64xf16>, %seq_ids: tensor<2xi32>,
    %block_indices: tensor<2x256xi32>, %seq_lens: tensor<2xi32>, %x: tensor<16x1024xf16>, %w: tensor<1024x1024xf16>,
    %b: tensor<1024xf16>, %wq: tensor<1024x512xi8>, %scales: tensor<8x512xf32>, %zero_points: tensor<8x512xi8>,
    %k_all: tensor<8x16x64xf16>) {
  // CHECK: llm.append_kv %cache, %k, %v, %seq_ids {block_size = 16 : i32, max_seq_len = 4096 : i32}
  %new_cache, %blocks = llm.append_kv %cache, %k, %v, %seq_ids {block_size = 16 : i32, max_seq_len = 4096 : i32} : (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<2x16x64xf16>, tensor<2x16x64xf16>, tensor<2xi32>) -> (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<2xi32>)
  // CHECK: llm.lookup_kv %cache, %block_indices
  %keys, %values = llm.lookup_kv %cache, %block_indices : (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<2x256xi32>) -> (tensor<2x4096x16x64xf16>, tensor<2x4096x16x64xf16>)
  // CHECK: llm.paged_attention %q, %cache, %block_indices, %seq_lens {num_heads = 16 : i32, head_dim = 64 : i32, scale = 1.250000e-01 : f32}
  %paged = llm.paged_attention %q, %cache, %block_indices, %seq_lens {num_heads = 16 : i32, head_dim = 64 : i32, scale = 0.125 : f32} : (tensor<2x16x64xf16>, !llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<2x256xi32>, tensor<2xi32>) -> tensor<2x16x64xf16>
  // CHECK: llm.attention %q, %k, %v
  %attended = llm.attention %q, %k, %v {scale = 0.125 : f32, causal = true} : (tensor<2x16x64xf16>, tensor<2x16x64xf16>, tensor<2x16x64xf16>) -> tensor<2x16x64xf16>
  // CHECK: llm.quantize(%x) {scale
  %q8 = llm.quantize(%x) {scale = dense<0.01> : tensor<1024xf32>, zero_point = dense<-2> : tensor<1024xi8>, bits = 8 : i32, symmetric = false} : (tensor<16x1024xf16>) -> tensor<16x1024xi8>
  // CHECK: llm.dequantize(%{{.*}}) {scale
  %dq = llm.dequantize(%q8) {scale = dense<0.01> : tensor<1024xf32>, zero_point = dense<-2> : tensor<1024xi8>} : (tensor<16x1024xi8>) -> tensor<16x1024xf16>
  // CHECK: llm.quantized_matmul(%x, %wq, %scales, %zero_points) {bits = 8 : i32, group_size = 128 : i32}
  %product = llm.quantized_matmul(%x, %wq, %scales, %zero_points) {bits = 8 : i32, group_size = 128 : i32} : (tensor<16x1024xf16>, tensor<1024x512xi8>, tensor<8x512xf32>, tensor<8x512xi8>) -> tensor<16x512xf16>
  // CHECK: llm.sharded_linear(%x, %w, %b) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 2 : i32}
  %part = llm.sharded_linear(%x, %w, %b) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 2 : i32} : (tensor<16x1024xf16>, tensor<1024x1024xf16>, tensor<1024xf16>) -> tensor<16x128xf16>
  // CHECK: llm.all_gather(%{{.*}}) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x128xf16>) -> tensor<16x1024xf16>
  %gathered = llm.all_gather(%part) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x128xf16>) -> tensor<16x1024xf16>
  // CHECK: llm.all_reduce(%x) {reduction = "sum", group_size = 8 : i32}
  %reduced = llm.all_reduce(%x) {reduction = "sum", group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  // CHECK: llm.reduce_scatter(%x) {dim = 1 : i32, group_size = 8 : i32}
  %scattered = llm.reduce_scatter(%x) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x128xf16>
  // CHECK: llm.pipeline_stage(%x) {stage_id = 2 : i32, num_stages = 4 : i32}
  %staged = llm.pipeline_stage(%x) {stage_id = 2 : i32, num_stages = 4 : i32, schedule = "1f1b"} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  // CHECK: llm.pipeline_send(%{{.*}}) {dest_stage = 3 : i32}
  llm.pipeline_send(%staged) {dest_stage = 3 : i32} : (tensor<16x1024xf16>) -> ()
  // CHECK: llm.pipeline_recv() {source_stage = 1 : i32}
  %received = llm.pipeline_recv() {source_stage = 1 : i32} : () -> tensor<16x1024xf16>
  // CHECK: llm.sequence_parallel_attention(%q, %{{.*}}, %{{.*}}) {seq_start = 0 : i32, seq_length = 2 : i32, total_length = 8 : i32}
  %long = llm.sequence_parallel_attention(%q, %k_all, %k_all) {seq_start = 0 : i32, seq_length = 2 : i32, total_length = 8 : i32} : (tensor<2x16x64xf16>, tensor<8x16x64xf16>, tensor<8x16x64xf16>) -> tensor<2x16x64xf16>
  // CHECK: llm.distributed_attention(%q, %sharded_cache) {num_heads = 16 : i32, head_dim = 64 : i32, scale = 1.250000e-01 : f32}
  %far = llm.distributed_attention(%q, %sharded_cache) {num_heads = 16 : i32, head_dim = 64 : i32, scale = 0.125 : f32} : (tensor<2x16x64xf16>, !llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=4>) -> tensor<2x16x64xf16>
  // CHECK: llm.cost_annotation(%{{.*}}) {compute_flops = 33554432 : i64, memory_bytes = 2162688 : i64, communication_bytes = 0 : i64}
  llm.cost_annotation(%product) {compute_flops = 33554432 : i64, memory_bytes = 2162688 : i64, communication_bytes = 0 : i64} : (tensor<16x512xf16>) -> ()
  func.return
}
