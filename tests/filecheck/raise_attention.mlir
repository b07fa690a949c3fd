// RUN: llmir-opt %s -p rewrite-positions,raise-attention --split-input-file | filecheck %s
// RUN: llmir-opt %s -p rewrite-positions,raise-attention,raise-attention --split-input-file | filecheck %s
// RUN: llmir-opt %s -p "rewrite-positions,raise-attention{max_seq_len=3}" --split-input-file | filecheck %s --check-prefix SHORT

// One head without a head axis: what was masked, scaled and normalised by hand is one operation.

// CHECK-LABEL: func.func @main
// CHECK: [[E:%[0-9a-z]+]] = "stablehlo.gather"(%embed
// CHECK: stablehlo.reshape [[E]] {{.*}} : (tensor<1x13x4xf32>) -> tensor<13x4xf32>
// CHECK-NOT: stablehlo.exponential
// CHECK: llm.attention %{{.*}}, %{{.*}}, %{{.*}} {scale = 5.000000e-01 : f32, llmir.loc = "model.py:9 (attend)"} : (tensor<13x1x4xf32>, tensor<13x1x4xf32>, tensor<13x1x4xf32>) -> tensor<13x1x4xf32>
// CHECK-NOT: stablehlo.dot_general
// CHECK: func.return

