// Which trajectory a turn belongs to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "id_range.h"

namespace archer_fast {

// Remembers the owner of one turn in kStride, from where the search for another goes on: a word a turn would be a
// twentieth of what the buffer holds.
//
// Owner: holds half a byte a turn. Threads: none of its own rules; the owner locks.
class TurnOwners {
 public:
  static constexpr std::int64_t kStride = 16;

  // The turns of a new trajectory, which follow those before. O(n / kStride). Throws std::bad_alloc, and nothing
  // has changed then.
  void push_back(IdRange turn_ids, std::int64_t trajectory_id);

  // Forgets turns from `end` on, as if they had never been there.
  void truncate(std::int64_t end) noexcept;

  // Forgets turns before `first`, which is none that was not pushed, but for the next one.
  void pop_front(std::int64_t first) noexcept;

  // A trajectory that owns `turn_id` or a turn at most kStride - 1 before it; it may have left since.
  std::int64_t search_from(std::int64_t turn_id) const noexcept {
    return owners_[static_cast<std::size_t>(turn_id / kStride - first_stride_)];
  }

  std::size_t num_bytes() const noexcept { return owners_.size() * sizeof(std::int64_t); }

 private:
  std::int64_t end_stride() const noexcept { return first_stride_ + std::ssize(owners_); }

  std::deque<std::int64_t> owners_;  // of the first turn seen in each stride
  std::int64_t first_stride_ = 0;
};

}  // namespace archer_fast
