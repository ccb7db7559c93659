// A trajectory as a fuzzer makes it: often whole, sometimes not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer_options.h"
#include "fuzz_input.h"
#include "new_trajectory.h"

namespace archer_fast::fuzzing {

// The fields of NewTrajectory, owned. (Initialised, so that GCC lets a designated one name some of them.)
struct PlainTrajectory {
  std::vector<std::int32_t> tokens{};
  std::vector<std::int32_t> observation_lengths{};
  std::vector<std::int32_t> action_lengths{};
  std::vector<float> rollout_logprobs{};
  std::vector<float> rewards{};
  std::vector<std::int64_t> policy_versions{};
  bool terminated = true;
  bool truncated = false;
  std::int32_t task_id = 0;

  NewTrajectory view() const noexcept;

  // What new_trajectory.h and trajectory_buffer.h ask of one, said a second time.
  bool fits(const BufferOptions& options) const;
};

// One that fits, but for its length: 1 to 4 turns, 2 to 35 tokens.
PlainTrajectory whole_trajectory(FuzzInput& input, std::int64_t vocab_size);

// One that may have anything wrong with it.
PlainTrajectory any_trajectory(FuzzInput& input, std::int64_t vocab_size);

// Another length, or another item.
template <class T>
void damage(FuzzInput& input, std::vector<T>& items) {
  const std::size_t choice = input.below(3);
  if (choice == 0 || items.empty()) {
    items.resize(input.below(2 * items.size() < 250 ? 2 * items.size() + 3 : 256));
  } else if (choice == 1) {
    items.pop_back();
  } else {
    items[input.byte() % items.size()] = input.edge<T>();
  }
}

}  // namespace archer_fast::fuzzing
