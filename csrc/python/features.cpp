// Features of a frozen trunk beside the buffer's turns.
#include "arrays.h"
#include "module.h"

namespace archer_fast {
namespace {

void set_features(TrajectoryBuffer& buffer, const Ids& trajectory_ids, std::int64_t trunk_version,
                  const Array<std::uint8_t>& rows) {
  const auto ids = read("trajectory_ids", trajectory_ids);
  const auto bytes = std::as_bytes(read("rows", rows));
  const py::gil_scoped_release release;
  buffer.set_features(ids, trunk_version, bytes);
}

void read_features(const TrajectoryBuffer& buffer, const Ids& turn_ids, std::int64_t trunk_version,
                   Array<std::uint8_t>& rows, Array<std::uint8_t>& next_rows, int threads) {
  const auto ids = read("turn_ids", turn_ids);
  const auto bytes = std::as_writable_bytes(write("rows", rows));
  const auto next_bytes = std::as_writable_bytes(write("next_rows", next_rows));
  const py::gil_scoped_release release;
  buffer.read_features(ids, trunk_version, bytes, next_bytes, threads);
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
  const auto turns = read("num_turns", num_turns);
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
      .def("read_features", &read_features, array("turn_ids"), "trunk_version"_a, array("rows"), array("next_rows"),
           "threads"_a)
      .def("trajectories_without_features", &trajectories_without_features, "trunk_version"_a)
      .def("features_stamp", py::overload_cast<>(&TrajectoryBuffer::features_stamp, py::const_),
           py::call_guard<py::gil_scoped_release>())
      .def("features_stamp", &features_stamp, "first"_a, "end"_a)
      .def("copy_features", &copy_features, "first_trajectory_id"_a, array("num_turns"), array("trunk_versions"),
           array("rows"));
}

}  // namespace archer_fast
