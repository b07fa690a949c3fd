// RUN: llmir-opt %s -p matrix-weights | filecheck %s
// RUN: llmir-opt %s -p matrix-weights,matrix-weights | filecheck %s
// RUN: llmir-opt %s -p matrix-weights,lower-to-reference | filecheck %s --check-prefix LOWERED

// A gated MLP comes apart, and its gate and up, of one input, become one weight whose parts tell where their rows lie. A
// layer of a stack is an argument of its own; tied embeddings are one. A bias is added after the product. bfloat16 that is
// multiplied in float32 is widened where it is read; float32 that is multiplied in bfloat16 is kept so. What is read in
// another way too keeps the form it had beside the matrix.
// CHECK: func.func @main(
// CHECK-SAME: [[GU:%[0-9a-z]+]]: tensor<24x8xf32> {llmir.path = "gate+up", llmir.parts = [{llmir.path = "gate", llmir.offset = 0 : i64, llmir.rows = array<i64: 12, 1>, llmir.columns = array<i64: 8, 12>}, {llmir.path = "up"
// CHECK-SAME: [[DOWN:%[0-9a-z]+]]: tensor<8x12xf32> {llmir.path = "down", llmir.offset = 0 : i64, llmir.rows = array<i64: 8, 1>, llmir.columns = array<i64: 12, 8>}
// CHECK-SAME: [[STACK:%[0-9a-z]+]]: tensor<8x8xf32> {llmir.path = "stack", llmir.offset = 64 : i64
// CHECK-SAME: %b: tensor<8xf32> {llmir.path = "b"}
// CHECK-SAME: [[EMBED:%[0-9a-z]+]]: tensor<32x8xf32> {llmir.path = "embed", llmir.offset = 0 : i64, llmir.rows = array<i64: 32, 8>, llmir.columns = array<i64: 8, 1>}
// CHECK-SAME: [[HALF:%[0-9a-z]+]]: tensor<6x8xbf16> {llmir.path = "half"
// CHECK-SAME: [[WIDE:%[0-9a-z]+]]: tensor<6x8xbf16> {llmir.path = "wide"
// CHECK-SAME: %norm: tensor<8xf32> {llmir.path = "norm"}
// CHECK-SAME: [[BOTH:%[0-9a-z]+]]: tensor<8x8xf32> {llmir.path = "both", {{.*}}}, %both: tensor<8x8xf32> {llmir.path = "both"}
// CHECK-NOT: llm.gated_mlp
// CHECK: stablehlo.gather"([[EMBED]],
// CHECK: [[P:%[0-9a-z]+]] = llm.linear %n, [[GU]] {transpose_w = true} : ({{.*}}) -> tensor<7x24xf32>
// CHECK-NEXT: stablehlo.slice [[P]] [0:7, 0:12]
// CHECK-NEXT: stablehlo.slice [[P]] [0:7, 12:24]
// CHECK-NEXT: stablehlo.logistic
// CHECK: llm.linear %{{.*}}, [[DOWN]] {transpose_w = true}
// CHECK: [[Y:%[0-9a-z]+]] = llm.linear %x, [[STACK]] {transpose_w = true}
// CHECK-NEXT: [[B:%[0-9a-z]+]] = stablehlo.broadcast_in_dim %b
// CHECK-NEXT: stablehlo.add [[Y]], [[B]]
// CHECK: llm.linear %x, [[EMBED]] {transpose_w = true}
// CHECK-NEXT: [[W:%[0-9a-z]+]] = stablehlo.convert [[HALF]] : (tensor<6x8xbf16>) -> tensor<6x8xf32>
// CHECK-NEXT: llm.linear %y, [[W]] {transpose_w = true} : (tensor<7x8xf32>, tensor<6x8xf32>)
// CHECK: llm.linear %{{.*}}, [[WIDE]] {transpose_w = true} : (tensor<7x8xbf16>, tensor<6x8xbf16>)
// CHECK: llm.linear %{{.*}}, [[BOTH]] {transpose_w = true}
// CHECK: stablehlo.exponential %both

// LOWERED-NOT: llm.linear
// LOWERED: func.call @llm_linear

builtin.module {
  func.func @main(%gate: tensor<8x12xf32> {llmir.path = "gate"}, %up: tensor<8x12xf32> {llmir.path = "up"},
                  %down: tensor<12x8xf32> {llmir.path = "down"}, %stack: tensor<2x8x8xf32> {llmir.path = "stack"},
                  %b: tensor<8xf32> {llmir.path = "b"}, %embed: tensor<32x8xf32> {llmir.path = "embed"},
                  %half: tensor<8x6xbf16> {llmir.path = "half"}, %wide: tensor<8x6xf32> {llmir.path = "wide"},
                  %norm: tensor<8xf32> {llmir.path = "norm"}, %both: tensor<8x8xf32> {llmir.path = "both"},
                  %tokens: tensor<7xi32> {llmir.role = "tokens"})
      -> (tensor<7x8xf32>, tensor<7x8xf32>, tensor<7x32xf32>, tensor<7x6xf32>, tensor<7x6xbf16>, tensor<7x8xf32>, tensor<8x8xf32>) {
    %ids = stablehlo.reshape %tokens : (tensor<7xi32>) -> tensor<7x1xi32>
    %x = "stablehlo.gather"(%embed, %ids) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, indices_are_sorted = false, slice_sizes = array<i64: 1, 8>}> : (tensor<32x8xf32>, tensor<7x1xi32>) -> tensor<7x8xf32>
    %n = llm.rms_norm %x, %norm {epsilon = 1.0e-5 : f32} : (tensor<7x8xf32>, tensor<8xf32>) -> tensor<7x8xf32>
    %mlp = llm.gated_mlp %n, %gate, %up, %down {activation = "silu"} : (tensor<7x8xf32>, tensor<8x12xf32>, tensor<8x12xf32>, tensor<12x8xf32>) -> tensor<7x8xf32>
    %slice = stablehlo.slice %stack [1:2, 0:8, 0:8] : (tensor<2x8x8xf32>) -> tensor<1x8x8xf32>
    %layer = stablehlo.reshape %slice : (tensor<1x8x8xf32>) -> tensor<8x8xf32>
    %y = llm.linear %x, %layer, %b : (tensor<7x8xf32>, tensor<8x8xf32>, tensor<8xf32>) -> tensor<7x8xf32>
    %logits = llm.linear %x, %embed {transpose_w = true} : (tensor<7x8xf32>, tensor<32x8xf32>) -> tensor<7x32xf32>
    %hw = stablehlo.convert %half : (tensor<8x6xbf16>) -> tensor<8x6xf32>
    %h = llm.linear %y, %hw : (tensor<7x8xf32>, tensor<8x6xf32>) -> tensor<7x6xf32>
    %xm = stablehlo.convert %mlp : (tensor<7x8xf32>) -> tensor<7x8xbf16>
    %wh = stablehlo.convert %wide : (tensor<8x6xf32>) -> tensor<8x6xbf16>
    %w = llm.linear %xm, %wh : (tensor<7x8xbf16>, tensor<8x6xbf16>) -> tensor<7x6xbf16>
    %z = llm.linear %mlp, %both : (tensor<7x8xf32>, tensor<8x8xf32>) -> tensor<7x8xf32>
    %e = stablehlo.exponential %both : tensor<8x8xf32>
    func.return %mlp, %y, %logits, %h, %w, %z, %e : tensor<7x8xf32>, tensor<7x8xf32>, tensor<7x32xf32>, tensor<7x6xf32>, tensor<7x6xbf16>, tensor<7x8xf32>, tensor<8x8xf32>
  }
}
