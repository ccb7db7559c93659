// Random 64-bit words as a pure function of (seed, counter).
#pragma once

#include <cstdint>

namespace archer_fast {

// SplitMix64 (Steele, Lea, Flood 2014) addressed by counter instead of by hidden state: word i of
// seed s is mix(mix(s) + i * golden). Integer arithmetic alone, so every machine draws the same words,
// and (seed, counter) is all there is to save.
//
// Threads: none of its own rules; the owner locks.
class CounterRng {
 public:
  explicit CounterRng(std::uint64_t seed, std::uint64_t counter = 0) noexcept : seed_(seed), counter_(counter) {}

  std::uint64_t next() noexcept;

  // Uniform over 0 .. bound - 1 without modulo bias (rejection). Precondition: bound > 0.
  std::uint64_t below(std::uint64_t bound) noexcept;

  std::uint64_t seed() const noexcept { return seed_; }
  std::uint64_t counter() const noexcept { return counter_; }

 private:
  std::uint64_t seed_;
  std::uint64_t counter_;
};

}  // namespace archer_fast
