#pragma once

#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace densreg::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> pnorm(Tensor g, double p);
Tensor pnorm_backward(Tensor grad, Tensor g, Tensor peak, Tensor total, double p);

}  // namespace densreg::cpu
