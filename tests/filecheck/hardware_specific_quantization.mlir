// RUN: llmir-opt %s -p "hardware-specific-quantization{target=tpu}" | filecheck %s
// RUN: llmir-opt %s -p "hardware-specific-quantization{target=\"gpu-reference\"}" | filecheck %s
// RUN: llmir-opt %s -p "hardware-specific-quantization{target=tpu},hardware-specific-quantization{target=tpu}" | filecheck %s
// RUN: llmir-opt %s -p "hardware-specific-quantization{target=cpu}" | filecheck %s --check-prefix ROWS
// RUN: llmir-opt %s -p "hardware-specific-quantization{target=tpu},hardware-specific-quantization{target=reference}" | filecheck %s --check-prefix ROWS
// RUN: llmir-opt %s -p "hardware-specific-quantization{target=tpu},lower-to-reference" | filecheck %s --check-prefix LOWERED
// RUN: not llmir-opt %s -p "hardware-specific-quantization{target=npu}" 2>&1 | filecheck %s --check-prefix TARGET

// What multiplies and looks up reads columns, on a target whose compiler wants them.
// CHECK: func.func @main(
// CHECK-SAME: %up: !llm.quantized_tensor<8x16xi4, scale=f32, symmetric=true, group_size=4, layout=columns> {llmir.path = "up"}
// CHECK-SAME: %down: !llm.quantized_tensor<8x16xi8, scale=f16, zp=i8, layout=columns> {llmir.path = "down"}
// CHECK-SAME: %embed: !llm.quantized_tensor<32x16xi4, scale=f16, min=f16, group_size=8, layout=columns> {llmir.path = "embed"}
// Not integers of 2 bits, not a weight that is returned, not what is no parameter, not the pages of a cache.
// CHECK-SAME: %narrow: !llm.quantized_tensor<8x16xi2, scale=f32, symmetric=true>
// CHECK-SAME: %returned: !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>
// CHECK-SAME: %input: !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>
// CHECK-SAME: %pages: !llm.quantized_tensor<32x4x2x16xi4, scale=f16, min=f16>
// CHECK-NOT: layout=rows
// CHECK: llm.quantized_matmul(%x, %up) {{.*}} !llm.quantized_tensor<8x16xi4, scale=f32, symmetric=true, group_size=4, layout=columns>

// ROWS: func.func @main(
// ROWS-NOT: layout=

// LOWERED: func.func @main(
// LOWERED-SAME: tensor<16x8xi4> {llmir.path = "up"}, %{{[0-9a-z]+}}: tensor<4x8xf32> {llmir.path = "up"}
// LOWERED-SAME: tensor<16x8xi8> {llmir.path = "down"}, %{{[0-9a-z]+}}: tensor<1x8xf16> {llmir.path = "down"}, %{{[0-9a-z]+}}: tensor<1x8xi8> {llmir.path = "down"}
// LOWERED-SAME: tensor<16x32xui4> {llmir.path = "embed"}, %{{[0-9a-z]+}}: tensor<2x32xf16> {llmir.path = "embed"}, %{{[0-9a-z]+}}: tensor<2x32xf16> {llmir.path = "embed"}
// LOWERED-SAME: tensor<8x4xui8> {llmir.path = "narrow"}

// TARGET: error: hardware-specific-quantization: target must be one of cpu, gpu, gpu-reference, reference, tpu, got 'npu'

builtin.module {
  func.func @main(
      %up: !llm.quantized_tensor<8x16xi4, scale=f32, symmetric=true, group_size=4> {llmir.path = "up"},
      %down: !llm.quantized_tensor<8x16xi8, scale=f16, zp=i8> {llmir.path = "down"},
      %embed: !llm.quantized_tensor<32x16xi4, scale=f16, min=f16, group_size=8> {llmir.path = "embed"},
      %narrow: !llm.quantized_tensor<8x16xi2, scale=f32, symmetric=true> {llmir.path = "narrow"},
      %returned: !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true> {llmir.path = "returned"},
      %input: !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>,
      %pages: !llm.quantized_tensor<32x4x2x16xi4, scale=f16, min=f16> {llmir.role = "k_pages"},
      %x: tensor<7x16xf32>, %ids: tensor<7xi32>)
      -> (tensor<7x8xf32>, tensor<7x8xf32>, tensor<7x16xf32>, tensor<7x32xf32>, tensor<7x8xf32>, tensor<7x8xf32>, !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>) {
    %0 = llm.quantized_matmul(%x, %up) {bits = 4 : i32, transpose_w = true} : (tensor<7x16xf32>, !llm.quantized_tensor<8x16xi4, scale=f32, symmetric=true, group_size=4>) -> tensor<7x8xf32>
    %1 = llm.quantized_matmul(%x, %down) {bits = 8 : i32, transpose_w = true} : (tensor<7x16xf32>, !llm.quantized_tensor<8x16xi8, scale=f16, zp=i8>) -> tensor<7x8xf32>
    %2 = llm.quantized_gather(%embed, %ids) : (!llm.quantized_tensor<32x16xi4, scale=f16, min=f16, group_size=8>, tensor<7xi32>) -> tensor<7x16xf32>
    %3 = llm.quantized_matmul(%x, %embed) {bits = 4 : i32, transpose_w = true} : (tensor<7x16xf32>, !llm.quantized_tensor<32x16xi4, scale=f16, min=f16, group_size=8>) -> tensor<7x32xf32>
    %4 = llm.quantized_matmul(%x, %narrow) {bits = 2 : i32, transpose_w = true} : (tensor<7x16xf32>, !llm.quantized_tensor<8x16xi2, scale=f32, symmetric=true>) -> tensor<7x8xf32>
    %5 = llm.quantized_matmul(%x, %input) {bits = 8 : i32, transpose_w = true} : (tensor<7x16xf32>, !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>) -> tensor<7x8xf32>
    func.return %0, %1, %2, %3, %4, %5, %returned : tensor<7x8xf32>, tensor<7x8xf32>, tensor<7x16xf32>, tensor<7x32xf32>, tensor<7x8xf32>, tensor<7x8xf32>, !llm.quantized_tensor<8x16xi8, scale=f32, symmetric=true>
  }
}
