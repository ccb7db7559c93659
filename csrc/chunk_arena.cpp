#include "chunk_arena.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace archer_fast {

ChunkArena::Chunk ChunkArena::take_chunk(std::size_t bytes) {
  if (spare_.capacity >= bytes) return std::exchange(spare_, Chunk{});
  Chunk chunk;
  chunk.capacity = std::max(bytes, chunk_bytes_);
  chunk.memory = std::make_unique_for_overwrite<std::byte[]>(chunk.capacity);
  return chunk;
}

std::byte* ChunkArena::allocate(std::size_t bytes) {
  assert(bytes > 0);
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (chunks_.empty() || chunks_.back().capacity - chunks_.back().used < rounded) {
    chunks_.push_back(take_chunk(rounded));
    if (chunks_.front().num_live == 0 && chunks_.size() > 1) chunks_.pop_front();  // was sole, empty and too small
  }
  Chunk& chunk = chunks_.back();
  std::byte* const block = chunk.memory.get() + chunk.used;
  chunk.used += rounded;
  ++chunk.num_live;
  ++num_blocks_;
  return block;
}

void ChunkArena::release_oldest() noexcept {
  assert(num_blocks_ > 0);
  Chunk& chunk = chunks_.front();
  --chunk.num_live;
  --num_blocks_;
  if (chunk.num_live > 0) return;
  chunk.used = 0;
  if (chunks_.size() == 1) return;
  if (chunk.capacity == chunk_bytes_) spare_ = std::move(chunk);
  chunks_.pop_front();
}

std::size_t ChunkArena::reserved_bytes() const noexcept {
  std::size_t bytes = spare_.capacity;
  for (const Chunk& chunk : chunks_) bytes += chunk.capacity;
  return bytes;
}

}  // namespace archer_fast
