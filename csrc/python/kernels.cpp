// The row kernels and scans. They take addresses, so that no array library is needed to hand one over;
// archer_fast/ops/cpu.py checks what they point to.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "critic_loss.h"
#include "huge_pages.h"
#include "module.h"
#include "row_softmax.h"
#include "segment_scan.h"
#include "simd_level.h"

namespace archer_fast {

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

py::tuple simd_names() {
  const std::vector<SimdLevel> levels = simd_levels();
  py::tuple names(levels.size());
  for (std::size_t i = 0; i < levels.size(); ++i) names[i] = simd_name(levels[i]);
  return names;
}

LogitTile logit_tile(std::int64_t n, std::int64_t v, std::int64_t first_column, Address target_ids,
                     Address inv_temperature, float softcap) {
  return {.n = n,
          .v = v,
          .first_column = first_column,
          .target_ids = at<const std::int64_t>(target_ids),
          .inv_temperature = at<const float>(inv_temperature),
          .softcap = softcap};
}

void update_softmax(Address logits, std::int64_t column_stride, std::int64_t n, std::int64_t v,
                    std::int64_t first_column, Address target_ids, Address inv_temperature, float softcap,
                    Address state, int threads, const std::string& simd) {
  const SimdLevel level = simd_level(simd);
  const LogitTile tile = logit_tile(n, v, first_column, target_ids, inv_temperature, softcap);
  const py::gil_scoped_release release;
  softmax_update(tile, at<const float>(logits), column_stride, at<float>(state), threads, level);
}

void differentiate_softmax(Address logits, std::int64_t column_stride, std::int64_t n, std::int64_t v,
                           std::int64_t first_column, Address target_ids, Address inv_temperature, float softcap,
                           Address row_max, Address log_sum, Address entropy, Address grad_logprobs,
                           Address grad_entropy, Address grad_lse, Address out, std::int64_t out_column_stride,
                           int threads, const std::string& simd) {
  const SimdLevel level = simd_level(simd);
  const LogitTile tile = logit_tile(n, v, first_column, target_ids, inv_temperature, softcap);
  const SoftmaxGradient gradient{.row_max = at<const float>(row_max),
                                 .log_sum = at<const float>(log_sum),
                                 .entropy = at<const float>(entropy),
                                 .grad_logprobs = at<const float>(grad_logprobs),
                                 .grad_entropy = at<const float>(grad_entropy),
                                 .grad_lse = at<const float>(grad_lse)};
  const py::gil_scoped_release release;
  softmax_backward(tile, at<const float>(logits), column_stride, gradient, at<float>(out), out_column_stride, threads,
                   level);
}

void scan_segments(Address a, Address b, Address cu, Address out, std::int64_t num_segments, int threads,
                   const std::string& simd) {
  const SimdLevel level = simd_level(simd);
  const std::span offsets(at<const std::int32_t>(cu), static_cast<std::size_t>(num_segments) + 1);
  const py::gil_scoped_release release;
  segment_scan(at<const float>(a), at<const float>(b), offsets, at<float>(out), threads, level);
}

template <class Offset>
bool check_offsets(Address cu, std::int64_t count, std::int64_t total, Address out) {
  const std::span offsets(at<const Offset>(cu), static_cast<std::size_t>(count));
  const py::gil_scoped_release release;
  return copy_offsets(offsets, total, at<std::int32_t>(out));
}

void lose_critic(Address values, Address targets, std::int64_t n, const std::string& kind, double expectile,
                 double huber_delta, Address losses, Address stats, Address grads) {
  const CriticLoss loss{.kind = critic_loss_kind(kind), .expectile = expectile, .huber_delta = huber_delta};
  const py::gil_scoped_release release;
  critic_loss(loss, at<const float>(values), at<const float>(targets), n, at<float>(losses), at<float>(stats),
              at<float>(grads));
}

}  // namespace

void bind_kernels(py::module_& module) {
  module.def("simd_levels", &simd_names);
  module.def(
      "advise_huge_pages", [](Address data, std::size_t bytes) { advise_huge_pages(at<void>(data), bytes); }, "data"_a,
      "bytes"_a);
  module.def("softmax_update", &update_softmax, "logits"_a, "column_stride"_a, "n"_a, "v"_a, "first_column"_a,
             "target_ids"_a, "inv_temperature"_a, "softcap"_a, "state"_a, "threads"_a, "simd"_a);
  module.def("softmax_backward", &differentiate_softmax, "logits"_a, "column_stride"_a, "n"_a, "v"_a, "first_column"_a,
             "target_ids"_a, "inv_temperature"_a, "softcap"_a, "row_max"_a, "log_sum"_a, "entropy"_a, "grad_logprobs"_a,
             "grad_entropy"_a, "grad_lse"_a, "out"_a, "out_column_stride"_a, "threads"_a, "simd"_a);
  module.def("segment_scan", &scan_segments, "a"_a, "b"_a, "cu"_a, "out"_a, "num_segments"_a, "threads"_a, "simd"_a);
  module.def("copy_offsets", &check_offsets<std::int32_t>, "cu"_a, "count"_a, "total"_a, "out"_a);
  module.def("copy_long_offsets", &check_offsets<std::int64_t>, "cu"_a, "count"_a, "total"_a, "out"_a);
  module.def("critic_loss", &lose_critic, "values"_a, "targets"_a, "n"_a, "kind"_a, "expectile"_a, "huber_delta"_a,
             "losses"_a, "stats"_a, "grads"_a);
}

}  // namespace archer_fast
