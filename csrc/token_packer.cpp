#include "token_packer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <limits>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <utility>

#include "concat.h"

namespace archer_fast {
namespace {

using Size = std::int64_t;
constexpr Size kNone = -1;

template <class T>
T& at(std::vector<T>& values, Size index) noexcept {
  return values[static_cast<std::size_t>(index)];
}

template <class T>
const T& at(const std::vector<T>& values, Size index) noexcept {
  return values[static_cast<std::size_t>(index)];
}

template <class T>
std::vector<T> filled(Size size, T value) {
  return std::vector<T>(static_cast<std::size_t>(size), value);
}

struct Item {
  Size length;
  Size id;
};

// Longest first, of equals the smaller id: a radix sort of what is missing to the longest.
std::vector<Item> longest_first(std::span<const Size> lengths) {
  const auto [least, most] = std::minmax_element(lengths.begin(), lengths.end());
  constexpr int kDigitBits = 11;
  const auto bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(*most - *least)));
  std::vector<Item> items(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) items[i] = {lengths[i], static_cast<Size>(i)};
  std::vector<Item> other(bits > 0 ? items.size() : 0);
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    const auto digit = [=, longest = *most](const Item& item) {
      return static_cast<std::size_t>((longest - item.length) >> shift) & ((1U << kDigitBits) - 1);
    };
    std::array<std::size_t, 1U << kDigitBits> next{};  // counts, then where the digit's next item goes
    for (const Item& item : items) ++next[digit(item)];
    std::size_t begin = 0;
    for (std::size_t& place : next) begin += std::exchange(place, begin);
    for (const Item& item : items) other[next[digit(item)]++] = item;
    items.swap(other);
  }
  return items;
}

// The bin of the least cost, of equals the first: a tournament whose every node carries its winner.
class CheapestBin {
 public:
  static constexpr Size kClosed = std::numeric_limits<Size>::max();

  explicit CheapestBin(Size num_bins)
      : first_leaf_(std::bit_ceil(static_cast<std::size_t>(num_bins))), nodes_(2 * first_leaf_, Node{kClosed, 0}) {
    for (Size bin = num_bins - 1; bin >= 0; --bin) set_cost(bin, 0);
  }

  Size cost() const noexcept { return nodes_[1].cost; }
  Size bin() const noexcept { return nodes_[1].bin; }

  void set_cost(Size bin, Size cost) noexcept {
    std::size_t node = first_leaf_ + static_cast<std::size_t>(bin);
    Node winner{cost, bin};
    for (nodes_[node] = winner; node > 1; nodes_[node] = winner) {
      const Node other = nodes_[node ^ 1];
      // Without a branch: which of the two wins is as good as random.
      const bool is_other = (other.cost < winner.cost) | ((other.cost == winner.cost) & (other.bin < winner.bin));
      winner = {is_other ? other.cost : winner.cost, is_other ? other.bin : winner.bin};
      node /= 2;
    }
  }

 private:
  struct Node {
    Size cost;
    Size bin;
  };

  std::size_t first_leaf_;
  std::vector<Node> nodes_;
};

// The first of some bins with enough room: every node carries the most room below it.
class FirstFit {
 public:
  explicit FirstFit(std::span<const Size> rooms) : first_leaf_(std::bit_ceil(rooms.size())), most_(2 * first_leaf_) {
    std::copy(rooms.begin(), rooms.end(), most_.begin() + static_cast<std::ptrdiff_t>(first_leaf_));
    for (std::size_t node = first_leaf_ - 1; node > 0; --node) {
      most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
    }
  }

  // Takes `length` >= 1 of the first place with that much room; kNone where there is none.
  Size take(Size length) noexcept {
    if (most_[1] < length) return kNone;
    std::size_t node = 1;
    while (node < first_leaf_) node = 2 * node + (most_[2 * node] < length ? 1 : 0);
    const auto place = static_cast<Size>(node - first_leaf_);
    Size most = most_[node] - length;
    for (most_[node] = most; node > 1; most_[node] = most) {
      most = std::max(most, most_[node ^ 1]);
      node /= 2;
    }
    return place;
  }

 private:
  std::size_t first_leaf_;
  std::vector<Size> most_;
};

