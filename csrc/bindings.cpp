// archer_fast._C: the only file of the core's neighbourhood that knows Python.
//
// Array arguments are bound with noconvert(): another dtype or stride is a TypeError, because pybind11
// would otherwise hand over a silent copy and what is written there would vanish. The GIL is released
// around every call that may wait for the buffer's lock, and no callee takes it back.
// The kernels take addresses instead, so that no array library is needed to hand one over; archer_fast/ops/cpu.py
// checks what they point to.
// std::invalid_argument becomes ValueError, std::out_of_range IndexError, std::bad_alloc MemoryError, and
// std::system_error OSError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "concat.h"
#include "critic_loss.h"
#include "huge_pages.h"
#include "open_trajectory.h"
#include "row_softmax.h"
#include "segment_scan.h"
#include "simd_level.h"
#include "token_packer.h"
#include "trajectory_buffer.h"

namespace py = pybind11;
using namespace py::literals;

namespace archer_fast {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Ids = Array<std::int64_t>;

template <class T>
void check_layout(const char* name, const Array<T>& array) {
  if (array.ndim() != 1) throw std::invalid_argument(concat(name, ": wanted 1 dimension, got ", array.ndim()));
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) {
    throw std::invalid_argument(
        concat(name, ": wanted memory aligned to ", alignof(T), " bytes, got a misaligned array"));
  }
}

template <class T>
std::span<const T> read(const char* name, const Array<T>& array) {
  check_layout(name, array);
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
std::span<T> write(const char* name, Array<T>& array) {
  check_layout(name, array);
  if (!array.writeable()) throw std::invalid_argument(concat(name, ": wanted a writeable array, got a read-only one"));
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

template <class T>
Array<T> empty(std::int64_t size) {
  return Array<T>(static_cast<py::ssize_t>(size));
}

Ids empty_ids(std::int64_t n) {
  if (n < 0) throw std::invalid_argument(concat("n: wanted 0 or more, got ", n));
  return empty<std::int64_t>(n);
}

// Moves the vector into an array that owns it.
template <class T, class Stored>
Array<T> to_array(std::vector<Stored>&& values) {
  static_assert(sizeof(T) == sizeof(Stored));
  auto owned = std::make_unique<std::vector<Stored>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owned->size());
  const auto* const data = reinterpret_cast<const T*>(owned->data());
  const py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<Stored>*>(vector); });
  owned.release();
  return Array<T>(size, data, owner);
}

// A struct of arrays is bound by a table of its fields' names. From Python it comes as keyword arguments, and
// goes as a dict.
template <class Struct, class Member>
struct Field {
  const char* name;
  Member Struct::* member;
};

template <class Struct, class Member>
constexpr Field<Struct, Member> field(const char* name, Member Struct::* member) {
  return {name, member};
}

template <class T>
Array<T> exact_array(const char* name, const py::handle& value) {
  if (!py::isinstance<py::array>(value)) {
    throw py::type_error(concat(name, ": wanted a NumPy array, got ", Py_TYPE(value.ptr())->tp_name));
  }
  if (!Array<T>::check_(value)) {
    const std::string dtype = py::str(py::dtype::of<T>()), got = py::str(value.attr("dtype"));
    const char* const layout = dtype == got ? " that is not contiguous" : "";
    throw py::type_error(concat(name, ": wanted a C-contiguous array of ", dtype, ", got one of ", got, layout));
  }
  return py::reinterpret_borrow<Array<T>>(value);
}

// One field out of what came; a span is written to, a vector is copied to, a number is taken.
template <class T>
void take(const char* name, const py::handle& value, std::span<T>& to) {
  Array<T> array = exact_array<T>(name, value);
  to = write(name, array);
}

// Booleans are bytes of 0 or 1: the core checks it.
template <class T>
using Element = std::conditional_t<std::is_same_v<T, std::uint8_t>, bool, T>;

template <class T>
void take(const char* name, const py::handle& value, std::span<const T>& to) {
  const std::span from = read(name, exact_array<Element<T>>(name, value));
  to = {reinterpret_cast<const T*>(from.data()), from.size()};
}

