// Every allocation of a push fails once; the buffer is then what it was.
#include <doctest/doctest.h>

#include <memory>
#include <new>
#include <vector>

#include "example.h"
#include "failing_new.h"
#include "trajectory_buffer.h"

using archer_fast::BufferState;
using archer_fast::TrajectoryBuffer;
using archer_fast::testing::Example;
using archer_fast::testing::FailingNew;

namespace {

void check_same(const BufferState& got, const BufferState& wanted) {
  CHECK(got.counter == wanted.counter);
  CHECK(got.first_trajectory_id == wanted.first_trajectory_id);
  CHECK(got.first_turn_id == wanted.first_turn_id);
  CHECK(got.tokens == wanted.tokens);
  CHECK(got.rollout_logprobs == wanted.rollout_logprobs);
  CHECK(got.policy_versions == wanted.policy_versions);
  CHECK(got.priorities == wanted.priorities);
  CHECK(got.num_turns == wanted.num_turns);
}

// A buffer whose next push must grow everything that it can grow: a full ring whose oldest trajectory stays.
std::unique_ptr<TrajectoryBuffer> filled(int pushes, bool is_prioritised) {
  auto buffer = std::make_unique<TrajectoryBuffer>(archer_fast::BufferOptions{1 << 20, 1 << 16});
  Example example;
  for (int i = 0; i < pushes; ++i) {
    example.policy_versions = {i, i + 1};
    buffer->push(example.view());
  }
  if (is_prioritised && pushes > 0) {
    const std::vector<std::int64_t> ids{0};
    const std::vector<double> priorities{2.0};
    buffer->update_priorities(ids, priorities);
  }
  return buffer;
}

}  // namespace

TEST_CASE("a push that finds no memory changes nothing, whichever allocation fails") {
  Example example;
  example.policy_versions = {1000, 1001};  // versions nobody has had
  int failures = 0;
  for (const bool is_prioritised : {false, true}) {
    for (const int pushes : {0, 1, 7, 8, 31, 32, 127, 128}) {
      for (int countdown = 0;; ++countdown) {
        const auto buffer = filled(pushes, is_prioritised);
        const BufferState before = buffer->state();
        bool has_failed = false;
        try {
          const FailingNew scarce(countdown);
          buffer->push(example.view());
        } catch (const std::bad_alloc&) {
          has_failed = true;
        }
        if (!has_failed) break;
        ++failures;
        check_same(buffer->state(), before);
        CHECK(buffer->stats().turns_by_version.size() == static_cast<std::size_t>(pushes == 0 ? 0 : pushes + 1));
        CHECK(buffer->push(example.view()) == pushes);  // and it goes on
        std::vector<std::int64_t> owner(1);
        buffer->trajectory_of(std::vector<std::int64_t>{2 * pushes + 1}, owner);
        CHECK(owner[0] == pushes);
      }
    }
  }
  CHECK(failures > 30);
}

TEST_CASE("a batch that finds no memory keeps those before it, whole") {
  const auto source = filled(5, false);
  const BufferState batch = source->state();
  for (int countdown = 0;; ++countdown) {
    const auto buffer = filled(3, false);
    bool has_failed = false;
    try {
      const FailingNew scarce(countdown);
      buffer->extend(batch.columns());
    } catch (const std::bad_alloc&) {
      has_failed = true;
    }
    const BufferState after = buffer->state();
    CHECK(buffer->num_tokens() == 9 * buffer->num_trajectories());
    CHECK(after.tokens.size() == static_cast<std::size_t>(buffer->num_tokens()));
    CHECK_NOTHROW(TrajectoryBuffer::restore(after));
    if (!has_failed) break;
  }
}
