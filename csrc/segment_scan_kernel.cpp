// Compiled once for each instruction set: ARCHER_SIMD_LANES says how many floats a register holds and
// ARCHER_SEGMENT_SCAN names the function. Read simd_vector.h before including anything here.
//
// y = b + a y' is a chain: one token would wait for the next. Instead 4 registers of tokens are turned so that a
// lane holds 4 neighbours, a "quad"; the maps of a lane's tokens are composed to one, y = B + A y', those of the quads
// by doubling, and only one product and sum a tile remains to wait for the tile before.
#include "segment_scan_kernel.h"

#include "simd_vector.h"

namespace archer_fast {
namespace {

constexpr std::int64_t kTile = 4 * kLanes;
constexpr std::int64_t kAhead = 512;   // tokens that a prefetch runs ahead: a tenth faster from memory, no slower else
constexpr std::int64_t kBlock = 2048;  // tokens whose ends of segments are marked at a time

typedef float Quad __attribute__((vector_size(16)));

// Within each 128 bits of two registers; `first` is the number of a group's first lane.
#define ARCHER_LOW(first) first, kLanes + first, first + 1, kLanes + first + 1
#define ARCHER_HIGH(first) ARCHER_LOW(first + 2)
#define ARCHER_FRONT(first) first, first + 1, kLanes + first, kLanes + first + 1
#define ARCHER_BACK(first) ARCHER_FRONT(first + 2)
#if ARCHER_SIMD_LANES == 16
#define ARCHER_GROUPS(indices) indices(0), indices(4), indices(8), indices(12)
#elif ARCHER_SIMD_LANES == 8
#define ARCHER_GROUPS(indices) indices(0), indices(4)
#else
#define ARCHER_GROUPS(indices) indices(0)
#endif

// In each 128 bits, rows become columns.
ARCHER_INLINE void transpose(Floats (&x)[4]) noexcept {
  const Floats low01 = __builtin_shufflevector(x[0], x[1], ARCHER_GROUPS(ARCHER_LOW));
  const Floats low23 = __builtin_shufflevector(x[2], x[3], ARCHER_GROUPS(ARCHER_LOW));
  const Floats high01 = __builtin_shufflevector(x[0], x[1], ARCHER_GROUPS(ARCHER_HIGH));
  const Floats high23 = __builtin_shufflevector(x[2], x[3], ARCHER_GROUPS(ARCHER_HIGH));
  x[0] = __builtin_shufflevector(low01, low23, ARCHER_GROUPS(ARCHER_FRONT));
  x[1] = __builtin_shufflevector(low01, low23, ARCHER_GROUPS(ARCHER_BACK));
  x[2] = __builtin_shufflevector(high01, high23, ARCHER_GROUPS(ARCHER_FRONT));
  x[3] = __builtin_shufflevector(high01, high23, ARCHER_GROUPS(ARCHER_BACK));
}

// x with its lanes moved down by so many groups of 4, the first lanes of `above` above them.
template <int kGroups>
ARCHER_INLINE Floats groups_down(Floats x, Floats above) noexcept {
#if ARCHER_SIMD_LANES == 16
  return (Floats)_mm512_maskz_alignr_epi32(0xFFFF, (__m512i)above, (__m512i)x, 4 * kGroups);
#elif ARCHER_SIMD_LANES == 8
  return __builtin_shufflevector(x, above, 4, 5, 6, 7, 8, 9, 10, 11);
#else
  static_cast<void>(x);
  return above;
#endif
}

// Maps y = b + a y' of each lane: composes each with that of the lane kGroups groups up, where there is one.
template <int kGroups>
ARCHER_INLINE void compose(Floats& a, Floats& b) noexcept {
  b = fma(a, groups_down<kGroups>(b, Floats{}), b);
  a = a * groups_down<kGroups>(a, broadcast(1.0F));
}

ARCHER_INLINE Quad fma_quad(Quad a, Quad b, Quad c) noexcept {
#if ARCHER_SIMD_LANES > 4
  return _mm_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// In every group.
ARCHER_INLINE Floats repeat(Quad x) noexcept {
#if ARCHER_SIMD_LANES == 16
  return _mm512_maskz_broadcast_f32x4(0xFFFF, x);
#elif ARCHER_SIMD_LANES == 8
  return _mm256_set_m128(x, x);
#else
  return x;
#endif
}

// b becomes y; `carry` is y of the token after the tile and becomes that of its first. Gives y of each quad's first
// token: infinite or NaN if that of any other of its tokens is.
ARCHER_INLINE Floats scan_tile(Floats (&a)[4], Floats (&b)[4], float& carry) noexcept {
  transpose(a);  // lane 4 g + i of register j: token 4 g + j of register i as loaded
  transpose(b);
  Floats product = a[3];
  Floats sum = b[3];
  for (int j = 2; j >= 0; --j) {
    sum = fma(a[j], sum, b[j]);
    product = a[j] * product;
  }
  if constexpr (kLanes > 4) compose<1>(product, sum);
  if constexpr (kLanes > 8) compose<2>(product, sum);
  // The first group now speaks of whole registers, of register i in lane i.
  const Quad zero = {};
  const Quad one = zero + 1.0F;
  Quad p = __builtin_shufflevector(product, product, 0, 1, 2, 3);
  Quad s = __builtin_shufflevector(sum, sum, 0, 1, 2, 3);
  s = fma_quad(p, __builtin_shufflevector(s, zero, 1, 2, 3, 4), s);
  p = p * __builtin_shufflevector(p, one, 1, 2, 3, 4);
  s = fma_quad(p, __builtin_shufflevector(s, zero, 2, 3, 4, 5), s);
  p = p * __builtin_shufflevector(p, one, 2, 3, 4, 5);
  const Quad after = zero + carry;
  const Quad begins = fma_quad(p, after, s);                             // y of the first token of each register
  carry = fma(p[0], carry, s[0]);                                        // begins[0], on the shortest way
  const Quad ends = __builtin_shufflevector(begins, after, 1, 2, 3, 4);  // y of the token after each
  const Floats all_ends = repeat(ends);
  Floats y = groups_down<1>(fma(product, all_ends, sum), all_ends);  // y of the token after each quad
  for (int j = 3; j >= 0; --j) {
    y = fma(a[j], y, b[j]);
    b[j] = y;
  }
  transpose(b);
  return y;
}

// Tokens [0, size) of a block. `open` is all ones, and 0 at a segment's last token.
struct Block {
  const float* a;
  const float* b;
  float* out;
  const std::uint32_t* open;
  std::int64_t size;
};

// By definition, token after token; gives y of the first.
float scan_serially(const Block& block, float carry) noexcept {
  for (std::int64_t i = block.size - 1; i >= 0; --i) {
    carry = block.open[i] == 0 ? block.b[i] : fma(block.a[i], carry, block.b[i]);
    block.out[i] = carry;
  }
  return carry;
}

// Where a prefetch looks; as a number, because it may lie before the array.
ARCHER_INLINE const void* before(const float* x) noexcept {
  return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(x) - kAhead * sizeof(float));
}

// The same for whole tiles; gives whether the result is finite. An end clears its `a`, so that nothing of the next
// segment comes through, unless that is infinite or NaN: then all of this is void.
bool scan_tiles(const Block& block, float& carry) noexcept {
  Floats poison = {};  // 0, or NaN for ever
  for (std::int64_t i = block.size - kTile; i >= 0; i -= kTile) {
    Floats a[4];
    Floats b[4];
    for (int j = 0; j < kTile; j += 16) {
      __builtin_prefetch(before(block.a + i + j));
      __builtin_prefetch(before(block.b + i + j));
      __builtin_prefetch(before(block.out + i + j), 1);
    }
    for (int j = 0; j < 4; ++j) {
      Bits open;
      __builtin_memcpy(&open, block.open + i + j * kLanes, sizeof open);
      a[j] = (Floats)((Bits)load(block.a + i + j * kLanes) & open);
      b[j] = load(block.b + i + j * kLanes);
    }
    poison = fma(scan_tile(a, b, carry), Floats{}, poison);
    for (int j = 0; j < 4; ++j) store(block.out + i + j * kLanes, b[j]);
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += poison[lane];
  return sum == 0;
}

void scan(const SegmentRange& range) noexcept {
  alignas(64) std::uint32_t open[kBlock];
  __builtin_memset(open, -1, sizeof open);
  std::int64_t k = range.num_segments;
  const std::int64_t first = range.cu[0];
  float carry = 0;
  for (std::int64_t end = range.cu[k], begin = 0; end > first; end = begin) {
    begin = end - first > kBlock ? end - kBlock : first;
    const std::int64_t last = k;
    for (; k > 0 && range.cu[k] > begin; --k) open[range.cu[k] - 1 - begin] = 0;
    const std::int64_t odd = (end - begin) % kTile;
    const Block tiles{range.a + begin + odd, range.b + begin + odd, range.out + begin + odd, open + odd,
                      end - begin - odd};
    const float after = carry;
    if (!scan_tiles(tiles, carry)) carry = scan_serially(tiles, after);
    carry = scan_serially({range.a + begin, range.b + begin, range.out + begin, open, odd}, carry);
    for (std::int64_t marked = last; marked > k; --marked) open[range.cu[marked] - 1 - begin] = ~std::uint32_t{0};
  }
}

}  // namespace

const SegmentScanKernel ARCHER_SEGMENT_SCAN = &scan;

}  // namespace archer_fast
