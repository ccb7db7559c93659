#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory_resource>
#include <new>
#include <utility>

#include "chunk_arena.h"

using archer_fast::ChunkArena;

TEST_CASE("blocks keep their bytes until they are released, oldest first") {
  ChunkArena arena(64, 64);
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
  ChunkArena arena(1024, 1024);
  for (int i = 0; i < 10'000; ++i) {
    arena.allocate(100);
    if (i >= 20) arena.release_oldest();
    CHECK(arena.reserved_bytes() <= 5 * 1024);
  }
}

TEST_CASE("a block larger than a chunk does not stay reserved once it is gone") {
  ChunkArena arena(64, 64);
  arena.allocate(10'000);
  arena.release_oldest();
  arena.allocate(20'000);
  CHECK(arena.reserved_bytes() == 20'000);
  arena.allocate(8);
  arena.release_oldest();
  CHECK(arena.reserved_bytes() == 64);
  CHECK(arena.num_blocks() == 1);
}

TEST_CASE("chunks grow with what is held: little of it is empty, in a queue that grows and in a steady one") {
  constexpr std::size_t kBlock = 3000;
  ChunkArena arena;
  std::size_t live = 0;
  for (int i = 0; i < 20'000; ++i) {
    arena.allocate(kBlock);
    ++live;
    if (i >= 5'000 && i < 12'000) arena.release_oldest(), --live;
    const std::size_t needed = live * kBlock;
    CHECK(arena.reserved_bytes() <= needed + needed / 8 + 3 * ChunkArena::kMinChunkBytes);
  }
}

TEST_CASE("an allocate is undone by release_newest, whatever chunk it came from") {
  ChunkArena arena(64, 64);
  std::byte* const first = arena.allocate(40);
  std::memset(first, 1, 40);
  for (const std::size_t size : {std::size_t{24}, std::size_t{25}, std::size_t{64}, std::size_t{1000}}) {
    std::byte* const block = arena.allocate(size);
    arena.release_newest(size);
    CHECK(arena.num_blocks() == 1);
    std::byte* const again = arena.allocate(size);
    CHECK((again == block || size > 64));  // the same place in the same chunk, or in the spare
    arena.release_newest(size);
    CHECK(arena.reserved_bytes() <= 128);
  }
  for (int i = 0; i < 40; ++i) CHECK(std::to_integer<int>(first[i]) == 1);
  arena.allocate(8);
  arena.release_oldest();
  arena.release_newest(8);
  CHECK(arena.num_blocks() == 0);
  CHECK(arena.allocate(64) == first);  // all of the chunk is free again
  CHECK(arena.reserved_bytes() <= 128);
}

namespace {

// Counts what is taken, and refuses when told to.
class CountingSource final : public std::pmr::memory_resource {
 public:
  std::size_t bytes = 0;
  bool refuses = false;

 private:
  void* do_allocate(std::size_t size, std::size_t alignment) override {
    if (refuses) throw std::bad_alloc();
    bytes += size;
    return std::pmr::new_delete_resource()->allocate(size, alignment);
  }
  void do_deallocate(void* memory, std::size_t size, std::size_t alignment) override {
    bytes -= size;
    std::pmr::new_delete_resource()->deallocate(memory, size, alignment);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

}  // namespace

TEST_CASE("chunks come from the source and go back to it; an arena that it refuses is as before") {
  CountingSource source;
  {
    ChunkArena arena(64, 64, &source);
    arena.allocate(60);
    arena.allocate(100);
    CHECK(source.bytes == arena.reserved_bytes());
    source.refuses = true;
    CHECK_THROWS_AS(arena.allocate(64), std::bad_alloc);
    CHECK(arena.num_blocks() == 2);
    CHECK(source.bytes == 64 + 104);
    arena.release_oldest();
    arena.release_oldest();
    CHECK_NOTHROW(arena.allocate(64));  // the one kept aside
    CHECK(source.bytes == arena.reserved_bytes());
  }
  CHECK(source.bytes == 0);
}
