// RUN: llmir-opt %s --split-input-file --verify-diagnostics --parsing-diagnostics | filecheck %s

// Every message of a verifier.

// CHECK: llm.attention: k: expected shape [T=7, Hkv, D=16], got 6x2x16
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<6x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<6x2x16xf32>, tensor<6x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: q: expected shape [T, H, D], got 7x128
func.func @f(%q: tensor<7x128xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32}
    : (tensor<7x128xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: output: expected shape [T=7, H=8, Dv=16], got 7x8x24
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x24xf32>
  func.return
}

// -----
// CHECK: llm.attention: output: expected floating-point elements, got i32
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xi32>
  func.return
}

// -----
// CHECK: llm.attention: q: expected a number of query heads that is a multiple of the 3 KV heads, got 8
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x3x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x3x16xf32>, tensor<7x3x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: window: expected at least 1, got 0
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32, window = 0 : i64}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: softcap: expected a positive finite number, got -1.0
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32, softcap = -1.0 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: scale: expected a finite number, got inf
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0x7F800000 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: property 'scale' expected in operation 'llm.attention'
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {causal = true}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: slopes: expected shape [H=8], got 7
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>, %s: tensor<7xf32>) {
  %0 = llm.attention %q, %k, %k slopes(%s) {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: expected 3 operands (q, k, v), got 2
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: expected 2 operands (seq_ids, positions) in tokens(…), got 1
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k tokens(%q) {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: expected one slopes(…), got two
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k slopes(%q) slopes(%q) {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: expected 3 operand types, one for each operand, got 2
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32} : (tensor<7x8x16xf32>, tensor<7x2x16xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: expected 1 result types, got 2
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>) {
  %0 = llm.attention %q, %k, %k {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> (tensor<7x8x16xf32>, tensor<7x8x16xf32>)
  func.return
}

// -----
// CHECK: llm.attention: k: expected shape [S, L, Hkv, D=16], got 7x2x16
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0 = llm.attention %q, %k, %k tokens(%i, %i) {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>, tensor<7xi32>)
    -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: positions: expected elements of type i32, got i64
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<2x9x2x16xf32>, %i: tensor<7xi32>, %j: tensor<7xi64>) {
  %0 = llm.attention %q, %k, %k tokens(%i, %j) {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<2x9x2x16xf32>, tensor<2x9x2x16xf32>, tensor<7xi32>, tensor<7xi64>)
    -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attention: tokens: expected both seq_ids and positions, got one of them
func.func @f(%q: tensor<7x8x16xf32>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0 = "llm.attention"(%q, %k, %k, %i) <{scale = 0.125 : f32, causal = true, operandSegmentSizes = array<i32: 1, 1, 1, 0, 1, 0>}>
    : (tensor<7x8x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.write_pages: k: expected shape [T, Hkv=2, D=16], got 7x3x16
func.func @f(%kp: tensor<32x4x2x16xbf16>, %k: tensor<7x3x16xf32>, %i: tensor<7xi32>, %t: tensor<4x8xi32>, %n: tensor<i32>) {
  %0, %1 = llm.write_pages %kp, %kp, %k, %k, %i, %i, %t, %n
    : (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<7x3x16xf32>, tensor<7x3x16xf32>, tensor<7xi32>,
    tensor<7xi32>, tensor<4x8xi32>, tensor<i32>) -> (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>)
  func.return
}

// -----
// CHECK: llm.write_pages: second result: expected the type of v_pages, tensor<32x4x2x16xbf16>, got tensor<32x4x2x16xf32>
func.func @f(%kp: tensor<32x4x2x16xbf16>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>, %t: tensor<4x8xi32>, %n: tensor<i32>) {
  %0, %1 = llm.write_pages %kp, %kp, %k, %k, %i, %i, %t, %n
    : (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>,
    tensor<7xi32>, tensor<4x8xi32>, tensor<i32>) -> (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xf32>)
  func.return
}

// -----
// CHECK: llm.write_pages: num_tokens: expected shape [], got 1
func.func @f(%kp: tensor<32x4x2x16xbf16>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>, %t: tensor<4x8xi32>, %n: tensor<1xi32>) {
  %0, %1 = llm.write_pages %kp, %kp, %k, %k, %i, %i, %t, %n
    : (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>,
    tensor<7xi32>, tensor<4x8xi32>, tensor<1xi32>) -> (tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>)
  func.return
}

// -----
// CHECK: llm.attend_pages: seq_lens: expected shape [S=4], got 5
func.func @f(%kp: tensor<32x4x2x16xbf16>, %q: tensor<7x8x16xf32>, %i: tensor<7xi32>, %t: tensor<4x8xi32>, %l: tensor<5xi32>, %n: tensor<i32>) {
  %0 = llm.attend_pages %q, %kp, %kp, %t, %l, %i, %i, %n {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<4x8xi32>, tensor<5xi32>,
    tensor<7xi32>, tensor<7xi32>, tensor<i32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attend_pages: q: expected shape [T, H, D=16], got 7x8x24
func.func @f(%kp: tensor<32x4x2x16xbf16>, %q: tensor<7x8x24xf32>, %i: tensor<7xi32>, %t: tensor<4x8xi32>, %l: tensor<4xi32>, %n: tensor<i32>) {
  %0 = llm.attend_pages %q, %kp, %kp, %t, %l, %i, %i, %n {scale = 0.125 : f32}
    : (tensor<7x8x24xf32>, tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<4x8xi32>, tensor<4xi32>,
    tensor<7xi32>, tensor<7xi32>, tensor<i32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.attend_pages: window: expected at least 1, got -1
func.func @f(%kp: tensor<32x4x2x16xbf16>, %q: tensor<7x8x16xf32>, %i: tensor<7xi32>, %t: tensor<4x8xi32>, %l: tensor<4xi32>, %n: tensor<i32>) {
  %0 = llm.attend_pages %q, %kp, %kp, %t, %l, %i, %i, %n {scale = 0.125 : f32, window = -1 : i64}
    : (tensor<7x8x16xf32>, tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>, tensor<4x8xi32>, tensor<4xi32>,
    tensor<7xi32>, tensor<7xi32>, tensor<i32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.append_kv: layer: expected between 0 and 1, got 2
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i {layer = 2 : i64}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: llm.append_kv: block_size: expected 4, as the type of the cache says, got 16
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i {block_size = 16 : i32}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: llm.append_kv: max_seq_len: expected 30, as the type of the cache says, got 4096
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i {max_seq_len = 4096 : i32}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: llm.append_kv: k: expected shape [T, 2, 16], got 7x3x16
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x3x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i {layer = 1 : i64}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x3x16xf32>, tensor<7x3x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: llm.append_kv: first result: expected the type of cache
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i {layer = 1 : i64}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 32>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: llm.append_kv: block_indices: expected shape [T=7], got 6
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i {layer = 1 : i64}
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>)
    -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<6xi32>)
  func.return
}

// -----
// CHECK: llm.append_kv: block_tables: expected shape [S, 8], got 4x7
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>, %t: tensor<4x7xi32>, %n: tensor<i32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i tokens(%i, %t, %n)
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>,
    tensor<7xi32>, tensor<4x7xi32>, tensor<i32>) -> (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: operand 'cache' at position 0 does not verify
func.func @f(%c: tensor<4xf32>, %k: tensor<7x2x16xf32>, %i: tensor<7xi32>) {
  %0, %1 = llm.append_kv %c, %k, %k, %i
    : (tensor<4xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>) -> (tensor<4xf32>, tensor<7xi32>)
  func.return
}

// -----
// CHECK: llm.lookup_kv: first result: expected shape [S=4, 30, 2, 16], got 4x32x2x16
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %t: tensor<4x8xi32>) {
  %0, %1 = llm.lookup_kv %c, %t
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>) -> (tensor<4x32x2x16xf16>, tensor<4x32x2x16xf16>)
  func.return
}

// -----
// CHECK: llm.lookup_kv: second result: expected elements of the cache's type f16, got tensor<4x30x2x16xf32>
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %t: tensor<4x8xi32>) {
  %0, %1 = llm.lookup_kv %c, %t
    : (!llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>) -> (tensor<4x30x2x16xf16>, tensor<4x30x2x16xf32>)
  func.return
}

// -----
// CHECK: llm.paged_attention: num_heads: expected 8, the query heads of q, got 16
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %q: tensor<4x8x16xf32>, %t: tensor<4x8xi32>, %l: tensor<4xi32>) {
  %0 = llm.paged_attention %q, %c, %t, %l {num_heads = 16 : i32, scale = 0.125 : f32}
    : (tensor<4x8x16xf32>, !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>, tensor<4xi32>)
    -> tensor<4x8x16xf32>
  func.return
}

// -----
// CHECK: llm.paged_attention: head_dim: expected 16, as the type of the cache says, got 64
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %q: tensor<4x8x16xf32>, %t: tensor<4x8xi32>, %l: tensor<4xi32>) {
  %0 = llm.paged_attention %q, %c, %t, %l {head_dim = 64 : i32, scale = 0.125 : f32}
    : (tensor<4x8x16xf32>, !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>, tensor<4xi32>)
    -> tensor<4x8x16xf32>
  func.return
}

// -----
// CHECK: llm.paged_attention: block_indices: expected shape [S=7, 8], got 4x8
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %q: tensor<7x8x16xf32>, %t: tensor<4x8xi32>, %l: tensor<4xi32>) {
  %0 = llm.paged_attention %q, %c, %t, %l {scale = 0.125 : f32}
    : (tensor<7x8x16xf32>, !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>, tensor<4xi32>)
    -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.paged_attention: q: expected a number of query heads that is a multiple of the 2 KV heads, got 5
func.func @f(%c: !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, %q: tensor<4x5x16xf32>, %t: tensor<4x8xi32>, %l: tensor<4xi32>) {
  %0 = llm.paged_attention %q, %c, %t, %l {scale = 0.125 : f32}
    : (tensor<4x5x16xf32>, !llm.paged_kv_cache<f16, 2, 2, 16, 4, 30>, tensor<4x8xi32>, tensor<4xi32>)
    -> tensor<4x5x16xf32>
  func.return
}

// -----
// CHECK: llm.rms_norm: w: expected shape [C=32], got 31
func.func @f(%x: tensor<7x32xf32>, %w2: tensor<31xf32>) {
  %0 = llm.rms_norm %x, %w2 {epsilon = 1.0e-5 : f32} : (tensor<7x32xf32>, tensor<31xf32>) -> tensor<7x32xf32>
  func.return
}

// -----
// CHECK: llm.rms_norm: epsilon: expected a positive finite number, got 0.0
func.func @f(%x: tensor<7x32xf32>, %w: tensor<32xf32>) {
  %0 = llm.rms_norm %x, %w {epsilon = 0.0 : f32} : (tensor<7x32xf32>, tensor<32xf32>) -> tensor<7x32xf32>
  func.return
}

// -----
// CHECK: llm.rms_norm: output: expected the type of x, tensor<7x32xf32>, got tensor<7x32xbf16>
func.func @f(%x: tensor<7x32xf32>, %w: tensor<32xf32>) {
  %0 = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32} : (tensor<7x32xf32>, tensor<32xf32>) -> tensor<7x32xbf16>
  func.return
}

// -----
// CHECK: llm.rms_norm: x: expected floating-point elements, got i32
func.func @f(%w: tensor<32xf32>, %i: tensor<7x32xi32>) {
  %0 = llm.rms_norm %i, %w {epsilon = 1.0e-5 : f32} : (tensor<7x32xi32>, tensor<32xf32>) -> tensor<7x32xi32>
  func.return
}

// -----
// CHECK: llm.layer_norm: b: expected shape [C=32], got 31
func.func @f(%x: tensor<7x32xf32>, %w: tensor<32xf32>, %w2: tensor<31xf32>) {
  %0 = llm.layer_norm %x, %w, %w2 {epsilon = 1.0e-5 : f32}
    : (tensor<7x32xf32>, tensor<32xf32>, tensor<31xf32>) -> tensor<7x32xf32>
  func.return
}

// -----
// CHECK: llm.rope: rotary_dim: expected a positive even number, got 13
func.func @f(%h: tensor<7x8x16xf32>, %cs: tensor<7x6xf32>) {
  %0 = llm.rope %h, %cs, %cs {rotary_dim = 13 : i64}
    : (tensor<7x8x16xf32>, tensor<7x6xf32>, tensor<7x6xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.rope: cos: expected shape [T=7, 8], got 7x6
func.func @f(%h: tensor<7x8x16xf32>, %cs: tensor<7x6xf32>) {
  %0 = llm.rope %h, %cs, %cs {rotary_dim = 16 : i64}
    : (tensor<7x8x16xf32>, tensor<7x6xf32>, tensor<7x6xf32>) -> tensor<7x8x16xf32>
  func.return
}

// -----
// CHECK: llm.rope: rotary_dim: expected at most the head dim 8, got 12
func.func @f(%h: tensor<7x8x8xf32>, %cs: tensor<7x6xf32>) {
  %0 = llm.rope %h, %cs, %cs {rotary_dim = 12 : i64}
    : (tensor<7x8x8xf32>, tensor<7x6xf32>, tensor<7x6xf32>) -> tensor<7x8x8xf32>
  func.return
}

// -----
// CHECK: llm.linear: w: expected shape [N, K=32], got 32x48
func.func @f(%x: tensor<7x32xf32>, %m: tensor<32x48xf32>) {
  %0 = llm.linear %x, %m {transpose_w = true} : (tensor<7x32xf32>, tensor<32x48xf32>) -> tensor<7x48xf32>
  func.return
}

// -----
// CHECK: llm.linear: b: expected shape [N=48], got 32
func.func @f(%x: tensor<7x32xf32>, %w: tensor<32xf32>, %m: tensor<32x48xf32>) {
  %0 = llm.linear %x, %m, %w : (tensor<7x32xf32>, tensor<32x48xf32>, tensor<32xf32>) -> tensor<7x48xf32>
  func.return
}

// -----
// CHECK: llm.linear: output: expected leading dimensions 7, got 8
func.func @f(%x: tensor<7x32xf32>, %m: tensor<32x48xf32>, %b: tensor<48xf32>) {
  %0 = llm.linear %x, %m, %b : (tensor<7x32xf32>, tensor<32x48xf32>, tensor<48xf32>) -> tensor<8x48xf32>
  func.return
}

// -----
// CHECK: llm.linear: expected 2 to 3 operands (x, w, b), got 1
func.func @f(%x: tensor<7x32xf32>) {
  %0 = llm.linear %x : (tensor<7x32xf32>) -> tensor<7x48xf32>
  func.return
}

// -----
// CHECK: llm.gated_mlp: activation: expected one of silu, gelu, gelu_tanh, relu, got "swish"
func.func @f(%x: tensor<7x32xf32>, %m: tensor<32x48xf32>) {
  %0 = llm.gated_mlp %x, %m, %m, %m {activation = "swish", transpose_down = true}
    : (tensor<7x32xf32>, tensor<32x48xf32>, tensor<32x48xf32>, tensor<32x48xf32>) -> tensor<7x32xf32>
  func.return
}

// -----
// CHECK: llm.gated_mlp: down_w: expected shape [F=48, O], got 32x48
func.func @f(%x: tensor<7x32xf32>, %m: tensor<32x48xf32>) {
  %0 = llm.gated_mlp %x, %m, %m, %m {activation = "silu"}
    : (tensor<7x32xf32>, tensor<32x48xf32>, tensor<32x48xf32>, tensor<32x48xf32>) -> tensor<7x32xf32>
  func.return
}

// -----
// CHECK: llm.quantize: scale: expected a number or a tensor of them for a plain tensor of integers, got none
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {bits = 8 : i32} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: bits: expected 8, the width of the stored integers, got 4
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32, bits = 4 : i32} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: scale: expected one number, or one for each of the 256 channels, got 255
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = dense<0.1> : tensor<255xf32>} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: scale: expected positive finite numbers, got -1
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = -1.0 : f32} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: scale: expected floating-point numbers, got tensor<256xi8>
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = dense<1> : tensor<256xi8>} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: zero_point: expected between -128 and 127, as i8 stores, got 200
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32, zero_point = 200 : i32} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: symmetric = true: expected no zero_point, or zero, got 3
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32, zero_point = 3 : i8, symmetric = true}
    : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: symmetric = false: expected a zero_point that is not all zero, got none
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32, symmetric = false} : (tensor<4x256xf32>) -> tensor<4x256xi8>
  func.return
}

