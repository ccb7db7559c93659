#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <filesystem>
#include <random>
#include <system_error>
#include <vector>

#include "feature_store.h"

namespace {

using archer_fast::FeatureStore;

constexpr std::size_t kRowBytes = 12;

struct Model {
  std::size_t num_rows;
  std::int64_t trunk_version = FeatureStore::kNoVersion;
  std::vector<std::byte> rows{};
};

void check_same(const FeatureStore& store, const std::deque<Model>& model) {
  REQUIRE(store.size() == model.size());
  for (std::size_t i = 0; i < model.size(); ++i) {
    REQUIRE(store.num_rows(i) == model[i].num_rows);
    REQUIRE(store.trunk_version(i) == model[i].trunk_version);
    if (model[i].trunk_version < 0) continue;
    for (std::size_t r = 0; r < model[i].num_rows; ++r) {
      REQUIRE(std::memcmp(store.row(i, r), model[i].rows.data() + r * kRowBytes, kRowBytes) == 0);
    }
  }
}

}  // namespace

TEST_CASE("every block keeps its rows and version over pushes, undone pushes and pops, in RAM and in files") {
  std::mt19937 rng(0);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(rng()) % n; };
  // Chunks of 256 bytes, of which two fit into RAM; some blocks are larger than a chunk.
  FeatureStore store(kRowBytes, 512, std::filesystem::temp_directory_path().string(), 256);
  std::deque<Model> model;
  std::size_t most_mapped = 0;
  for (int step = 0; step < 3000; ++step) {
    const std::size_t what = below(8);
    if (what < 3) {
      const std::size_t num_rows = 2 + below(30);
      store.push(num_rows);
      if (below(5) == 0) {
        store.pop_newest();
      } else {
        model.push_back({.num_rows = num_rows});
      }
    } else if (what < 6 && !model.empty()) {
      const std::size_t i = below(model.size());
      model[i].rows.resize(model[i].num_rows * kRowBytes);
      for (std::byte& byte : model[i].rows) byte = static_cast<std::byte>(rng() & 0xFF);
      model[i].trunk_version = step;
      store.set(i, step, model[i].rows.data());
    } else if (model.size() > below(20)) {
      store.pop_oldest();
      model.pop_front();
    }
    CHECK(store.ram_bytes() <= 512);
    most_mapped = std::max(most_mapped, store.mapped_bytes());
    if (step % 10 == 0) check_same(store, model);
  }
  CHECK(most_mapped > 1024);
}

TEST_CASE("stamps tell which blocks were set since") {
  FeatureStore store(kRowBytes, 1 << 20, "");
  const std::vector<std::byte> rows(2 * kRowBytes);
  for (int i = 0; i < 3; ++i) store.push(2);
  CHECK(store.stamp() == 0);
  CHECK(store.stamp(1) == 0);
  store.set(0, 5, rows.data());
  store.set(1, 5, rows.data());
  const std::uint64_t before = store.stamp();
  CHECK(before == 2);
  store.set(0, 6, rows.data());
  CHECK(store.stamp(0) > before);
  CHECK(store.stamp(1) <= before);
  CHECK(store.stamp(2) == 0);
  store.pop_oldest();
  CHECK(store.stamp(0) == 2);
}

TEST_CASE("a push without room leaves the store as it was") {
  FeatureStore store(kRowBytes, 4096, "/nowhere/at/all", 4096);
  const std::vector<std::byte> rows(2 * kRowBytes, std::byte{7});
  store.push(2);
  store.set(0, 3, rows.data());
  CHECK_THROWS_AS(store.push(1000), std::system_error);
  CHECK(store.size() == 1);
  CHECK(store.mapped_bytes() == 0);
  CHECK(std::memcmp(store.row(0, 1), rows.data(), kRowBytes) == 0);
  store.push(3);
  CHECK(store.trunk_version(1) == FeatureStore::kNoVersion);
}

TEST_CASE("gather copies rows and the fronts of those behind, out of RAM and out of files, on any number of threads") {
  std::mt19937 rng(0);
  for (const std::size_t max_memory : {std::size_t{0}, std::size_t{512}, std::size_t{1} << 20}) {
    FeatureStore store(kRowBytes, max_memory, std::filesystem::temp_directory_path().string(), 256);
    std::vector<std::byte> rows(5 * kRowBytes);
    for (std::size_t i = 0; i < 20; ++i) {
      store.push(5);
      for (std::byte& byte : rows) byte = static_cast<std::byte>(rng() & 0xFF);
      store.set(i, 1, rows.data());
    }
    CHECK((store.ram_bytes() > 0) == (max_memory > 0));
    CHECK((store.mapped_bytes() > 0) == (max_memory < 1 << 20));
    for (const std::size_t next_bytes : {std::size_t{0}, std::size_t{5}, kRowBytes}) {
      for (const int threads : {1, 3}) {
        std::vector<const std::byte*> sources;
        for (int i = 0; i < 400; ++i) sources.push_back(store.row(rng() % 20, rng() % 4));
        std::vector<std::byte> got(400 * kRowBytes), next(400 * next_bytes + 1);
        store.gather(sources, next_bytes, got.data(), next.data(), threads);
        for (std::size_t i = 0; i < 400; ++i) {
          REQUIRE(std::memcmp(got.data() + i * kRowBytes, sources[i], kRowBytes) == 0);
          REQUIRE(std::memcmp(next.data() + i * next_bytes, sources[i] + kRowBytes, next_bytes) == 0);
        }
      }
    }
  }
}
