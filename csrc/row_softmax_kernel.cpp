// Compiled once for each instruction set: ARCHER_SIMD_LANES says how many floats a register holds and
// ARCHER_ROW_SOFTMAX names the table. Read simd_vector.h before including anything here.
#include "row_softmax_kernel.h"

#include <math.h>

#include "simd_vector.h"

namespace archer_fast {
namespace {

constexpr int kStrip = 4;            // registers of rows side by side
constexpr std::int64_t kBlock = 64;  // columns: z of a strip stays in the first cache
constexpr std::int64_t kAhead = 16;  // columns that a prefetch runs ahead: they are too far apart for the machine's own
constexpr float kInfinity = __builtin_inff();

// tanh(x / softcap) without cancellation near 0, and 1 - tanh^2 without cancellation far from it.
class Cap {
 public:
  explicit Cap(float softcap) noexcept : softcap_(softcap), minus_half_(-0.5F * softcap) {}

  Floats value(Floats x) const noexcept {
    const Parts p = parts(x);
    const Floats magnitude = softcap_ * (-p.less_one / (2.0F + p.less_one));
    return (Floats)((Bits)magnitude | ((Bits)x & kSign));
  }

  // Writes cap(x), gives its derivative.
  Floats value_and_derivative(Floats x, Floats& value) const noexcept {
    const Parts p = parts(x);
    const Floats inverse = 1.0F / (2.0F + p.less_one);
    value = (Floats)((Bits)(softcap_ * (-p.less_one * inverse)) | ((Bits)x & kSign));
    return (4.0F * p.whole) * (inverse * inverse);
  }

 private:
  static constexpr std::uint32_t kSign = 0x80000000U;
  struct Parts {
    Floats whole;     // e = e^(-2 |x| / softcap)
    Floats less_one;  // e - 1
  };

  Parts parts(Floats x) const noexcept {
    const Floats magnitude = (Floats)((Bits)x & ~kSign);
    const Exponential e = exponential(clamp_exponent(magnitude / minus_half_));
    return {fma(e.scale, e.rest, e.scale), fma(e.scale, e.rest, e.scale - 1.0F)};
  }

  float softcap_;
  float minus_half_;
};

struct NoCap {
  static ARCHER_INLINE Floats value(Floats x) noexcept { return x; }
  static ARCHER_INLINE Floats value_and_derivative(Floats x, Floats& value) noexcept {
    value = x;
    return broadcast(1.0F);
  }
};

// kRegisters registers of rows from `row` on, all whole, or one of which only the first `rest` lanes are rows.
template <int kRegisters, bool kIsWhole>
struct Strip {
  static_assert(kIsWhole || kRegisters == 1);
  static constexpr int kRows = kRegisters * kLanes;

  std::int64_t row;
  int rest = kLanes;

  int size() const noexcept { return kIsWhole ? kRows : rest; }

  // Register k of what lies at `rows`, a number a row.
  ARCHER_INLINE Floats load(const float* rows, int k) const noexcept {
    const float* from = rows + row + k * kLanes;
    return kIsWhole ? archer_fast::load(from) : load_first(from, rest);
  }

  ARCHER_INLINE void store(float* rows, int k, Floats x) const noexcept {
    float* to = rows + row + k * kLanes;
    if constexpr (kIsWhole) {
      archer_fast::store(to, x);
    } else {
      store_first(to, x, rest);
    }
  }