// -----
// CHECK: llm.quantize: result: expected the shape of x, 4x256, got 4x255
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32} : (tensor<4x256xf32>) -> tensor<4x255xi8>
  func.return
}

// -----
// CHECK: llm.quantize: result: expected integer elements, got f32
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32} : (tensor<4x256xf32>) -> tensor<4x256xf32>
  func.return
}

// -----
// CHECK: llm.quantize: scale: expected none for !llm.quantized_tensor<4x256xi8, scale=f32, symmetric=true>, whose scales are found
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {scale = 0.1 : f32}
    : (tensor<4x256xf32>) -> !llm.quantized_tensor<4x256xi8, scale=f32, symmetric=true>
  func.return
}

// -----
// CHECK: llm.quantize: symmetric: expected true
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {symmetric = false}
    : (tensor<4x256xf32>) -> !llm.quantized_tensor<4x256xi8, scale=f32, symmetric=true>
  func.return
}

// -----
// CHECK: llm.quantize: wide_rows: expected row numbers for a mixed quantized tensor
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {} : (tensor<4x256xf32>) -> !llm.mixed_quantized_tensor<4x256x!llm.mixed<i8,i4>, scale=f32>
  func.return
}

// -----
// CHECK: llm.quantize: wide_rows: expected different numbers between 0 and 3, got [0, 4]
func.func @f(%x: tensor<4x256xf32>) {
  %0 = llm.quantize(%x) {wide_rows = array<i64: 0, 4>}
    : (tensor<4x256xf32>) -> !llm.mixed_quantized_tensor<4x256x!llm.mixed<i8,i4>, scale=f32>
  func.return
}

