// What a TrajectoryBuffer is made with.
#pragma once

#include <cstdint>
#include <string>

namespace archer_fast {

struct BufferOptions {
  std::int64_t max_tokens = 0;        // of all trajectories; at least 2, the shortest trajectory
  std::int64_t max_trajectories = 0;  // at least 1
  std::uint64_t seed = 0;             // of the draws
  std::int64_t vocab_size = 0;        // ids are below it; 0: not known. Up to 65536 ids take two bytes instead of four
  double gamma = 1.0;                 // discount of Monte-Carlo returns, 0 to 1
  std::int64_t feature_bytes = 0;     // of a row of features; 0: there are none

  // Throws std::invalid_argument that names the field, what was wanted and what came.
  void check() const;
};

// Where features lie, which is the machine's matter and not the contents': see feature_store.h.
struct FeatureMemory {
  std::int64_t max_feature_memory = std::int64_t{4} << 30;  // bytes in RAM, 0 or more; beyond it they lie in files
  std::string feature_folder = "/tmp";                      // of these

  void check() const;  // as above
};

}  // namespace archer_fast
