// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64}" | filecheck %s --check-prefix INSERT
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},insert-kv-cache{max_seqs=4 max_seq_len=64}" | filecheck %s --check-prefix INSERT
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=63},blockify-kv-cache{page_size=16}" | filecheck %s --check-prefix BLOCKIFY
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=63},blockify-kv-cache{page_size=16},blockify-kv-cache{page_size=8}" | filecheck %s --check-prefix BLOCKIFY
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,paged-attention-rewrite" | filecheck %s --check-prefix REWRITE
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,paged-attention-rewrite,paged-attention-rewrite" | filecheck %s --check-prefix REWRITE
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,paged-attention-rewrite,kv-cache-pruning" | filecheck %s --check-prefix PRUNE
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,paged-attention-rewrite,kv-cache-pruning,kv-cache-pruning" | filecheck %s --check-prefix PRUNE
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,paged-attention-rewrite,kv-cache-pruning,kv-cache-allocation{num_pages=9}" | filecheck %s --check-prefix ALLOCATE
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,paged-attention-rewrite,kv-cache-pruning,kv-cache-allocation{num_pages=9},kv-cache-allocation{num_pages=5}" | filecheck %s --check-prefix ALLOCATE
// RUN: llmir-opt %s -p "insert-kv-cache{max_seqs=4 max_seq_len=64},blockify-kv-cache,kv-cache-allocation" | filecheck %s --check-prefix LOOKUP
// RUN: not llmir-opt %s -p "blockify-kv-cache{page_size=0}" 2>&1 | filecheck %s --check-prefix BADPAGE
// RUN: not llmir-opt %s -p "kv-cache-allocation{num_pages=-1}" 2>&1 | filecheck %s --check-prefix BADPAGES

// Three layers: two that read everything, with a sliding window between them. From whole sequences to arrays of pages.

// INSERT: func.func @main(
// INSERT-SAME: %{{.*}}: tensor<4x1xi32> {llmir.role = "block_tables", llmir.group = 0 : i64}
// INSERT-SAME: [[CACHE:%[0-9a-z]+]]: !llm.paged_kv_cache<f32, 3, 2, 16, 64, 64> {llmir.role = "cache", llmir.group = 0 : i64}
// INSERT: llm.append_kv [[CACHE]], %k, %v, %seq_ids tokens(%positions, %{{.*}}, %num_tokens)
// INSERT-NEXT: llm.lookup_kv
// INSERT-NEXT: llm.attention %q, %{{.*}}, %{{.*}} tokens(%seq_ids, %positions)
// INSERT: llm.append_kv {{.*}} {layer = 1 : i64
// INSERT: llm.append_kv {{.*}} {layer = 2 : i64
// INSERT-NOT: llm.append_kv
// INSERT: func.return %{{.*}}, %{{.*}} : tensor<7x4x16xf32>, !llm.paged_kv_cache<f32, 3, 2, 16, 64, 64>

// BLOCKIFY: func.func @main(
// BLOCKIFY-SAME: tensor<4x4xi32> {llmir.role = "block_tables"
// BLOCKIFY-SAME: !llm.paged_kv_cache<f32, 3, 2, 16, 16, 64> {llmir.role = "cache"
// BLOCKIFY: llm.append_kv {{.*}} {block_size = 16 : i32, max_seq_len = 64 : i32
// BLOCKIFY-NEXT: llm.lookup_kv {{.*}} -> (tensor<4x64x2x16xf32>, tensor<4x64x2x16xf32>)

// REWRITE-NOT: llm.lookup_kv
// REWRITE-NOT: llm.attention
// REWRITE: llm.paged_attention %q, %{{.*}}, %{{.*}}, %seq_lens tokens(%seq_ids, %positions, %num_tokens) {num_heads = 4 : i32, head_dim = 16 : i32, scale = 2.500000e-01 : f32, llmir.loc = "model.py:5 (attend)"}
// REWRITE: llm.paged_attention {{.*}} {layer = 1 : i64, {{.*}}window = 8 : i64
// REWRITE: llm.paged_attention {{.*}} {layer = 2 : i64
// REWRITE-NOT: llm.lookup_kv

// The windowed layer gets a cache and a table of its own, and its layers are counted anew.
// PRUNE: func.func @main(
// PRUNE-SAME: [[ALL:%[0-9a-z]+]]: !llm.paged_kv_cache<f32, 2, 2, 16, 16, 64> {llmir.role = "cache", llmir.group = 0 : i64}
// PRUNE-SAME: [[WINDOWED:%[0-9a-z]+]]: !llm.paged_kv_cache<f32, 1, 2, 16, 16, 64> {llmir.role = "cache", {{.*}}llmir.window = 8 : i64
// PRUNE: llm.append_kv [[ALL]]
// PRUNE: llm.append_kv [[WINDOWED]], %{{.*}} {block_size
// PRUNE: llm.append_kv %{{.*}} {layer = 1 : i64
// PRUNE: func.return {{.*}} : tensor<7x4x16xf32>, !llm.paged_kv_cache<f32, 2, 2, 16, 16, 64>, !llm.paged_kv_cache<f32, 1, 2, 16, 16, 64>

// ALLOCATE-NOT: llm.paged_kv_cache
// ALLOCATE: tensor<9x16x2x16xf32> {{{.*}}llmir.layer = 0 : i64{{.*}}llmir.result = 1 : i64
// ALLOCATE: llm.write_pages
// ALLOCATE-NEXT: llm.attend_pages
// ALLOCATE: llm.attend_pages {{.*}}window = 8 : i64
// ALLOCATE-NOT: llm.append_kv
// ALLOCATE: func.return {{.*}} : tensor<7x4x16xf32>, tensor<9x16x2x16xf32>, tensor<9x16x2x16xf32>, tensor<9x16x2x16xf32>, tensor<9x16x2x16xf32>, tensor<9x16x2x16xf32>, tensor<9x16x2x16xf32>

// With no number of pages, each of the four sequences gets its four.
// LOOKUP: tensor<16x16x2x16xf32>
// LOOKUP: llm.write_pages
// LOOKUP: stablehlo.gather
// LOOKUP: llm.attention {{.*}} tokens(

// BADPAGE: llmir-opt: error: blockify-kv-cache: page_size must be at least 1 token, got 0
// BADPAGES: llmir-opt: error: kv-cache-allocation: num_pages must be at least 0, got -1

func.func @main(
    %q: tensor<7x4x16xf32> {llmir.path = "q"}, %k: tensor<7x2x16xf32> {llmir.path = "k"},
    %v: tensor<7x2x16xf32> {llmir.path = "v"}, %positions: tensor<7xi32> {llmir.role = "positions"},
    %seq_ids: tensor<7xi32> {llmir.role = "seq_ids"}, %num_tokens: tensor<i32> {llmir.role = "num_tokens"},
    %seq_lens: tensor<4xi32> {llmir.role = "seq_lens"}) -> tensor<7x4x16xf32> {
  %0 = llm.attention %q, %k, %v {scale = 0.25 : f32, llmir.loc = "model.py:5 (attend)"}
    : (tensor<7x4x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x4x16xf32>
  %1 = llm.attention %0, %k, %v {scale = 0.25 : f32, window = 8 : i64}
    : (tensor<7x4x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x4x16xf32>
  %2 = llm.attention %1, %k, %v {scale = 0.25 : f32}
    : (tensor<7x4x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>) -> tensor<7x4x16xf32>
  func.return %2 : tensor<7x4x16xf32>
}
