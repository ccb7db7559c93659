// Memory that ends where its last item ends.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

namespace archer_fast::fuzzing {

// n items on the heap, to the byte, so that AddressSanitizer sees what is read or written beside them. Filled with
// a pattern that no bool has: UndefinedBehaviorSanitizer sees one that was read and not written.
//
// Owner: of its items. Precondition of T: trivially copyable.
template <class T>
class Block {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Block(std::size_t size) : size_(size), items_(new T[size]) {
    std::memset(static_cast<void*>(items_.get()), 0xA5, size * sizeof(T));
  }

  explicit Block(const std::vector<T>& items) : Block(items.size()) {
    for (std::size_t i = 0; i < size_; ++i) items_[i] = items[i];
  }

  std::span<T> span() const noexcept { return {items_.get(), size_}; }
  bool holds(const std::vector<T>& wanted) const {
    return std::equal(items_.get(), items_.get() + size_, wanted.begin(), wanted.end());
  }

 private:
  std::size_t size_;
  std::unique_ptr<T[]> items_;
};

}  // namespace archer_fast::fuzzing
