// Where the rows of a batch lie: end to end, or as the lines of a rectangle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

namespace archer_fast {

// Every row gets `width` places of its own, and what it does not need of them is filled.
struct Padding {
  std::int64_t width;
  std::int32_t pad_token_id;
  bool is_left;  // the row stands at the end of its places, else at their beginning

  // Throws std::invalid_argument that names the field at fault: a width below that of the longest row, or one at which
  // num_rows * width exceeds int32; a negative token id.
  void check(std::int64_t num_rows, std::int64_t max_length) const;
};

// Owner: of nothing; cu_seqlens and the padding outlive it. cu_seqlens [num_rows + 1] are the sums of the rows'
// lengths, from 0 on, whether the rows are padded or not.
class RowLayout {
 public:
  RowLayout(std::span<const std::int32_t> cu_seqlens, const std::optional<Padding>& padding) noexcept
      : cu_seqlens_(cu_seqlens), padding_(padding) {}

  // Places of all rows together.
  static std::int64_t num_places(std::int64_t num_rows, std::int64_t num_tokens,
                                 const std::optional<Padding>& padding) noexcept {
    return padding ? num_rows * padding->width : num_tokens;
  }

  // Where row i begins.
  std::int64_t begin(std::size_t i) const noexcept {
    if (!padding_) return cu_seqlens_[i];
    return line(i) + (padding_->is_left ? padding_->width - length(i) : 0);
  }

  // Fills the places of row i that are not its own.
  template <class T>
  void fill_pads(std::size_t i, std::span<T> out, T value) const noexcept {
    if (!padding_) return;
    T* const places = out.data();
    std::fill(places + line(i), places + begin(i), value);
    std::fill(places + begin(i) + length(i), places + line(i) + padding_->width, value);
  }

 private:
  std::int64_t length(std::size_t i) const noexcept { return std::int64_t{cu_seqlens_[i + 1]} - cu_seqlens_[i]; }
  std::int64_t line(std::size_t i) const noexcept { return static_cast<std::int64_t>(i) * padding_->width; }

  std::span<const std::int32_t> cu_seqlens_;
  const std::optional<Padding>& padding_;
};

}  // namespace archer_fast
