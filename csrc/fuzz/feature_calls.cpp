// Features: what is set of trajectories, and what is read of it turn by turn and whole.
#include <algorithm>
#include <limits>

#include "operations.h"

namespace archer_fast::fuzzing {
namespace {

using Bytes = std::vector<std::byte>;

std::int64_t some_trunk_version(FuzzInput& input) {
  return input.once_in(8) ? input.edge<std::int64_t>() : static_cast<std::int64_t>(input.below(3));
}

void append(Bytes& to, std::span<const std::byte> from) { to.insert(to.end(), from.begin(), from.end()); }

void set_features(Bench& bench) {
  FuzzInput& input = bench.input;
  PlainBuffer& plain = bench.plain;
  const Block<std::int64_t> ids = some_ids(input, plain.trajectory_range());
  const std::int64_t trunk_version = some_trunk_version(input);
  const bool are_live = are_all_in(plain.trajectory_range(), ids);
  std::size_t num_bytes = 0;
  if (are_live) {
    for (const std::int64_t id : ids.span()) num_bytes += plain.feature_bytes_of(id);
  }
  Lengths length(input);
  const Block<std::byte> rows(length(num_bytes));
  std::uint32_t mixed = input.byte();  // one byte says all rows, and few of them are alike
  for (std::byte& byte : rows.span()) byte = static_cast<std::byte>((mixed += 2654435761U) >> 24);

  const bool is_possible = plain.options.feature_bytes > 0 && are_live && trunk_version >= 0 && length.are_right();
  require(goes_through([&] { bench.buffer->set_features(ids.span(), trunk_version, rows.span()); }) == is_possible);
  if (!is_possible) return;
  std::span<const std::byte> rest = rows.span();
  for (const std::int64_t id : ids.span()) {
    const std::size_t size = plain.feature_bytes_of(id);
    plain.set_features(id, trunk_version, rest.first(size));
    rest = rest.subspan(size);
  }
}

void read_features(Bench& bench) {
  FuzzInput& input = bench.input;
  const PlainBuffer& plain = bench.plain;
  const Block<std::int64_t> ids = some_ids(input, plain.turn_range());
  const std::int64_t trunk_version = some_trunk_version(input);
  const auto row_bytes = static_cast<std::size_t>(plain.options.feature_bytes);
  const std::size_t front = input.byte();
  const std::size_t next_bytes = front < 250 ? std::min(row_bytes, front) : row_bytes + front - 249;  // too much
  const int threads = input.once_in(16) ? some_threads(input) : 1;
  const std::size_t n = ids.span().size();
  Lengths length(input);
  const Block<std::byte> rows(length(n * row_bytes));
  const bool are_rows_right = length.are_right();
  const Block<std::byte> next_rows(length(n * next_bytes));
  const std::size_t got = next_rows.span().size();
  const bool is_next_right = n == 0 ? got == 0 : got % n == 0 && got / n <= row_bytes;

  bool is_possible =
      row_bytes > 0 && trunk_version >= 0 && are_rows_right && is_next_right && are_all_in(plain.turn_range(), ids);
  Bytes wanted, wanted_next;
  for (std::size_t i = 0; is_possible && i < n; ++i) {
    const PlainTurn turn = plain.turn(ids.span()[i]);
    const PlainFeatures& features = plain.features_of(turn.trajectory_id);
    is_possible = features.trunk_version == trunk_version;
    if (!is_possible) break;
    append(wanted, std::span(features.rows).subspan(turn.index * row_bytes, row_bytes));
    append(wanted_next, std::span(features.rows).subspan((turn.index + 1) * row_bytes, got / n));
  }
  require(goes_through([&] {
            bench.buffer->read_features(ids.span(), trunk_version, rows.span(), next_rows.span(), threads);
          }) == is_possible);
  require(!is_possible || (rows.holds(wanted) && next_rows.holds(wanted_next)));
}

void list_without(Bench& bench) {
  const PlainBuffer& plain = bench.plain;
  const std::int64_t trunk_version = some_trunk_version(bench.input);
  std::vector<std::int64_t> wanted, got;
  for (std::int64_t id = plain.trajectory_range().first; id < plain.trajectory_range().end; ++id) {
    if (plain.features_of(id).trunk_version != trunk_version) wanted.push_back(id);
  }
  const bool is_possible = plain.options.feature_bytes > 0 && trunk_version >= 0;
  require(goes_through([&] { got = bench.buffer->trajectories_without_features(trunk_version); }) == is_possible);
  require(!is_possible || got == wanted);
}

void read_stamp(Bench& bench) {
  FuzzInput& input = bench.input;
  const IdRange live = bench.plain.trajectory_range();
  const auto some_end = [&] {
    return input.once_in(8) ? input.edge<std::int64_t>() : live.first - 2 + static_cast<std::int64_t>(input.below(12));
  };
  const std::int64_t first = some_end();
  const IdRange asked{first, some_end()};
  std::uint64_t newest = 0;
  for (std::int64_t id = live.first; id < live.end; ++id) {
    if (asked.contains(id)) newest = std::max(newest, bench.plain.features_of(id).stamp);
  }
  require(bench.buffer->features_stamp(asked) == newest);
}

void copy_features(Bench& bench) {
  FuzzInput& input = bench.input;
  const PlainBuffer& plain = bench.plain;
  const IdRange live = plain.trajectory_range();
  const std::int64_t first =
      input.once_in(16) ? input.edge<std::int64_t>() : live.first - 1 + static_cast<std::int64_t>(input.below(4));
  const auto id_of = [&](std::size_t i) {  // past the live ones no sum is needed, or possible
    return first < live.end ? first + static_cast<std::int64_t>(i) : live.end;
  };
  std::vector<std::int64_t> turns(input.below(6));
  for (std::size_t i = 0; i < turns.size(); ++i) {
    turns[i] = input.once_in(16)         ? input.edge<std::int64_t>()
               : live.contains(id_of(i)) ? std::ssize(plain.game(id_of(i)).rewards)
                                         : 1 + static_cast<std::int64_t>(input.below(4));
  }
  const auto row_bytes = static_cast<std::size_t>(plain.options.feature_bytes);
  bool is_possible = row_bytes > 0;
  std::vector<std::int64_t> wanted_versions;
  Bytes wanted;
  for (std::size_t i = 0; is_possible && i < turns.size(); ++i) {
    // What would be right but does not fit into our memory is asked for with too little room, and so refused.
    constexpr std::size_t kMaxBytes = std::size_t{1} << 22;
    is_possible = turns[i] >= 1 && turns[i] <= std::numeric_limits<std::int32_t>::max() &&
                  (!live.contains(id_of(i)) || turns[i] == std::ssize(plain.game(id_of(i)).rewards)) &&
                  (static_cast<std::size_t>(turns[i]) + 1) * row_bytes <= kMaxBytes;
    if (!is_possible) break;
    wanted_versions.push_back(live.contains(id_of(i)) ? plain.features_of(id_of(i)).trunk_version
                                                      : FeatureStore::kNoVersion);
    if (wanted_versions.back() == FeatureStore::kNoVersion) {
      wanted.resize(wanted.size() + (static_cast<std::size_t>(turns[i]) + 1) * row_bytes);
    } else {
      append(wanted, plain.features_of(id_of(i)).rows);
    }
  }
  const Block<std::int64_t> num_turns(turns);
  Lengths length(input);
  const Block<std::int64_t> trunk_versions(length(turns.size()));
  const Block<std::byte> rows(length(wanted.size()));
  is_possible = is_possible && length.are_right();
  require(goes_through([&] {
            bench.buffer->copy_features(first, num_turns.span(), trunk_versions.span(), rows.span());
          }) == is_possible);
  require(!is_possible || (trunk_versions.holds(wanted_versions) && rows.holds(wanted)));
}

}  // namespace

void check_features(const TrajectoryBuffer& buffer, const PlainBuffer& plain) {
  if (plain.options.feature_bytes == 0) return;
  for (std::int64_t id = plain.trajectory_range().first; id < plain.trajectory_range().end; ++id) {
    const PlainFeatures& wanted = plain.features_of(id);
    const std::vector<std::int64_t> num_turns{std::ssize(plain.game(id).rewards)};
    const Block<std::int64_t> trunk_version(1);
    const Block<std::byte> rows(plain.feature_bytes_of(id));
    buffer.copy_features(id, num_turns, trunk_version.span(), rows.span());
    require(trunk_version.span()[0] == wanted.trunk_version);
    require(rows.holds(wanted.rows.empty() ? Bytes(rows.span().size()) : wanted.rows));
  }
}

void use_features(Bench& bench, std::size_t choice) {
  switch (choice % 7) {
    case 0:
    case 1:
      set_features(bench);
      break;
    case 2:
    case 3:
      read_features(bench);
      break;
    case 4:
      list_without(bench);
      break;
    case 5:
      read_stamp(bench);
      break;
    default:
      copy_features(bench);
      break;
  }
}

}  // namespace archer_fast::fuzzing
