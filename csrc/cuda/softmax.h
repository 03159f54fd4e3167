#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace densreg::cuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> target,
                                                   double label_smoothing, int64_t ignore_index, bool need_softmax,
                                                   double scale);
Tensor softmax_backward(Tensor source, std::optional<Tensor> statistics, std::optional<Tensor> target,
                        std::optional<Tensor> grad_log_density, std::optional<Tensor> grad_cross_entropy,
                        std::optional<Tensor> grad_softmax, double label_smoothing, int64_t ignore_index,
                        double scale);
std::tuple<Tensor, Tensor> softmax_double_backward(Tensor source, std::optional<Tensor> statistics,
                                                   std::optional<Tensor> target,
                                                   std::optional<Tensor> grad_log_density,
                                                   std::optional<Tensor> grad_cross_entropy, Tensor v,
                                                   int64_t ignore_index);

}  // namespace densreg::cuda
