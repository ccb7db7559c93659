#include "plain_rows.h"

#include <limits>

namespace archer_fast::fuzzing {

std::optional<Padding> some_padding(FuzzInput& input, std::size_t max_length) {
  const std::uint8_t kind = input.byte();
  if (kind % 2 == 0) return std::nullopt;
  const std::int64_t more = kind >= 250 ? 40000 : static_cast<std::int64_t>(input.below(8)) - 1;
  return Padding{.width = kind == 249 ? input.edge<std::int64_t>() : static_cast<std::int64_t>(max_length) + more,
                 .pad_token_id = input.once_in(8) ? input.edge<std::int32_t>() : input.byte(),
                 .is_left = kind / 2 % 2 == 1};
}

bool fits(const std::optional<Padding>& padding, std::size_t num_rows, std::size_t max_length) {
  if (!padding) return true;
  constexpr std::int64_t kMaxPlaces = std::int64_t{1} << 20;
  const std::int64_t max_width = std::numeric_limits<std::int32_t>::max();
  return padding->pad_token_id >= 0 && padding->width >= static_cast<std::int64_t>(max_length) &&
         padding->width <= max_width && static_cast<std::int64_t>(num_rows) * padding->width <= kMaxPlaces;
}

}  // namespace archer_fast::fuzzing
