// Uniform draws from a contiguous range of ids.
#pragma once

#include <cstdint>
#include <span>

#include "counter_rng.h"

namespace archer_fast {

// A range of ids [first, end).
struct IdRange {
  std::int64_t first = 0;
  std::int64_t end = 0;

  std::int64_t size() const noexcept { return end - first; }
  bool contains(std::int64_t id) const noexcept { return first <= id && id < end; }
};

// Owner: holds its generator and nothing else. Threads: none of its own rules; the owner locks.
class UniformSampler {
 public:
  explicit UniformSampler(CounterRng rng) noexcept : rng_(rng) {}

  // Fills `out` with independent draws. O(out). Throws std::invalid_argument where the range is empty
  // and `out` is not; nothing is drawn then.
  void draw(IdRange range, std::span<std::int64_t> out);

  // Fills `out` with distinct ids in random order: every ordered choice is equally likely. O(out).
  // Throws std::invalid_argument where the range has fewer ids than `out`; nothing is drawn then.
  void draw_distinct(IdRange range, std::span<std::int64_t> out);

  const CounterRng& rng() const noexcept { return rng_; }

 private:
  CounterRng rng_;
};

}  // namespace archer_fast
