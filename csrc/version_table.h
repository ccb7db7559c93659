// How many live turns each policy version has sampled.
#pragma once

#include <cstdint>
#include <map>
#include <span>

namespace archer_fast {

// Versions may come in any order: what is true of the order of pushes is not assumed.
//
// Owner: holds one entry a live version. Threads: none of its own rules; the owner locks.
// Complexity: of v live versions O(log v) for each run of equal versions that is added and for remove, O(v)
// for the rest.
class VersionTable {
 public:
  struct Entry {
    std::int64_t num_turns = 0;
    std::int64_t first_trajectory_id = 0;  // no live trajectory before this one has turns of the version
  };

  // The version of each turn of a trajectory; ids ascend from call to call. Throws std::bad_alloc, and nothing
  // has changed then.
  void add(std::span<const std::int64_t> versions, std::int64_t trajectory_id);

  // Precondition: as many turns of that version were added and not removed.
  void remove(std::int64_t version, std::int64_t num_turns) noexcept;

  const std::map<std::int64_t, Entry>& entries() const noexcept { return entries_; }

  // Of version `min_version` and later: the turns, and the first trajectory that may have one. Where there
  // is no such turn both are 0.
  Entry since(std::int64_t min_version) const;

 private:
  std::map<std::int64_t, Entry> entries_;  // num_turns > 0
};

}  // namespace archer_fast
