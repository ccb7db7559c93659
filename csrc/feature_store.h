// Rows of a fixed size beside each trajectory: what a trunk computed of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <utility>

#include "chunk_arena.h"
#include "spill_memory.h"

namespace archer_fast {

// A queue of blocks of rows, one block a trajectory, freed oldest first. What the bytes of a row mean is the caller's
// to say. All rows of a block were made by one version of the trunk; a new block has none yet, and its bytes are not
// to be read.
//
// Owner: the store owns all rows; a pointer is valid until its block is popped.
// Threads: none of its own rules; the owner of the store locks.
// Complexity: O(1), and `set` the bytes of the block.
class FeatureStore {
 public:
  static constexpr std::int64_t kNoVersion = -1;
  // A mapped chunk is a file and a mapping, of which a process may have some 65,000: 1 TB of these.
  static constexpr std::size_t kDefaultChunkBytes = std::size_t{16} << 20;

  // Chunks of `chunk_bytes` lie in RAM while they fit into `max_memory_bytes`, else in files in `folder`
  // (spill_memory.h). Precondition: row_bytes > 0.
  FeatureStore(std::size_t row_bytes, std::size_t max_memory_bytes, std::string folder,
               std::size_t chunk_bytes = kDefaultChunkBytes)
      : row_bytes_(row_bytes),
        memory_(max_memory_bytes, std::move(folder)),
        arena_(chunk_bytes, chunk_bytes, &memory_) {}

  // Makes room for the rows of the next trajectory. Throws what SpillMemory throws; the store is then as before.
  void push(std::size_t num_rows);
  void pop_oldest() noexcept;  // precondition: there is one
  void pop_newest() noexcept;  // undoes the last push; same precondition

  std::size_t size() const noexcept { return blocks_.size(); }
  std::size_t row_bytes() const noexcept { return row_bytes_; }
  std::size_t ram_bytes() const noexcept { return memory_.ram_bytes(); }        // held, what is free included
  std::size_t mapped_bytes() const noexcept { return memory_.mapped_bytes(); }  // likewise, on the disk

  // In the following `i` is a place in the queue, 0 the oldest; precondition: i < size().
  std::size_t num_rows(std::size_t i) const noexcept { return blocks_[i].num_rows; }
  std::int64_t trunk_version(std::size_t i) const noexcept { return blocks_[i].trunk_version; }
  const std::byte* row(std::size_t i, std::size_t index) const noexcept { return blocks_[i].rows + index * row_bytes_; }

  // Copies the rows of a whole block in. Precondition: trunk_version >= 0.
  void set(std::size_t i, std::int64_t trunk_version, const std::byte* rows) noexcept;

  // How many times `set` was called: a block whose stamp is above what this was at some moment was set since.
  std::uint64_t stamp() const noexcept { return stamp_; }
  std::uint64_t stamp(std::size_t i) const noexcept { return blocks_[i].stamp; }  // 0: never set

  // Copies each of `sources`, which are rows of this store but none the last one of its block, to `rows`, and the first
  // next_bytes of the row behind it to `next_rows`; both end to end, next_bytes <= row_bytes. On up to `threads`
  // threads.
  void gather(std::span<const std::byte* const> sources, std::size_t next_bytes, std::byte* rows, std::byte* next_rows,
              int threads) const noexcept;

 private:
  struct Block {
    std::byte* rows;
    std::size_t num_rows;
    std::int64_t trunk_version;
    std::uint64_t stamp;
  };

  const std::size_t row_bytes_;
  SpillMemory memory_;
  ChunkArena arena_;
  std::deque<Block> blocks_;
  std::uint64_t stamp_ = 0;
};

}  // namespace archer_fast
