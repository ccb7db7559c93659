// Ids by task, and draws of equal numbers from each task.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "id_range.h"
#include "uniform_sampler.h"

namespace archer_fast {

// Owner: holds 16 bytes for every run of consecutive ids of one task. Threads: none of its own rules.
class TaskStrata {
 public:
  // O(log K) of K tasks. Precondition: the ids are above all that the task already has.
  void add(std::int32_t task_id, IdRange ids);

  std::int64_t size() const noexcept { return size_; }  // ids in all
  std::size_t num_bytes() const noexcept;

  // Fills `out` task by task in ascending order: n / K ids of each of the K tasks, and one more of n % K tasks
  // that the generator chooses (where ids are distinct: among the tasks that have more than n / K). Uniform
  // within a task, with replacement or distinct. O(n log r + K) of r runs. With one task of one run the draws
  // are those of the UniformSampler. Throws std::invalid_argument where there are too few ids, in all or of a
  // task, and nothing is drawn then.
  void draw(UniformSampler& sampler, bool replacement, std::span<std::int64_t> out) const;

 private:
  struct Run {
    std::int64_t first_id;
    std::int64_t first_index;  // among the ids of the stratum
  };

  struct Stratum {
    std::vector<Run> runs;
    std::int64_t size = 0;

    std::int64_t id_at(std::int64_t index) const noexcept;
  };

  std::vector<std::int64_t> shares(UniformSampler& sampler, bool replacement, std::int64_t n) const;

  std::map<std::int32_t, Stratum> strata_;
  std::int64_t size_ = 0;
};

}  // namespace archer_fast
