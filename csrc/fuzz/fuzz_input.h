// What a fuzzer hands over, read as values.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

namespace archer_fast::fuzzing {

// Takes values from the front. Where nothing is left every value is 0, so any bytes mean something.
//
// Owner: of nothing; the bytes are the fuzzer's.
class FuzzInput {
 public:
  explicit FuzzInput(std::span<const std::uint8_t> bytes) noexcept : bytes_(bytes) {}

  bool empty() const noexcept { return bytes_.empty(); }

  std::uint8_t byte() noexcept { return bits<std::uint8_t>(); }

  // 0 to n - 1, of one byte. Precondition: 1 <= n <= 256.
  std::size_t below(std::size_t n) noexcept { return byte() % n; }

  // True once in n.
  bool once_in(std::size_t n) noexcept { return below(n) == n - 1; }

  // Any value at all, for a floating-point number also NaN and infinity.
  template <class T>
  T bits() noexcept {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_same_v<T, bool>);
    std::array<std::uint8_t, sizeof(T)> taken{};
    for (std::uint8_t& byte : taken) {  // no memcpy of what is left: of that GCC 12 makes code that forgets the zeroes
      if (bytes_.empty()) break;
      byte = bytes_.front();
      bytes_ = bytes_.subspan(1);
    }
    return std::bit_cast<T>(taken);
  }

  // A small number, one at which something ends, or any.
  template <class T>
  T edge() noexcept {
    using Limits = std::numeric_limits<T>;
    const std::size_t place = below(16);
    if constexpr (std::is_floating_point_v<T>) {
      constexpr std::array<T, 14> kEdges{T(0),
                                         T(-0.0),
                                         T(1),
                                         T(-1),
                                         T(0.5),
                                         Limits::min(),
                                         Limits::max(),
                                         Limits::lowest(),
                                         T(1e30),
                                         Limits::infinity(),
                                         -Limits::infinity(),
                                         Limits::quiet_NaN(),
                                         Limits::denorm_min(),
                                         Limits::epsilon()};
      return place < kEdges.size() ? kEdges[place] : bits<T>();
    } else {
      constexpr std::array<T, 14> kEdges{
          static_cast<T>(0),   static_cast<T>(1),     static_cast<T>(-1),    static_cast<T>(2), static_cast<T>(3),
          static_cast<T>(255), static_cast<T>(65535), static_cast<T>(65536), Limits::min(),     Limits::max(),
          Limits::max() - 1,   Limits::max() / 2,     Limits::max() / 2 + 1, static_cast<T>(-2)};
      return place < kEdges.size() ? kEdges[place] : bits<T>();
    }
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

}  // namespace archer_fast::fuzzing
