// Token ids in the width they are stored with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace archer_fast {

// A view of tokens that are two bytes each where the vocabulary allows it, else four. Owner: whoever owns the memory.
class TokenSpan {
 public:
  static constexpr std::int64_t kMaxNarrowVocabulary = 65536;

  TokenSpan() = default;
  // `data` is aligned to the width of a token.
  TokenSpan(const std::byte* data, std::int64_t size, bool is_narrow) noexcept
      : data_(data), size_(size), is_narrow_(is_narrow) {}

  static std::size_t width(bool is_narrow) noexcept { return is_narrow ? sizeof(std::uint16_t) : sizeof(std::int32_t); }

  std::int64_t size() const noexcept { return size_; }
  const std::byte* data() const noexcept { return data_; }
  std::size_t num_bytes() const noexcept { return static_cast<std::size_t>(size_) * width(is_narrow_); }

  // The first `count` of them. Precondition: there are as many.
  TokenSpan first(std::int64_t count) const noexcept { return {data_, count, is_narrow_}; }

  // Copies them to `out`.
  void copy(std::int32_t* out) const noexcept {
    if (is_narrow_) {
      std::copy_n(reinterpret_cast<const std::uint16_t*>(data_), size_, out);
    } else {
      std::copy_n(reinterpret_cast<const std::int32_t*>(data_), size_, out);
    }
  }

 private:
  const std::byte* data_ = nullptr;
  std::int64_t size_ = 0;
  bool is_narrow_ = false;
};

}  // namespace archer_fast
