#include <doctest/doctest.h>

#include <cstdint>
#include <span>
#include <vector>

#include "array_layout.h"

using archer_fast::ArrayLayout;

TEST_CASE("arrays begin with cache lines and do not overlap") {
  std::span<std::int64_t> longs;
  std::span<bool> flags;
  std::span<float> none;
  ArrayLayout wanted;
  wanted.place(longs, 9);
  wanted.place(flags, 65);
  wanted.place(none, 0);
  CHECK(longs.data() == nullptr);  // counted, not placed
  CHECK(wanted.num_bytes() == 128 + 128);

  std::vector<std::byte> memory(wanted.num_bytes());
  ArrayLayout layout(memory.data());
  layout.place(longs, 9);
  layout.place(flags, 65);
  layout.place(none, 0);
  CHECK(layout.num_bytes() == wanted.num_bytes());
  CHECK(longs.size() == 9);
  CHECK(reinterpret_cast<std::byte*>(longs.data()) == memory.data());
  CHECK(reinterpret_cast<std::byte*>(flags.data()) == memory.data() + 128);
  CHECK(none.empty());
}