  ARCHER_INLINE void prefetch(const float* rows) const noexcept {
    for (int first = 0; first < kRows; first += 16) __builtin_prefetch(rows + row + first);
  }
};

// Calls f(strip) for all rows of a range.
template <class Function>
void for_strips(RowRange rows, const Function& f) noexcept {
  std::int64_t row = rows.begin;
  for (; row + kStrip * kLanes <= rows.end; row += kStrip * kLanes) f(Strip<kStrip, true>{row});
  for (; row + kLanes <= rows.end; row += kLanes) f(Strip<1, true>{row});
  if (row < rows.end) f(Strip<1, false>{row, static_cast<int>(rows.end - row)});
}

// The running sums of a row where one of its columns is larger than all before.
void raise(float most, float& m, double& s, double& t) noexcept {
  // Without a column above -inf the sums are 0 (or NaN), and -inf - most must not meet them.
  const double d = m == -kInfinity ? 0 : static_cast<double>(m) - static_cast<double>(most);
  const double factor = ::exp(d);
  t = factor * (t + s * d);
  s = factor * s;
  m = most;
}

template <class Rows, class CapOrNone>
void update_strip(const LogitTile& tile, const float* logits, std::int64_t column_stride, float* state,
                  const Rows& strip, const CapOrNone& cap) noexcept {
  constexpr int kRegisters = Rows::kRows / kLanes;
  // z goes through memory in its final rounding: the maximum, the target's z and the exponents must agree
  // to the bit, or a sure token's log-probability would come out above 0.
  alignas(64) float z[kBlock * Rows::kRows];
  // Sums of a block are float32, those over blocks double: the error does not grow with v.
  float m[Rows::kRows] = {};
  double s[Rows::kRows] = {};
  double t[Rows::kRows] = {};
  for (int i = 0; i < strip.size(); ++i) {
    const float* from = state + 4 * (strip.row + i);
    m[i] = from[0];
    s[i] = static_cast<double>(from[1]);
    t[i] = static_cast<double>(from[2]);
  }
  Floats inv_temperature[kRegisters];
  for (int k = 0; k < kRegisters; ++k) inv_temperature[k] = strip.load(tile.inv_temperature, k);
  for (std::int64_t first = 0; first < tile.v; first += kBlock) {
    const std::int64_t count = tile.v - first < kBlock ? tile.v - first : kBlock;
    Floats most[kRegisters];
    for (Floats& m : most) m = broadcast(-kInfinity);
    for (std::int64_t j = 0; j < count; ++j) {
      const float* column = logits + (first + j) * column_stride;
      if (first + j + kAhead < tile.v) strip.prefetch(column + kAhead * column_stride);
      for (int k = 0; k < kRegisters; ++k) {
        const Floats value = cap.value(strip.load(column, k)) * inv_temperature[k];
        store(z + j * Rows::kRows + k * kLanes, value);
        most[k] = larger(value, most[k]);
      }
    }
    float highest[Rows::kRows];
    for (int k = 0; k < kRegisters; ++k) store(highest + k * kLanes, most[k]);
    for (int i = 0; i < Rows::kRows; ++i) {
      if (highest[i] > m[i]) raise(highest[i], m[i], s[i], t[i]);
    }
    Floats base[kRegisters];
    for (int k = 0; k < kRegisters; ++k) {
      const Floats of_rows = load(m + k * kLanes);
      base[k] = of_rows == -kInfinity ? Floats{} : of_rows;
    }
    Floats sums[kRegisters] = {};
    Floats weighted[kRegisters] = {};
    for (std::int64_t j = 0; j < count; ++j) {
      for (int k = 0; k < kRegisters; ++k) {
        const Floats d = clamp_exponent(load(z + j * Rows::kRows + k * kLanes) - base[k]);
        const Floats e = exp(d);
        sums[k] += e;
        weighted[k] = fma(e, d, weighted[k]);
      }
    }
    float lanes[Rows::kRows];
    for (int k = 0; k < kRegisters; ++k) store(lanes + k * kLanes, sums[k]);
    for (int i = 0; i < Rows::kRows; ++i) s[i] += static_cast<double>(lanes[i]);
    for (int k = 0; k < kRegisters; ++k) store(lanes + k * kLanes, weighted[k]);
    for (int i = 0; i < Rows::kRows; ++i) t[i] += static_cast<double>(lanes[i]);
  }
  for (int i = 0; i < strip.size(); ++i) {
    const std::int64_t row = strip.row + i;
    float* to = state + 4 * row;
    to[0] = m[i];
    to[1] = static_cast<float>(s[i]);
    to[2] = static_cast<float>(t[i]);
    const std::int64_t target = tile.target_ids[row] - tile.first_column;
    if (target >= 0 && target < tile.v) {
      const Floats at_target = cap.value(broadcast(logits[target * column_stride + row])) * tile.inv_temperature[row];
      to[3] = at_target[0];
    }
  }
}

// What multiplies p in each row, and what joins it at the target; the temperature is multiplied in, once a row.
struct RowFactors {
  float a;  // dz = p (a + b log p)
  float b;
  float at_target;
  bool is_zero;
};

RowFactors row_factors(const LogitTile& tile, const SoftmaxGradient& gradient, std::int64_t row) noexcept {
  const auto inv_temperature = static_cast<double>(tile.inv_temperature[row]);
  const auto of_logprob = static_cast<double>(gradient.grad_logprobs[row]);
  const auto of_entropy = gradient.grad_entropy == nullptr ? 0 : static_cast<double>(gradient.grad_entropy[row]);
  const auto of_lse = gradient.grad_lse == nullptr ? 0 : static_cast<double>(gradient.grad_lse[row]);
  const double a =
      of_lse - of_logprob - (of_entropy == 0 ? 0 : of_entropy * static_cast<double>(gradient.entropy[row]));
  return {.a = static_cast<float>(a * inv_temperature),
          .b = static_cast<float>(-of_entropy * inv_temperature),
          .at_target = static_cast<float>(of_logprob * inv_temperature),
          .is_zero = of_logprob == 0 && of_entropy == 0 && of_lse == 0};
}

template <bool kHasEntropy, class Rows, class CapOrNone>
void backward_strip(const LogitTile& tile, const float* logits, std::int64_t column_stride,
                    const SoftmaxGradient& gradient, float* out, std::int64_t out_column_stride, const Rows& strip,
                    const CapOrNone& cap) noexcept {
  constexpr int kRegisters = Rows::kRows / kLanes;
  float a_of[Rows::kRows] = {};
  float b_of[Rows::kRows] = {};
  std::uint32_t kept_of[Rows::kRows] = {};  // 0 clears a row
  float at_target[Rows::kRows] = {};
  for (int i = 0; i < strip.size(); ++i) {
    const RowFactors row = row_factors(tile, gradient, strip.row + i);
    a_of[i] = row.a;
    b_of[i] = row.b;
    kept_of[i] = row.is_zero ? 0 : ~std::uint32_t{0};
    at_target[i] = row.at_target;
  }
  Floats a[kRegisters];
  Floats b[kRegisters];
  Bits kept[kRegisters];
  Floats row_max[kRegisters];
  Floats log_sum[kRegisters];
  Floats inv_temperature[kRegisters];
  for (int k = 0; k < kRegisters; ++k) {
    a[k] = load(a_of + k * kLanes);
    b[k] = load(b_of + k * kLanes);
    __builtin_memcpy(&kept[k], kept_of + k * kLanes, sizeof kept[k]);
    row_max[k] = strip.load(gradient.row_max, k);
    log_sum[k] = strip.load(gradient.log_sum, k);
    inv_temperature[k] = strip.load(tile.inv_temperature, k);
  }
  // The targets' slopes first: `out` may be `logits`.
  for (int i = 0; i < strip.size(); ++i) {
    const std::int64_t target = tile.target_ids[strip.row + i] - tile.first_column;
    if (target < 0 || target >= tile.v) continue;
    Floats value;
    at_target[i] *= cap.value_and_derivative(broadcast(logits[target * column_stride + strip.row + i]), value)[0];
  }
  for (std::int64_t j = 0; j < tile.v; ++j) {
    const float* column = logits + j * column_stride;
    if (j + kAhead < tile.v) strip.prefetch(column + kAhead * column_stride);
    for (int k = 0; k < kRegisters; ++k) {
      Floats value;
      const Floats slope = cap.value_and_derivative(strip.load(column, k), value);
      const Floats log_p = clamp_exponent((value * inv_temperature[k] - row_max[k]) - log_sum[k]);
      const Floats dz = exp(log_p) * (kHasEntropy ? fma(b[k], log_p, a[k]) : a[k]);
      strip.store(out + j * out_column_stride, k, (Floats)((Bits)(dz * slope) & kept[k]));
    }
  }
  for (int i = 0; i < strip.size(); ++i) {
    const std::int64_t target = tile.target_ids[strip.row + i] - tile.first_column;
    if (target < 0 || target >= tile.v || kept_of[i] == 0) continue;
    out[target * out_column_stride + strip.row + i] += at_target[i];
  }
}

void update(const LogitTile& tile, const float* logits, std::int64_t column_stride, float* state,
            RowRange rows) noexcept {
  for_strips(rows, [&](const auto& strip) noexcept {
    if (tile.softcap == 0) {
      update_strip(tile, logits, column_stride, state, strip, NoCap());
    } else {
      update_strip(tile, logits, column_stride, state, strip, Cap(tile.softcap));
    }
  });
}

void backward(const LogitTile& tile, const float* logits, std::int64_t column_stride, const SoftmaxGradient& gradient,
              float* out, std::int64_t out_column_stride, RowRange rows) noexcept {
  const auto run = [&](const auto& strip, const auto& cap) noexcept {
    if (gradient.grad_entropy == nullptr) {
      backward_strip<false>(tile, logits, column_stride, gradient, out, out_column_stride, strip, cap);
    } else {
      backward_strip<true>(tile, logits, column_stride, gradient, out, out_column_stride, strip, cap);
    }
  };
  for_strips(rows, [&](const auto& strip) noexcept {
    if (tile.softcap == 0) {
      run(strip, NoCap());
    } else {
      run(strip, Cap(tile.softcap));
    }
  });
}

}  // namespace

const RowSoftmaxKernel ARCHER_ROW_SOFTMAX = {&update, &backward};

}  // namespace archer_fast
