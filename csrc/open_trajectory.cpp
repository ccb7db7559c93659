#include "open_trajectory.h"

#include <cmath>
#include <limits>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {
namespace {

template <class T>
void reserve_more(std::vector<T>& values, std::size_t count) {
  // As a vector grows of itself: room for one more turn at a time would copy the whole every time.
  if (values.capacity() - values.size() < count) values.reserve(2 * values.size() + count);
}

void check_not_empty(const char* name, std::size_t size) {
  if (size == 0) throw std::invalid_argument(concat(name, ": wanted at least 1 token, got none"));
}

}  // namespace

void OpenTrajectory::add_turn(std::span<const std::int32_t> observation_ids, std::span<const std::int32_t> action_ids,
                              std::span<const float> rollout_logprobs, float reward, std::int64_t policy_version) {
  check_not_empty("observation_ids", observation_ids.size());
  check_not_empty("action_ids", action_ids.size());
  if (rollout_logprobs.size() != action_ids.size()) {
    throw std::invalid_argument(concat("rollout_logprobs: wanted one per action token (", action_ids.size(), "), got ",
                                       rollout_logprobs.size()));
  }
  constexpr std::size_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  const std::size_t num_tokens = num_turn_tokens_ + observation_ids.size() + action_ids.size();
  if (num_tokens > kMaxTokens) {
    throw std::invalid_argument(
        concat("action_ids: wanted a trajectory of at most ", kMaxTokens, " tokens, got ", num_tokens));
  }
  check_token_ids("observation_ids", observation_ids, vocab_size_);
  check_token_ids("action_ids", action_ids, vocab_size_);
  check_finite("rollout_logprobs", rollout_logprobs);
  if (!std::isfinite(reward)) throw std::invalid_argument(concat("reward: wanted a finite number, got ", reward));

  // All that can throw comes first.
  reserve_more(tokens_, observation_ids.size() + action_ids.size());
  reserve_more(rollout_logprobs_, rollout_logprobs.size());
  reserve_more(observation_lengths_, 1);
  reserve_more(action_lengths_, 1);
  reserve_more(rewards_, 1);
  reserve_more(policy_versions_, 1);

  tokens_.resize(num_turn_tokens_);
  tokens_.insert(tokens_.end(), observation_ids.begin(), observation_ids.end());
  tokens_.insert(tokens_.end(), action_ids.begin(), action_ids.end());
  num_turn_tokens_ = num_tokens;
  rollout_logprobs_.insert(rollout_logprobs_.end(), rollout_logprobs.begin(), rollout_logprobs.end());
  observation_lengths_.push_back(static_cast<std::int32_t>(observation_ids.size()));
  action_lengths_.push_back(static_cast<std::int32_t>(action_ids.size()));
  rewards_.push_back(reward);
  policy_versions_.push_back(policy_version);
}

NewTrajectory OpenTrajectory::close(std::span<const std::int32_t> final_observation_ids, bool terminated,
                                    bool truncated) {
  check_token_ids("final_observation_ids", final_observation_ids, vocab_size_);
  tokens_.resize(num_turn_tokens_);
  tokens_.insert(tokens_.end(), final_observation_ids.begin(), final_observation_ids.end());
  return {.tokens = tokens_,
          .observation_lengths = observation_lengths_,
          .action_lengths = action_lengths_,
          .rollout_logprobs = rollout_logprobs_,
          .rewards = rewards_,
          .policy_versions = policy_versions_,
          .terminated = terminated,
          .truncated = truncated,
          .task_id = task_id_};
}

}  // namespace archer_fast
