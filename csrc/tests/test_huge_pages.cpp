#include <doctest/doctest.h>

#include <cstddef>
#include <vector>

#include "huge_pages.h"

TEST_CASE("advice leaves the contents alone, at any address and size") {
  std::vector<unsigned char> bytes(std::size_t{5} << 20, 7);
  for (const std::size_t offset : {std::size_t{0}, std::size_t{1}, std::size_t{4095}}) {
    archer_fast::advise_huge_pages(bytes.data() + offset, bytes.size() - offset);
    archer_fast::advise_huge_pages(bytes.data() + offset, offset);
  }
  archer_fast::advise_huge_pages(nullptr, 0);
  for (const unsigned char byte : bytes) REQUIRE(byte == 7);
}
