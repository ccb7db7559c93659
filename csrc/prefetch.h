// Memory that is asked for before it is needed.
#pragma once

#include <algorithm>
#include <cstddef>

namespace archer_fast {

// Brings the first 32 KB of [data, data + bytes) into the second cache: the first one has too few places for what is on
// its way.
inline void prefetch(const void* data, std::size_t bytes) noexcept {
  constexpr std::size_t kLine = 64, kMaxBytes = std::size_t{32} << 10;
  const auto* const from = static_cast<const char*>(data);
  for (std::size_t i = 0; i < std::min(bytes, kMaxBytes); i += kLine) __builtin_prefetch(from + i, 0, 2);
}

}  // namespace archer_fast
