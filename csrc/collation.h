// What every collation checks and decides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {

inline void check_length(const char* name, std::size_t length, std::int64_t wanted) {
  if (length != static_cast<std::size_t>(wanted)) {
    throw std::invalid_argument(concat(name, ": wanted length ", wanted, ", got ", length));
  }
}

// ids: name of the argument that said what is in the batch.
inline void check_num_tokens(const char* ids, std::int64_t num_tokens) {
  constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  if (num_tokens > kMaxTokens) {
    throw std::invalid_argument(concat(ids, ": wanted a batch of at most ", kMaxTokens, " tokens, got ", num_tokens));
  }
}

// How many of `threads` pay for their start (50 us and more) in a batch of that many tokens.
inline int threads_worth(std::int64_t num_tokens, int threads) noexcept {
  constexpr std::int64_t kTokensPerThread = std::int64_t{1} << 17;
  return static_cast<int>(
      std::clamp(num_tokens / kTokensPerThread, std::int64_t{1}, std::int64_t{std::max(threads, 1)}));
}

}  // namespace archer_fast
