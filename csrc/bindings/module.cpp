// sparsecod_mcore._C: loading it registers the operators of the namespace `sparsecod`.

#include <torch/csrc/utils/pybind.h>

#include <array>
#include <string_view>

#include "../common/columns.h"
#include "../common/moments.h"
#include "../common/probe_moments.h"
#include "residual_add_moments.h"

namespace {

#define SPARSECOD_NAME(name) #name,
constexpr std::array<std::string_view, sparsecod::NUM_MOMENTS> MOMENT_NAMES = {SPARSECOD_MOMENTS(SPARSECOD_NAME)};
constexpr std::array<std::string_view, sparsecod::NUM_COLUMN_SUMS> COLUMN_SUM_NAMES = {
    SPARSECOD_COLUMN_SUMS(SPARSECOD_NAME)};
constexpr std::array<std::string_view, sparsecod::ProbeMoment::COUNT> PROBE_MOMENT_NAMES = {
    SPARSECOD_PROBE_MOMENTS(SPARSECOD_NAME)};
#undef SPARSECOD_NAME

}  // namespace

PYBIND11_MODULE(_C, m) {
#if defined(SPARSECOD_CUDA)
  m.attr("HAS_CUDA") = true;
#else
  m.attr("HAS_CUDA") = false;
#endif
  m.attr("MOMENT_NAMES") = pybind11::cast(MOMENT_NAMES);
  m.attr("COLUMN_SUM_NAMES") = pybind11::cast(COLUMN_SUM_NAMES);
  m.attr("PROBE_MOMENT_NAMES") = pybind11::cast(PROBE_MOMENT_NAMES);
  m.def("check_residual_add_moments", &sparsecod::check_residual_add_moments);
}
