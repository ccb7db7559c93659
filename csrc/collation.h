// What every collation checks.
#pragma once

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

}  // namespace archer_fast
