// The trajectory of new_trajectory.h, owned.
#pragma once

#include <cstdint>
#include <vector>

#include "new_trajectory.h"

namespace archer_fast::testing {

struct Example {
  std::vector<std::int32_t> tokens{17, 9, 41, 8, 2, 12, 5, 2, 30};
  std::vector<std::int32_t> observation_lengths{2, 1};
  std::vector<std::int32_t> action_lengths{3, 2};
  std::vector<float> rollout_logprobs{-0.1F, -0.2F, -0.3F, -0.4F, -0.5F};
  std::vector<float> rewards{-1.0F, 0.0F};
  std::vector<std::int64_t> policy_versions{7, 8};
  bool terminated = true;
  bool truncated = false;

  NewTrajectory view() const {
    return {.tokens = tokens,
            .observation_lengths = observation_lengths,
            .action_lengths = action_lengths,
            .rollout_logprobs = rollout_logprobs,
            .rewards = rewards,
            .policy_versions = policy_versions,
            .terminated = terminated,
            .truncated = truncated};
  }
};

}  // namespace archer_fast::testing
