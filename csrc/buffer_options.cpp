#include "buffer_options.h"

#include <limits>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {
namespace {

void at_least(const char* name, std::int64_t value, std::int64_t wanted) {
  if (value < wanted) throw std::invalid_argument(concat(name, ": wanted at least ", wanted, ", got ", value));
}

}  // namespace

void BufferOptions::check() const {
  at_least("max_tokens", max_tokens, 2);
  at_least("max_trajectories", max_trajectories, 1);
  constexpr std::int64_t kMaxVocabulary = std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1;
  if (vocab_size < 0 || vocab_size > kMaxVocabulary) {
    throw std::invalid_argument(
        concat("vocab_size: wanted 1 to ", kMaxVocabulary, ", or 0 for unknown, got ", vocab_size));
  }
  if (!(gamma >= 0.0 && gamma <= 1.0)) throw std::invalid_argument(concat("gamma: wanted 0 to 1, got ", gamma));
  constexpr std::int64_t kMaxRow = std::int64_t{1} << 30;  // one more than a trajectory's turns of these fit into int64
  if (feature_bytes < 0 || feature_bytes > kMaxRow) {
    throw std::invalid_argument(concat("feature_bytes: wanted 0 to ", kMaxRow, ", got ", feature_bytes));
  }
}

void FeatureMemory::check() const { at_least("max_feature_memory", max_feature_memory, 0); }

}  // namespace archer_fast