// Some items that lie in no bin yet.
class Stock {
 public:
  // Of items, longest first, those from `first` on.
  Stock(const std::vector<Item>& items, Size first)
      : items_(items),
        first_(first),
        num_items_(static_cast<Size>(items.size()) - first),
        next_(filled(num_items_ + 1, Size{0})) {
    std::iota(next_.begin(), next_.end(), Size{0});
    for (Size i = 0; i < num_items_; ++i) num_tokens_ += at(items, first + i).length;
    if (num_items_ > 0 && at(items, first).length < kTablePerItem * num_items_) tabulate();
  }

  bool empty() const noexcept { return num_items_ == 0; }

  // Takes the longest item of at most `length`, kNone where there is none.
  Size take(Size length) {
    Size i = num_longer(length);
    while (at(next_, i) != i) i = at(next_, i) = at(next_, at(next_, i));
    if (i + 1 == static_cast<Size>(next_.size())) return kNone;
    at(next_, i) = i + 1;
    --num_items_;
    num_tokens_ -= at(items_, first_ + i).length;
    return first_ + i;
  }

  // Takes the longest item of at most a c-th of `room`, which c items of the mean length would fill; where all are
  // longer, of a part of fewer.
  Size take_part(Size room) {
    if (empty()) return kNone;
    for (Size parts = std::max<Size>(1, (room * num_items_ + num_tokens_ / 2) / num_tokens_);; --parts) {
      const Size i = take(room / parts);
      if (i != kNone || parts == 1) return i;
    }
  }

 private:
  static constexpr Size kTablePerItem = 4;  // a larger table would take longer to make than it saves

  void tabulate() {
    num_longer_ = filled(at(items_, first_).length, Size{0});
    Size length = std::ssize(num_longer_) - 1;
    for (Size i = 1; i < num_items_; ++i) {
      for (; length >= at(items_, first_ + i).length; --length) at(num_longer_, length) = i;
    }
    for (; length >= 0; --length) at(num_longer_, length) = num_items_;
  }

  // How many of the items that were there at first are longer than that.
  Size num_longer(Size length) const {
    if (!num_longer_.empty()) return length < std::ssize(num_longer_) ? at(num_longer_, length) : 0;
    const auto begin = items_.begin() + first_;
    return std::partition_point(begin, items_.end(), [=](const Item& item) { return item.length > length; }) - begin;
  }

  const std::vector<Item>& items_;
  Size first_;
  Size num_items_;
  Size num_tokens_ = 0;
  std::vector<Size>
      next_;  // by place behind first_: itself, or one nearer to the next that is there; one more: the end
  std::vector<Size> num_longer_;  // by length below the longest; empty where there would be too many
};

// Items, longest first, and the bin of each: bins[i] is that of items[i].
struct Placement {
  const std::vector<Item>& items;
  Size max_tokens;
  Size num_bins = 0;
  Size num_by_cost = 0;  // items [0, num_by_cost) lie where place_by_cost put them
  std::vector<Size> bins = filled(num_items(), kNone);

  Size num_items() const noexcept { return static_cast<Size>(items.size()); }

  // (room, bin) of every bin that holds its share of items [0, count), the least room first.
  std::vector<std::pair<Size, Size>> fullest_first(Size count) const {
    std::vector<std::pair<Size, Size>> found(static_cast<std::size_t>(num_bins));
    for (Size bin = 0; bin < num_bins; ++bin) at(found, bin) = {max_tokens, bin};
    for (Size i = 0; i < count; ++i) at(found, at(bins, i)).first -= at(items, i).length;
    std::sort(found.begin(), found.end());
    return found;
  }

  // Each item into the cheapest bin that it fits into; the number of items placed before one fitted nowhere.
  Size place_by_cost() {
    CheapestBin cheapest(num_bins);
    std::vector<Size> left = filled(num_bins, max_tokens), cost = filled(num_bins, Size{0});
    std::priority_queue<std::pair<Size, Size>> closed;  // (room, bin): items get shorter, so a bin may open again
    for (Size i = 0; i < num_items(); ++i) {
      const Size length = at(items, i).length;
      while (!closed.empty() && closed.top().first >= length) {
        const Size bin = closed.top().second;
        cheapest.set_cost(bin, at(cost, bin));
        closed.pop();
      }
      Size bin = cheapest.bin();
      while (at(left, bin) < length && cheapest.cost() != CheapestBin::kClosed) {
        closed.emplace(at(left, bin), bin);
        cheapest.set_cost(bin, CheapestBin::kClosed);
        bin = cheapest.bin();
      }
      if (cheapest.cost() == CheapestBin::kClosed) return i;
      at(bins, i) = bin;
      at(left, bin) -= length;
      cheapest.set_cost(bin, at(cost, bin) += length * length);
    }
    return num_items();
  }

