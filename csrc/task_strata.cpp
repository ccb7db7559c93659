#include "task_strata.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

#include "concat.h"

namespace archer_fast {

void TaskStrata::add(std::int32_t task_id, IdRange ids) {
  Stratum& to = strata_[task_id];
  const bool goes_on = !to.runs.empty() && to.runs.back().first_id + to.size - to.runs.back().first_index == ids.first;
  if (!goes_on) to.runs.push_back({.first_id = ids.first, .first_index = to.size});
  to.size += ids.size();
  size_ += ids.size();
}

std::size_t TaskStrata::num_bytes() const noexcept {
  std::size_t bytes = 0;
  for (const auto& [task_id, stratum] : strata_) bytes += sizeof(Stratum) + stratum.runs.capacity() * sizeof(Run);
  return bytes;
}

std::int64_t TaskStrata::Stratum::id_at(std::int64_t index) const noexcept {
  assert(0 <= index && index < size);
  const auto after = std::upper_bound(runs.begin(), runs.end(), index,
                                      [](std::int64_t wanted, const Run& run) { return wanted < run.first_index; });
  const Run& run = *(after - 1);
  return run.first_id + (index - run.first_index);
}

// Ids to draw of each task.
std::vector<std::int64_t> TaskStrata::shares(UniformSampler& sampler, bool replacement, std::int64_t n) const {
  const auto num_strata = static_cast<std::int64_t>(strata_.size());
  const std::int64_t share = n / num_strata;
  std::vector<std::size_t> may_give_more;
  std::size_t place = 0;
  for (const auto& [task_id, stratum] : strata_) {
    if (!replacement && stratum.size < share) {
      throw std::invalid_argument(concat("n: wanted at most ", stratum.size, " distinct ids of task ", task_id,
                                         ", got ", share, " as its share of ", n));
    }
    if (replacement || stratum.size > share) may_give_more.push_back(place);
    ++place;
  }
  const std::int64_t remainder = n - share * num_strata;
  if (std::ssize(may_give_more) < remainder) {
    throw std::invalid_argument(concat("n: wanted at most ", share * num_strata + std::ssize(may_give_more),
                                       " distinct ids in equal shares of ", num_strata, " tasks, got ", n));
  }
  std::vector<std::int64_t> shares(strata_.size(), share);
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(remainder));
  sampler.draw_distinct({0, std::ssize(may_give_more)}, chosen);
  for (const std::int64_t i : chosen) ++shares[may_give_more[static_cast<std::size_t>(i)]];
  return shares;
}

void TaskStrata::draw(UniformSampler& sampler, bool replacement, std::span<std::int64_t> out) const {
  if (out.empty()) return;
  if (size_ == 0) throw std::invalid_argument(concat("n: wanted 0 draws from an empty buffer, got ", out.size()));
  if (!replacement && std::ssize(out) > size_) {
    throw std::invalid_argument(
        concat("n: wanted at most ", size_, " distinct ids, as many as there are to choose from, got ", out.size()));
  }
  const std::vector<std::int64_t> counts = shares(sampler, replacement, std::ssize(out));
  auto count = counts.begin();
  for (const auto& [task_id, stratum] : strata_) {
    const auto part = out.first(static_cast<std::size_t>(*count++));
    out = out.subspan(part.size());
    const IdRange indices{0, stratum.size};
    replacement ? sampler.draw(indices, part) : sampler.draw_distinct(indices, part);
    for (std::int64_t& id : part) id = stratum.id_at(id);
  }
}

}  // namespace archer_fast
