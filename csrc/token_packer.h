// Which sequences share a forward pass: lengths into bins under a token budget, the bins' attention cost balanced.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace archer_fast {

// n items in k bins: bin j holds item_ids[cu_bins[j] .. cu_bins[j + 1]), ascending, at least one.
//
// Rank r of num_ranks takes bins r * k / num_ranks up to (r + 1) * k / num_ranks. Inside a rank the dearest bin comes
// first (what does not fit into memory fails at once); of two equally dear ones, that of the smaller first item.
struct TokenPlan {
  std::vector<std::int64_t> item_ids;  // [n], each of 0 .. n - 1 once
  std::vector<std::int64_t> cu_bins;   // [k + 1], 0 ... n
};

// A bin's cost is the sum of its items' squared lengths: what attention spends on it.
//
// Longest first, each item goes to the cheapest bin that it fits into. The number of bins is the least that the tokens
// and the long items need. Where that many overflow, the shortest items, 5 a bin, then 14, then 28, are taken out and
// each bin is filled up on its own: the longest that fits, then c-th parts of the room left for c items, so that the
// last ends it. Where none of it helps, the number of bins is what first-fit decreasing needs, with the same attempts,
// then the shortest half or seven eighths of all items placed by fit (into the fullest bin with room), and first-fit
// decreasing itself as the last resort: never more bins than that. `num_ranks` rounds the number of bins up to a
// multiple of itself; the ranks' costs are balanced, dearest bin first. No lengths: no bins.
//
// No item is split and no bin holds more than max_tokens. The same lengths give the same plan on every machine.
//
// Throws std::invalid_argument that names the argument where max_tokens is not 1 .. 2^31 - 1 (a pass has int32
// offsets), a length is not 1 .. max_tokens, num_ranks is below 1, or there are too few lengths for num_ranks times as
// many bins, none empty.
//
// Owner: the caller of the lengths; the plan is the caller's too. Threads: any. O(n log k) time, O(n) memory.
TokenPlan pack_tokens(std::span<const std::int64_t> lengths, std::int64_t max_tokens, std::int64_t num_ranks = 1);

}  // namespace archer_fast