  // Items [first, n) anew, each into the first bin that it fits into, the fullest bins first; whether all fitted.
  bool place_by_fit(Size first) {
    const auto fullest = fullest_first(first);
    std::vector<Size> rooms(fullest.size());
    std::transform(fullest.begin(), fullest.end(), rooms.begin(), [](const auto& entry) { return entry.first; });
    FirstFit first_fit(rooms);
    for (Size i = first; i < num_items(); ++i) {
      const Size place = first_fit.take(at(items, i).length);
      if (place == kNone) return false;
      at(bins, i) = at(fullest, place).second;
    }
    return true;
  }

  // Items [first, n) anew, bin by bin, the fullest first: the longest that fits, then parts of the room, so that
  // the last leaves next to nothing. Whether all fitted.
  bool place_by_parts(Size first) {
    Stock stock(items, first);
    for (const auto& [left, bin] : fullest_first(first)) {
      Size room = left;
      for (Size i = stock.take(room); i != kNone; i = stock.take_part(room)) {
        at(bins, i) = bin;
        room -= at(items, i).length;
      }
    }
    return stock.empty();
  }

  // Into `count` bins by cost; where they overflow, the shortest items of each bin by parts. Whether all fitted.
  bool balance(Size count) {
    num_bins = count;
    num_by_cost = place_by_cost();
    if (num_by_cost == num_items()) return true;
    for (const Size again : {5, 14, 28}) {
      if (again * num_bins >= num_items()) break;
      num_by_cost = std::max<Size>(0, std::min(num_by_cost, num_items() - again * num_bins));
      if (place_by_parts(num_by_cost)) return true;
    }
    return false;
  }

  // First-fit decreasing, into as many bins as it needs out of `count`, which are enough.
  void first_fit_decreasing(Size count) {
    num_bins = count;
    place_by_fit(0);
    num_bins = *std::max_element(bins.begin(), bins.end()) + 1;
  }

  // Leaves no bin empty: the longest items that do not lie alone move into those that are.
  void spread() {
    std::vector<Size> members = filled(num_bins, Size{0});
    for (const Size bin : bins) ++at(members, bin);
    Size i = 0;
    for (Size empty = 0; empty < num_bins; ++empty) {
      if (at(members, empty) != 0) continue;
      while (at(members, at(bins, i)) == 1) ++i;
      --at(members, at(bins, i));
      at(bins, i) = empty;
      at(members, empty) = 1;
    }
  }
};

// What any plan needs: room for all tokens, and a bin for each item longer than half of one.
Size least_bins(const std::vector<Item>& items, Size max_tokens) {
  Size bins = 0, room = 0, halves = 0;
  for (const Item& item : items) {
    if (room < item.length) {  // the sum in whole bins: a single number might overflow
      room += max_tokens;
      ++bins;
    }
    room -= item.length;
    halves += item.length > max_tokens - item.length ? 1 : 0;
  }
  return std::max(bins, halves);
}

// The smallest multiple of num_ranks that is at least `bins`.
Size whole_ranks(Size bins, Size num_ranks, Size num_items) {
  const Size each = (bins + num_ranks - 1) / num_ranks;
  if (each > num_items / num_ranks) {
    throw std::invalid_argument(concat("num_ranks: wanted at least one length a bin, got ", num_items,
                                       " lengths, which need ", bins, " bins or more, on ", num_ranks, " ranks"));
  }
  return each * num_ranks;
}

Placement place(const std::vector<Item>& items, Size max_tokens, Size num_ranks) {
  Placement balanced{.items = items, .max_tokens = max_tokens};
  const Size n = balanced.num_items();
  const Size least = whole_ranks(least_bins(items, max_tokens), num_ranks, n);
  if (balanced.balance(least)) return balanced;

  // First fit leaves at most one bin half empty: twice the bins that the tokens need are enough.
  Placement fitted{.items = items, .max_tokens = max_tokens};
  fitted.first_fit_decreasing(std::min(n, 2 * least));
  fitted.num_bins = whole_ranks(fitted.num_bins, num_ranks, n);
  if (fitted.num_bins > least && balanced.balance(fitted.num_bins)) return balanced;
  for (const Size share : {2, 8}) {
    if (balanced.place_by_fit(std::min(balanced.num_by_cost, n / share))) return balanced;
  }
  return fitted;
}

