// RUN: llmir-opt %s -p "kv-cache-precision" | filecheck %s
// RUN: llmir-opt %s -p "kv-cache-precision,kv-cache-precision" | filecheck %s
// RUN: llmir-opt %s -p "kv-cache-precision{dtype=bfloat16},lower-to-reference" | filecheck %s --check-prefix LOWERED
// RUN: llmir-opt %s -p "kv-cache-quantization,kv-cache-precision" | filecheck %s --check-prefix INTEGERS
// RUN: not llmir-opt %s -p "kv-cache-precision{dtype=int8}" 2>&1 | filecheck %s --check-prefix DTYPE

// CHECK: func.func @main(
// CHECK-SAME: tensor<32x4x2x16xf16> {llmir.role = "k_pages", llmir.result = 1 : i64}
// CHECK-SAME: tensor<32x4x2x16xf16> {llmir.role = "v_pages", llmir.result = 2 : i64}
// CHECK-SAME: -> (tensor<7x4x16xf32>, tensor<32x4x2x16xf16>, tensor<32x4x2x16xf16>)
// CHECK: llm.write_pages {{.*}} -> (tensor<32x4x2x16xf16>, tensor<32x4x2x16xf16>)
// CHECK: llm.attend_pages %q, %{{.*}} : (tensor<7x4x16xf32>, tensor<32x4x2x16xf16>, tensor<32x4x2x16xf16>

// LOWERED: func.func @main(
// LOWERED-SAME: tensor<32x4x2x16xbf16> {llmir.role = "k_pages"
// LOWERED-SAME: -> (tensor<7x4x16xf32>, tensor<32x4x2x16xbf16>, tensor<32x4x2x16xbf16>)
// LOWERED-NOT: llm.write_pages

// INTEGERS: llm.attend_pages %q, %{{.*}} : (tensor<7x4x16xf32>, !llm.quantized_tensor<32x4x2x16xi8, scale=f16, symmetric=true>

// DTYPE: error: kv-cache-precision: dtype must be one of float32, bfloat16, float16, got 'int8'

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
