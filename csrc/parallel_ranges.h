// A loop over independent items on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace archer_fast {

// How many of `threads` pay for their start (50 us and more) where that many bytes are written; 1 at least.
inline int threads_worth(std::int64_t num_bytes, int threads) noexcept {
  constexpr std::int64_t kBytesPerThread = std::int64_t{1} << 20;
  return static_cast<int>(std::clamp(num_bytes / kBytesPerThread, std::int64_t{1}, std::int64_t{std::max(threads, 1)}));
}

// Cuts [0, n) into ranges and calls body(begin, end) for each, on the calling thread and up to threads - 1 others,
// which take the next range as they finish one: a thread that the system keeps waiting, because another library's
// threads spin on its core, then delays one range and not its whole share. Returns when all are done.
//
// Threads are made and joined by the call: nothing is left running that a fork would lose, and any thread
// may call. `body` must not throw, and must be safe to run beside itself on other ranges. Where the
// system refuses a thread, the others do its work.
template <class Body>
void parallel_ranges(std::int64_t n, int threads, const Body& body) noexcept {
  static_assert(noexcept(body(n, n)), "an exception cannot leave a thread");
  constexpr std::int64_t kRangesPerThread = 8;
  const std::int64_t workers = threads < n ? threads : n;
  if (workers <= 1) {
    if (n > 0) body(std::int64_t{0}, n);
    return;
  }
  const std::int64_t parts = n < workers * kRangesPerThread ? n : workers * kRangesPerThread;
  std::atomic<std::int64_t> next = 0;
  const auto run = [&]() noexcept {
    for (std::int64_t part = next++; part < parts; part = next++) body(n * part / parts, n * (part + 1) / parts);
  };
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<std::size_t>(workers - 1));
    while (static_cast<std::int64_t>(helpers.size()) < workers - 1) helpers.emplace_back(run);
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace archer_fast
