// RUN: llmir-opt %s | filecheck %s

// Every op with every optional part, and the spellings that are read but not printed.

// CHECK-LABEL: func.func @attention
func.func @attention(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>, %v: tensor<7x2x24xbf16>, %s: tensor<8xf32>,
                     %ck: tensor<4x64x2x16xf32>, %cv: tensor<4x64x2x16xf32>, %ids: tensor<7xi32>, %pos: tensor<7xi32>) {
  // CHECK: llm.attention %q, %k, %v {scale = 1.250000e-01 : f32} : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x24xbf16>) -> tensor<7x8x24xbf16>
  %0 = llm.attention %q, %k, %v {scale = 0.125 : f32, causal = true}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x24xbf16>) -> tensor<7x8x24xbf16>
  // CHECK: llm.attention %q, %k, %k slopes(%s) {scale = 1.250000e-01 : f32, causal = false, window = 128 : i64, softcap = 5.000000e+01 : f32, precise = true} : (
  %1 = llm.attention(%q, %k, %k) slopes(%s) {scale = 0.125 : f32, causal = false, window = 128 : i64, softcap = 50.0 : f32, precise = true}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<8xf32>) -> tensor<7x8x16xf32>
  // CHECK: llm.attention %q, %ck, %cv slopes(%s) tokens(%ids, %pos) {scale = 1.250000e-01 : f32} : (
  %2 = llm.attention %q, %ck, %cv tokens(%ids, %pos) slopes(%s) {scale = 0.125 : f32}
    : tensor<7x8x16xf32>, tensor<4x64x2x16xf32>, tensor<4x64x2x16xf32>, tensor<8xf32>, tensor<7xi32>, tensor<7xi32>
    -> tensor<7x8x16xf32>
  // CHECK: llm.attention %q, %k, %k {scale = 1.250000e-01 : f32, llmir.loc = "model.py:3 (f)"} : (
  %3 = llm.attention %q, %k, %k {scale = 0.125 : f32, llmir.loc = "model.py:3 (f)"}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// CHECK-LABEL: func.func @pages
func.func @pages(%kp: tensor<32x4x2x16xbf16>, %vp: tensor<32x4x2x16xbf16>, %q: tensor<7x8x16xf32>,
                 %k: tensor<7x2x16xf32>, %ids: tensor<7xi32>, %pos: tensor<7xi32>, %tables: tensor<4x8xi32>,
                 %lens: tensor<4xi32>, %n: tensor<i32>, %s: tensor<8xf32>) {
  // CHECK: llm.write_pages %kp, %vp, %k, %k, %ids, %pos, %tables, %n : (tensor<32x4x2x16xbf16>, {{.*}}) -> (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>)
  %kp1, %vp1 = llm.write_pages %kp, %vp, %k, %k, %ids, %pos, %tables, %n
    : (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>,
       tensor<7xi32>, tensor<4x8xi32>, tensor<i32>) -> (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>)
  // CHECK: llm.attend_pages %q, %{{.*}}, %{{.*}}, %tables, %lens, %ids, %pos, %n slopes(%s) {scale = 1.250000e-01 : f32, window = 8 : i64} : (
  %0 = llm.attend_pages %q, %kp1, %vp1, %tables, %lens, %ids, %pos, %n slopes(%s) {scale = 0.125 : f32, window = 8 : i64}
    : (tensor<7x8x16xf32>, tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<4x8xi32>, tensor<4xi32>,
       tensor<7xi32>, tensor<7xi32>, tensor<i32>, tensor<8xf32>) -> tensor<7x8x16xf32>
  func.return
}

