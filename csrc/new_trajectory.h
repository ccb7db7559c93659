// A trajectory as its producer hands it over.
#pragma once

#include <cstdint>
#include <span>

namespace archer_fast {

// One token stream o_0 a_0 o_1 a_1 ... o_final with what was recorded on the way. The final
// observation is what is left of `tokens` after the N turns; it may be empty.
//
//   tokens               17 9 | 41 8 2 | 12 | 5 2 | 30     T = 9
//   observation_lengths   2      .       1                 N = 2
//   action_lengths        .      3       .    2
//   rollout_logprobs             3 of them    2 of them    A = 5
//
// Owner: the caller; nothing is kept past the call it is given to.
struct NewTrajectory {
  std::span<const std::int32_t> tokens;               // [T]
  std::span<const std::int32_t> observation_lengths;  // [N]
  std::span<const std::int32_t> action_lengths;       // [N]
  std::span<const float> rollout_logprobs;            // [A]
  std::span<const float> rewards;                     // [N]
  std::span<const std::int64_t> policy_versions;      // [N]
  bool terminated = false;
  bool truncated = false;
  std::int32_t task_id = 0;  // which task the game was of; any number

  // vocab_size: ids are below it; 0 where it is not known.
  // Throws std::invalid_argument that names the field, what was wanted and what came. O(T).
  void check(std::int64_t vocab_size) const;
};

// What holds for any ids and numbers that are stored; throws as above.
void check_token_ids(const char* name, std::span<const std::int32_t> tokens, std::int64_t vocab_size);
void check_finite(const char* name, std::span<const float> values);

}  // namespace archer_fast
