#include <doctest/doctest.h>

#include <stdexcept>
#include <string>

#include "simd_level.h"

using archer_fast::SimdLevel;

TEST_CASE("the best level comes first, the baseline last, and each answers to its name") {
  const auto levels = archer_fast::simd_levels();
  REQUIRE(!levels.empty());
  CHECK(levels.back() == SimdLevel::kBaseline);
  for (std::size_t i = 1; i < levels.size(); ++i) CHECK(levels[i - 1] > levels[i]);
  for (const SimdLevel level : levels) CHECK(archer_fast::simd_level(archer_fast::simd_name(level)) == level);
  CHECK(archer_fast::simd_level("auto") == levels.front());
}

TEST_CASE("a name that this machine cannot run is refused with those it can") {
  std::string message;
  try {
    archer_fast::simd_level("mmx");
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK(message.starts_with("simd: wanted one of auto, "));
  CHECK(message.ends_with("baseline on this machine, got 'mmx'"));
}
