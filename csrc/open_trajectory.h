// A game that is still being played.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "new_trajectory.h"

namespace archer_fast {

// Collects the turns of one trajectory until it has ended and can be pushed. No buffer knows of it before, so
// nobody ever sees half a trajectory, whatever stops the game.
//
// Owner: whoever plays the game; all that comes in is copied. Threads: one at a time.
class OpenTrajectory {
 public:
  // vocab_size as in BufferOptions.
  OpenTrajectory(std::int64_t vocab_size, std::int32_t task_id) : vocab_size_(vocab_size), task_id_(task_id) {}

  // One exchange. Throws std::invalid_argument that names the argument, what was wanted and what came; the
  // trajectory is then as before. O(tokens).
  void add_turn(std::span<const std::int32_t> observation_ids, std::span<const std::int32_t> action_ids,
                std::span<const float> rollout_logprobs, float reward, std::int64_t policy_version);

  // The whole trajectory, valid until the next call or the end of this object. `final_observation_ids` is what the
  // last action was answered with; it may be empty. Given again it replaces the one before.
  NewTrajectory close(std::span<const std::int32_t> final_observation_ids, bool terminated, bool truncated);

  std::int64_t num_turns() const noexcept { return std::ssize(rewards_); }

 private:
  std::int64_t vocab_size_;
  std::int32_t task_id_;
  std::size_t num_turn_tokens_ = 0;  // of tokens_, without a final observation
  std::vector<std::int32_t> tokens_;
  std::vector<std::int32_t> observation_lengths_;
  std::vector<std::int32_t> action_lengths_;
  std::vector<float> rollout_logprobs_;
  std::vector<float> rewards_;
  std::vector<std::int64_t> policy_versions_;
};

}  // namespace archer_fast
