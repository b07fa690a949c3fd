// RUN: llmir-opt %s -p lower-to-tpu --split-input-file | filecheck %s
// RUN: llmir-opt %s -p lower-to-tpu,lower-to-tpu --split-input-file | filecheck %s
// RUN: llmir-opt %s -p "lower-to-tpu{interpret=true}" --split-input-file | filecheck %s --check-prefix INTERPRETED

// A write and the attention that reads it are one call of the kernel; its pages are rows of all heads, padded to lanes.

// CHECK-LABEL: func.func @main
// CHECK-SAME: %kp: tensor<8x16x256xf32>, %vp: tensor<8x16x256xf32>
// CHECK-NOT: llm.
// CHECK: func.call @llm_paged_attention(%q, %k, %v, %kp, %vp, %tables, %lens, %ids, %n)
// CHECK: func.func private @llm_paged_attention(
// CHECK: @tpu_custom_call
// INTERPRETED: func.call @llm_paged_attention(
// INTERPRETED-NOT: tpu_custom_call
func.func @main(%q: tensor<7x9x64xf32>, %k: tensor<7x3x64xf32>, %v: tensor<7x3x64xf32>, %kp: tensor<8x16x3x64xf32>,
    %vp: tensor<8x16x3x64xf32>, %ids: tensor<7xi32>, %pos: tensor<7xi32>, %tables: tensor<2x4xi32>,
    %lens: tensor<2xi32>, %n: tensor<i32>) -> (tensor<7x9x64xf32>, tensor<8x16x3x64xf32>, tensor<8x16x3x64xf32>) {
  %kp1, %vp1 = llm.write_pages %kp, %vp, %k, %v, %ids, %pos, %tables, %n
    : (tensor<8x16x3x64xf32>, tensor<8x16x3x64xf32>, tensor<7x3x64xf32>, tensor<7x3x64xf32>, tensor<7xi32>,
       tensor<7xi32>, tensor<2x4xi32>, tensor<i32>) -> (tensor<8x16x3x64xf32>, tensor<8x16x3x64xf32>)
  %o = llm.attend_pages %q, %kp1, %vp1, %tables, %lens, %ids, %pos, %n {scale = 0.125 : f32}
    : (tensor<7x9x64xf32>, tensor<8x16x3x64xf32>, tensor<8x16x3x64xf32>, tensor<2x4xi32>, tensor<2xi32>, tensor<7xi32>,
       tensor<7xi32>, tensor<i32>) -> tensor<7x9x64xf32>
  func.return %o, %kp1, %vp1 : tensor<7x9x64xf32>, tensor<8x16x3x64xf32>, tensor<8x16x3x64xf32>
}

// -----
// Pages of 4 tokens are none of the kernel's: they keep their type, and the reference serves them.

// CHECK-LABEL: func.func @main
// CHECK-SAME: %kp: tensor<8x4x3x64xf32>
// CHECK: func.call @llm_write_pages(
// CHECK: func.call @llm_attend_pages(
// CHECK-NOT: tpu_custom_call
func.func @main(%q: tensor<7x9x64xf32>, %k: tensor<7x3x64xf32>, %v: tensor<7x3x64xf32>, %kp: tensor<8x4x3x64xf32>,
    %vp: tensor<8x4x3x64xf32>, %ids: tensor<7xi32>, %pos: tensor<7xi32>, %tables: tensor<2x4xi32>,
    %lens: tensor<2xi32>, %n: tensor<i32>) -> (tensor<7x9x64xf32>, tensor<8x4x3x64xf32>, tensor<8x4x3x64xf32>) {
  %kp1, %vp1 = llm.write_pages %kp, %vp, %k, %v, %ids, %pos, %tables, %n
    : (tensor<8x4x3x64xf32>, tensor<8x4x3x64xf32>, tensor<7x3x64xf32>, tensor<7x3x64xf32>, tensor<7xi32>,
       tensor<7xi32>, tensor<2x4xi32>, tensor<i32>) -> (tensor<8x4x3x64xf32>, tensor<8x4x3x64xf32>)
  %o = llm.attend_pages %q, %kp1, %vp1, %tables, %lens, %ids, %pos, %n {scale = 0.125 : f32}
    : (tensor<7x9x64xf32>, tensor<8x4x3x64xf32>, tensor<8x4x3x64xf32>, tensor<2x4xi32>, tensor<2xi32>, tensor<7xi32>,
       tensor<7xi32>, tensor<i32>) -> tensor<7x9x64xf32>
  func.return %o, %kp1, %vp1 : tensor<7x9x64xf32>, tensor<8x4x3x64xf32>, tensor<8x4x3x64xf32>
}
