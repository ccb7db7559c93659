// The buffer: what is pushed, drawn, told and saved.
#include "fields.h"
#include "module.h"

namespace archer_fast {
namespace {

const std::tuple kBufferOptions{field("max_tokens", &BufferOptions::max_tokens),
                                field("max_trajectories", &BufferOptions::max_trajectories),
                                field("seed", &BufferOptions::seed),
                                field("vocab_size", &BufferOptions::vocab_size),
                                field("gamma", &BufferOptions::gamma),
                                field("feature_bytes", &BufferOptions::feature_bytes)};

const std::tuple kFeatureMemory{field("max_feature_memory", &FeatureMemory::max_feature_memory),
                                field("feature_folder", &FeatureMemory::feature_folder)};

const std::tuple kTrajectoryColumns{field("tokens", &TrajectoryColumns::tokens),
                                    field("num_tokens", &TrajectoryColumns::num_tokens),
                                    field("num_turns", &TrajectoryColumns::num_turns),
                                    field("observation_lengths", &TrajectoryColumns::observation_lengths),
                                    field("action_lengths", &TrajectoryColumns::action_lengths),
                                    field("rollout_logprobs", &TrajectoryColumns::rollout_logprobs),
                                    field("rewards", &TrajectoryColumns::rewards),
                                    field("policy_versions", &TrajectoryColumns::policy_versions),
                                    field("terminated", &TrajectoryColumns::terminated),
                                    field("truncated", &TrajectoryColumns::truncated),
                                    field("task_ids", &TrajectoryColumns::task_ids)};

const std::tuple kBufferState{field("counter", &BufferState::counter),
                              field("first_trajectory_id", &BufferState::first_trajectory_id),
                              field("first_turn_id", &BufferState::first_turn_id),
                              field("max_priority", &BufferState::max_priority),
                              field("tokens", &BufferState::tokens),
                              field("rollout_logprobs", &BufferState::rollout_logprobs),
                              field("observation_lengths", &BufferState::observation_lengths),
                              field("action_lengths", &BufferState::action_lengths),
                              field("rewards", &BufferState::rewards),
                              field("policy_versions", &BufferState::policy_versions),
                              field("priorities", &BufferState::priorities),
                              field("num_tokens", &BufferState::num_tokens),
                              field("num_turns", &BufferState::num_turns),
                              field("terminated", &BufferState::terminated),
                              field("truncated", &BufferState::truncated),
                              field("task_ids", &BufferState::task_ids)};

// A property: reads without the GIL; a range becomes (first, end).
template <auto Getter>
auto get(const TrajectoryBuffer& buffer) {
  const py::gil_scoped_release release;
  const auto value = (buffer.*Getter)();
  if constexpr (std::is_same_v<decltype(value), const IdRange>) {
    return std::pair(value.first, value.end);
  } else {
    return value;
  }
}

template <auto Member>
auto option(const TrajectoryBuffer& buffer) {
  return buffer.options().*Member;
}

std::unique_ptr<TrajectoryBuffer> make_buffer(const py::kwargs& values) {
  BufferOptions options;
  FeatureMemory memory;
  take_all(values, kBufferOptions, options);
  take_all(values, kFeatureMemory, memory);
  refuse_others(values, kBufferOptions, kFeatureMemory);
  return std::make_unique<TrajectoryBuffer>(options, memory);
}

std::pair<std::int64_t, std::int64_t> extend(TrajectoryBuffer& buffer, const py::kwargs& arrays) {
  TrajectoryColumns trajectories;
  take_all(arrays, kTrajectoryColumns, trajectories);
  refuse_others(arrays, kTrajectoryColumns);
  // Where things lie must not change between check and use; tokens and numbers that change are merely stored so.
  std::vector<std::int32_t> kept[4];
  const auto keep = [](std::span<const std::int32_t>& column, std::vector<std::int32_t>& copy) {
    copy.assign(column.begin(), column.end());
    column = copy;
  };
  keep(trajectories.num_tokens, kept[0]);
  keep(trajectories.num_turns, kept[1]);
  keep(trajectories.observation_lengths, kept[2]);
  keep(trajectories.action_lengths, kept[3]);
  const py::gil_scoped_release release;
  const IdRange ids = buffer.extend(trajectories);
  return {ids.first, ids.end};
}

Ids sample_turns(TrajectoryBuffer& buffer, std::int64_t n, bool replacement, std::int64_t min_policy_version,
                 bool by_task) {
  Ids turn_ids = empty_ids(n);
  const auto out = write("turn_ids", turn_ids);
  {
    const py::gil_scoped_release release;
    buffer.sample_turns(out,
                        {.replacement = replacement, .min_policy_version = min_policy_version, .by_task = by_task});
  }
  return turn_ids;
}

Ids sample_trajectories(TrajectoryBuffer& buffer, std::int64_t n, bool by_task) {
  Ids trajectory_ids = empty_ids(n);
  const auto out = write("trajectory_ids", trajectory_ids);
  {
    const py::gil_scoped_release release;
    buffer.sample_trajectories(out, by_task);
  }
  return trajectory_ids;
}

std::pair<Ids, Array<float>> sample_prioritised(TrajectoryBuffer& buffer, std::int64_t n, double beta) {
  Ids turn_ids = empty_ids(n);
  auto weights = empty<float>(n);
  const auto ids = write("turn_ids", turn_ids);
  const auto out = write("weights", weights);
  {
    const py::gil_scoped_release release;
    buffer.sample_prioritised(beta, ids, out);
  }
  return {std::move(turn_ids), std::move(weights)};
}

std::int64_t update_priorities(TrajectoryBuffer& buffer, const Ids& turn_ids, const Array<double>& priorities) {
  const auto ids = copied("turn_ids", turn_ids);
  const auto values = copied("priorities", priorities);
  const py::gil_scoped_release release;
  return buffer.update_priorities(ids, values);
}

Array<double> priorities(const TrajectoryBuffer& buffer) {
  std::vector<double> values;
  {
    const py::gil_scoped_release release;
    values = buffer.priorities();
  }
  return to_array<double>(std::move(values));
}

py::tuple stats(const TrajectoryBuffer& buffer) {
  BufferStats stats;
  {
    const py::gil_scoped_release release;
    stats = buffer.stats();
  }
  py::dict turns_by_age, turns_by_version;
  for (const auto& [age, turns] : stats.turns_by_age) turns_by_age[py::int_(age)] = turns;
  for (const auto& [version, turns] : stats.turns_by_version) turns_by_version[py::int_(version)] = turns;
  return py::make_tuple(stats.num_trajectories, stats.num_turns, stats.num_tokens, stats.num_evicted, stats.num_bytes,
                        turns_by_age, turns_by_version, stats.num_mapped_bytes);
}

Ids trajectory_of(const TrajectoryBuffer& buffer, const Ids& turn_ids) {
  const auto ids = copied("turn_ids", turn_ids);
  Ids trajectory_ids = empty_ids(turn_ids.size());
  const auto out = write("trajectory_ids", trajectory_ids);
  {
    const py::gil_scoped_release release;
    buffer.trajectory_of(ids, out);
  }
  return trajectory_ids;
}

std::pair<Ids, Ids> turn_span(const TrajectoryBuffer& buffer, const Ids& trajectory_ids) {
  const auto ids = copied("trajectory_ids", trajectory_ids);
  Ids first_turn_ids = empty_ids(trajectory_ids.size());
  Ids num_turns = empty_ids(trajectory_ids.size());
  const auto first = write("first_turn_ids", first_turn_ids);
  const auto count = write("num_turns", num_turns);
  {
    const py::gil_scoped_release release;
    buffer.turn_span(ids, first, count);
  }
  return {std::move(first_turn_ids), std::move(num_turns)};
}

Ids lengths(const TrajectoryBuffer& buffer, const Ids& trajectory_ids) {
  const auto ids = copied("trajectory_ids", trajectory_ids);
  Ids num_tokens = empty_ids(trajectory_ids.size());
  const auto out = write("num_tokens", num_tokens);
  {
    const py::gil_scoped_release release;
    buffer.lengths(ids, out);
  }
  return num_tokens;
}

py::tuple turn_records(const TrajectoryBuffer& buffer, const Ids& turn_ids) {
  const auto ids = copied("turn_ids", turn_ids);
  auto rewards = empty<float>(turn_ids.size());
  auto turn = empty<std::int32_t>(turn_ids.size());
  auto is_last = empty<bool>(turn_ids.size());
  auto terminated = empty<bool>(turn_ids.size());
  auto truncated = empty<bool>(turn_ids.size());
  const TurnColumns out{.rewards = write("rewards", rewards),
                        .turn = write("turn", turn),
                        .is_last = write("is_last", is_last),
                        .terminated = write("terminated", terminated),
                        .truncated = write("truncated", truncated)};
  {
    const py::gil_scoped_release release;
    buffer.turn_records(ids, out);
  }
  return py::make_tuple(rewards, turn, is_last, terminated, truncated);
}

py::dict to_dict(BufferState&& state) {
  py::dict fields;
  give_all(std::move(state.options), kBufferOptions, fields);
  give_all(std::move(state), kBufferState, fields);
  return fields;
}

py::dict state(const TrajectoryBuffer& buffer) {
  BufferState state;
  {
    const py::gil_scoped_release release;
    state = buffer.state();
  }
  return to_dict(std::move(state));
}

py::tuple snapshot(const TrajectoryBuffer& buffer, std::int64_t first_trajectory_id) {
  BufferSnapshot snapshot;
  {
    const py::gil_scoped_release release;
    snapshot = buffer.snapshot(first_trajectory_id);
  }
  return py::make_tuple(to_dict(std::move(snapshot.since)), to_array<double>(std::move(snapshot.priorities)),
                        to_array<std::int64_t>(std::move(snapshot.num_turns)));
}

std::unique_ptr<TrajectoryBuffer> restore(const py::kwargs& fields) {
  BufferState state;
  FeatureMemory memory;
  take_all(fields, kBufferOptions, state.options);
  take_all(fields, kBufferState, state);
  take_all(fields, kFeatureMemory, memory);
  refuse_others(fields, kBufferOptions, kBufferState, kFeatureMemory);
  const py::gil_scoped_release release;
  return TrajectoryBuffer::restore(state, memory);
}

}  // namespace

BufferClass bind_trajectory_buffer(py::module_& module) {
  BufferClass buffer(module, "TrajectoryBuffer");
  buffer.def(py::init(&make_buffer))
      .def("extend", &extend)
      .def_property_readonly("max_tokens", &option<&BufferOptions::max_tokens>)
      .def_property_readonly("max_trajectories", &option<&BufferOptions::max_trajectories>)
      .def_property_readonly("vocab_size", &option<&BufferOptions::vocab_size>)
      .def_property_readonly("gamma", &option<&BufferOptions::gamma>)
      .def_property_readonly("num_trajectories", &get<&TrajectoryBuffer::num_trajectories>)
      .def_property_readonly("num_turns", &get<&TrajectoryBuffer::num_turns>)
      .def_property_readonly("num_tokens", &get<&TrajectoryBuffer::num_tokens>)
      .def_property_readonly("num_evicted", &get<&TrajectoryBuffer::num_evicted>)
      .def_property_readonly("trajectory_range", &get<&TrajectoryBuffer::trajectory_range>)
      .def_property_readonly("turn_range", &get<&TrajectoryBuffer::turn_range>)
      .def("stats", &stats)
      .def("sample_turns", &sample_turns, "n"_a, py::kw_only(), array("replacement") = true,
           "min_policy_version"_a = TurnQuery::kAnyVersion, array("by_task") = false)
      .def("sample_trajectories", &sample_trajectories, "n"_a, py::kw_only(), array("by_task") = false)
      .def("sample_prioritised", &sample_prioritised, "n"_a, "beta"_a)
      .def("update_priorities", &update_priorities, array("turn_ids"), array("priorities"))
      .def("priorities", &priorities)
      .def("trajectory_of", &trajectory_of, array("turn_ids"))
      .def("turn_span", &turn_span, array("trajectory_ids"))
      .def("lengths", &lengths, array("trajectory_ids"))
      .def("turn_records", &turn_records, array("turn_ids"))
      .def("state", &state)
      .def("snapshot", &snapshot, "first_trajectory_id"_a)
      .def_static("restore", &restore);
  return buffer;
}

}  // namespace archer_fast