// CHECK-LABEL: func.func @cache
func.func @cache(%cache: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %q: tensor<7x8x16xf32>, %q1: tensor<4x8x16xf32>,
                 %k: tensor<7x2x16xf32>, %ids: tensor<7xi32>, %pos: tensor<7xi32>, %tables: tensor<4x8xi32>,
                 %lens: tensor<4xi32>, %n: tensor<i32>, %s: tensor<8xf32>) {
  // CHECK: llm.append_kv %cache, %k, %k, %ids {block_size = 4 : i32, max_seq_len = 30 : i32} : (
  %c1, %b1 = llm.append_kv %cache, %k, %k, %ids {block_size = 4 : i32, max_seq_len = 30 : i32}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  // CHECK: llm.append_kv %{{.*}}, %k, %k, %ids tokens(%pos, %tables, %n) {layer = 1 : i64} : (
  %c2, %b2 = llm.append_kv %c1, %k, %k, %ids tokens(%pos, %tables, %n) {layer = 1 : i64}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>, tensor<7xi32>,
       tensor<4x8xi32>, tensor<i32>) -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  // CHECK: llm.lookup_kv %{{.*}}, %tables {layer = 1 : i64} : ({{.*}}) -> (tensor<4x30x2x16xf16>, tensor<4x30x2x16xf16>)
  %ck, %cv = llm.lookup_kv %c2, %tables {layer = 1 : i64}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>) -> (tensor<4x30x2x16xf16>, tensor<4x30x2x16xf16>)
  // CHECK: llm.paged_attention %q1, %{{.*}}, %tables, %lens {num_heads = 8 : i32, head_dim = 16 : i32, scale = 1.250000e-01 : f32} : (
  %0 = llm.paged_attention %q1, %c2, %tables, %lens {num_heads = 8 : i32, head_dim = 16 : i32, scale = 0.125 : f32}
    : (tensor<4x8x16xf32>, !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>, tensor<4xi32>)
    -> tensor<4x8x16xf32>
  // CHECK: llm.paged_attention %q, %{{.*}}, %tables, %lens tokens(%ids, %pos, %n) slopes(%s) {layer = 1 : i64, scale = 1.250000e-01 : f32, causal = false, window = 8 : i64, softcap = 5.000000e+01 : f32} : (
  %1 = llm.paged_attention %q, %c2, %tables, %lens tokens(%ids, %pos, %n) slopes(%s)
    {layer = 1, scale = 0.125 : f32, causal = false, window = 8 : i64, softcap = 50.0 : f32}
    : (tensor<7x8x16xf32>, !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>, tensor<4xi32>, tensor<7xi32>,
       tensor<7xi32>, tensor<i32>, tensor<8xf32>) -> tensor<7x8x16xf32>
  func.return
}

// CHECK-LABEL: func.func @layers
func.func @layers(%x: tensor<7x32xbf16>, %w: tensor<32xf32>, %h: tensor<7x8x16xf32>, %cs: tensor<7x6xf32>,
                  %m: tensor<32x48xbf16>, %mt: tensor<48x32xbf16>, %b: tensor<48xf32>) {
  // CHECK: llm.rms_norm %x, %w {epsilon = 1.000000e-05 : f32} : (tensor<7x32xbf16>, tensor<32xf32>) -> tensor<7x32xbf16>
  %0 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32, offset = 0.0 : f32}
    : (tensor<7x32xbf16>, tensor<32xf32>) -> tensor<7x32xbf16>
  // CHECK: llm.rms_norm %x, %w {epsilon = 1.000000e-05 : f32, offset = 1.000000e+00 : f32} : (
  %1 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32, offset = 1.0 : f32}
    : (tensor<7x32xbf16>, tensor<32xf32>) -> tensor<7x32xbf16>
  // CHECK: llm.layer_norm %x, %w, %w {epsilon = 1.000000e-05 : f32} : (
  %2 = llm.layer_norm %x, %w, %w {epsilon = 1.0e-5 : f32}
    : (tensor<7x32xbf16>, tensor<32xf32>, tensor<32xf32>) -> tensor<7x32xbf16>
  // CHECK: llm.rope %h, %cs, %cs {rotary_dim = 12 : i64} : (
  %3 = llm.rope %h, %cs, %cs {interleaved = false, rotary_dim = 12 : i64}
    : (tensor<7x8x16xf32>, tensor<7x6xf32>, tensor<7x6xf32>) -> tensor<7x8x16xf32>
  // CHECK: llm.rope %h, %cs, %cs {interleaved = true, rotary_dim = 12 : i64} : (
  %4 = llm.rope %h, %cs, %cs {interleaved = true, rotary_dim = 12 : i64}
    : (tensor<7x8x16xf32>, tensor<7x6xf32>, tensor<7x6xf32>) -> tensor<7x8x16xf32>
  // CHECK: llm.linear %x, %m, %b : (tensor<7x32xbf16>, tensor<32x48xbf16>, tensor<48xf32>) -> tensor<7x48xf32>
  %5 = llm.linear %x, %m, %b : (tensor<7x32xbf16>, tensor<32x48xbf16>, tensor<48xf32>) -> tensor<7x48xf32>
  // CHECK: llm.linear %x, %mt {transpose_w = true} : (tensor<7x32xbf16>, tensor<48x32xbf16>) -> tensor<7x48xbf16>
  %6 = llm.linear %x, %mt {transpose_w = true} : (tensor<7x32xbf16>, tensor<48x32xbf16>) -> tensor<7x48xbf16>
  // CHECK: llm.gated_mlp %x, %m, %mt, %mt {activation = "gelu_tanh", transpose_up = true} : (
  %7 = llm.gated_mlp %x, %m, %mt, %mt {activation = "gelu_tanh", transpose_up = true}
    : (tensor<7x32xbf16>, tensor<32x48xbf16>, tensor<48x32xbf16>, tensor<48x32xbf16>) -> tensor<7x32xbf16>
  func.return
}

