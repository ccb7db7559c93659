// Any calls with any arguments: bad ones are refused with nothing changed, all others do what the headers say.
#include "operations.h"

using archer_fast::BufferOptions;
using archer_fast::FeatureMemory;
using archer_fast::TrajectoryBuffer;
using namespace archer_fast::fuzzing;

namespace {

constexpr std::int64_t kMaxRow = 1 << 15;  // many games fill a chunk of the store; more would take us long

BufferOptions some_options(FuzzInput& input) {
  constexpr std::int64_t kVocabularies[] = {0, 0, 50257, 65536, 65537, 300, 3, 1};
  constexpr std::int64_t kRows[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 8, 40, 264, kMaxRow};
  const std::uint8_t sizes = input.byte();
  return {.max_tokens = 2 + 8 * (sizes % 32),
          .max_trajectories = 1 + sizes / 32,
          .seed = input.byte(),
          .vocab_size = kVocabularies[input.below(8)],
          .gamma = static_cast<double>(input.byte()) / 255.0,
          .feature_bytes = kRows[input.below(16)]};
}

BufferOptions any_options(FuzzInput& input) {
  return {.max_tokens = input.edge<std::int64_t>(),
          .max_trajectories = input.edge<std::int64_t>(),
          .seed = input.edge<std::uint64_t>(),
          .vocab_size = input.edge<std::int64_t>(),
          .gamma = input.edge<double>(),
          .feature_bytes = input.edge<std::int64_t>()};
}

// Mostly all in RAM; a chunk takes 16 MB.
FeatureMemory some_memory(FuzzInput& input) {
  FeatureMemory memory;
  if (input.once_in(32)) memory.max_feature_memory = input.below(2) == 1 ? 20 << 20 : input.edge<std::int64_t>();
  return memory;
}

bool are_possible(const BufferOptions& options) {
  return options.max_tokens >= 2 && options.max_trajectories >= 1 && options.vocab_size >= 0 &&
         options.vocab_size <= std::int64_t{1} << 31 && options.gamma >= 0.0 && options.gamma <= 1.0 &&
         options.feature_bytes >= 0 && options.feature_bytes <= std::int64_t{1} << 30;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzInput input({data, size});
  const BufferOptions options = input.once_in(8) ? any_options(input) : some_options(input);
  Bench bench{input, nullptr, PlainBuffer(options)};
  const FeatureMemory memory = some_memory(input);
  const bool was_made = goes_through([&] { bench.buffer = std::make_unique<TrajectoryBuffer>(options, memory); });
  require(was_made == (are_possible(options) && memory.max_feature_memory >= 0));
  if (was_made && options.feature_bytes <= kMaxRow) operate(bench);
  return 0;
}
