#include "sum_tree.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <limits>

namespace archer_fast {
namespace {

constexpr std::size_t kFirstLeafNodes = 8;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

std::vector<SumTree::Level> SumTree::make_levels(std::size_t num_leaf_nodes) {
  std::vector<Level> levels(1);
  levels.back().sums.resize(num_leaf_nodes);
  // m nodes in a row have at most (m + 6) / 8 + 1 parents, and two nodes may have two for ever.
  for (std::size_t num_live = num_leaf_nodes; num_live > 2;) {
    num_live = (num_live + kFanOut - 2) / kFanOut + 1;
    Node nothing;
    nothing.children.fill(kInfinity);
    Level level;
    level.sums.resize(std::bit_ceil(num_live));
    level.mins.resize(level.sums.size(), nothing);
    levels.push_back(std::move(level));
  }
  return levels;
}

SumTree::SumTree(std::int64_t first_id) : ids_{first_id, first_id}, levels_(make_levels(kFirstLeafNodes)) {
  assert(first_id >= 0);
}

std::size_t SumTree::num_bytes() const noexcept {
  std::size_t num_nodes = 0;
  for (const Level& level : levels_) num_nodes += level.sums.size() + level.mins.size();
  return num_nodes * sizeof(Node);
}

double SumTree::sum_of(std::size_t level, std::int64_t node) const noexcept {
  const Level& from = levels_[level];
  double sum = 0.0;
  for (const double child : from.sums[from.slot(node)].children) sum += child;
  return sum;
}

double SumTree::weight(std::int64_t id) const noexcept {
  assert(ids_.contains(id));
  const Level& leaves = levels_.front();
  return leaves.sums[leaves.slot(id >> kFanOutBits)].children[child_of(id)];
}

SumTree::Top SumTree::top() const noexcept {
  const int shift = kFanOutBits * static_cast<int>(levels_.size());
  return {.level = levels_.size() - 1, .first = ids_.first >> shift, .last = (ids_.end - 1) >> shift};
}

double SumTree::total() const noexcept {
  if (ids_.size() == 0) return 0.0;
  const Top top = this->top();
  const double first = sum_of(top.level, top.first);
  return top.first == top.last ? first : first + sum_of(top.level, top.last);
}

double SumTree::min_of(std::size_t level, std::int64_t node) const noexcept {
  const Level& from = levels_[level];
  double smallest = kInfinity;
  if (level > 0) {
    for (const double child : from.mins[from.slot(node)].children) smallest = std::min(smallest, child);
  } else {
    for (const double weight : from.sums[from.slot(node)].children) {
      smallest = std::min(smallest, weight > 0.0 ? weight : kInfinity);
    }
  }
  return smallest;
}

double SumTree::min_positive() const noexcept {
  if (ids_.size() == 0) return kInfinity;
  const Top top = this->top();
  return std::min(min_of(top.level, top.first), min_of(top.level, top.last));
}

void SumTree::refresh(std::size_t level, std::int64_t node) noexcept {
  Level& parents = levels_[level + 1];
  const std::size_t parent = parents.slot(node >> kFanOutBits);
  const std::size_t child = child_of(node);
  parents.sums[parent].children[child] = sum_of(level, node);
  parents.mins[parent].children[child] = min_of(level, node);
}

void SumTree::refresh_all(IdRange ids) noexcept {
  if (ids.size() == 0) return;
  std::int64_t first = ids.first, last = ids.end - 1;
  for (std::size_t level = 0; level + 1 < levels_.size(); ++level) {
    first >>= kFanOutBits;
    last >>= kFanOutBits;
    for (std::int64_t node = first; node <= last; ++node) refresh(level, node);
  }
}

void SumTree::fill(IdRange ids, double weight) noexcept {
  Level& leaves = levels_.front();
  for (std::int64_t id = ids.first; id < ids.end; ++id) {
    leaves.sums[leaves.slot(id >> kFanOutBits)].children[child_of(id)] = weight;
  }
  refresh_all(ids);
}

void SumTree::reserve(std::int64_t count) {
  const std::int64_t first = ids_.first >> kFanOutBits;
  const auto wanted = static_cast<std::size_t>(((ids_.end + count - 1) >> kFanOutBits) - first + 1);
  const Level& old = levels_.front();
  if (wanted <= old.sums.size()) return;
  std::vector<Level> levels = make_levels(std::bit_ceil(wanted));
  Level& leaves = levels.front();
  for (std::int64_t node = first; node <= (ids_.end - 1) >> kFanOutBits; ++node) {
    leaves.sums[leaves.slot(node)] = old.sums[old.slot(node)];
  }
  levels_ = std::move(levels);
  refresh_all(ids_);
}

void SumTree::push_back(std::int64_t count, double weight) noexcept {
  assert(weight >= 0.0 && weight <= kMaxWeight);
  const IdRange added{ids_.end, ids_.end + count};
  ids_.end = added.end;
  fill(added, weight);
}

void SumTree::pop_front(std::int64_t count) noexcept {
  assert(count <= ids_.size());
  const IdRange dead{ids_.first, ids_.first + count};
  fill(dead, 0.0);
  ids_.first = dead.end;
}

void SumTree::set(std::span<const std::int64_t> ids, std::span<const double> weights) noexcept {
  assert(ids.size() == weights.size());
  Level& leaves = levels_.front();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    assert(ids_.contains(ids[i]) && weights[i] >= 0.0 && weights[i] <= kMaxWeight);
    leaves.sums[leaves.slot(ids[i] >> kFanOutBits)].children[child_of(ids[i])] = weights[i];
  }
  for (std::size_t level = 0; level + 1 < levels_.size(); ++level) {
    const int shift = kFanOutBits * (static_cast<int>(level) + 1);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const bool again = i + 1 < ids.size() && ids[i + 1] >> shift == ids[i] >> shift;
      if (!again) refresh(level, ids[i] >> shift);  // once for a row of ids under one node
    }
  }
}

