// archer_fast._C: the only file of the core's neighbourhood that knows Python.
//
// Array arguments are bound with noconvert(): another dtype or stride is a TypeError, because pybind11
// would otherwise hand over a silent copy and what is written there would vanish. The GIL is released
// around every call that may wait for the buffer's lock, and no callee takes it back.
// The kernels take addresses instead, so that no array library is needed to hand one over; archer_fast/ops/cpu.py
// checks what they point to.
// std::invalid_argument becomes ValueError, std::out_of_range IndexError, std::bad_alloc MemoryError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "concat.h"
#include "critic_loss.h"
#include "huge_pages.h"
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

template <class Stored, class T>
std::vector<Stored> to_vector(const char* name, const Array<T>& array) {
  const std::span<const T> values = read(name, array);
  return std::vector<Stored>(values.begin(), values.end());
}

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

std::int64_t push(TrajectoryBuffer& buffer, const Array<std::int32_t>& tokens,
                  const Array<std::int32_t>& observation_lengths, const Array<std::int32_t>& action_lengths,
                  const Array<float>& rollout_logprobs, const Array<float>& rewards, const Ids& policy_versions,
                  bool terminated, bool truncated, std::int32_t task_id) {
  const NewTrajectory trajectory{.tokens = read("tokens", tokens),
                                 .observation_lengths = read("observation_lengths", observation_lengths),
                                 .action_lengths = read("action_lengths", action_lengths),
                                 .rollout_logprobs = read("rollout_logprobs", rollout_logprobs),
                                 .rewards = read("rewards", rewards),
                                 .policy_versions = read("policy_versions", policy_versions),
                                 .terminated = terminated,
                                 .truncated = truncated,
                                 .task_id = task_id};
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
                        turns_by_age, turns_by_version);
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
  return py::make_tuple(sizes.num_trajectories, sizes.num_turns, sizes.num_tokens);
}

void collate(const TrajectoryBuffer& buffer, const Ids& trajectory_ids, Array<std::int32_t>& input_ids,
             Array<std::int32_t>& position_ids, Array<std::int32_t>& cu_seqlens, Array<std::int32_t>& turn_ids,
             Array<bool>& action_mask, Array<std::int32_t>& cu_turns, Ids& state_positions, Ids& action_positions,
             Ids& final_positions, Array<std::int32_t>& turn, Array<float>& rewards, Ids& policy_versions,
             Array<bool>& terminated, Array<bool>& truncated, Array<float>& rollout_logprobs) {
  const auto ids = read("trajectory_ids", trajectory_ids);
  const PackedArrays out{.input_ids = write("input_ids", input_ids),
                         .position_ids = write("position_ids", position_ids),
                         .cu_seqlens = write("cu_seqlens", cu_seqlens),
                         .turn_ids = write("turn_ids", turn_ids),
                         .action_mask = write("action_mask", action_mask),
                         .cu_turns = write("cu_turns", cu_turns),
                         .state_positions = write("state_positions", state_positions),
                         .action_positions = write("action_positions", action_positions),
                         .final_positions = write("final_positions", final_positions),
                         .turn = write("turn", turn),
                         .rewards = write("rewards", rewards),
                         .policy_versions = write("policy_versions", policy_versions),
                         .terminated = write("terminated", terminated),
                         .truncated = write("truncated", truncated),
                         .rollout_logprobs = write("rollout_logprobs", rollout_logprobs)};
  const py::gil_scoped_release release;
  buffer.collate(ids, out);
}

