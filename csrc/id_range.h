// A range of ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {

// [first, end).
struct IdRange {
  std::int64_t first = 0;
  std::int64_t end = 0;

  std::int64_t size() const noexcept { return end - first; }
  bool contains(std::int64_t id) const noexcept { return first <= id && id < end; }
};

// Throws std::out_of_range that names the argument, the place and the id where one is not live.
inline void check_live(const char* name, std::span<const std::int64_t> ids, IdRange live) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (!live.contains(ids[i])) {
      throw std::out_of_range(
          concat(name, "[", i, "]: wanted a live id in [", live.first, ", ", live.end, "), got ", ids[i]));
    }
  }
}

}  // namespace archer_fast