// By bin of the placement, its place in the plan.
std::vector<Size> order_of_bins(const Placement& placement, Size num_ranks) {
  struct Bin {
    Size cost = 0;
    Size first_item = std::numeric_limits<Size>::max();
    Size rank = 0;
  };
  std::vector<Bin> bins(static_cast<std::size_t>(placement.num_bins));
  for (Size i = 0; i < placement.num_items(); ++i) {
    const Item& item = at(placement.items, i);
    Bin& bin = at(bins, at(placement.bins, i));
    bin.cost += item.length * item.length;
    bin.first_item = std::min(bin.first_item, item.id);
  }
  std::vector<Size> order(bins.size());
  for (std::size_t bin = 0; bin < bins.size(); ++bin) order[bin] = static_cast<Size>(bin);
  const auto dearest_first = [&bins](Size a, Size b) {
    return std::pair(-at(bins, a).cost, at(bins, a).first_item) < std::pair(-at(bins, b).cost, at(bins, b).first_item);
  };
  std::sort(order.begin(), order.end(), dearest_first);
  // The sum of a rank's bins may leave int64; doubles add up the same way everywhere.
  using Rank = std::pair<double, Size>;
  std::priority_queue<Rank, std::vector<Rank>, std::greater<>> cheapest;
  for (Size rank = 0; rank < num_ranks; ++rank) cheapest.emplace(0.0, rank);
  std::vector<Size> room = filled(num_ranks, placement.num_bins / num_ranks);
  for (const Size bin : order) {
    const auto [cost, rank] = cheapest.top();
    cheapest.pop();
    at(bins, bin).rank = rank;
    if (--at(room, rank) > 0) cheapest.emplace(cost + static_cast<double>(at(bins, bin).cost), rank);
  }
  std::stable_sort(order.begin(), order.end(), [&bins](Size a, Size b) { return at(bins, a).rank < at(bins, b).rank; });
  std::vector<Size> place_of(bins.size());
  for (std::size_t place = 0; place < order.size(); ++place) at(place_of, order[place]) = static_cast<Size>(place);
  return place_of;
}

void check(std::span<const Size> lengths, Size max_tokens, Size num_ranks) {
  constexpr Size kMost = std::numeric_limits<std::int32_t>::max();
  if (max_tokens < 1 || max_tokens > kMost) {
    throw std::invalid_argument(concat("max_tokens: wanted 1 to ", kMost, ", got ", max_tokens));
  }
  const auto wrong =
      std::find_if(lengths.begin(), lengths.end(), [=](Size length) { return length < 1 || length > max_tokens; });
  if (wrong != lengths.end()) {
    throw std::invalid_argument(
        concat("lengths[", wrong - lengths.begin(), "]: wanted 1 to max_tokens ", max_tokens, ", got ", *wrong));
  }
  if (num_ranks < 1) throw std::invalid_argument(concat("num_ranks: wanted 1 or more, got ", num_ranks));
}

}  // namespace

TokenPlan pack_tokens(std::span<const std::int64_t> lengths, std::int64_t max_tokens, std::int64_t num_ranks) {
  check(lengths, max_tokens, num_ranks);
  if (lengths.empty()) return {.item_ids = {}, .cu_bins = {0}};
  const std::vector<Item> items = longest_first(lengths);
  Placement placement = place(items, max_tokens, num_ranks);
  placement.spread();

  const std::vector<Size> place_of = order_of_bins(placement, num_ranks);
  std::vector<Size> bin_of(lengths.size());
  TokenPlan plan{.item_ids = std::vector<Size>(lengths.size()), .cu_bins = filled(placement.num_bins + 1, Size{0})};
  for (Size i = 0; i < placement.num_items(); ++i) {
    const Size bin = at(place_of, at(placement.bins, i));
    at(bin_of, at(items, i).id) = bin;
    ++at(plan.cu_bins, bin + 1);
  }
  for (Size bin = 0; bin < placement.num_bins; ++bin) at(plan.cu_bins, bin + 1) += at(plan.cu_bins, bin);
  std::vector<Size> next = plan.cu_bins;
  for (Size id = 0; id < placement.num_items(); ++id) at(plan.item_ids, at(next, at(bin_of, id))++) = id;
  return plan;
}

}  // namespace archer_fast