// The child of `node` at `mass`, which becomes the mass inside that child.
std::size_t SumTree::descend(const Node& node, double& mass) noexcept {
  // No branch: where a search goes cannot be predicted. A child of weight 0 ends where it begins, so it
  // is never where the counting stops.
  double end = 0.0, begin = 0.0;
  std::size_t child = 0;
  for (const double weight : node.children) {
    end += weight;
    const bool beyond = mass >= end;
    child += beyond ? 1 : 0;
    begin = beyond ? end : begin;
  }
  if (child < kFanOut) {
    mass -= begin;
    return child;
  }
  // Rounding carried it past the end: the last child that has a weight, at its very end.
  do {
    --child;
  } while (child > 0 && !(node.children[child] > 0.0));
  mass = node.children[child];
  return child;
}

void SumTree::find(std::span<double> masses, std::span<std::int64_t> ids) const noexcept {
  assert(total() > 0.0 && ids.size() == masses.size());
  const Top top = this->top();
  const double first_sum = sum_of(top.level, top.first);
  const double last_sum = top.first == top.last ? 0.0 : sum_of(top.level, top.last);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const bool in_last = last_sum > 0.0 && masses[i] >= first_sum;
    ids[i] = in_last ? top.last : top.first;
    if (in_last) masses[i] -= first_sum;
  }
  for (std::size_t level = top.level + 1; level-- > 0;) {
    const Level& nodes = levels_[level];
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::size_t child = descend(nodes.sums[nodes.slot(ids[i])], masses[i]);
      ids[i] = ids[i] * kFanOut + static_cast<std::int64_t>(child);
      if (level > 0) __builtin_prefetch(&levels_[level - 1].sums[levels_[level - 1].slot(ids[i])]);
    }
  }
}

}  // namespace archer_fast