template <class T>
void take(const char* name, const py::handle& value, std::vector<T>& to) {
  std::span<const T> from;
  take(name, value, from);
  to.assign(from.begin(), from.end());
}

template <class T>
  requires std::is_arithmetic_v<T>
void take(const char* name, const py::handle& value, T& to) {
  try {
    to = py::cast<T>(value);
  } catch (const py::cast_error&) {
    throw py::type_error(concat(name, ": wanted a number in the range of its type, got ", std::string(py::str(value))));
  }
}

void take(const char* name, const py::handle& value, std::string& to) {
  if (!py::isinstance<py::str>(value)) {
    throw py::type_error(concat(name, ": wanted a str, got ", Py_TYPE(value.ptr())->tp_name));
  }
  to = py::cast<std::string>(value);
}

// The struct's fields, all of which must be there.
template <class Struct, class... Members>
void take_all(const py::kwargs& values, const std::tuple<Field<Struct, Members>...>& fields, Struct& to) {
  const auto take_one = [&](const auto& field) {
    if (!values.contains(field.name)) throw py::type_error(concat(field.name, ": wanted as a keyword, got nothing"));
    take(field.name, values[field.name], to.*field.member);
  };
  std::apply([&](const auto&... field) { (take_one(field), ...); }, fields);
}

// Throws where a keyword argument is no field of any of the tables.
template <class... Tables>
void refuse_others(const py::kwargs& values, const Tables&... tables) {
  for (const auto& [key, value] : values) {
    const std::string name = py::str(key);
    const auto is_in = [&](const auto& table) {
      return std::apply([&](const auto&... field) { return ((name == field.name) || ...); }, table);
    };
    if (!(is_in(tables) || ...)) throw py::type_error(concat(name, ": wanted none of this name"));
  }
}

template <class T>
py::object give(std::vector<T>&& values) {
  return to_array<Element<T>>(std::move(values));
}

template <class T>
  requires std::is_arithmetic_v<T>
py::object give(T value) {
  return py::cast(value);
}

template <class Struct, class... Members>
void give_all(Struct&& from, const std::tuple<Field<Struct, Members>...>& fields, py::dict& to) {
  std::apply([&](const auto&... field) { ((to[field.name] = give(std::move(from.*field.member))), ...); }, fields);
}

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

const std::tuple kPackedArrays{field("input_ids", &PackedArrays::input_ids),
                               field("position_ids", &PackedArrays::position_ids),
                               field("cu_seqlens", &PackedArrays::cu_seqlens),
                               field("turn_ids", &PackedArrays::turn_ids),
                               field("action_mask", &PackedArrays::action_mask),
                               field("cu_turns", &PackedArrays::cu_turns),
                               field("state_positions", &PackedArrays::state_positions),
                               field("action_positions", &PackedArrays::action_positions),
                               field("final_positions", &PackedArrays::final_positions),
                               field("turn", &PackedArrays::turn),
                               field("rewards", &PackedArrays::rewards),
                               field("returns", &PackedArrays::returns),
                               field("policy_versions", &PackedArrays::policy_versions),
                               field("terminated", &PackedArrays::terminated),
                               field("truncated", &PackedArrays::truncated),
                               field("rollout_logprobs", &PackedArrays::rollout_logprobs)};
const std::tuple kPackedMask{field("attention_mask", &PackedArrays::attention_mask)};

const std::tuple kTransitionArrays{field("input_ids", &TransitionArrays::input_ids),
                                   field("cu_seqlens", &TransitionArrays::cu_seqlens),
                                   field("state_positions", &TransitionArrays::state_positions),
                                   field("action_positions", &TransitionArrays::action_positions),
                                   field("next_state_positions", &TransitionArrays::next_state_positions),
                                   field("turn", &TransitionArrays::turn),
                                   field("rewards", &TransitionArrays::rewards),
                                   field("returns", &TransitionArrays::returns),
                                   field("policy_versions", &TransitionArrays::policy_versions),
                                   field("is_last", &TransitionArrays::is_last),
                                   field("terminated", &TransitionArrays::terminated),
                                   field("truncated", &TransitionArrays::truncated),
                                   field("rollout_logprobs", &TransitionArrays::rollout_logprobs),
                                   field("cu_actions", &TransitionArrays::cu_actions)};