// -----
// CHECK: llm.dequantize: scale: expected a number or a tensor of them
func.func @f(%q: tensor<4x256xi8>) {
  %0 = llm.dequantize(%q) : (tensor<4x256xi8>) -> tensor<4x256xf32>
  func.return
}

// -----
// CHECK: llm.dequantize: result: expected shape [4, 256], got 4x255
func.func @f(%q: tensor<4x256xi8>) {
  %0 = llm.dequantize(%q) {scale = 0.1 : f32} : (tensor<4x256xi8>) -> tensor<4x255xf32>
  func.return
}

// -----
// CHECK: llm.dequantize: scale: expected none for !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>, which has its own
func.func @f(%qw: !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>) {
  %0 = llm.dequantize(%qw) {scale = 0.1 : f32}
    : (!llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>) -> tensor<64x256xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: scales: expected a tensor of them for a plain tensor of integers, got none
func.func @f(%x: tensor<4x256xf32>, %w: tensor<256x64xi4>) {
  %0 = llm.quantized_matmul(%x, %w) {} : (tensor<4x256xf32>, tensor<256x64xi4>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: bits: expected 4, the width of the stored integers, got 8
func.func @f(%x: tensor<4x256xf32>, %w: tensor<256x64xi4>, %s: tensor<2x64xf32>) {
  %0 = llm.quantized_matmul(%x, %w, %s) {bits = 8 : i32, group_size = 128 : i32}
    : (tensor<4x256xf32>, tensor<256x64xi4>, tensor<2x64xf32>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: scales: expected shape [4, N=64], got 2x64
func.func @f(%x: tensor<4x256xf32>, %w: tensor<256x64xi4>, %s: tensor<2x64xf32>) {
  %0 = llm.quantized_matmul(%x, %w, %s) {group_size = 64 : i32}
    : (tensor<4x256xf32>, tensor<256x64xi4>, tensor<2x64xf32>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: scales: expected shape [N=64], got 2x64
func.func @f(%x: tensor<4x256xf32>, %w: tensor<256x64xi4>, %s: tensor<2x64xf32>) {
  %0 = llm.quantized_matmul(%x, %w, %s) {bits = 4 : i32}
    : (tensor<4x256xf32>, tensor<256x64xi4>, tensor<2x64xf32>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: group_size: expected a divisor of K=256, got 100
func.func @f(%x: tensor<4x256xf32>, %w: tensor<256x64xi4>, %s: tensor<2x64xf32>) {
  %0 = llm.quantized_matmul(%x, %w, %s) {group_size = 100 : i32}
    : (tensor<4x256xf32>, tensor<256x64xi4>, tensor<2x64xf32>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: zero_points: expected integer elements, got f32
func.func @f(%x: tensor<4x256xf32>, %w: tensor<256x64xi4>, %s: tensor<2x64xf32>, %z: tensor<2x64xf32>) {
  %0 = llm.quantized_matmul(%x, %w, %s, %z) {group_size = 128 : i32}
    : (tensor<4x256xf32>, tensor<256x64xi4>, tensor<2x64xf32>, tensor<2x64xf32>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: transpose_w: expected true for a weight of a quantized type
func.func @f(%x: tensor<4x256xf32>, %qw: !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>) {
  %0 = llm.quantized_matmul(%x, %qw) {}
    : (tensor<4x256xf32>, !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>)
    -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: scales: expected none
func.func @f(%x: tensor<4x256xf32>, %s: tensor<2x64xf32>, %qw: !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>) {
  %0 = llm.quantized_matmul(%x, %qw, %s) {transpose_w = true}
    : (tensor<4x256xf32>, !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>,
    tensor<2x64xf32>) -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: group_size: expected that of
func.func @f(%x: tensor<4x256xf32>, %qw: !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>) {
  %0 = llm.quantized_matmul(%x, %qw) {transpose_w = true, group_size = 64 : i32}
    : (tensor<4x256xf32>, !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>)
    -> tensor<4x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: result: expected shape [..., 64], got 4x32
func.func @f(%x: tensor<4x256xf32>, %qw: !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>) {
  %0 = llm.quantized_matmul(%x, %qw) {transpose_w = true}
    : (tensor<4x256xf32>, !llm.quantized_tensor<64x256xi4, scale=f32, symmetric=true, group_size=32>)
    -> tensor<4x32xf32>
  func.return
}

// -----
// CHECK: llm.sharded_linear: shard_dim: expected between 0 and 1, got 2
func.func @f(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>) {
  %0 = llm.sharded_linear(%x, %w) {shard_dim = 2 : i32, num_shards = 8 : i32, shard_id = 2 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>) -> tensor<16x512xf16>
  func.return
}

// -----
// CHECK: llm.sharded_linear: num_shards: expected at least 1, got 0
func.func @f(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>) {
  %0 = llm.sharded_linear(%x, %w) {shard_dim = 1 : i32, num_shards = 0 : i32, shard_id = 2 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>) -> tensor<16x512xf16>
  func.return
}

// -----
// CHECK: llm.sharded_linear: shard_id: expected between 0 and 7, got 8
func.func @f(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>) {
  %0 = llm.sharded_linear(%x, %w) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 8 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>) -> tensor<16x512xf16>
  func.return
}

// -----
// CHECK: llm.sharded_linear: num_shards: expected a divisor of dimension 1 of w, 4096, got 3
func.func @f(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>) {
  %0 = llm.sharded_linear(%x, %w) {shard_dim = 1 : i32, num_shards = 3 : i32, shard_id = 0 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>) -> tensor<16x512xf16>
  func.return
}

// -----
// CHECK: llm.sharded_linear: x: expected shape [..., 128], got 16x1024
func.func @f(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>) {
  %0 = llm.sharded_linear(%x, %w) {shard_dim = 0 : i32, num_shards = 8 : i32, shard_id = 0 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>) -> tensor<16x512xf16>
  func.return
}

// -----
// CHECK: llm.sharded_linear: result: expected shape [..., 512], got 16x4096
func.func @f(%x: tensor<16x1024xf16>, %w: tensor<1024x4096xf16>) {
  %0 = llm.sharded_linear(%x, %w) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 0 : i32}
    : (tensor<16x1024xf16>, tensor<1024x4096xf16>) -> tensor<16x4096xf16>
  func.return
}

// -----
// CHECK: llm.sharded_linear: w: expected shard_dim, num_shards and shard_id (1, 8, 2), as the op says, got (1, 4, 3)
func.func @f(%x: tensor<16x1024xf16>, %ws: !llm.sharded_tensor<tensor<1024x4096xf16>, 1, 4, 3>) {
  %0 = llm.sharded_linear(%x, %ws) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 2 : i32}
    : (tensor<16x1024xf16>, !llm.sharded_tensor<tensor<1024x4096xf16>, 1, 4, 3>) -> tensor<16x512xf16>
  func.return
}

// -----
// CHECK: llm.all_gather: dim: expected between 0 and 1, got 2
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.all_gather(%x) {dim = 2 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x8192xf16>
  func.return
}

// -----
// CHECK: llm.all_gather: result: expected shape 16x8192, got 16x4096
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.all_gather(%x) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x4096xf16>
  func.return
}

// -----
// CHECK: llm.all_gather: group_size: expected at least 1, got 0
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.all_gather(%x) {dim = 1 : i32, group_size = 0 : i32} : (tensor<16x1024xf16>) -> tensor<16x4096xf16>
  func.return
}

// -----
// CHECK: llm.all_gather: result: expected the elements of x, f16, got f32
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.all_gather(%x) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x8192xf32>
  func.return
}

// -----
// CHECK: llm.all_reduce: reduction: expected one of sum, max, min, got "mean"
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.all_reduce(%x) {reduction = "mean", group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  func.return
}

// -----
// CHECK: llm.all_reduce: result: expected the type of x
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.all_reduce(%x) {reduction = "sum", group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x1024xf32>
  func.return
}

// -----
// CHECK: llm.reduce_scatter: group_size: expected a divisor of dimension 0 of x, 16, got 3
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.reduce_scatter(%x) {dim = 0 : i32, group_size = 3 : i32} : (tensor<16x1024xf16>) -> tensor<2x1024xf16>
  func.return
}

// -----
// CHECK: llm.pipeline_stage: stage_id: expected between 0 and 3, got 4
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.pipeline_stage(%x) {stage_id = 4 : i32, num_stages = 4 : i32}
    : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  func.return
}

// -----
// CHECK: llm.pipeline_stage: schedule: expected one of 1f1b, gpipe, got "fifo"
func.func @f(%x: tensor<16x1024xf16>) {
  %0 = llm.pipeline_stage(%x) {stage_id = 0 : i32, num_stages = 4 : i32, schedule = "fifo"}
    : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
  func.return
}

// -----
// CHECK: llm.pipeline_send: dest_stage: expected at least 0, got -1
func.func @f(%x: tensor<16x1024xf16>) {
  llm.pipeline_send(%x) {dest_stage = -1 : i32} : (tensor<16x1024xf16>) -> ()
  func.return
}

// -----
// CHECK: llm.pipeline_recv: source_stage: expected at least 0, got -1
func.func @f() {
  %0 = llm.pipeline_recv() {source_stage = -1 : i32} : () -> tensor<16x1024xf16>
  func.return
}

// -----
// CHECK: llm.sequence_parallel_attention: seq_start: expected between 0 and 9, got 10
func.func @f(%q: tensor<3x8x16xf16>, %k: tensor<12x2x16xf16>) {
  %0 = llm.sequence_parallel_attention(%q, %k, %k) {seq_start = 10 : i32, seq_length = 3 : i32, total_length = 12 : i32}
    : (tensor<3x8x16xf16>, tensor<12x2x16xf16>, tensor<12x2x16xf16>) -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.sequence_parallel_attention: seq_length: expected between 1 and 12, got 13
func.func @f(%q: tensor<3x8x16xf16>, %k: tensor<12x2x16xf16>) {
  %0 = llm.sequence_parallel_attention(%q, %k, %k) {seq_start = 0 : i32, seq_length = 13 : i32, total_length = 12 : i32}
    : (tensor<3x8x16xf16>, tensor<12x2x16xf16>, tensor<12x2x16xf16>) -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.sequence_parallel_attention: k: expected shape [24, Hkv, D=16], got 12x2x16
func.func @f(%q: tensor<3x8x16xf16>, %k: tensor<12x2x16xf16>) {
  %0 = llm.sequence_parallel_attention(%q, %k, %k) {seq_start = 0 : i32, seq_length = 3 : i32, total_length = 24 : i32}
    : (tensor<3x8x16xf16>, tensor<12x2x16xf16>, tensor<12x2x16xf16>) -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.sequence_parallel_attention: q: expected shape [4, H, D], got 3x8x16
func.func @f(%q: tensor<3x8x16xf16>, %k: tensor<12x2x16xf16>) {
  %0 = llm.sequence_parallel_attention(%q, %k, %k) {seq_start = 0 : i32, seq_length = 4 : i32, total_length = 12 : i32}
    : (tensor<3x8x16xf16>, tensor<12x2x16xf16>, tensor<12x2x16xf16>) -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.distributed_attention: layer: expected between 0 and 11, got 12
func.func @f(%q: tensor<3x8x16xf16>, %c: !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) {
  %0 = llm.distributed_attention(%q, %c) {layer = 12, scale = 0.25 : f32}
    : (tensor<3x8x16xf16>, !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.distributed_attention: num_heads: expected 8, as q has, got 4
func.func @f(%q: tensor<3x8x16xf16>, %c: !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) {
  %0 = llm.distributed_attention(%q, %c) {num_heads = 4 : i32, scale = 0.25 : f32}
    : (tensor<3x8x16xf16>, !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.distributed_attention: seq_len: expected elements of type i32, got i64
func.func @f(%q: tensor<3x8x16xf16>, %n: tensor<i64>, %c: !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>) {
  %0 = llm.distributed_attention(%q, %c, %n) {scale = 0.25 : f32}
    : (tensor<3x8x16xf16>, !llm.sharded_kv_cache<f16, 12, 2, 16, 4, 64, shards=4>, tensor<i64>)
    -> tensor<3x8x16xf16>
  func.return
}

// -----
// CHECK: llm.cost_annotation: compute_flops: expected at least 0, got -1
func.func @f(%x: tensor<16x1024xf16>) {
  llm.cost_annotation(%x) {compute_flops = -1 : i64} : (tensor<16x1024xf16>) -> ()
  func.return
}

// -----
// CHECK: llm.cost_annotation: cost: expected at least one of compute_flops, memory_bytes and communication_bytes, got none
func.func @f(%x: tensor<16x1024xf16>) {
  llm.cost_annotation(%x) : (tensor<16x1024xf16>) -> ()
  func.return
}

// -----
// CHECK: llm.cost_annotation: memory_bytes: expected an integer, got true
func.func @f(%x: tensor<16x1024xf16>) {
  llm.cost_annotation(%x) {memory_bytes = true} : (tensor<16x1024xf16>) -> ()
  func.return
}

// -----
// CHECK: llm.quantized_matmul: activation_group_size: expected a divisor of K=64, got 24
func.func @f(%x: tensor<4x64xf32>, %w: !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>) {
  %0 = llm.quantized_matmul(%x, %w) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 24 : i32}
    : (tensor<4x64xf32>, !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>) -> tensor<4x8xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: activation_scales: expected shape [2], got 64
func.func @f(%x: tensor<4x64xf32>, %w: !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, %s: tensor<64xf32>) {
  %0 = llm.quantized_matmul(%x, %w) activation_scales(%s) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32}
    : (tensor<4x64xf32>, !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, tensor<64xf32>) -> tensor<4x8xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: activation_scales: expected activation_bits beside it, got none
func.func @f(%x: tensor<4x64xf32>, %w: !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, %s: tensor<1xf32>) {
  %0 = llm.quantized_matmul(%x, %w) activation_scales(%s) {transpose_w = true}
    : (tensor<4x64xf32>, !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, tensor<1xf32>) -> tensor<4x8xf32>
  func.return
}

// -----
// CHECK: llm.observe: statistic: expected one of absmax, gram, histogram, got "mean"
func.func @f(%x: tensor<4x64xf32>) {
  %0 = llm.observe %x {statistic = "mean"} : (tensor<4x64xf32>) -> tensor<64xf32>
  func.return
}

// -----
// CHECK: llm.observe: result: expected shape [K=64, K=64], got 64x32
func.func @f(%x: tensor<4x64xf32>) {
  %0 = llm.observe %x {statistic = "gram"} : (tensor<4x64xf32>) -> tensor<64x32xf32>
  func.return
}

// -----
// CHECK: llm.observe: result: expected elements of type i32, got f32
func.func @f(%x: tensor<4x64xf32>) {
  %0 = llm.observe %x {statistic = "histogram"} : (tensor<4x64xf32>) -> tensor<64x320xf32>
  func.return
}

// -----
// CHECK: llm.quantized_matmul: activation_bits: expected 8, got 4
func.func @f(%x: tensor<4x64xf32>, %w: !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>) {
  %0 = llm.quantized_matmul(%x, %w) {transpose_w = true, activation_bits = 4 : i32}
    : (tensor<4x64xf32>, !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>) -> tensor<4x8xf32>
  func.return
}

// -----
// CHECK: llm.quantized_gather: ids: expected integer elements, got f32
func.func @f(%w: !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, %ids: tensor<3xf32>) {
  %0 = llm.quantized_gather(%w, %ids)
    : (!llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, tensor<3xf32>) -> tensor<3x64xf32>
  func.return
}

// -----
// CHECK: llm.quantized_gather: result: expected shape [..., 64], got 3x32
func.func @f(%w: !llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, %ids: tensor<3xi32>) {
  %0 = llm.quantized_gather(%w, %ids)
    : (!llm.quantized_tensor<8x64xi8, scale=f32, symmetric=true>, tensor<3xi32>) -> tensor<3x32xf32>
  func.return
}

// -----
// CHECK: llm.write_pages: k_pages: expected [N, PS, Hkv, D] with one scale for each token and head, got !llm.quantized_tensor<
func.func @f(%kp: !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true, group_size=8>, %k: tensor<7x2x16xf32>,
    %i: tensor<7xi32>, %t: tensor<4x8xi32>, %n: tensor<i32>) {
  %0, %1 = llm.write_pages %kp, %kp, %k, %k, %i, %i, %t, %n
    : (!llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true, group_size=8>,
    !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true, group_size=8>, tensor<7x2x16xf32>, tensor<7x2x16xf32>,
    tensor<7xi32>, tensor<7xi32>, tensor<4x8xi32>, tensor<i32>)
    -> (!llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true, group_size=8>,
    !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true, group_size=8>)
  func.return
}
