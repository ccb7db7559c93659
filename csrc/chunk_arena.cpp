#include "chunk_arena.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace archer_fast {
namespace {

std::size_t rounded(std::size_t bytes) noexcept {
  return (bytes + ChunkArena::kAlignment - 1) / ChunkArena::kAlignment * ChunkArena::kAlignment;
}

}  // namespace

ChunkArena::Chunk ChunkArena::take_chunk(std::size_t bytes) {
  if (spare_.capacity() >= bytes) return std::exchange(spare_, Chunk{});
  const std::size_t capacity =
      std::max(bytes, std::clamp(rounded(reserved_bytes_ / 32), min_chunk_bytes_, max_chunk_bytes_));
  auto* const memory = static_cast<std::byte*>(source_->allocate(capacity, kAlignment));
  reserved_bytes_ += capacity;
  return {.memory = {memory, GiveBack{this, capacity}}};
}

void ChunkArena::keep_as_spare(Chunk&& chunk) noexcept {
  if (chunk.capacity() <= max_chunk_bytes_ && chunk.capacity() > spare_.capacity()) spare_ = std::move(chunk);
}

std::byte* ChunkArena::allocate(std::size_t bytes) {
  assert(bytes > 0);
  const std::size_t size = rounded(bytes);
  if (chunks_.empty() || chunks_.back().capacity() - chunks_.back().used < size) {
    chunks_.push_back(take_chunk(size));
    if (chunks_.front().num_live == 0 && chunks_.size() > 1) chunks_.pop_front();  // was sole, empty and too small
  }
  Chunk& chunk = chunks_.back();
  std::byte* const block = chunk.memory.get() + chunk.used;
  chunk.used += size;
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
  keep_as_spare(std::move(chunk));
  chunks_.pop_front();
}

void ChunkArena::release_newest(std::size_t bytes) noexcept {
  assert(num_blocks_ > 0);
  Chunk& chunk = chunks_.back();
  assert(chunk.used >= rounded(bytes));
  chunk.used -= rounded(bytes);
  --chunk.num_live;
  --num_blocks_;
  if (chunk.num_live > 0) return;
  chunk.used = 0;  // older blocks may have been there
  if (chunks_.size() == 1) return;
  keep_as_spare(std::move(chunk));
  chunks_.pop_back();
}

}  // namespace archer_fast
