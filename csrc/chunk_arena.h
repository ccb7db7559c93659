// Memory for blocks that are freed in the order in which they were allocated.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <memory_resource>

#include "huge_pages.h"

namespace archer_fast {

// A queue of large chunks; a block never crosses a chunk's end, so each block is contiguous. The
// tail of a chunk that was too short for the next block stays empty until the chunk is recycled.
//
// Owner: the arena owns all blocks; a pointer is valid until its block is released or the arena dies. Chunks come
// from `source`, which outlives the arena.
// Threads: none of its own rules; the owner of the arena locks.
// Complexity: allocate and both releases O(1); one chunk is kept aside for reuse, because page
// faults of fresh memory cost more than the copy into it.
class ChunkArena {
 public:
  static constexpr std::size_t kMinChunkBytes = std::size_t{64} << 10;
  static constexpr std::size_t kMaxChunkBytes = std::size_t{4} << 20;
  static constexpr std::size_t kAlignment = 8;

  // A new chunk is a 32nd of what is held, within these bounds: the newest, the oldest and the spare one are partly or
  // wholly empty, and that shall be little of any arena.
  explicit ChunkArena(std::size_t min_chunk_bytes = kMinChunkBytes, std::size_t max_chunk_bytes = kMaxChunkBytes,
                      std::pmr::memory_resource* source = huge_page_resource())
      : source_(source), min_chunk_bytes_(min_chunk_bytes), max_chunk_bytes_(max_chunk_bytes) {}
  ChunkArena(const ChunkArena&) = delete;
  ChunkArena& operator=(const ChunkArena&) = delete;

  // An uninitialised block aligned to kAlignment. A block larger than a chunk gets a chunk of its own.
  // Throws what the source throws (std::bad_alloc, if it is the usual one), and the arena is then as before.
  std::byte* allocate(std::size_t bytes);

  // Frees the oldest block. Precondition: there is one.
  void release_oldest() noexcept;

  // Undoes the last allocate, which was of `bytes`: the newest block is freed. Precondition: there is one.
  void release_newest(std::size_t bytes) noexcept;

  std::size_t num_blocks() const noexcept { return num_blocks_; }
  std::size_t reserved_bytes() const noexcept { return reserved_bytes_; }  // held from the source, the spare included

 private:
  struct GiveBack {
    ChunkArena* arena;
    std::size_t bytes;

    void operator()(std::byte* memory) const noexcept {
      arena->source_->deallocate(memory, bytes, kAlignment);
      arena->reserved_bytes_ -= bytes;
    }
  };

  struct Chunk {
    std::unique_ptr<std::byte, GiveBack> memory;
    std::size_t used = 0;
    std::size_t num_live = 0;

    std::size_t capacity() const noexcept { return memory.get_deleter().bytes; }
  };

  Chunk take_chunk(std::size_t bytes);
  void keep_as_spare(Chunk&& chunk) noexcept;

  std::pmr::memory_resource* const source_;
  const std::size_t min_chunk_bytes_;
  const std::size_t max_chunk_bytes_;
  std::size_t reserved_bytes_ = 0;
  std::size_t num_blocks_ = 0;
  std::deque<Chunk> chunks_;  // every chunk holds a live block, except a sole one
  Chunk spare_;
};

}  // namespace archer_fast
