// What can be done to a trajectory buffer, each with arguments that a fuzzer chose, and each compared with what a plain
// buffer makes of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "block.h"
#include "fuzz_input.h"
#include "plain_buffer.h"
#include "require.h"
#include "trajectory_buffer.h"

namespace archer_fast::fuzzing {

// The two that are compared, and whence the arguments come.
struct Bench {
  FuzzInput& input;
  std::unique_ptr<TrajectoryBuffer> buffer;
  PlainBuffer plain;
};

// Goes on until the input is used up, 64 operations at most.
void operate(Bench& bench);

// The groups of operations; `choice` is any number.
void push_something(Bench& bench, std::size_t choice);
void draw_something(Bench& bench, std::size_t choice);
void read_something(Bench& bench, std::size_t choice);
void use_features(Bench& bench, std::size_t choice);
void check_features(const TrajectoryBuffer& buffer, const PlainBuffer& plain);  // the two hold the same rows
void collate_trajectories(Bench& bench);
void collate_transitions(Bench& bench);

// Between the plan of a batch and its copy: a push, now and then.
void evict_some(Bench& bench);

// Mostly ids of the range, up to 7 of them, in memory of just that size.
Block<std::int64_t> some_ids(FuzzInput& input, IdRange live);
// A number of threads, which may be no use.
int some_threads(FuzzInput& input);

bool are_all_in(IdRange range, const Block<std::int64_t>& ids);

// Lengths of destinations: those wanted, but where the input says so for one of them.
class Lengths {
 public:
  explicit Lengths(FuzzInput& input);

  std::size_t operator()(std::size_t wanted);
  bool are_right() const noexcept { return are_right_; }

 private:
  std::size_t until_wrong_;  // how many come before it
  std::size_t wrong_;        // what it is then
  bool are_right_ = true;
};

}  // namespace archer_fast::fuzzing
