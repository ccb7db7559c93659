// Vectors of float32 for the sources that are compiled once for each instruction set; for nobody else.
//
// Everything here is in an anonymous namespace and such a source calls no inline function of the standard
// library: a function that the linker may share between objects could reach a machine without the
// instructions it was compiled to. GCC's and Clang's vector extensions do the rest. Those sources are
// compiled with -ffp-contract=off: where a product is rounded is part of what the kernels promise.
#pragma once

#include <cstdint>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace archer_fast {
namespace {

constexpr int kLanes = ARCHER_SIMD_LANES;

typedef float Floats __attribute__((vector_size(4 * ARCHER_SIMD_LANES)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * ARCHER_SIMD_LANES)));

#define ARCHER_INLINE inline __attribute__((always_inline))

ARCHER_INLINE Floats load(const float* from) noexcept {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

ARCHER_INLINE void store(float* to, Floats x) noexcept { __builtin_memcpy(to, &x, sizeof x); }

// The first `count` lanes, fewer than all, and 0; memory behind them is not touched.
ARCHER_INLINE Floats load_first(const float* from, int count) noexcept {
#if ARCHER_SIMD_LANES == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << count) - 1), from);
#elif ARCHER_SIMD_LANES == 8
  return _mm256_maskload_ps(from,
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
#else
  Floats x = {};
  for (int i = 0; i < count; ++i) x[i] = from[i];
  return x;
#endif
}

ARCHER_INLINE void store_first(float* to, Floats x, int count) noexcept {
#if ARCHER_SIMD_LANES == 16
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1U << count) - 1), x);
#elif ARCHER_SIMD_LANES == 8
  _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), x);
#else
  for (int i = 0; i < count; ++i) to[i] = x[i];
#endif
}

ARCHER_INLINE Floats broadcast(float x) noexcept { return x - Floats{}; }

// a * b + c, rounded once where the instruction set can.
ARCHER_INLINE Floats fma(Floats a, Floats b, Floats c) noexcept {
#if ARCHER_SIMD_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif ARCHER_SIMD_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

ARCHER_INLINE float fma(float a, float b, float c) noexcept {
#if ARCHER_SIMD_LANES > 4
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger; `y` where one of them is NaN.
ARCHER_INLINE Floats larger(Floats x, Floats y) noexcept {
#if ARCHER_SIMD_LANES == 16
  return _mm512_maskz_max_ps(0xFFFF, x, y);  // GCC 12 warns of the plain one's undefined register
#elif ARCHER_SIMD_LANES == 8
  return _mm256_max_ps(x, y);
#elif defined(__SSE2__)
  return _mm_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

// e^x = scale * (1 + rest) with scale a power of two, and rest exact to the last place also near 0.
struct Exponential {
  Floats scale;
  Floats rest;
};

// Lifts what is lower to where `exponential` is 0, so that its product with the exponent is 0 even of
// -inf. NaN stays.
ARCHER_INLINE Floats clamp_exponent(Floats x) noexcept { return larger(broadcast(-88.0296919F), x); }  // -127 log 2

// For clamped x <= 88; scale is 0 where x < -87.7. NaN stays.
ARCHER_INLINE Exponential exponential(Floats x) noexcept {
  constexpr float kLog2E = 1.44269504F;      // 1 / log 2
  constexpr float kLog2High = 0.693359375F;  // with 9 bits: its product with -127 .. 127 is exact
  constexpr float kLog2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Floats shifted = fma(x, broadcast(kLog2E), broadcast(kRound));
  const Floats k = shifted - kRound;
  const Floats r = fma(k, broadcast(-kLog2Low), fma(k, broadcast(-kLog2High), x));  // |r| <= log(2) / 2
  // Minimax of e^r - 1 - r over r^2, weighted so that e^r is off by 3e-9 of itself.
  Floats q = fma(r, broadcast(1.3814539e-3F), broadcast(8.3687454e-3F));
  q = fma(r, q, broadcast(4.1668389e-2F));
  q = fma(r, q, broadcast(1.6666521e-1F));
  q = fma(r, q, broadcast(0.49999994F));
  constexpr std::uint32_t kOne = 127;
  const Bits biased = ((Bits)shifted + kOne) << 23U;
  return {(Floats)biased, fma(r * r, q, r)};
}

// e^x for clamped x <= 88, off by at most 2 units in the last place; 0 below -87.7.
ARCHER_INLINE Floats exp(Floats x) noexcept {
  const Exponential e = exponential(x);
  return fma(e.scale, e.rest, e.scale);
}

}  // namespace
}  // namespace archer_fast
