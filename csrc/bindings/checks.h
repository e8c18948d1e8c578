// What bindings say of arguments that do not fit: the argument, what was given, what is accepted. A ValueError in Python.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/DimVector.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "../common/thresholds.h"

namespace sparsecod {

inline std::string name(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

// float32, bfloat16, float16, and on CPU float64.
inline void check_floating(const char* argument, const at::Tensor& given) {
  const at::ScalarType dtype = given.scalar_type();
  const bool reduced = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  if (given.is_cuda()) {
    TORCH_CHECK_VALUE(reduced, argument, " is ", name(dtype), ", but must be float32, bfloat16 or float16 on ",
                      given.device());
  }
  TORCH_CHECK_VALUE(reduced || dtype == at::kDouble, argument, " is ", name(dtype),
                    ", but must be float32, bfloat16, float16 or float64");
}

inline void check_dtype(const char* argument, const at::Tensor& given, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(given.scalar_type() == dtype, argument, " is ", name(given.scalar_type()), ", but must be ",
                    name(dtype));
}

// The shape of `given` is `shape`, which in words is `meaning`.
inline void check_shape(const char* argument, const at::Tensor& given, c10::SymIntArrayRef shape,
                        const std::string& meaning) {
  TORCH_CHECK_VALUE(given.sym_sizes() == shape, argument, " has shape ", given.sym_sizes(), ", but must have ", meaning,
                    shape);
}

inline void check_like(const char* argument, const at::Tensor& given, const char* model_name, const at::Tensor& model) {
  TORCH_CHECK_VALUE(given.scalar_type() == model.scalar_type(), argument, " is ", name(given.scalar_type()),
                    ", but must have ", model_name, "'s dtype ", name(model.scalar_type()));
  TORCH_CHECK_VALUE(given.device() == model.device(), argument, " is on ", given.device(), ", but must be on ",
                    model_name, "'s device ", model.device());
}

inline void check_same_shape(const char* argument, const at::Tensor& given, const char* model_name,
                             const at::Tensor& model) {
  check_shape(argument, given, model.sym_sizes(), std::string(model_name) + "'s shape ");
}

// `probes`, if given, and then the sizes of `model`.
inline c10::SymDimVector with_probes(const std::optional<c10::SymInt>& probes, c10::SymIntArrayRef model) {
  c10::SymDimVector shape;
  if (probes) shape.push_back(*probes);
  shape.append(model.begin(), model.end());
  return shape;
}

// A tangent has the shape of its primal, or one dimension more in front: several tangents, one per probe. Returns how
// many, if that dimension is there; at least `fewest`.
inline std::optional<c10::SymInt> check_tangent(const char* argument, const at::Tensor& tangent,
                                                const char* primal_name, const at::Tensor& primal, int fewest = 1) {
  const bool probed = tangent.dim() == primal.dim() + 1;
  const auto probes = probed ? std::optional(tangent.sym_size(0)) : std::nullopt;
  TORCH_CHECK_VALUE(tangent.sym_sizes().equals(with_probes(probes, primal.sym_sizes())), argument, " has shape ",
                    tangent.sym_sizes(), ", but must have ", primal_name, "'s shape ", primal.sym_sizes(),
                    ", or a number of probes before it");
  TORCH_CHECK_VALUE(!probes || *probes >= fewest, argument, " has ", *probes, " probes, but must have at least ", fewest);
  check_like(argument, tangent, primal_name, primal);
  return probes;
}

inline void check_thresholds(at::ArrayRef<double> thresholds, size_t fewest) {
  TORCH_CHECK_VALUE(thresholds.size() >= fewest && thresholds.size() <= MAX_THRESHOLDS, "thresholds has ",
                    thresholds.size(), " numbers, but must have ", fewest, " to ", MAX_THRESHOLDS);
  for (size_t i = 0; i < thresholds.size(); ++i) {
    TORCH_CHECK_VALUE(thresholds[i] > 0, "thresholds[", i, "] is ", thresholds[i], ", but must be above 0");
  }
}

}  // namespace sparsecod
