// Batches: one piece of memory, which Python gives, and arrays over it.
#include <pybind11/stl.h>

#include <cstddef>
#include <optional>
#include <tuple>
#include <type_traits>

#include "array_layout.h"
#include "arrays.h"
#include "module.h"

namespace archer_fast {
namespace {

// (width or none for the longest row, pad_token_id, is_left), or none.
using PaddingArgument = std::optional<std::tuple<std::optional<std::int64_t>, std::int32_t, bool>>;

std::optional<Padding> to_padding(const PaddingArgument& padding, std::int64_t max_length) {
  if (!padding) return std::nullopt;
  const auto [width, pad_token_id, is_left] = *padding;
  return Padding{.width = width.value_or(max_length), .pad_token_id = pad_token_id, .is_left = is_left};
}

// The batch as a tuple of arrays in the order of Arrays::for_each, all in one piece of `memory`.
template <class Arrays, class PlanOfRows>
py::tuple collated(const TrajectoryBuffer& buffer, const PlanOfRows& plan, const PaddingArgument& padding_argument,
                   int threads, const py::function& memory) {
  const std::optional<Padding> padding = to_padding(padding_argument, plan.sizes.max_length);
  const std::int64_t num_rows = std::ssize(plan.rows);
  if (padding) padding->check(num_rows, plan.sizes.max_length);
  Arrays out;
  std::size_t num_arrays = 0;
  ArrayLayout wanted;
  Arrays::for_each(out, plan.sizes, padding, [&](const char*, auto& array, std::int64_t length, bool) {
    wanted.place(array, length);
    ++num_arrays;
  });
  Array<std::uint8_t> bytes = ask_for(memory, wanted.num_bytes());
  ArrayLayout layout(reinterpret_cast<std::byte*>(bytes.mutable_data()));
  Arrays::for_each(out, plan.sizes, padding,
                   [&](const char*, auto& array, std::int64_t length, bool) { layout.place(array, length); });
  {
    const py::gil_scoped_release release;
    buffer.collate(plan, padding, threads, out);
  }
  py::tuple arrays(num_arrays);
  std::size_t next = 0;
  Arrays::for_each(out, plan.sizes, padding, [&](const char*, auto& array, std::int64_t length, bool is_per_place) {
    using Item = typename std::decay_t<decltype(array)>::element_type;
    if (padding && is_per_place) {
      arrays[next++] = Array<Item>({num_rows, padding->width}, array.data(), bytes);
    } else {
      arrays[next++] = Array<Item>(length, array.data(), bytes);
    }
  });
  return arrays;
}

py::tuple collate_trajectories(const TrajectoryBuffer& buffer, const Ids& trajectory_ids,
                               const PaddingArgument& padding, int threads, const py::function& memory) {
  const auto ids = copied("trajectory_ids", trajectory_ids);
  const TrajectoryPlan plan = [&] {
    const py::gil_scoped_release release;
    return buffer.plan(ids);
  }();
  return collated<PackedArrays>(buffer, plan, padding, threads, memory);
}

py::tuple collate_transitions(const TrajectoryBuffer& buffer, const Ids& turn_ids, const PaddingArgument& padding,
                              int threads, const py::function& memory) {
  const auto ids = copied("turn_ids", turn_ids);
  const TransitionPlan plan = [&] {
    const py::gil_scoped_release release;
    return buffer.plan_transitions(ids);
  }();
  return collated<TransitionArrays>(buffer, plan, padding, threads, memory);
}

}  // namespace

void bind_batches(BufferClass& buffer) {
  buffer.def("collate", &collate_trajectories, array("trajectory_ids"), "padding"_a, "threads"_a, "memory"_a)
      .def("collate_transitions", &collate_transitions, array("turn_ids"), "padding"_a, "threads"_a, "memory"_a);
}

}  // namespace archer_fast