// CHECK-LABEL: func.func @quantization
func.func @quantization(%x: tensor<4x256xf16>, %w: tensor<256x64xi4>, %s: tensor<2x64xf32>, %z: tensor<2x64xi8>) {
  // CHECK: llm.quantize(%x) {scale = dense<1.000000e-02> : tensor<256xf32>, zero_point = dense<-2> : tensor<256xi8>, bits = 8 : i32, symmetric = false} : (tensor<4x256xf16>) -> tensor<4x256xi8>
  %0 = llm.quantize(%x) {scale = dense<0.01> : tensor<256xf32>, zero_point = dense<-2> : tensor<256xi8>, bits = 8 : i32,
                         symmetric = false} : (tensor<4x256xf16>) -> tensor<4x256xi8>
  // CHECK: llm.quantize(%x) {scale = 1.000000e-02 : f32, bits = 4 : i32, symmetric = true} : (tensor<4x256xf16>) -> tensor<4x256xi4>
  %1 = llm.quantize %x {scale = 0.01 : f32, bits = 4 : i32, symmetric = true} : tensor<4x256xf16> -> tensor<4x256xi4>
  // CHECK: llm.quantize(%x) : (tensor<4x256xf16>) -> !llm.quantized_tensor<4x256xi4, scale=f32, symmetric=true, group_size=32>
  %2 = llm.quantize(%x) : (tensor<4x256xf16>) -> !llm.quantized_tensor<4x256xi4, scale=f32, symmetric=true, group_size=32>
  // CHECK: llm.quantize(%x) {wide_rows = array<i64: 0, 3>} : (tensor<4x256xf16>) -> !llm.mixed_quantized_tensor<4x256x!llm.mixed<i8,i4>, scale=f32>
  %3 = llm.quantize(%x) {wide_rows = array<i64: 0, 3>}
    : (tensor<4x256xf16>) -> !llm.mixed_quantized_tensor<4x256x!llm.mixed<i8,i4>, scale=f32>
  // CHECK: llm.dequantize(%{{.*}}) {scale = dense<1.000000e-02> : tensor<256xf32>, zero_point = dense<-2> : tensor<256xi8>} : (tensor<4x256xi8>) -> tensor<4x256xf16>
  %4 = llm.dequantize(%0) {scale = dense<0.01> : tensor<256xf32>, zero_point = dense<-2> : tensor<256xi8>}
    : (tensor<4x256xi8>) -> tensor<4x256xf16>
  // CHECK: llm.dequantize(%{{.*}}) : (!llm.quantized_tensor<{{.*}}>) -> tensor<4x256xf32>
  %5 = llm.dequantize(%2) : (!llm.quantized_tensor<4x256xi4, scale=f32, symmetric=true, group_size=32>) -> tensor<4x256xf32>
  // CHECK: llm.quantized_matmul(%x, %w, %s, %z) {bits = 4 : i32, group_size = 128 : i32} : (
  %6 = llm.quantized_matmul(%x, %w, %s, %z) {bits = 4 : i32, group_size = 128 : i32}
    : (tensor<4x256xf16>, tensor<256x64xi4>, tensor<2x64xf32>, tensor<2x64xi8>) -> tensor<4x64xf16>
  // CHECK: llm.quantized_matmul(%x, %{{.*}}) {transpose_w = true} : (tensor<4x256xf16>, !llm.mixed_quantized_tensor<{{.*}}>) -> tensor<4x4xf32>
  %7 = llm.quantized_matmul(%x, %3) {transpose_w = true}
    : (tensor<4x256xf16>, !llm.mixed_quantized_tensor<4x256x!llm.mixed<i8,i4>, scale=f32>) -> tensor<4x4xf32>
  // CHECK: llm.quantized_matmul(%x, %{{.*}}) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32} : (
  %8 = llm.quantized_matmul(%x, %2) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32}
    : (tensor<4x256xf16>, !llm.quantized_tensor<4x256xi4, scale=f32, symmetric=true, group_size=32>) -> tensor<4x4xf32>
  // CHECK: llm.quantized_matmul(%x, %{{.*}}) activation_scales(%as) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32} : (
  %as = stablehlo.constant dense<0.5> : tensor<8xf32>
  %10 = llm.quantized_matmul(%x, %2) activation_scales(%as) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32}
    : (tensor<4x256xf16>, !llm.quantized_tensor<4x256xi4, scale=f32, symmetric=true, group_size=32>, tensor<8xf32>) -> tensor<4x4xf32>
  // CHECK: llm.observe %x {statistic = "absmax"} : (tensor<4x256xf16>) -> tensor<256xf32>
  %11 = llm.observe %x {statistic = "absmax"} : (tensor<4x256xf16>) -> tensor<256xf32>
  // CHECK: llm.observe %x {statistic = "gram"} : (tensor<4x256xf16>) -> tensor<256x256xf32>
  %12 = llm.observe %x {statistic = "gram"} : (tensor<4x256xf16>) -> tensor<256x256xf32>
  // CHECK: llm.observe %x {statistic = "histogram"} : (tensor<4x256xf16>) -> tensor<256x320xi32>
  %13 = llm.observe %x {statistic = "histogram"} : (tensor<4x256xf16>) -> tensor<256x320xi32>
  // CHECK: llm.quantized_gather(%{{.*}}, %ids) : (!llm.quantized_tensor<{{.*}}>, tensor<2x3xi32>) -> tensor<2x3x256xf16>
  %ids = stablehlo.constant dense<1> : tensor<2x3xi32>
  %9 = llm.quantized_gather(%2, %ids)
    : (!llm.quantized_tensor<4x256xi4, scale=f32, symmetric=true, group_size=32>, tensor<2x3xi32>) -> tensor<2x3x256xf16>
  func.return
}

