// A game that is being played.
#include "open_trajectory.h"

#include "arrays.h"
#include "module.h"

namespace archer_fast {
namespace {

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

}  // namespace

void bind_open_trajectory(py::module_& module) {
  py::class_<OpenTrajectory>(module, "OpenTrajectory")
      .def(py::init<std::int64_t, std::int32_t>(), "vocab_size"_a, "task_id"_a)
      .def("add_turn", &add_turn, array("observation_ids"), array("action_ids"), array("rollout_logprobs"), "reward"_a,
           "policy_version"_a)
      .def("end", &end_trajectory, "buffer"_a, array("final_observation_ids"), array("terminated"), array("truncated"))
      .def_property_readonly("num_turns", &OpenTrajectory::num_turns);
}

}  // namespace archer_fast
