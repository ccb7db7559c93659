// What a trunk computed of a TrajectoryBuffer's turns.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "concat.h"
#include "trajectory_buffer.h"

namespace archer_fast {
namespace {

void check_trunk_version(std::int64_t trunk_version) {
  if (trunk_version < 0) throw std::invalid_argument(concat("trunk_version: wanted 0 or more, got ", trunk_version));
}

void check_bytes(const char* name, std::size_t bytes, std::size_t num_rows, std::size_t row_bytes) {
  if (bytes % row_bytes != 0 || bytes / row_bytes != num_rows) {
    throw std::invalid_argument(
        concat(name, ": wanted ", num_rows, " rows of ", row_bytes, " bytes, got ", bytes, " bytes in all"));
  }
}

}  // namespace

void TrajectoryBuffer::need_features() const {
  if (!features_) throw std::invalid_argument("features: wanted a buffer with some, got one of feature_bytes = 0");
}

void TrajectoryBuffer::set_features(std::span<const std::int64_t> trajectory_ids, std::int64_t trunk_version,
                                    std::span<const std::byte> rows) {
  const WriteLock lock(mutex_);
  need_features();
  FeatureStore& store = *features_;
  check_trunk_version(trunk_version);
  check_live("trajectory_ids", trajectory_ids, live_trajectories());
  std::size_t num_rows = 0;
  for (const std::int64_t id : trajectory_ids) num_rows += store.num_rows(place_of(id));
  check_bytes("rows", rows.size(), num_rows, store.row_bytes());
  const std::byte* next = rows.data();
  for (const std::int64_t id : trajectory_ids) {
    store.set(place_of(id), trunk_version, next);
    next += store.num_rows(place_of(id)) * store.row_bytes();
  }
}

void TrajectoryBuffer::read_features(std::span<const std::int64_t> turn_ids, std::int64_t trunk_version,
                                     std::span<std::byte> rows, std::span<std::byte> next_rows, int threads) const {
  const ReadLock lock(mutex_);
  need_features();
  const FeatureStore& store = *features_;
  check_trunk_version(trunk_version);
  check_live("turn_ids", turn_ids, live_turns());
  const std::size_t n = turn_ids.size();
  check_bytes("rows", rows.size(), n, store.row_bytes());
  const std::size_t next_bytes = n == 0 ? 0 : next_rows.size() / n;
  if (next_bytes > store.row_bytes() || next_bytes * n != next_rows.size()) {
    throw std::invalid_argument(concat("next_rows: wanted ", n, " rows of 0 to ", store.row_bytes(), " bytes, got ",
                                       next_rows.size(), " bytes in all"));
  }
  std::vector<const std::byte*> sources(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t id = owner_id(turn_ids[i]);
    const std::size_t place = place_of(id);
    if (const std::int64_t got = store.trunk_version(place); got != trunk_version) {
      const std::string there = got == FeatureStore::kNoVersion ? "none" : concat("version ", got);
      throw std::invalid_argument(concat("turn_ids[", i, "]: wanted features of trunk version ", trunk_version,
                                         ", got turn ", turn_ids[i], " of trajectory ", id, ", which has ", there));
    }
    sources[i] = store.row(place, static_cast<std::size_t>(turn_ids[i] - stored(id).first_turn_id));
  }
  store.gather(sources, next_bytes, rows.data(), next_rows.data(), threads);
}

std::vector<std::int64_t> TrajectoryBuffer::trajectories_without_features(std::int64_t trunk_version) const {
  const ReadLock lock(mutex_);
  need_features();
  const FeatureStore& store = *features_;
  check_trunk_version(trunk_version);
  std::vector<std::int64_t> ids;
  const IdRange live = live_trajectories();
  for (std::int64_t id = live.first; id < live.end; ++id) {
    if (store.trunk_version(place_of(id)) != trunk_version) ids.push_back(id);
  }
  return ids;
}

std::uint64_t TrajectoryBuffer::features_stamp() const {
  const ReadLock lock(mutex_);
  return features_ ? features_->stamp() : 0;
}

std::uint64_t TrajectoryBuffer::features_stamp(IdRange trajectory_ids) const {
  const ReadLock lock(mutex_);
  const IdRange live = live_trajectories();
  std::uint64_t newest = 0;
  if (!features_) return newest;
  for (std::int64_t id = std::max(trajectory_ids.first, live.first); id < std::min(trajectory_ids.end, live.end);
       ++id) {
    newest = std::max(newest, features_->stamp(place_of(id)));
  }
  return newest;
}

void TrajectoryBuffer::copy_features(std::int64_t first_trajectory_id, std::span<const std::int64_t> num_turns,
                                     std::span<std::int64_t> trunk_versions, std::span<std::byte> rows) const {
  const ReadLock lock(mutex_);
  need_features();
  const FeatureStore& store = *features_;
  std::size_t num_rows = 0;
  for (std::size_t i = 0; i < num_turns.size(); ++i) {
    constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
    if (num_turns[i] < 1 || num_turns[i] > kMax) {
      throw std::invalid_argument(concat("num_turns[", i, "]: wanted 1 to ", kMax, ", got ", num_turns[i]));
    }
    num_rows += static_cast<std::size_t>(num_turns[i]) + 1;
  }
  check_bytes("rows", rows.size(), num_rows, store.row_bytes());
  if (trunk_versions.size() != num_turns.size()) {
    throw std::invalid_argument(
        concat("trunk_versions: wanted length ", num_turns.size(), ", got ", trunk_versions.size()));
  }
  std::byte* out = rows.data();
  const IdRange live = live_trajectories();
  for (std::size_t i = 0; i < num_turns.size(); ++i) {
    // Past the live ones no sum is needed, or possible.
    const std::int64_t id =
        first_trajectory_id < live.end ? first_trajectory_id + static_cast<std::int64_t>(i) : live.end;
    const bool is_live = live.contains(id);
    const std::size_t bytes = (static_cast<std::size_t>(num_turns[i]) + 1) * store.row_bytes();
    if (is_live && stored(id).num_turns != num_turns[i]) {
      throw std::invalid_argument(
          concat("num_turns[", i, "]: wanted ", stored(id).num_turns, " of trajectory ", id, ", got ", num_turns[i]));
    }
    trunk_versions[i] = is_live ? store.trunk_version(place_of(id)) : FeatureStore::kNoVersion;
    if (trunk_versions[i] == FeatureStore::kNoVersion) {
      std::memset(out, 0, bytes);
    } else {
      std::memcpy(out, store.row(place_of(id), 0), bytes);
    }
    out += bytes;
  }
}

}  // namespace archer_fast
