// Uniform draws: ids of a contiguous range, and numbers.
#pragma once

#include <cstdint>
#include <span>

#include "counter_rng.h"
#include "id_range.h"

namespace archer_fast {

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

  // Cuts [0, total) into out.size() equal slices and draws one number from each, in order. O(out).
  // Rounding may give a slice's end, and at the last one `total` itself. Precondition: 0 <= total < inf.
  //
  // The same on every machine of IEEE doubles: a draw has 53 bits and becomes a number without rounding;
  // one sum, one quotient and one product follow, each rounded once and in this order.
  void draw_slices(double total, std::span<double> out) noexcept;

  const CounterRng& rng() const noexcept { return rng_; }

 private:
  CounterRng rng_;
};

}  // namespace archer_fast