// CHECK-LABEL: func.func @distributed
func.func @distributed(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>, %b: tensor<4096xf16>, %xs: tensor<16x256xf16>,
                       %ws: !llm.sharded_tensor<tensor<1024x4096xf16>, 0, 4, 3>) {
  // CHECK: llm.sharded_linear(%x, %w, %b) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 2 : i32} : ({{.*}}) -> tensor<16x512xf16>
  %0 = llm.sharded_linear(%x, %w, %b) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 2 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>, tensor<4096xf16>) -> tensor<16x512xf16>
  // CHECK: llm.sharded_linear(%xs, %ws) {shard_dim = 0 : i32, num_shards = 4 : i32, shard_id = 3 : i32} : (tensor<16x256xf16>, !llm.sharded_tensor<tensor<1024x4096xf16>, 0, 4, 3>) -> tensor<16x4096xf16>
  %1 = llm.sharded_linear(%xs, %ws) {shard_dim = 0 : i32, num_shards = 4 : i32, shard_id = 3 : i32}
    : (tensor<16x256xf16>, !llm.sharded_tensor<tensor<1024x4096xf16>, 0, 4, 3>) -> tensor<16x4096xf16>
  // CHECK: llm.all_gather(%x) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x8192xf16>
  %2 = llm.all_gather(%x) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x8192xf16>
  // CHECK: llm.all_reduce(%x) {reduction = "max", group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  %3 = llm.all_reduce(%x) {reduction = "max", group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  // CHECK: llm.reduce_scatter(%x) {dim = 0 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<2x1024xf16>
  %4 = llm.reduce_scatter(%x) {dim = 0 : i32, reduction = "sum", group_size = 8 : i32}
    : (tensor<16x1024xf16>) -> tensor<2x1024xf16>
  func.return
}

