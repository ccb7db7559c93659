#include "row_layout.h"

#include <limits>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {

void Padding::check(std::int64_t num_rows, std::int64_t max_length) const {
  constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  const std::int64_t max_width = kMaxTokens / std::max(num_rows, std::int64_t{1});
  if (width < max_length || width > max_width) {
    throw std::invalid_argument(
        concat("width: wanted ", max_length, ", the longest row, to ", max_width, ", got ", width));
  }
  if (pad_token_id < 0) throw std::invalid_argument(concat("pad_token_id: wanted 0 or more, got ", pad_token_id));
}

}  // namespace archer_fast
