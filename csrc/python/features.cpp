// Features of a frozen trunk beside the buffer's turns.
#include "array_layout.h"
#include "arrays.h"
#include "module.h"

namespace archer_fast {
namespace {

void set_features(TrajectoryBuffer& buffer, const Ids& trajectory_ids, std::int64_t trunk_version,
                  const Array<std::uint8_t>& rows) {
  const auto ids = copied("trajectory_ids", trajectory_ids);
  const auto bytes = std::as_bytes(read("rows", rows));
  const py::gil_scoped_release release;
  buffer.set_features(ids, trunk_version, bytes);
}

// Rows [n, feature_bytes] and the front of the rows behind them [n, next_bytes], in one piece of `memory`.
py::tuple read_features(const TrajectoryBuffer& buffer, const Ids& turn_ids, std::int64_t trunk_version,
                        std::int64_t next_bytes, int threads, const py::function& memory) {
  const auto ids = copied("turn_ids", turn_ids);
  const std::int64_t row_bytes = buffer.options().feature_bytes, n = std::ssize(ids);
  if (next_bytes < 0 || next_bytes > row_bytes) {
    throw std::invalid_argument(concat("next_bytes: wanted 0 to feature_bytes = ", row_bytes, ", got ", next_bytes));
  }
  std::span<std::byte> rows, next_rows;
  const auto place = [&](ArrayLayout layout) {
    layout.place(rows, n * row_bytes);
    layout.place(next_rows, n * next_bytes);
    return layout.num_bytes();
  };
  Array<std::uint8_t> bytes = ask_for(memory, place(ArrayLayout()));
  place(ArrayLayout(reinterpret_cast<std::byte*>(bytes.mutable_data())));
  {
    const py::gil_scoped_release release;
    buffer.read_features(ids, trunk_version, rows, next_rows, threads);
  }
  const auto as_rows = [&](std::span<std::byte> items, std::int64_t width) {
    return Array<std::uint8_t>({n, width}, reinterpret_cast<const std::uint8_t*>(items.data()), bytes);
  };
  return py::make_tuple(as_rows(rows, row_bytes), as_rows(next_rows, next_bytes));
}

Ids trajectories_without_features(const TrajectoryBuffer& buffer, std::int64_t trunk_version) {
  std::vector<std::int64_t> ids;
  {
    const py::gil_scoped_release release;
    ids = buffer.trajectories_without_features(trunk_version);
  }
  return to_array<std::int64_t>(std::move(ids));
}

std::uint64_t features_stamp(const TrajectoryBuffer& buffer, std::int64_t first, std::int64_t end) {
  const py::gil_scoped_release release;
  return buffer.features_stamp({first, end});
}

void copy_features(const TrajectoryBuffer& buffer, std::int64_t first_trajectory_id, const Ids& num_turns,
                   Ids& trunk_versions, Array<std::uint8_t>& rows) {
  const auto turns = copied("num_turns", num_turns);
  const auto versions = write("trunk_versions", trunk_versions);
  const auto bytes = std::as_writable_bytes(write("rows", rows));
  const py::gil_scoped_release release;
  buffer.copy_features(first_trajectory_id, turns, versions, bytes);
}

}  // namespace

void bind_features(BufferClass& buffer) {
  buffer
      .def_property_readonly("feature_bytes", [](const TrajectoryBuffer& self) { return self.options().feature_bytes; })
      .def("set_features", &set_features, array("trajectory_ids"), "trunk_version"_a, array("rows"))
      .def("read_features", &read_features, array("turn_ids"), "trunk_version"_a, "next_bytes"_a, "threads"_a,
           "memory"_a)
      .def("trajectories_without_features", &trajectories_without_features, "trunk_version"_a)
      .def("features_stamp", py::overload_cast<>(&TrajectoryBuffer::features_stamp, py::const_),
           py::call_guard<py::gil_scoped_release>())
      .def("features_stamp", &features_stamp, "first"_a, "end"_a)
      .def("copy_features", &copy_features, "first_trajectory_id"_a, array("num_turns"), array("trunk_versions"),
           array("rows"));
}

}  // namespace archer_fast
