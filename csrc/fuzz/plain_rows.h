// The rows of a batch as one would lay them out who minds no copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "fuzz_input.h"
#include "row_layout.h"

namespace archer_fast::fuzzing {

// End to end, or with padding each in a line of its own.
class PlainRows {
 public:
  explicit PlainRows(const std::optional<Padding>& padding) : padding_(padding) {}

  // Gives the next row its places, and where the row begins in them.
  std::int64_t next(std::size_t length) {
    pads_ = padding_ ? static_cast<std::size_t>(padding_->width) - length : 0;
    const std::size_t begin = num_places_ + (is_left() ? pads_ : 0);
    num_places_ += length + pads_;
    return static_cast<std::int64_t>(begin);
  }

  // Its values, with pads before or behind them.
  template <class T>
  void add(std::vector<T>& to, const std::vector<T>& row, T pad) const {
    if (is_left()) to.insert(to.end(), pads_, pad);
    to.insert(to.end(), row.begin(), row.end());
    if (!is_left()) to.insert(to.end(), pads_, pad);
  }

  // Where there is padding alone.
  template <class T>
  void add_padded(std::vector<T>& to, const std::vector<T>& row, T pad) const {
    if (padding_) add(to, row, pad);
  }

 private:
  bool is_left() const { return padding_ && padding_->is_left; }

  std::optional<Padding> padding_;
  std::size_t pads_ = 0;
  std::size_t num_places_ = 0;
};

// None, one into which the rows fit, or any; sometimes so wide that several threads are worth it.
std::optional<Padding> some_padding(FuzzInput& input, std::size_t max_length);

// What row_layout.h asks of one, said a second time, and that we have memory for it too: it is without that refused
// because of the lengths of the destinations.
bool fits(const std::optional<Padding>& padding, std::size_t num_rows, std::size_t max_length);

}  // namespace archer_fast::fuzzing
