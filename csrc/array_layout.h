// Arrays of several types, side by side in one piece of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace archer_fast {

// Hands out places from the front, each at the beginning of a cache line. Owner: of nothing.
class ArrayLayout {
 public:
  static constexpr std::size_t kAlignment = 64;

  // `memory` holds what will be placed; without, places are only counted.
  explicit ArrayLayout(std::byte* memory = nullptr) noexcept : memory_(memory) {}

  // Bytes that have been handed out.
  std::size_t num_bytes() const noexcept { return num_bytes_; }

  template <class T>
  void place(std::span<T>& array, std::int64_t length) noexcept {
    const auto size = static_cast<std::size_t>(length);
    if (memory_ != nullptr) array = {reinterpret_cast<T*>(memory_ + num_bytes_), size};
    num_bytes_ += (size * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  std::byte* memory_;
  std::size_t num_bytes_ = 0;
};

}  // namespace archer_fast
