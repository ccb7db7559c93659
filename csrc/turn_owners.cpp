#include "turn_owners.h"

#include <algorithm>
#include <cassert>
#include <iterator>

namespace archer_fast {

void TurnOwners::push_back(IdRange turn_ids, std::int64_t trajectory_id) {
  assert(turn_ids.size() > 0);
  if (owners_.empty()) first_stride_ = turn_ids.first / kStride;
  const std::int64_t wanted = (turn_ids.end - 1) / kStride + 1;
  const std::int64_t more = std::max(wanted - end_stride(), std::int64_t{0});
  owners_.insert(owners_.end(), static_cast<std::size_t>(more), trajectory_id);
}

void TurnOwners::truncate(std::int64_t end) noexcept {
  const std::int64_t wanted = (end + kStride - 1) / kStride;
  while (end_stride() > wanted && !owners_.empty()) owners_.pop_back();
}

void TurnOwners::pop_front(std::int64_t first) noexcept {
  while (first_stride_ < first / kStride && !owners_.empty()) {
    owners_.pop_front();
    ++first_stride_;
  }
}

}  // namespace archer_fast
