#include "version_table.h"

#include <algorithm>
#include <cassert>

namespace archer_fast {

void VersionTable::add(std::span<const std::int64_t> versions, std::int64_t trajectory_id) {
  auto run = versions.begin();
  try {
    while (run != versions.end()) {
      const auto end = std::find_if(run, versions.end(), [=](std::int64_t version) { return version != *run; });
      Entry& entry = entries_.try_emplace(*run, Entry{0, trajectory_id}).first->second;
      entry.num_turns += end - run;
      run = end;
    }
  } catch (...) {
    std::for_each(versions.begin(), run, [this](std::int64_t version) { remove(version, 1); });
    throw;
  }
}

void VersionTable::remove(std::int64_t version, std::int64_t num_turns) noexcept {
  const auto entry = entries_.find(version);
  assert(entry != entries_.end() && entry->second.num_turns >= num_turns);
  entry->second.num_turns -= num_turns;
  if (entry->second.num_turns == 0) entries_.erase(entry);
}

VersionTable::Entry VersionTable::since(std::int64_t min_version) const {
  Entry all;
  for (auto entry = entries_.lower_bound(min_version); entry != entries_.end(); ++entry) {
    const auto& [num_turns, first] = entry->second;
    all.first_trajectory_id = all.num_turns == 0 ? first : std::min(all.first_trajectory_id, first);
    all.num_turns += num_turns;
  }
  return all;
}

}  // namespace archer_fast