const std::tuple kTransitionMasks{field("attention_mask", &TransitionArrays::attention_mask),
                                  field("action_mask", &TransitionArrays::action_mask)};

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
  const py::gil_scoped_release release;
  const IdRange ids = buffer.extend(trajectories);
  return {ids.first, ids.end};
}

void add_turn(OpenTrajectory& game, const Array<std::int32_t>& observation_ids, const Array<std::int32_t>& action_ids,
              const Array<float>& rollout_logprobs, float reward, std::int64_t policy_version) {
  game.add_turn(read("observation_ids", observation_ids), read("action_ids", action_ids),
                read("rollout_logprobs", rollout_logprobs), reward, policy_version);
}

std::int64_t end_trajectory(OpenTrajectory& game, TrajectoryBuffer& buffer,
                            const Array<std::int32_t>& final_observation_ids, bool terminated, bool truncated) {
  const NewTrajectory trajectory =
      game.close(read("final_observation_ids", final_observation_ids), terminated, truncated);
  const py::gil_scoped_release release;
  return buffer.push(trajectory);
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
  const auto ids = read("turn_ids", turn_ids);
  const auto values = read("priorities", priorities);
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
  const auto ids = read("turn_ids", turn_ids);
  Ids trajectory_ids = empty_ids(turn_ids.size());
  const auto out = write("trajectory_ids", trajectory_ids);
  {
    const py::gil_scoped_release release;
    buffer.trajectory_of(ids, out);
  }
  return trajectory_ids;
}