builtin.module attributes {llmir.length = 13 : i64} {
  func.func @main(%embed: tensor<5x4xf32> {llmir.path = "e"}, %tokens: tensor<1x13xi32> {llmir.role = "tokens"})
      -> tensor<1x13x4xf32> {
    %ids = stablehlo.reshape %tokens : (tensor<1x13xi32>) -> tensor<1x13x1xi32>
    %e = "stablehlo.gather"(%embed, %ids) <{dimension_numbers = #stablehlo.gather<offset_dims = [2], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 2>, slice_sizes = array<i64: 1, 4>, indices_are_sorted = false}>
      : (tensor<5x4xf32>, tensor<1x13x1xi32>) -> tensor<1x13x4xf32>
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %low = stablehlo.constant dense<-3.0e38> : tensor<f32>
    %half = stablehlo.constant dense<0.5> : tensor<f32>
    %s = stablehlo.dot_general %e, %e, batching_dims = [0] x [0], contracting_dims = [2] x [2]
      : (tensor<1x13x4xf32>, tensor<1x13x4xf32>) -> tensor<1x13x13xf32>
    %halves = stablehlo.broadcast_in_dim %half, dims = [] : (tensor<f32>) -> tensor<1x13x13xf32>
    %scaled = stablehlo.multiply %s, %halves : tensor<1x13x13xf32>
    %q = stablehlo.iota dim = 1 : tensor<1x13x13xi32>
    %k = stablehlo.iota dim = 2 : tensor<1x13x13xi32>
    %mask = stablehlo.compare GE, %q, %k, SIGNED : (tensor<1x13x13xi32>, tensor<1x13x13xi32>) -> tensor<1x13x13xi1>
    %lows = stablehlo.broadcast_in_dim %low, dims = [] : (tensor<f32>) -> tensor<1x13x13xf32>
    %masked = stablehlo.select %mask, %scaled, %lows : tensor<1x13x13xi1>, tensor<1x13x13xf32>
    %max = stablehlo.reduce(%masked init: %low) across dimensions = [2] : (tensor<1x13x13xf32>, tensor<f32>) -> tensor<1x13xf32>
    reducer(%a: tensor<f32>, %b: tensor<f32>) {
      %m = stablehlo.maximum %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }
    %maxes = stablehlo.broadcast_in_dim %max, dims = [0, 1] : (tensor<1x13xf32>) -> tensor<1x13x13xf32>
    %less = stablehlo.subtract %masked, %maxes : tensor<1x13x13xf32>
    %exp = stablehlo.exponential %less : tensor<1x13x13xf32>
    %sum = stablehlo.reduce(%exp init: %zero) across dimensions = [2] : (tensor<1x13x13xf32>, tensor<f32>) -> tensor<1x13xf32>
    reducer(%a: tensor<f32>, %b: tensor<f32>) {
      %m = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }
    %sums = stablehlo.broadcast_in_dim %sum, dims = [0, 1] : (tensor<1x13xf32>) -> tensor<1x13x13xf32>
    %w = stablehlo.divide %exp, %sums : tensor<1x13x13xf32>
    %o = stablehlo.dot_general %w, %e, batching_dims = [0] x [0], contracting_dims = [2] x [1] {llmir.loc = "model.py:9 (attend)"}
      : (tensor<1x13x13xf32>, tensor<1x13x4xf32>) -> tensor<1x13x4xf32>
    func.return %o : tensor<1x13x4xf32>
  }
}

// -----
// A window of three tokens. Where no sequence is longer than that, there is none to speak of.

// CHECK-LABEL: func.func @main
// CHECK: llm.attention {{.*}} {scale = 5.000000e-01 : f32, window = 3 : i64
// SHORT-LABEL: func.func @main
// SHORT: llm.attention

builtin.module attributes {llmir.length = 13 : i64} {
  func.func @main(%embed: tensor<5x4xf32> {llmir.path = "e"}, %tokens: tensor<1x13xi32> {llmir.role = "tokens"})
      -> tensor<1x13x4xf32> {
    %ids = stablehlo.reshape %tokens : (tensor<1x13xi32>) -> tensor<1x13x1xi32>
    %e = "stablehlo.gather"(%embed, %ids) <{dimension_numbers = #stablehlo.gather<offset_dims = [2], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 2>, slice_sizes = array<i64: 1, 4>, indices_are_sorted = false}>
      : (tensor<5x4xf32>, tensor<1x13x1xi32>) -> tensor<1x13x4xf32>
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %low = stablehlo.constant dense<-3.0e38> : tensor<f32>
    %half = stablehlo.constant dense<0.5> : tensor<f32>
    %s = stablehlo.dot_general %e, %e, batching_dims = [0] x [0], contracting_dims = [2] x [2]
      : (tensor<1x13x4xf32>, tensor<1x13x4xf32>) -> tensor<1x13x13xf32>
    %halves = stablehlo.broadcast_in_dim %half, dims = [] : (tensor<f32>) -> tensor<1x13x13xf32>
    %scaled = stablehlo.multiply %s, %halves : tensor<1x13x13xf32>
    %q = stablehlo.iota dim = 1 : tensor<1x13x13xi32>
    %k = stablehlo.iota dim = 2 : tensor<1x13x13xi32>
    %three = stablehlo.constant dense<3> : tensor<i32>
    %threes = stablehlo.broadcast_in_dim %three, dims = [] : (tensor<i32>) -> tensor<1x13x13xi32>
    %causal = stablehlo.compare GE, %q, %k, SIGNED : (tensor<1x13x13xi32>, tensor<1x13x13xi32>) -> tensor<1x13x13xi1>
    %distance = stablehlo.subtract %q, %k : tensor<1x13x13xi32>
    %near = stablehlo.compare LT, %distance, %threes, SIGNED : (tensor<1x13x13xi32>, tensor<1x13x13xi32>) -> tensor<1x13x13xi1>
    %mask = stablehlo.and %causal, %near : tensor<1x13x13xi1>
    %lows = stablehlo.broadcast_in_dim %low, dims = [] : (tensor<f32>) -> tensor<1x13x13xf32>
    %masked = stablehlo.select %mask, %scaled, %lows : tensor<1x13x13xi1>, tensor<1x13x13xf32>
    %max = stablehlo.reduce(%masked init: %low) across dimensions = [2] : (tensor<1x13x13xf32>, tensor<f32>) -> tensor<1x13xf32>
    reducer(%a: tensor<f32>, %b: tensor<f32>) {
      %m = stablehlo.maximum %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }
    %maxes = stablehlo.broadcast_in_dim %max, dims = [0, 1] : (tensor<1x13xf32>) -> tensor<1x13x13xf32>
    %less = stablehlo.subtract %masked, %maxes : tensor<1x13x13xf32>
    %exp = stablehlo.exponential %less : tensor<1x13x13xf32>
    %sum = stablehlo.reduce(%exp init: %zero) across dimensions = [2] : (tensor<1x13x13xf32>, tensor<f32>) -> tensor<1x13xf32>
    reducer(%a: tensor<f32>, %b: tensor<f32>) {
      %m = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }
    %sums = stablehlo.broadcast_in_dim %sum, dims = [0, 1] : (tensor<1x13xf32>) -> tensor<1x13x13xf32>
    %w = stablehlo.divide %exp, %sums : tensor<1x13x13xf32>
    %o = stablehlo.dot_general %w, %e, batching_dims = [0] x [0], contracting_dims = [2] x [1] {llmir.loc = "model.py:9 (attend)"}
      : (tensor<1x13x13xf32>, tensor<1x13x4xf32>) -> tensor<1x13x4xf32>
    func.return %o : tensor<1x13x4xf32>
  }
}

// -----
// The first two tokens are seen by every query: no causal mask, so it stays as it was.

// CHECK-LABEL: func.func @main
// CHECK-NOT: llm.attention
// CHECK: stablehlo.dot_general
// CHECK: stablehlo.exponential
// CHECK: stablehlo.dot_general
// CHECK-NOT: llm.attention

builtin.module attributes {llmir.length = 13 : i64} {
  func.func @main(%embed: tensor<5x4xf32> {llmir.path = "e"}, %tokens: tensor<1x13xi32> {llmir.role = "tokens"})
      -> tensor<1x13x4xf32> {
    %ids = stablehlo.reshape %tokens : (tensor<1x13xi32>) -> tensor<1x13x1xi32>
    %e = "stablehlo.gather"(%embed, %ids) <{dimension_numbers = #stablehlo.gather<offset_dims = [2], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 2>, slice_sizes = array<i64: 1, 4>, indices_are_sorted = false}>
      : (tensor<5x4xf32>, tensor<1x13x1xi32>) -> tensor<1x13x4xf32>
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %low = stablehlo.constant dense<-3.0e38> : tensor<f32>
    %half = stablehlo.constant dense<0.5> : tensor<f32>
    %s = stablehlo.dot_general %e, %e, batching_dims = [0] x [0], contracting_dims = [2] x [2]
      : (tensor<1x13x4xf32>, tensor<1x13x4xf32>) -> tensor<1x13x13xf32>
    %halves = stablehlo.broadcast_in_dim %half, dims = [] : (tensor<f32>) -> tensor<1x13x13xf32>
    %scaled = stablehlo.multiply %s, %halves : tensor<1x13x13xf32>
    %q = stablehlo.iota dim = 1 : tensor<1x13x13xi32>
    %k = stablehlo.iota dim = 2 : tensor<1x13x13xi32>
    %two = stablehlo.constant dense<2> : tensor<i32>
    %twos = stablehlo.broadcast_in_dim %two, dims = [] : (tensor<i32>) -> tensor<1x13x13xi32>
    %causal = stablehlo.compare GE, %q, %k, SIGNED : (tensor<1x13x13xi32>, tensor<1x13x13xi32>) -> tensor<1x13x13xi1>
    %first = stablehlo.compare LT, %k, %twos, SIGNED : (tensor<1x13x13xi32>, tensor<1x13x13xi32>) -> tensor<1x13x13xi1>
    %mask = stablehlo.or %causal, %first : tensor<1x13x13xi1>
    %lows = stablehlo.broadcast_in_dim %low, dims = [] : (tensor<f32>) -> tensor<1x13x13xf32>
    %masked = stablehlo.select %mask, %scaled, %lows : tensor<1x13x13xi1>, tensor<1x13x13xf32>
    %max = stablehlo.reduce(%masked init: %low) across dimensions = [2] : (tensor<1x13x13xf32>, tensor<f32>) -> tensor<1x13xf32>
    reducer(%a: tensor<f32>, %b: tensor<f32>) {
      %m = stablehlo.maximum %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }
    %maxes = stablehlo.broadcast_in_dim %max, dims = [0, 1] : (tensor<1x13xf32>) -> tensor<1x13x13xf32>
    %less = stablehlo.subtract %masked, %maxes : tensor<1x13x13xf32>
    %exp = stablehlo.exponential %less : tensor<1x13x13xf32>
    %sum = stablehlo.reduce(%exp init: %zero) across dimensions = [2] : (tensor<1x13x13xf32>, tensor<f32>) -> tensor<1x13xf32>
    reducer(%a: tensor<f32>, %b: tensor<f32>) {
      %m = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }
    %sums = stablehlo.broadcast_in_dim %sum, dims = [0, 1] : (tensor<1x13xf32>) -> tensor<1x13x13xf32>
    %w = stablehlo.divide %exp, %sums : tensor<1x13x13xf32>
    %o = stablehlo.dot_general %w, %e, batching_dims = [0] x [0], contracting_dims = [2] x [1] {llmir.loc = "model.py:9 (attend)"}
      : (tensor<1x13x13xf32>, tensor<1x13x4xf32>) -> tensor<1x13x4xf32>
    func.return %o : tensor<1x13x4xf32>
  }
}
