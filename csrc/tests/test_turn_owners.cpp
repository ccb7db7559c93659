#include <doctest/doctest.h>

#include <cstdint>
#include <deque>
#include <utility>

#include "counter_rng.h"
#include "turn_owners.h"

using archer_fast::CounterRng;
using archer_fast::IdRange;
using archer_fast::TurnOwners;

TEST_CASE("the search starts at the owner or at most a stride before, whatever was pushed, taken back and evicted") {
  CounterRng rng(3);
  for (const std::int64_t start : {std::int64_t{0}, std::int64_t{45}}) {
    TurnOwners owners;
    std::deque<std::pair<std::int64_t, IdRange>> live;
    std::int64_t next_turn = start, next_id = 0, first_turn = start;
    for (int step = 0; step < 3000; ++step) {
      const auto count = static_cast<std::int64_t>(1 + rng.next() % 40);
      const IdRange turns{next_turn, next_turn + count};
      owners.push_back(turns, next_id);
      if (rng.next() % 4 == 0) {
        owners.truncate(next_turn);
      } else {
        live.emplace_back(next_id++, turns);
        next_turn = turns.end;
      }
      const std::uint64_t evicted = step % 500 == 499 ? live.size() : rng.next() % 3;
      for (std::uint64_t i = 0; i < evicted && !live.empty(); ++i) {
        first_turn = live.front().second.end;
        owners.pop_front(first_turn);
        live.pop_front();
      }
      for (const auto& [id, range] : live) {
        for (const std::int64_t turn : {range.first, range.end - 1}) {
          const std::int64_t found = owners.search_from(turn);
          CHECK(found <= id);
          CHECK(found >= id - TurnOwners::kStride);
        }
      }
      if (live.size() > 20) {
        first_turn = live.front().second.end;
        owners.pop_front(first_turn);
        live.pop_front();
      }
    }
    CHECK(owners.num_bytes() <= 8 * (40 * 21 / TurnOwners::kStride + 2));
  }
}