std::pair<Ids, Ids> turn_span(const TrajectoryBuffer& buffer, const Ids& trajectory_ids) {
  const auto ids = read("trajectory_ids", trajectory_ids);
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

py::tuple turn_records(const TrajectoryBuffer& buffer, const Ids& turn_ids) {
  const auto ids = read("turn_ids", turn_ids);
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

py::tuple collated_sizes(const TrajectoryBuffer& buffer, const Ids& trajectory_ids) {
  const auto ids = read("trajectory_ids", trajectory_ids);
  PackedSizes sizes;
  {
    const py::gil_scoped_release release;
    sizes = buffer.collated_sizes(ids);
  }
  return py::make_tuple(sizes.num_trajectories, sizes.num_turns, sizes.num_tokens, sizes.max_length);
}

py::tuple transition_sizes(const TrajectoryBuffer& buffer, const Ids& turn_ids) {
  const auto ids = read("turn_ids", turn_ids);
  TransitionSizes sizes;
  {
    const py::gil_scoped_release release;
    sizes = buffer.transition_sizes(ids);
  }
  return py::make_tuple(sizes.num_transitions, sizes.num_tokens, sizes.num_action_tokens, sizes.max_length);
}

// (width, pad_token_id, is_left), or none.
using PaddingArgument = std::optional<std::tuple<std::int64_t, std::int32_t, bool>>;

std::optional<Padding> to_padding(const PaddingArgument& padding) {
  if (!padding) return std::nullopt;
  const auto [width, pad_token_id, is_left] = *padding;
  return Padding{.width = width, .pad_token_id = pad_token_id, .is_left = is_left};
}

// The destinations come as keyword arguments: `fields` always, `masks` with padding alone.
template <class Arrays, class Fields, class Masks>
Arrays destinations(const py::kwargs& arrays, const Fields& fields, const Masks& masks, bool is_padded) {
  Arrays out;
  take_all(arrays, fields, out);
  if (is_padded) {
    take_all(arrays, masks, out);
    refuse_others(arrays, fields, masks);
  } else {
    refuse_others(arrays, fields);
  }
  return out;
}

void collate(const TrajectoryBuffer& buffer, const Ids& trajectory_ids, const PaddingArgument& padding, int threads,
             const py::kwargs& arrays) {
  const auto ids = read("trajectory_ids", trajectory_ids);
  const auto out = destinations<PackedArrays>(arrays, kPackedArrays, kPackedMask, padding.has_value());
  const py::gil_scoped_release release;
  buffer.collate(ids, to_padding(padding), threads, out);
}

void collate_transitions(const TrajectoryBuffer& buffer, const Ids& turn_ids, const PaddingArgument& padding,
                         int threads, const py::kwargs& arrays) {
  const auto ids = read("turn_ids", turn_ids);
  const auto out = destinations<TransitionArrays>(arrays, kTransitionArrays, kTransitionMasks, padding.has_value());
  const py::gil_scoped_release release;
  buffer.collate_transitions(ids, to_padding(padding), threads, out);
}

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

py::dict state_since(const TrajectoryBuffer& buffer, std::int64_t first_trajectory_id) {
  BufferState state;
  {
    const py::gil_scoped_release release;
    state = buffer.state_since(first_trajectory_id);
  }
  return to_dict(std::move(state));
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

py::arg array(const char* name) { return py::arg(name).noconvert(); }

void bind_trajectory_buffer(py::module_& module) {
  py::class_<TrajectoryBuffer>(module, "TrajectoryBuffer")
      .def(py::init(&make_buffer))
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
      .def("turn_records", &turn_records, array("turn_ids"))
      .def("collated_sizes", &collated_sizes, array("trajectory_ids"))
      .def("collate", &collate, array("trajectory_ids"), "padding"_a, "threads"_a)
      .def("transition_sizes", &transition_sizes, array("turn_ids"))
      .def("collate_transitions", &collate_transitions, array("turn_ids"), "padding"_a, "threads"_a)
      .def_property_readonly("feature_bytes", &option<&BufferOptions::feature_bytes>)
      .def("set_features", &set_features, array("trajectory_ids"), "trunk_version"_a, array("rows"))
      .def("read_features", &read_features, array("turn_ids"), "trunk_version"_a, array("rows"), array("next_rows"),
           "threads"_a)
      .def("trajectories_without_features", &trajectories_without_features, "trunk_version"_a)
      .def("features_stamp", py::overload_cast<>(&TrajectoryBuffer::features_stamp, py::const_),
           py::call_guard<py::gil_scoped_release>())
      .def("features_stamp", &features_stamp, "first"_a, "end"_a)
      .def("copy_features", &copy_features, "first_trajectory_id"_a, array("num_turns"), array("trunk_versions"),
           array("rows"))
      .def("state", &state)
      .def("state_since", &state_since, "first_trajectory_id"_a)
      .def_static("restore", &restore);
}

void bind_open_trajectory(py::module_& module) {
  py::class_<OpenTrajectory>(module, "OpenTrajectory")
      .def(py::init<std::int64_t, std::int32_t>(), "vocab_size"_a, "task_id"_a)
      .def("add_turn", &add_turn, array("observation_ids"), array("action_ids"), array("rollout_logprobs"), "reward"_a,
           "policy_version"_a)
      .def("end", &end_trajectory, "buffer"_a, array("final_observation_ids"), array("terminated"), array("truncated"))
      .def_property_readonly("num_turns", &OpenTrajectory::num_turns);
}

py::tuple plan_tokens(const Ids& lengths, std::int64_t max_tokens, std::int64_t num_ranks) {
  const auto items = read("lengths", lengths);
  TokenPlan plan;
  {
    const py::gil_scoped_release release;
    plan = pack_tokens(items, max_tokens, num_ranks);
  }
  return py::make_tuple(to_array<std::int64_t>(std::move(plan.item_ids)),
                        to_array<std::int64_t>(std::move(plan.cu_bins)));
}

void bind_token_packer(py::module_& module) {
  module.def("pack_tokens", &plan_tokens, array("lengths"), "max_tokens"_a, "num_ranks"_a);
}

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

}  // namespace
}  // namespace archer_fast

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of archer_fast.";
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      const py::tuple number_and_text = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, number_and_text.ptr());  // Python chooses the subclass by the number
    }
  });
  archer_fast::bind_trajectory_buffer(module);
  archer_fast::bind_open_trajectory(module);
  archer_fast::bind_token_packer(module);
  archer_fast::bind_kernels(module);
}
