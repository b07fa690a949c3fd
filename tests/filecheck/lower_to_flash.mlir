// RUN: llmir-opt %s -p lower-to-flash --split-input-file | filecheck %s
// RUN: llmir-opt %s -p lower-to-flash,lower-to-flash --split-input-file | filecheck %s
// RUN: llmir-opt %s -p "lower-to-flash{interpret=true}" --split-input-file | filecheck %s --check-prefix INTERPRETED
// RUN: not llmir-opt %s -p "lower-to-flash{chip=\"v1\"}" --split-input-file 2>&1 | filecheck %s --check-prefix CHIP

// CHIP: error: lower-to-flash: chip: expected one of v5e,

// Two layers of one form share a kernel.

// CHECK-LABEL: func.func @main
// CHECK-NOT: llm.
// CHECK: %o = func.call @llm_attention(%q, %k, %v)
// CHECK: func.call @llm_attention(%o, %k, %v)
// CHECK: func.func private @llm_attention(
// CHECK: @tpu_custom_call
// INTERPRETED: func.call @llm_attention(
// INTERPRETED-NOT: tpu_custom_call
func.func @main(%q: tensor<200x4x64xbf16>, %k: tensor<200x2x64xbf16>, %v: tensor<200x2x64xbf16>) -> tensor<200x4x64xbf16> {
  %o = llm.attention %q, %k, %v {scale = 0.125 : f32, window = 128 : i64}
    : (tensor<200x4x64xbf16>, tensor<200x2x64xbf16>, tensor<200x2x64xbf16>) -> tensor<200x4x64xbf16>
  %p = llm.attention %o, %k, %v {scale = 0.125 : f32, window = 128 : i64}
    : (tensor<200x4x64xbf16>, tensor<200x2x64xbf16>, tensor<200x2x64xbf16>) -> tensor<200x4x64xbf16>
  func.return %p : tensor<200x4x64xbf16>
}

// -----
// What the kernel does not take, slopes say, is the reference decomposition.

// CHECK-LABEL: func.func @main
// CHECK: func.call @llm_attention(%q, %k, %v, %s)
// CHECK-NOT: tpu_custom_call
func.func @main(%q: tensor<200x4x64xf32>, %k: tensor<200x2x64xf32>, %v: tensor<200x2x64xf32>, %s: tensor<4xf32>) -> tensor<200x4x64xf32> {
  %o = llm.attention %q, %k, %v slopes(%s) {scale = 0.125 : f32}
    : (tensor<200x4x64xf32>, tensor<200x2x64xf32>, tensor<200x2x64xf32>, tensor<4xf32>) -> tensor<200x4x64xf32>
  func.return %o : tensor<200x4x64xf32>
}
