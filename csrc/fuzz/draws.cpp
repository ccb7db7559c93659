// Draws, and the priorities that some of them follow.
#include <algorithm>
#include <map>
#include <set>

#include "operations.h"

namespace archer_fast::fuzzing {
namespace {

using Ids = std::vector<std::int64_t>;

bool are_distinct(std::span<const std::int64_t> ids) { return std::set(ids.begin(), ids.end()).size() == ids.size(); }

// As many of each task, or one more.
bool are_shared_out(std::span<const std::int64_t> tasks, std::span<const std::int64_t> drawn) {
  std::map<std::int64_t, std::size_t> counts;
  for (const std::int64_t task : tasks) counts[task] = 0;
  for (const std::int64_t task : drawn) ++counts[task];
  return std::all_of(counts.begin(), counts.end(), [&](const auto& count) {
    const std::size_t share = drawn.size() / counts.size();
    return count.second == share || count.second == share + 1;
  });
}

// After a draw: nothing was drawn where it was refused.
void take_counter(Bench& bench, bool was_drawn) {
  const std::uint64_t counter = bench.buffer->snapshot(bench.plain.trajectory_range().end).since.counter;
  require(was_drawn || counter == bench.plain.counter);
  bench.plain.counter = counter;
}

void draw_turns(Bench& bench) {
  FuzzInput& input = bench.input;
  const std::uint8_t flags = input.byte();
  const TurnQuery query{.replacement = flags % 2 == 0,
                        .min_policy_version = flags % 4 < 2   ? TurnQuery::kAnyVersion
                                              : flags % 8 < 4 ? input.bits<std::int8_t>()
                                                              : input.edge<std::int64_t>(),
                        .by_task = flags >= 128};
  const Block<std::int64_t> drawn(input.below(20));
  const Ids allowed = bench.plain.turns_since(query.min_policy_version);
  const Ids tasks = bench.plain.tasks_of_turns(allowed);

  const bool was_drawn = goes_through([&] { bench.buffer->sample_turns(drawn.span(), query); });
  require(was_drawn == bench.plain.can_draw(tasks, drawn.span().size(), query.replacement, query.by_task));
  take_counter(bench, was_drawn);
  if (!was_drawn || drawn.span().empty()) return;
  for (const std::int64_t id : drawn.span()) require(std::binary_search(allowed.begin(), allowed.end(), id));
  require(query.replacement || are_distinct(drawn.span()));
  require(!query.by_task || are_shared_out(tasks, bench.plain.tasks_of_turns(drawn.span())));
}

void draw_trajectories(Bench& bench) {
  const bool by_task = bench.input.below(2) == 1;
  const Block<std::int64_t> drawn(bench.input.below(12));
  Ids tasks;
  for (const PlainTrajectory& game : bench.plain.games) tasks.push_back(game.task_id);

  const bool was_drawn = goes_through([&] { bench.buffer->sample_trajectories(drawn.span(), by_task); });
  require(was_drawn == bench.plain.can_draw(tasks, drawn.span().size(), false, by_task));
  take_counter(bench, was_drawn);
  if (!was_drawn) return;
  require(are_all_in(bench.plain.trajectory_range(), drawn) && are_distinct(drawn.span()));
  Ids drawn_tasks;
  for (const std::int64_t id : drawn.span()) drawn_tasks.push_back(bench.plain.game(id).task_id);
  require(!by_task || are_shared_out(tasks, drawn_tasks));
}

void draw_prioritised(Bench& bench) {
  FuzzInput& input = bench.input;
  const double beta = input.once_in(8) ? input.edge<double>() : static_cast<double>(input.byte()) / 255.0;
  Lengths length(input);
  const Block<std::int64_t> drawn(length(input.below(20)));
  const Block<float> weights(length(drawn.span().size()));
  const auto& priorities = bench.plain.priorities;
  const bool can_be_drawn = std::any_of(priorities.begin(), priorities.end(), [](double p) { return p > 0.0; });

  const bool was_drawn = goes_through([&] { bench.buffer->sample_prioritised(beta, drawn.span(), weights.span()); });
  require(was_drawn == (drawn.span().size() == weights.span().size() && beta >= 0.0 && beta <= 1.0 &&
                        (can_be_drawn || drawn.span().empty())));
  take_counter(bench, was_drawn);
  if (!was_drawn) return;
  const IdRange live = bench.plain.turn_range();
  require(are_all_in(live, drawn) && std::is_sorted(drawn.span().begin(), drawn.span().end()));
  for (std::size_t i = 0; i < drawn.span().size(); ++i) {
    require(priorities[static_cast<std::size_t>(drawn.span()[i] - live.first)] > 0.0);
    require(weights.span()[i] >= 0.0F && weights.span()[i] <= 1.0F);
  }
}

void update_priorities(Bench& bench) {
  FuzzInput& input = bench.input;
  PlainBuffer& plain = bench.plain;
  const IdRange live = plain.turn_range();
  const std::int64_t evicted = std::min<std::int64_t>(live.first, 5);
  const Block<std::int64_t> ids = some_ids(input, {live.first - evicted, live.end});
  Lengths length(input);
  const Block<double> priorities(length(ids.span().size()));
  for (double& priority : priorities.span()) {
    priority = input.once_in(8) ? input.edge<double>() : static_cast<double>(input.byte()) / 16.0;
  }
  const bool are_possible = std::all_of(priorities.span().begin(), priorities.span().end(),
                                        [](double p) { return p >= 0.0 && p <= TurnPriorities::kMax; });

  std::int64_t num_stale = -1;
  const bool was_done =
      goes_through([&] { num_stale = bench.buffer->update_priorities(ids.span(), priorities.span()); });
  require(was_done == (length.are_right() && are_possible && are_all_in({0, live.end}, ids)));
  if (!was_done) return;
  for (std::size_t i = 0; i < ids.span().size(); ++i) {
    const std::int64_t id = ids.span()[i];
    if (!live.contains(id)) continue;
    plain.priorities[static_cast<std::size_t>(id - live.first)] = priorities.span()[i];
    plain.max_priority = std::max(plain.max_priority, priorities.span()[i]);
  }
  require(num_stale ==
          std::count_if(ids.span().begin(), ids.span().end(), [&](auto id) { return !live.contains(id); }));
}

}  // namespace

void draw_something(Bench& bench, std::size_t choice) {
  switch (choice % 4) {
    case 0:
      draw_turns(bench);
      break;
    case 1:
      draw_trajectories(bench);
      break;
    case 2:
      draw_prioritised(bench);
      break;
    default:
      update_priorities(bench);
      break;
  }
}

}  // namespace archer_fast::fuzzing
