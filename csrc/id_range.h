// A range of ids.
#pragma once

#include <cstdint>

namespace archer_fast {

// [first, end).
struct IdRange {
  std::int64_t first = 0;
  std::int64_t end = 0;

  std::int64_t size() const noexcept { return end - first; }
  bool contains(std::int64_t id) const noexcept { return first <= id && id < end; }
};

}  // namespace archer_fast
