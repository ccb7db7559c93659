#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>

#include "chunk_arena.h"

using archer_fast::ChunkArena;

TEST_CASE("blocks keep their bytes until they are released, oldest first") {
  ChunkArena arena(64);
  std::deque<std::pair<std::byte*, std::size_t>> live;
  const auto byte_of = [](std::size_t i) { return static_cast<int>(i % 251); };
  std::size_t first = 0;
  for (std::size_t i = 0; i < 500; ++i) {
    const std::size_t size = 1 + i * 7 % 90;  // some larger than a chunk
    std::byte* const block = arena.allocate(size);
    CHECK(reinterpret_cast<std::uintptr_t>(block) % ChunkArena::kAlignment == 0);
    std::memset(block, byte_of(i), size);
    live.emplace_back(block, size);
    while (live.size() > i % 13) {
      const auto [oldest, length] = live.front();
      for (std::size_t k = 0; k < length; ++k) REQUIRE(std::to_integer<int>(oldest[k]) == byte_of(first));
      arena.release_oldest();
      live.pop_front();
      ++first;
    }
    CHECK(arena.num_blocks() == live.size());
  }
}

TEST_CASE("memory is reused: a steady queue reserves a bounded number of chunks") {
  ChunkArena arena(1024);
  for (int i = 0; i < 10'000; ++i) {
    arena.allocate(100);
    if (i >= 20) arena.release_oldest();
    CHECK(arena.reserved_bytes() <= 5 * 1024);
  }
}

TEST_CASE("a block larger than a chunk does not stay reserved once it is gone") {
  ChunkArena arena(64);
  arena.allocate(10'000);
  arena.release_oldest();
  arena.allocate(20'000);
  CHECK(arena.reserved_bytes() == 20'000);
  arena.allocate(8);
  arena.release_oldest();
  CHECK(arena.reserved_bytes() == 64);
  CHECK(arena.num_blocks() == 1);
}
