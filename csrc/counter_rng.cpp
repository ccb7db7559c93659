#include "counter_rng.h"

#include <cassert>

namespace archer_fast {
namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15U;

std::uint64_t mix(std::uint64_t word) noexcept {
  word = (word ^ (word >> 30U)) * 0xBF58476D1CE4E5B9U;
  word = (word ^ (word >> 27U)) * 0x94D049BB133111EBU;
  return word ^ (word >> 31U);
}

}  // namespace

std::uint64_t CounterRng::next() noexcept {
  // Seeds are hashed first: without it seed + golden would be the same stream one step ahead.
  const std::uint64_t key = mix(seed_ + kGolden);
  return mix(key + kGolden * ++counter_);
}

std::uint64_t CounterRng::below(std::uint64_t bound) noexcept {
  assert(bound > 0);
  const std::uint64_t reject_below = (0U - bound) % bound;  // 2^64 mod bound
  std::uint64_t word = next();
  while (word < reject_below) word = next();
  return word % bound;
}

}  // namespace archer_fast
