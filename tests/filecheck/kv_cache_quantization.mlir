// RUN: llmir-opt %s -p "kv-cache-quantization" | filecheck %s
// RUN: llmir-opt %s -p "kv-cache-quantization,kv-cache-quantization" | filecheck %s
// RUN: llmir-opt %s -p "kv-cache-quantization{bits=4},lower-to-reference" | filecheck %s --check-prefix LOWERED
// RUN: llmir-opt %s -p "kv-cache-quantization{target=tpu}" | filecheck %s --check-prefix KERNEL
// RUN: not llmir-opt %s -p "kv-cache-quantization{bits=2}" 2>&1 | filecheck %s --check-prefix BITS
// RUN: not llmir-opt %s -p "kv-cache-quantization{target=npu}" 2>&1 | filecheck %s --check-prefix TARGET

// CHECK: func.func @main(
// CHECK-SAME: !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true> {llmir.role = "k_pages", llmir.result = 1 : i64}
// CHECK-SAME: !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true> {llmir.role = "v_pages", llmir.result = 2 : i64}
// CHECK: llm.write_pages {{.*}} -> (!llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true>, !llm.quantized_tensor<
// CHECK: llm.attend_pages %q, %{{.*}} : (tensor<7x4x16xf32>, !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true>

// What kernels read has scales of float32.
// KERNEL: func.func @main(
// KERNEL-SAME: !llm.quantized_tensor<32x4x2x16xi8, scale=f32, symmetric=true> {llmir.role = "k_pages"

// Integers, scales and minima are arguments and results of their own, those of 4 bits packed.
// LOWERED: func.func @main(
// LOWERED-SAME: tensor<32x4x2x8xui8> {llmir.role = "k_pages"
// LOWERED-SAME: tensor<32x4x2x1xf16> {llmir.role = "k_pages"
// LOWERED-SAME: tensor<32x4x2x1xf16> {llmir.role = "k_pages"
// LOWERED-SAME: tensor<32x4x2x8xui8> {llmir.role = "v_pages"
// LOWERED-SAME: -> (tensor<7x4x16xf32>, tensor<32x4x2x8xui8>, tensor<32x4x2x1xf16>, tensor<32x4x2x1xf16>, tensor<32x4x2x8xui8>, tensor<32x4x2x1xf16>, tensor<32x4x2x1xf16>)
// LOWERED-NOT: llm.write_pages

// TARGET: error: kv-cache-quantization: target must be one of cpu, gpu, gpu-reference, reference, tpu, got 'npu'
// BITS: error: kv-cache-quantization: bits must be 4 or 8, got 2

builtin.module {
  func.func @main(%kp: tensor<32x4x2x16xf32> {llmir.role = "k_pages", llmir.result = 1 : i64},
                  %vp: tensor<32x4x2x16xf32> {llmir.role = "v_pages", llmir.result = 2 : i64},
                  %q: tensor<7x4x16xf32>, %k: tensor<7x2x16xf32>, %v: tensor<7x2x16xf32>, %ids: tensor<7xi32>, %at: tensor<7xi32>,
                  %t: tensor<3x8xi32>, %lens: tensor<3xi32>, %n: tensor<i32>)
      -> (tensor<7x4x16xf32>, tensor<32x4x2x16xf32>, tensor<32x4x2x16xf32>) {
    %0, %1 = llm.write_pages %kp, %vp, %k, %v, %ids, %at, %t, %n
      : (tensor<32x4x2x16xf32>, tensor<32x4x2x16xf32>, tensor<7x2x16xf32>, tensor<7x2x16xf32>, tensor<7xi32>, tensor<7xi32>,
      tensor<3x8xi32>, tensor<i32>) -> (tensor<32x4x2x16xf32>, tensor<32x4x2x16xf32>)
    %2 = llm.attend_pages %q, %0, %1, %t, %lens, %ids, %at, %n {scale = 0.25 : f32}
      : (tensor<7x4x16xf32>, tensor<32x4x2x16xf32>, tensor<32x4x2x16xf32>, tensor<3x8xi32>, tensor<3xi32>, tensor<7xi32>,
      tensor<7xi32>, tensor<i32>) -> tensor<7x4x16xf32>
    func.return %2, %0, %1 : tensor<7x4x16xf32>, tensor<32x4x2x16xf32>, tensor<32x4x2x16xf32>
  }
}
