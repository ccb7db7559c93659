// What memory allows: scattered slices copied one after the other, their places known, beside one memcpy of as many
// bytes. A batch of transitions is such slices, and everything else that our buffer does comes on top.
//
//   g++ -O3 -std=c++20 benchmarks/gather_floor.cpp -o /tmp/gather_floor && /tmp/gather_floor
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr std::size_t kSliceBytes = 896;  // of 224 tokens: the mean history, action and next observation
constexpr std::size_t kColdBytes = std::size_t{768} << 20;

double median_seconds(int rounds, auto prepare, auto run) {
  std::vector<double> times;
  for (int i = 0; i < rounds; ++i) {
    prepare();
    const auto begin = std::chrono::steady_clock::now();
    run();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[static_cast<std::size_t>(rounds / 2)];
}

}  // namespace

int main() {
  const std::vector<char> other(kColdBytes, 1);
  volatile long sink = 0;
  const auto evict = [&] {
    long sum = 0;
    for (std::size_t i = 0; i < other.size(); i += 64) sum += other[i];
    sink = sink + sum;
  };
  std::mt19937_64 random(0);
  for (const std::size_t megabytes : {13UL, 1040UL}) {
    const std::size_t bytes = megabytes << 20;
    char* const memory =
        static_cast<char*>(std::aligned_alloc(std::size_t{2} << 20, bytes + (2 << 20) - bytes % (2 << 20)));
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::memset(memory, 1, bytes);
    for (const std::size_t n : {256UL, 4096UL}) {
      std::vector<char> out(n * kSliceBytes, 1);
      std::vector<std::size_t> places(n);
      for (const bool is_cold : {false, true}) {
        const auto draw = [&] {
          if (is_cold) evict();
          for (std::size_t& place : places) place = random() % (bytes - kSliceBytes) / 64 * 64;
        };
        const int rounds = is_cold ? 15 : 101;
        const double gather = median_seconds(rounds, draw, [&] {
          for (std::size_t i = 0; i < n; ++i) std::memcpy(&out[i * kSliceBytes], memory + places[i], kSliceBytes);
        });
        const double copy = median_seconds(
            rounds, draw, [&] { std::memcpy(out.data(), memory + places[0] % (bytes - out.size()), out.size()); });
        std::printf("%5zu MB, %4zu slices, %s: gather %7.1f us, memcpy %7.1f us, share %.0f%%\n", megabytes, n,
                    is_cold ? "cold" : "hot ", gather * 1e6, copy * 1e6, 100 * copy / gather);
      }
    }
    std::free(memory);
  }
}
