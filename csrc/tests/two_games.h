// The two games of archer_fast/packing.py, as they are stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "trajectory_view.h"

namespace archer_fast::testing {

struct TwoGames {
  std::vector<TurnRecord> first_turns{{7, 2, 0, -1.0F, -1.5F}, {7, 5, 2, 0.0F, -0.5F}};
  std::vector<std::int32_t> first_tokens{17, 9, 41, 2, 12, 5, 2, 30};
  std::vector<float> first_logprobs{-1, -2, -3, -4};
  std::vector<TurnRecord> second_turns{{7, 1, 0, -1.0F, -1.0F}};
  std::vector<std::int32_t> second_tokens{17, 8, 2};
  std::vector<float> second_logprobs{-5, -6};
  std::vector<TrajectoryView> views{{first_turns, wide(first_tokens), first_logprobs, true},
                                    {second_turns, wide(second_tokens), second_logprobs, false}};

  static TokenSpan wide(const std::vector<std::int32_t>& tokens) {
    return {reinterpret_cast<const std::byte*>(tokens.data()), std::ssize(tokens), false};
  }
};

using Numbers = std::vector<double>;

template <class T>
Numbers numbers(std::span<T> values) {
  return {values.begin(), values.end()};
}

// Destinations of any types, poisoned, so that an element nobody wrote is seen.
class Poisoned {
 public:
  template <class T>
  std::span<T> array(std::int64_t size) {
    const auto length = static_cast<std::size_t>(size);
    memory_.emplace_back(length * sizeof(T) + 1, std::byte{0x5A});
    return {reinterpret_cast<T*>(memory_.back().data()), length};
  }

 private:
  std::vector<std::vector<std::byte>> memory_;
};

}  // namespace archer_fast::testing
