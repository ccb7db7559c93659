#include <doctest/doctest.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "row_layout.h"

using archer_fast::Padding;
using archer_fast::RowLayout;

namespace {

const std::vector<std::int32_t> kCuSeqlens{0, 3, 4};

std::vector<int> pads(const std::optional<Padding>& padding) {
  const RowLayout rows(kCuSeqlens, padding);
  std::vector<int> places(static_cast<std::size_t>(RowLayout::num_places(2, 4, padding)), 0);
  for (std::size_t i = 0; i < 2; ++i) rows.fill_pads(i, std::span(places), 9);
  return places;
}

}  // namespace

TEST_CASE("rows end to end have no pads") {
  const std::optional<Padding> none;
  const RowLayout rows(kCuSeqlens, none);
  CHECK(rows.begin(0) == 0);
  CHECK(rows.begin(1) == 3);
  CHECK(pads(none) == std::vector{0, 0, 0, 0});
}

TEST_CASE("rows at the beginning of their lines, and at their ends") {
  const std::optional right = Padding{.width = 4, .pad_token_id = 0, .is_left = false};
  CHECK(RowLayout(kCuSeqlens, right).begin(1) == 4);
  CHECK(pads(right) == std::vector{0, 0, 0, 9, 0, 9, 9, 9});
  const std::optional left = Padding{.width = 4, .pad_token_id = 0, .is_left = true};
  CHECK(RowLayout(kCuSeqlens, left).begin(0) == 1);
  CHECK(RowLayout(kCuSeqlens, left).begin(1) == 7);
  CHECK(pads(left) == std::vector{9, 0, 0, 0, 9, 9, 9, 0});
}

TEST_CASE("a padding that cannot be is refused by name") {
  const Padding good{.width = 3, .pad_token_id = 0, .is_left = false};
  good.check(2, 3);
  CHECK_THROWS_WITH_AS((Padding{2, 0, false}.check(2, 3)), "width: wanted 3, the longest row, to 1073741823, got 2",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS((Padding{1 << 30, 0, false}.check(2, 3)),
                       "width: wanted 3, the longest row, to 1073741823, got 1073741824", std::invalid_argument);
  CHECK_THROWS_WITH_AS((Padding{3, -1, false}.check(2, 3)), "pad_token_id: wanted 0 or more, got -1",
                       std::invalid_argument);
  Padding{0, 0, false}.check(0, 0);
}