// CHECK-LABEL: func.func @pipeline
func.func @pipeline(%x: tensor<16x1024xf16>) {
  // CHECK: llm.pipeline_stage(%x) {stage_id = 2 : i32, num_stages = 4 : i32, schedule = "gpipe"} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  %0 = llm.pipeline_stage(%x) {stage_id = 2 : i32, num_stages = 4 : i32, schedule = "gpipe"}
    : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  // CHECK: llm.pipeline_send(%{{.*}}) {dest_stage = 3 : i32} : (tensor<16x1024xf16>) -> ()
  llm.pipeline_send(%0) {dest_stage = 3 : i32} : (tensor<16x1024xf16>) -> ()
  // CHECK: llm.pipeline_recv() {source_stage = 1 : i32} : () -> tensor<16x1024xf16>
  %1 = llm.pipeline_recv() {source_stage = 1 : i32} : () -> tensor<16x1024xf16>
  // CHECK: llm.cost_annotation(%{{.*}}) {compute_flops = 2147483648 : i64, memory_bytes = 4194304 : i64, communication_bytes = 0 : i64} : (tensor<16x1024xf16>) -> ()
  llm.cost_annotation(%0) {compute_flops = 2147483648, memory_bytes = 4194304 : i64, communication_bytes = 0 : i64}
    : (tensor<16x1024xf16>) -> ()
  func.return
}

// CHECK-LABEL: func.func @long_sequences
func.func @long_sequences(%q: tensor<3x8x16xf16>, %k: tensor<12x2x16xf16>, %n: tensor<i32>,
                          %cache: !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) {
  // CHECK: llm.sequence_parallel_attention(%q, %k, %k) {seq_start = 6 : i32, seq_length = 3 : i32, total_length = 12 : i32} : (
  %0 = llm.sequence_parallel_attention(%q, %k, %k) {seq_start = 6 : i32, seq_length = 3 : i32, total_length = 12 : i32}
    : (tensor<3x8x16xf16>, tensor<12x2x16xf16>, tensor<12x2x16xf16>) -> tensor<3x8x16xf16>
  // CHECK: llm.distributed_attention(%q, %cache) {num_heads = 8 : i32, head_dim = 16 : i32, scale = 2.500000e-01 : f32} : (
  %1 = llm.distributed_attention(%q, %cache) {num_heads = 8 : i32, head_dim = 16 : i32, scale = 0.25 : f32}
    : (tensor<3x8x16xf16>, !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) -> tensor<3x8x16xf16>
  // CHECK: llm.distributed_attention(%q, %cache, %n) {layer = 3 : i64, scale = 2.500000e-01 : f32, window = 8 : i64, softcap = 5.000000e+01 : f32} : (
  %2 = llm.distributed_attention(%q, %cache, %n) {layer = 3, scale = 0.25 : f32, window = 8 : i64, softcap = 50.0 : f32}
    : (tensor<3x8x16xf16>, !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>, tensor<i32>) -> tensor<3x8x16xf16>
  func.return
}
