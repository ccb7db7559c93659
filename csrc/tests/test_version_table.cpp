#include <doctest/doctest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "version_table.h"

using archer_fast::VersionTable;

namespace {

using Counts = std::vector<std::pair<std::int64_t, std::int64_t>>;

Counts counts(const VersionTable& table) {
  Counts counts;
  for (const auto& [version, entry] : table.entries()) counts.emplace_back(version, entry.num_turns);
  return counts;
}

std::pair<std::int64_t, std::int64_t> since(const VersionTable& table, std::int64_t min_version) {
  const VersionTable::Entry entry = table.since(min_version);
  return {entry.num_turns, entry.first_trajectory_id};
}

}  // namespace

TEST_CASE("turns are counted by version, in whatever order the versions come") {
  VersionTable table;
  CHECK(since(table, 0) == std::pair(0L, 0L));
  table.add(std::vector<std::int64_t>{7, 7, 8, 7}, 0);
  table.add(std::vector<std::int64_t>{9}, 1);
  table.add(std::vector<std::int64_t>{-3, 8}, 2);
  CHECK(counts(table) == Counts{{-3, 1}, {7, 3}, {8, 2}, {9, 1}});
  CHECK(since(table, -3) == std::pair(7L, 0L));
  CHECK(since(table, 8) == std::pair(3L, 0L));
  CHECK(since(table, 9) == std::pair(1L, 1L));
  CHECK(since(table, 10) == std::pair(0L, 0L));

  table.remove(7, 2);
  table.remove(8, 1);
  table.remove(7, 1);
  CHECK(counts(table) == Counts{{-3, 1}, {8, 1}, {9, 1}});
  table.remove(8, 1);
  table.add(std::vector<std::int64_t>{8}, 5);
  CHECK(since(table, 8) == std::pair(2L, 1L));
  table.remove(9, 1);
  CHECK(since(table, 8) == std::pair(1L, 5L));
}
