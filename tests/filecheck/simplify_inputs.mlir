// RUN: llmir-opt %s -p simplify-inputs,dce | filecheck %s
// RUN: llmir-opt %s -p simplify-inputs,simplify-inputs,dce | filecheck %s

// With a vocabulary of 11, `tokens >= 0` is always so; whether a token is 5 is not known.

// CHECK-NOT: stablehlo.compare GE
// CHECK: stablehlo.constant dense<true>
// CHECK: stablehlo.compare EQ
func.func @main(%tokens: tensor<1x7xi32> {llmir.role = "tokens"}, %x: tensor<1x7x11xf32>)
    -> (tensor<1x7x11xf32>, tensor<1x7xi1>, tensor<1x7xi1>) {
  %zero = stablehlo.constant dense<0> : tensor<1x7xi32>
  %five = stablehlo.constant dense<5> : tensor<1x7xi32>
  %0 = stablehlo.compare GE, %tokens, %zero, SIGNED : (tensor<1x7xi32>, tensor<1x7xi32>) -> tensor<1x7xi1>
  %1 = stablehlo.compare EQ, %tokens, %five, SIGNED : (tensor<1x7xi32>, tensor<1x7xi32>) -> tensor<1x7xi1>
  func.return %x, %0, %1 : tensor<1x7x11xf32>, tensor<1x7xi1>, tensor<1x7xi1>
}
