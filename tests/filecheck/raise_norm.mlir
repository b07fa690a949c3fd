// RUN: llmir-opt %s -p raise-norm | filecheck %s
// RUN: llmir-opt %s -p raise-norm,raise-norm | filecheck %s

// A root-mean-square norm by 1 + w, in float32, rounded once: the convert is taken in, its location kept.
// CHECK: func.func @main
// CHECK: [[RMS:%[0-9a-z]+]] = llm.rms_norm %x, %w {epsilon = 1.000000e-06 : f32, offset = 1.000000e+00 : f32, llmir.loc = "model.py:1 (norm)"}
// CHECK-SAME: (tensor<1x7x12xbf16>, tensor<12xf32>) -> tensor<1x7x12xbf16>

// A layer norm of one pass, with a bias: the statistics are gone.
// CHECK: [[LAYER:%[0-9a-z]+]] = llm.layer_norm %y, %w, %b {epsilon = 1.000000e-05 : f32
// CHECK-SAME: (tensor<1x7x12xf32>, tensor<12xf32>, tensor<12xf32>) -> tensor<1x7x12xf32>

// A mean over 11 of 12 features is none: everything of it stays.
// CHECK-NOT: llm.
// CHECK: stablehlo.divide %{{.*}}, %eleven
// CHECK: stablehlo.rsqrt
// CHECK: stablehlo.multiply
// CHECK-NEXT: [[STAYS:%[0-9a-z]+]] = stablehlo.multiply
// CHECK-NEXT: func.return [[RMS]], [[LAYER]], [[STAYS]]

builtin.module {
  func.func @main(%x: tensor<1x7x12xbf16>, %w: tensor<12xf32> {llmir.path = "w"}, %b: tensor<12xf32> {llmir.path = "b"},
                  %y: tensor<1x7x12xf32>) -> (tensor<1x7x12xbf16>, tensor<1x7x12xf32>, tensor<1x7x12xf32>) {
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %one = stablehlo.constant dense<1.0> : tensor<12xf32>
    %twelve = stablehlo.constant dense<12.0> : tensor<1x7xf32>
    %eleven = stablehlo.constant dense<11.0> : tensor<1x7xf32>
    %fine = stablehlo.constant dense<1.0e-6> : tensor<1x7xf32>
    %coarse = stablehlo.constant dense<1.0e-5> : tensor<1x7xf32>

    %wide = stablehlo.convert %x : (tensor<1x7x12xbf16>) -> tensor<1x7x12xf32>
    %0 = stablehlo.multiply %wide, %wide : tensor<1x7x12xf32>
    %1 = stablehlo.reduce(%0 init: %zero) across dimensions = [2] : (tensor<1x7x12xf32>, tensor<f32>) -> tensor<1x7xf32>
    reducer(%l: tensor<f32>, %r: tensor<f32>) {
      %s = stablehlo.add %l, %r : tensor<f32>
      stablehlo.return %s : tensor<f32>
    }
    %2 = stablehlo.divide %1, %twelve : tensor<1x7xf32>
    %3 = stablehlo.add %2, %fine : tensor<1x7xf32>
    %4 = stablehlo.rsqrt %3 : tensor<1x7xf32>
    %5 = stablehlo.broadcast_in_dim %4, dims = [0, 1] : (tensor<1x7xf32>) -> tensor<1x7x12xf32>
    %6 = stablehlo.multiply %wide, %5 : tensor<1x7x12xf32>
    %7 = stablehlo.add %one, %w : tensor<12xf32>
    %8 = stablehlo.broadcast_in_dim %7, dims = [2] : (tensor<12xf32>) -> tensor<1x7x12xf32>
    %9 = stablehlo.multiply %6, %8 : tensor<1x7x12xf32>
    %10 = stablehlo.convert %9 {llmir.loc = "model.py:1 (norm)"} : (tensor<1x7x12xf32>) -> tensor<1x7x12xbf16>

    %11 = stablehlo.reduce(%y init: %zero) across dimensions = [2] : (tensor<1x7x12xf32>, tensor<f32>) -> tensor<1x7xf32>
    reducer(%l1: tensor<f32>, %r1: tensor<f32>) {
      %s1 = stablehlo.add %l1, %r1 : tensor<f32>
      stablehlo.return %s1 : tensor<f32>
    }
    %12 = stablehlo.divide %11, %twelve : tensor<1x7xf32>
    %13 = stablehlo.multiply %y, %y : tensor<1x7x12xf32>
    %14 = stablehlo.reduce(%13 init: %zero) across dimensions = [2] : (tensor<1x7x12xf32>, tensor<f32>) -> tensor<1x7xf32>
    reducer(%l2: tensor<f32>, %r2: tensor<f32>) {
      %s2 = stablehlo.add %l2, %r2 : tensor<f32>
      stablehlo.return %s2 : tensor<f32>
    }
    %15 = stablehlo.divide %14, %twelve : tensor<1x7xf32>
    %16 = stablehlo.multiply %12, %12 : tensor<1x7xf32>
    %17 = stablehlo.subtract %15, %16 : tensor<1x7xf32>
    %18 = stablehlo.add %17, %coarse : tensor<1x7xf32>
    %19 = stablehlo.rsqrt %18 : tensor<1x7xf32>
    %20 = stablehlo.broadcast_in_dim %12, dims = [0, 1] : (tensor<1x7xf32>) -> tensor<1x7x12xf32>
    %21 = stablehlo.subtract %y, %20 : tensor<1x7x12xf32>
    %22 = stablehlo.broadcast_in_dim %19, dims = [0, 1] : (tensor<1x7xf32>) -> tensor<1x7x12xf32>
    %23 = stablehlo.broadcast_in_dim %w, dims = [2] : (tensor<12xf32>) -> tensor<1x7x12xf32>
    %24 = stablehlo.multiply %22, %23 : tensor<1x7x12xf32>
    %25 = stablehlo.multiply %21, %24 : tensor<1x7x12xf32>
    %26 = stablehlo.broadcast_in_dim %b, dims = [2] : (tensor<12xf32>) -> tensor<1x7x12xf32>
    %27 = stablehlo.add %25, %26 : tensor<1x7x12xf32>

    %28 = stablehlo.divide %14, %eleven : tensor<1x7xf32>
    %29 = stablehlo.add %28, %coarse : tensor<1x7xf32>
    %30 = stablehlo.rsqrt %29 : tensor<1x7xf32>
    %31 = stablehlo.broadcast_in_dim %30, dims = [0, 1] : (tensor<1x7xf32>) -> tensor<1x7x12xf32>
    %32 = stablehlo.multiply %y, %31 : tensor<1x7x12xf32>
    %33 = stablehlo.multiply %32, %23 : tensor<1x7x12xf32>
    func.return %10, %27, %33 : tensor<1x7x12xbf16>, tensor<1x7x12xf32>, tensor<1x7x12xf32>
  }
}
