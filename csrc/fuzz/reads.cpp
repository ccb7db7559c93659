// What is told of the buffer and of its turns.
#include <algorithm>
#include <map>

#include "operations.h"

namespace archer_fast::fuzzing {
namespace {

void read_owners(Bench& bench) {
  const Block<std::int64_t> ids = some_ids(bench.input, bench.plain.turn_range());
  Lengths length(bench.input);
  const Block<std::int64_t> owners(length(ids.span().size()));
  const bool is_possible = length.are_right() && are_all_in(bench.plain.turn_range(), ids);
  require(goes_through([&] { bench.buffer->trajectory_of(ids.span(), owners.span()); }) == is_possible);
  if (!is_possible) return;
  for (std::size_t i = 0; i < ids.span().size(); ++i) {
    require(owners.span()[i] == bench.plain.turn(ids.span()[i]).trajectory_id);
  }
}

void read_spans(Bench& bench) {
  const Block<std::int64_t> ids = some_ids(bench.input, bench.plain.trajectory_range());
  Lengths length(bench.input);
  const Block<std::int64_t> first_turns(length(ids.span().size()));
  const Block<std::int64_t> num_turns(length(ids.span().size()));
  const bool is_possible = length.are_right() && are_all_in(bench.plain.trajectory_range(), ids);
  require(goes_through([&] { bench.buffer->turn_span(ids.span(), first_turns.span(), num_turns.span()); }) ==
          is_possible);
  if (!is_possible) return;
  for (std::size_t i = 0; i < ids.span().size(); ++i) {
    require(first_turns.span()[i] == bench.plain.first_turn_of(ids.span()[i]));
    require(num_turns.span()[i] == std::ssize(bench.plain.game(ids.span()[i]).rewards));
  }
}

void read_records(Bench& bench) {
  const Block<std::int64_t> ids = some_ids(bench.input, bench.plain.turn_range());
  const std::size_t n = ids.span().size();
  Lengths length(bench.input);
  const Block<float> rewards(length(n));
  const Block<std::int32_t> turn(length(n));
  const Block<bool> is_last(length(n));
  const Block<bool> terminated(length(n));
  const Block<bool> truncated(length(n));
  const TurnColumns out{.rewards = rewards.span(),
                        .turn = turn.span(),
                        .is_last = is_last.span(),
                        .terminated = terminated.span(),
                        .truncated = truncated.span()};
  const bool is_possible = length.are_right() && are_all_in(bench.plain.turn_range(), ids);
  require(goes_through([&] { bench.buffer->turn_records(ids.span(), out); }) == is_possible);
  if (!is_possible) return;
  for (std::size_t i = 0; i < n; ++i) {
    const PlainTurn wanted = bench.plain.turn(ids.span()[i]);
    const PlainTrajectory& game = bench.plain.game(wanted.trajectory_id);
    require(out.rewards[i] == game.rewards[wanted.index]);
    require(out.turn[i] == static_cast<std::int32_t>(wanted.index));
    require(out.is_last[i] == wanted.is_last);
    require(out.terminated[i] == (wanted.is_last && game.terminated));
    require(out.truncated[i] == (wanted.is_last && game.truncated));
  }
}

void read_stats(Bench& bench) {
  const BufferStats stats = bench.buffer->stats();
  const PlainBuffer& plain = bench.plain;
  const IdRange live = plain.trajectory_range();
  std::map<std::int64_t, std::int64_t> by_age, by_version;
  for (std::int64_t id = live.first; id < live.end; ++id) {
    std::int64_t age = live.end - 1 - id, power = 1;
    while (2 * power <= age) power *= 2;
    by_age[std::min(age, power)] += std::ssize(plain.game(id).rewards);
    for (const std::int64_t version : plain.game(id).policy_versions) ++by_version[version];
  }
  require(std::map(stats.turns_by_age.begin(), stats.turns_by_age.end()) == by_age);
  require(std::map(stats.turns_by_version.begin(), stats.turns_by_version.end()) == by_version);
  require(stats.num_trajectories == live.size() && stats.num_evicted == live.first);
  require(stats.num_turns == plain.turn_range().size() && stats.num_tokens == bench.buffer->num_tokens());
  require(stats.num_bytes >= 0 && stats.num_bytes < std::int64_t{1} << 30);
}

void read_late_state(Bench& bench) {
  const IdRange live = bench.plain.trajectory_range();
  const std::int64_t id =
      bench.input.once_in(8) ? bench.input.edge<std::int64_t>() : live.first - 1 + bench.input.byte() % 8;
  BufferState state;
  const bool was_given = goes_through([&] { state = bench.buffer->snapshot(id).since; });
  require(was_given == (id <= live.end));
  if (was_given) require(are_same(state, bench.plain.state_since(id)));
}

}  // namespace

void read_something(Bench& bench, std::size_t choice) {
  switch (choice % 5) {
    case 0:
      read_owners(bench);
      break;
    case 1:
      read_spans(bench);
      break;
    case 2:
      read_records(bench);
      break;
    case 3:
      read_stats(bench);
      break;
    default:
      read_late_state(bench);
      break;
  }
}

}  // namespace archer_fast::fuzzing