py::dict to_dict(BufferState&& state) {
  return py::dict("max_tokens"_a = state.max_tokens, "max_trajectories"_a = state.max_trajectories,
                  "seed"_a = state.seed, "counter"_a = state.counter,
                  "first_trajectory_id"_a = state.first_trajectory_id, "first_turn_id"_a = state.first_turn_id,
                  "max_priority"_a = state.max_priority, "tokens"_a = to_array<std::int32_t>(std::move(state.tokens)),
                  "rollout_logprobs"_a = to_array<float>(std::move(state.rollout_logprobs)),
                  "observation_lengths"_a = to_array<std::int32_t>(std::move(state.observation_lengths)),
                  "action_lengths"_a = to_array<std::int32_t>(std::move(state.action_lengths)),
                  "rewards"_a = to_array<float>(std::move(state.rewards)),
                  "policy_versions"_a = to_array<std::int64_t>(std::move(state.policy_versions)),
                  "priorities"_a = to_array<double>(std::move(state.priorities)),
                  "num_tokens"_a = to_array<std::int32_t>(std::move(state.num_tokens)),
                  "num_turns"_a = to_array<std::int32_t>(std::move(state.num_turns)),
                  "terminated"_a = to_array<bool>(std::move(state.terminated)),
                  "truncated"_a = to_array<bool>(std::move(state.truncated)),
                  "task_ids"_a = to_array<std::int32_t>(std::move(state.task_ids)));
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

std::unique_ptr<TrajectoryBuffer> restore(std::int64_t max_tokens, std::int64_t max_trajectories, std::uint64_t seed,
                                          std::uint64_t counter, std::int64_t first_trajectory_id,
                                          std::int64_t first_turn_id, double max_priority,
                                          const Array<std::int32_t>& tokens, const Array<float>& rollout_logprobs,
                                          const Array<std::int32_t>& observation_lengths,
                                          const Array<std::int32_t>& action_lengths, const Array<float>& rewards,
                                          const Ids& policy_versions, const Array<double>& priorities,
                                          const Array<std::int32_t>& num_tokens, const Array<std::int32_t>& num_turns,
                                          const Array<bool>& terminated, const Array<bool>& truncated,
                                          const Array<std::int32_t>& task_ids) {
  const BufferState state{.max_tokens = max_tokens,
                          .max_trajectories = max_trajectories,
                          .seed = seed,
                          .counter = counter,
                          .first_trajectory_id = first_trajectory_id,
                          .first_turn_id = first_turn_id,
                          .max_priority = max_priority,
                          .tokens = to_vector<std::int32_t>("tokens", tokens),
                          .rollout_logprobs = to_vector<float>("rollout_logprobs", rollout_logprobs),
                          .observation_lengths = to_vector<std::int32_t>("observation_lengths", observation_lengths),
                          .action_lengths = to_vector<std::int32_t>("action_lengths", action_lengths),
                          .rewards = to_vector<float>("rewards", rewards),
                          .policy_versions = to_vector<std::int64_t>("policy_versions", policy_versions),
                          .priorities = to_vector<double>("priorities", priorities),
                          .num_tokens = to_vector<std::int32_t>("num_tokens", num_tokens),
                          .num_turns = to_vector<std::int32_t>("num_turns", num_turns),
                          .terminated = to_vector<std::uint8_t>("terminated", terminated),
                          .truncated = to_vector<std::uint8_t>("truncated", truncated),
                          .task_ids = to_vector<std::int32_t>("task_ids", task_ids)};
  const py::gil_scoped_release release;
  return TrajectoryBuffer::restore(state);
}

py::arg array(const char* name) { return py::arg(name).noconvert(); }

void bind_trajectory_buffer(py::module_& module) {
  py::class_<TrajectoryBuffer>(module, "TrajectoryBuffer")
      .def(py::init<std::int64_t, std::int64_t, std::uint64_t>(), "max_tokens"_a, "max_trajectories"_a, "seed"_a)
      .def("push", &push, array("tokens"), array("observation_lengths"), array("action_lengths"),
           array("rollout_logprobs"), array("rewards"), array("policy_versions"), array("terminated"),
           array("truncated"), "task_id"_a = 0)
      .def_property_readonly("max_tokens", &TrajectoryBuffer::max_tokens)
      .def_property_readonly("max_trajectories", &TrajectoryBuffer::max_trajectories)
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
      .def("collate", &collate, array("trajectory_ids"), py::kw_only(), array("input_ids"), array("position_ids"),
           array("cu_seqlens"), array("turn_ids"), array("action_mask"), array("cu_turns"), array("state_positions"),
           array("action_positions"), array("final_positions"), array("turn"), array("rewards"),
           array("policy_versions"), array("terminated"), array("truncated"), array("rollout_logprobs"))
      .def("state", &state)
      .def("state_since", &state_since, "first_trajectory_id"_a)
      .def_static("restore", &restore, py::kw_only(), "max_tokens"_a, "max_trajectories"_a, "seed"_a, "counter"_a,
                  "first_trajectory_id"_a, "first_turn_id"_a, "max_priority"_a, array("tokens"),
                  array("rollout_logprobs"), array("observation_lengths"), array("action_lengths"), array("rewards"),
                  array("policy_versions"), array("priorities"), array("num_tokens"), array("num_turns"),
                  array("terminated"), array("truncated"), array("task_ids"));
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
  archer_fast::bind_trajectory_buffer(module);
  archer_fast::bind_token_packer(module);
  archer_fast::bind_kernels(module);
}
