#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <vector>

#include "parallel_ranges.h"

using archer_fast::parallel_ranges;

TEST_CASE("every item is visited once, whatever the number of threads") {
  for (const std::int64_t n : {0, 1, 2, 7, 100}) {
    for (const int threads : {-1, 0, 1, 2, 3, 8, 200}) {
      std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
      std::atomic<std::int64_t> longest = 0;
      parallel_ranges(n, threads, [&](std::int64_t begin, std::int64_t end) noexcept {
        for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
        if (end - begin > longest) longest = end - begin;
      });
      for (const auto& count : visits) CHECK(count == 1);
      if (threads > 0) CHECK(longest <= n / threads + 1);
    }
  }
}
