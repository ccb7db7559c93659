#include "uniform_sampler.h"

#include <cfloat>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "concat.h"

namespace archer_fast {

// What draw_slices promises of other machines.
static_assert(std::numeric_limits<double>::is_iec559 && FLT_EVAL_METHOD == 0);

void UniformSampler::draw(IdRange range, std::span<std::int64_t> out) {
  if (out.empty()) return;
  if (range.size() <= 0) {
    throw std::invalid_argument(concat("n: wanted 0 draws from an empty buffer, got ", out.size()));
  }
  const auto size = static_cast<std::uint64_t>(range.size());
  for (std::int64_t& id : out) id = range.first + static_cast<std::int64_t>(rng_.below(size));
}

void UniformSampler::draw_distinct(IdRange range, std::span<std::int64_t> out) {
  const auto size = static_cast<std::uint64_t>(range.size());
  if (out.size() > size) {
    throw std::invalid_argument(
        concat("n: wanted at most ", size, " distinct ids, as many as are live, got ", out.size()));
  }
  // Fisher-Yates over 0 .. size - 1 that stores only the places it touched.
  std::unordered_map<std::uint64_t, std::uint64_t> moved;
  moved.reserve(out.size());
  const auto value_at = [&moved](std::uint64_t place) {
    const auto found = moved.find(place);
    return found == moved.end() ? place : found->second;
  };
  for (std::uint64_t i = 0; i < out.size(); ++i) {
    const std::uint64_t j = i + rng_.below(size - i);
    out[i] = range.first + static_cast<std::int64_t>(value_at(j));
    moved[j] = value_at(i);
  }
}

void UniformSampler::draw_slices(double total, std::span<double> out) noexcept {
  const auto num_slices = static_cast<double>(out.size());
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double unit = static_cast<double>(rng_.next() >> 11U) * 0x1p-53;  // [0, 1)
    out[i] = (static_cast<double>(i) + unit) / num_slices * total;
  }
}

}  // namespace archer_fast
