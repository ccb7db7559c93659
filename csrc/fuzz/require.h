// What a fuzz target holds the core to.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace archer_fast::fuzzing {

// Ends the process where it does not hold: that is how a fuzzer learns of a finding.
inline void require(bool holds, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: a requirement does not hold\n", file, line);
  std::abort();
}

// Whether the call went through. Of exceptions only those pass that a header promises for bad arguments, and only
// with a message that says what was wanted; any other ends the process.
template <class Call>
bool goes_through(Call&& call, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto refused = [=](const std::exception& error) {
    require(std::string_view(error.what()).find(": wanted ") != std::string_view::npos, file, line);
    return false;
  };
  try {
    std::forward<Call>(call)();
    return true;
  } catch (const std::invalid_argument& error) {
    return refused(error);
  } catch (const std::out_of_range& error) {
    return refused(error);
  }
}

}  // namespace archer_fast::fuzzing
