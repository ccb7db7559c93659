// Compiled once for each instruction set: ARCHER_SIMD_LANES says how many floats a register holds and
// ARCHER_ROW_SOFTMAX names the table. Read simd_vector.h before including anything here.
#include "row_softmax_kernel.h"

#include <math.h>

#include "simd_vector.h"

namespace archer_fast {
namespace {

constexpr int kUnroll = 4;
constexpr std::int64_t kBlock = 2048;  // columns: logits and z of a block stay in the first cache
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
};

float largest_lane(Floats x) noexcept {
  float lanes[kLanes];
  store(lanes, x);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

double sum_of_lanes(const Floats (&x)[kUnroll]) noexcept {
  float lanes[kLanes];
  store(lanes, (x[0] + x[1]) + (x[2] + x[3]));
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

// Writes z of `count` columns and -inf up to the next multiple of kUnroll vectors; gives the maximum.
// z goes through memory in its final rounding: the maximum, the target's z and the exponents must agree
// to the bit, or a sure token's log-probability would come out above 0.
template <class CapOrNone>
float write_z(const float* logits, std::int64_t count, float inv_temperature, const CapOrNone& cap, float* z) noexcept {
  Floats most[kUnroll];
  for (Floats& m : most) m = broadcast(-kInfinity);
  std::int64_t j = 0;
  for (; j + kUnroll * kLanes <= count; j += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const Floats value = cap.value(load(logits + j + u * kLanes)) * inv_temperature;
      store(z + j + u * kLanes, value);
      most[u] = larger(value, most[u]);
    }
  }
  for (; j < count; j += kLanes) {
    const std::int64_t rest = count - j < kLanes ? count - j : kLanes;
    float lanes[kLanes] = {};
    __builtin_memcpy(lanes, logits + j, static_cast<std::size_t>(rest) * sizeof(float));
    store(lanes, cap.value(load(lanes)) * inv_temperature);
    for (std::int64_t i = rest; i < kLanes; ++i) lanes[i] = -kInfinity;
    store(z + j, load(lanes));
    most[0] = larger(load(lanes), most[0]);
  }
  for (; j % (kUnroll * kLanes) != 0; j += kLanes) store(z + j, broadcast(-kInfinity));
  return largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

template <class CapOrNone>
void update_row(const UpdateRow& row, const CapOrNone& cap) noexcept {
  alignas(64) float z[kBlock];
  float m = row.state[0];
  // Sums of a block are float32 over many lanes, those over blocks double: the error does not grow with v.
  double s = static_cast<double>(row.state[1]);
  double t = static_cast<double>(row.state[2]);
  for (std::int64_t first = 0; first < row.v; first += kBlock) {
    const std::int64_t count = row.v - first < kBlock ? row.v - first : kBlock;
    const float most = write_z(row.logits + first, count, row.inv_temperature, cap, z);
    if (row.target >= first && row.target < first + count) row.state[3] = z[row.target - first];
    if (most > m) {
      // Without a column above -inf the sums are 0 (or NaN), and -inf - most must not meet them.
      const double d = m == -kInfinity ? 0 : static_cast<double>(m) - static_cast<double>(most);
      const double factor = ::exp(d);
      t = factor * (t + s * d);
      s = factor * s;
      m = most;
    }
    const Floats base = broadcast(m == -kInfinity ? 0 : m);
    Floats sums[kUnroll] = {};
    Floats weighted[kUnroll] = {};
    for (std::int64_t j = 0; j < count; j += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) {
        const Floats d = clamp_exponent(load(z + j + u * kLanes) - base);
        const Floats e = exp(d);
        sums[u] += e;
        weighted[u] = fma(e, d, weighted[u]);
      }
    }
    s += sum_of_lanes(sums);
    t += sum_of_lanes(weighted);
  }
  row.state[0] = m;
  row.state[1] = static_cast<float>(s);
  row.state[2] = static_cast<float>(t);
}

// Calls f(x) on all columns, in place.
template <class Function>
ARCHER_INLINE void transform(float* x, std::int64_t v, const Function& f) noexcept {
  std::int64_t j = 0;
  for (; j + kLanes <= v; j += kLanes) store(x + j, f(load(x + j)));
  if (j < v) {
    const auto bytes = static_cast<std::size_t>(v - j) * sizeof(float);
    float lanes[kLanes] = {};
    __builtin_memcpy(lanes, x + j, bytes);
    store(lanes, f(load(lanes)));
    __builtin_memcpy(x + j, lanes, bytes);
  }
}

template <bool kHasEntropy>
void backward_row(const BackwardRow& row) noexcept {
  // dz = p (a + b log p); the temperature is multiplied in here, once a row.
  const double inv_temperature = static_cast<double>(row.inv_temperature);
  const double b_exact = -static_cast<double>(row.grad_entropy);
  const double a_exact = static_cast<double>(row.grad_lse) - static_cast<double>(row.grad_logprob) +
                         (kHasEntropy ? b_exact * static_cast<double>(row.entropy) : 0);
  const Floats a = broadcast(static_cast<float>(a_exact * inv_temperature));
  const Floats b = broadcast(static_cast<float>(b_exact * inv_temperature));
  const Floats row_max = broadcast(row.row_max);
  const Floats log_sum = broadcast(row.log_sum);
  const Floats scale = broadcast(row.inv_temperature);
  const auto gradient = [&](Floats z) __attribute__((always_inline)) {
    const Floats log_p = clamp_exponent((z - row_max) - log_sum);
    return exp(log_p) * (kHasEntropy ? fma(b, log_p, a) : a);
  };
  const auto at_target = static_cast<float>(static_cast<double>(row.grad_logprob) * inv_temperature);
  if (row.softcap == 0) {
    transform(row.logits, row.v, [&](Floats x) __attribute__((always_inline)) { return gradient(x * scale); });
    row.logits[row.target] += at_target;
  } else {
    const Cap cap(row.softcap);
    Floats capped;
    const Floats slope = cap.value_and_derivative(broadcast(row.logits[row.target]), capped);
    transform(row.logits, row.v, [&](Floats x) __attribute__((always_inline)) {
      Floats value;
      const Floats derivative = cap.value_and_derivative(x, value);
      return gradient(value * scale) * derivative;
    });
    row.logits[row.target] += at_target * slope[0];
  }
}

void update(const UpdateRow& row) noexcept {
  if (row.softcap == 0) {
    update_row(row, NoCap());
  } else {
    update_row(row, Cap(row.softcap));
  }
}

void backward(const BackwardRow& row) noexcept {
  if (row.grad_logprob == 0 && row.grad_entropy == 0 && row.grad_lse == 0) {
    __builtin_memset(row.logits, 0, static_cast<std::size_t>(row.v) * sizeof(float));
  } else if (row.grad_entropy == 0) {
    backward_row<false>(row);
  } else {
    backward_row<true>(row);
  }
}

}  // namespace

const RowSoftmaxKernel ARCHER_ROW_SOFTMAX = {&update, &backward};

}  // namespace archer_fast
